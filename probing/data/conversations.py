"""LLaVA-format conversations: reading, checking, and tokens with labels on the answers alone.

A file is a JSON list or one JSON object per line:
``{"id", "image" (optional, below the image root), "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.
"""

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from probing.data.annotation_file import relative_name
from probing.data.coco import is_file, read_image
from probing.data.dataloader import Kept
from probing.data.patch_words import PatchWords
from probing.models.chat_templates import TAG, render, rendering_at
from probing.utils.errors import BROKEN, UserError
from probing.utils.images import square
from probing.utils.interrupt import ignore_signals

logger = logging.getLogger(__name__)

IGNORED = -100
ROLES = {"human": "user", "gpt": "assistant"}
NOTES = ("skipped", "cut", "unlabelled", "scaled")
"""What a batch tells about its samples, by name."""


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        id: for messages.
        images: files below the image root, in the order of their tags.
        turns: (role, text) with roles `user` and `assistant` in turn; the texts carry no image tag.
        tags: number of images in each turn; they come first in it, as in LLaVA.
        number: its position in the file, for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    tags: tuple[int, ...]
    number: int = 0

    def messages(self) -> list[dict[str, Any]]:
        """The turns as a chat template takes them."""
        return [
            {"role": role, "content": [*[{"type": "image"}] * tags, {"type": "text", "text": text}]}
            for (role, text), tags in zip(self.turns, self.tags, strict=True)
        ]


def _parse(entry: Any, number: int) -> Conversation:
    """Checks one entry; raises ValueError where it is no conversation."""
    if isinstance(entry, ValueError):
        raise entry
    try:
        listed = entry.get("image") or []
        images = tuple(relative_name(name) for name in ([listed] if isinstance(listed, str) else listed))
        turns = [(ROLES[turn["from"]], turn["value"]) for turn in entry["conversations"]]
    except ValueError:
        raise
    except BROKEN as error:
        raise ValueError(f"it is no LLaVA conversation ({type(error).__name__}: {error})") from None
    if not all(isinstance(text, str) for _, text in turns):
        raise ValueError("it has a turn whose value is not text")
    try:
        "".join([*images, *(text for _, text in turns)]).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a surrogate), which is not text") from None
    roles = [role for role, _ in turns]
    if len(turns) < 2 or roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns must go human, gpt, human, gpt …, and end with gpt")
    tags = tuple(text.count(TAG) for _, text in turns)
    if sum(tags) != len(images) or any(tags[1::2]):
        raise ValueError(f"it has {len(images)} images and {sum(tags)} {TAG} tags in its turns")
    clean = tuple((role, text.replace(TAG, "").strip()) for role, text in turns)
    return Conversation(str(entry.get("id", "")), images, clean, tags, number)


def _load_line(line: str, number: int) -> Any:
    """Reads one line of a JSONL; returns what is wrong with it where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"line {number} is not valid JSON: {getattr(error, 'msg', error)}")


def read_conversations(path: Path, limit: int | None = None) -> list[Conversation]:
    """Reads a conversation file; entries that are no conversations are left out, and counted.

    Raises:
        UserError: the file is missing or broken, or holds no conversation.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # not splitlines: JSON allows a bare U+2028 or U+0085 inside a string
            entries = [_load_line(line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        else:
            entries = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"no conversation file at {path}; set data.conversations") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no list of conversations")
    found: list[Conversation] = []
    odd: list[str] = []
    for index, entry in enumerate(entries[:limit]):
        try:
            found.append(_parse(entry, index))
        except ValueError as error:
            odd.append(f"entry {index}: {str(error)[:200]}")
    if not found:
        raise UserError(f"{path} holds no conversation that can be used, first {odd[0]}")
    if odd:
        logger.warning("%s: %d of %d conversations are left out, first %s", path.name, len(odd), len(entries), odd[0])
    return found


def require_some_image(conversations: list[Conversation], image_root: Path, looked_for: int = 64) -> None:
    """Notices a wrong image root before training rather than as one skipped image after another.

    Args:
        conversations: evenly spaced ones are looked at.
        image_root: folder that image names are relative to.
        looked_for: number of images to look for at most.

    Raises:
        UserError: the folder is missing, or has none of the images looked for.
    """
    if not image_root.is_dir():
        raise UserError(f"no such image folder: {image_root}; set data.image_root")
    names = [name for conversation in conversations for name in conversation.images]
    some = names[:: max(1, len(names) // looked_for)][:looked_for]
    if some and not any(is_file(image_root / name) for name in some):
        raise UserError(
            f"none of {len(some)} images looked for is in {image_root}, first {some[0]}; set data.image_root"
        )


SAMPLE = Conversation("", ("",), (("user", "?"), ("assistant", "x")) * 2, (1, 0, 0, 0))
"""Two rounds about one image, by which processors and chat templates are tried."""


class CutInsideImageError(ValueError):
    """A conversation that is too long ends between two tokens of one image."""


@dataclass(frozen=True)
class Encoder:
    """Turns a conversation into model inputs with labels.

    Attributes:
        processor: the checkpoint's processor, with a chat template.
        image_token_id: id of the placeholder of one image token.
        max_length: longer samples are cut at the end; what is cut is neither read nor supervised.
        moment: that the chat template is rendered at, in whatever process.
    """

    processor: Any
    image_token_id: int
    max_length: int
    moment: datetime.datetime | None = None

    def require_usable(self) -> None:
        """Tries processor and chat template on two rounds about a blank image; raises as encoding a sample does."""
        replace(self, max_length=sys.maxsize)(SAMPLE, [Image.new("RGB", (8, 8))])

    def sample_text(self) -> str:
        """Two rounds about an image, as the chat template writes them."""
        with rendering_at(self.moment):
            return render(self.processor, self._closed(SAMPLE.messages()))

    def _closed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Ends every answer with the EOS token where the template puts nothing after it: a model must learn to stop."""
        tokenizer = self.processor.tokenizer
        special = [token for token in tokenizer.all_special_tokens if token != TAG]
        before = render(self.processor, messages[:1], generation_prompt=True)
        answer = render(self.processor, messages[:2])[len(before) :]
        if any(token in answer for token in special):
            return messages
        closed = json.loads(json.dumps(messages))
        for message in closed[1::2]:
            message["content"][-1]["text"] += tokenizer.eos_token
        return closed

    def __call__(self, conversation: Conversation, images: list[Image.Image]) -> dict[str, Any]:
        """Encodes one sample.

        Supervised are exactly the tokens that lie within what the template adds for an answer, after its own
        generation prompt: the answer and the marker that ends it.

        Returns:
            input_ids, attention_mask and labels (T), and pixel_values (images, 3, S, S) where there are images;
            `cut` where the end was cut off.

        Raises:
            UserError: the chat template cannot be used, or does not extend its own generation prompt, so that answers
                cannot be located.
            CutInsideImageError: an image does not fit in `max_length`.
        """
        with rendering_at(self.moment):
            return self._encode(conversation, images)

    def _encode(self, conversation: Conversation, images: list[Image.Image]) -> dict[str, Any]:
        messages = self._closed(conversation.messages())
        full = render(self.processor, messages)
        spans = []
        for index in range(1, len(messages), 2):
            prefix = render(self.processor, messages[:index], generation_prompt=True)
            whole = render(self.processor, messages[: index + 1])
            if not (whole.startswith(prefix) and full.startswith(whole)):
                raise UserError(
                    f"the chat template of {self.processor.tokenizer.name_or_path or 'the checkpoint'} changes earlier "
                    "turns when later ones are added, so answers cannot be told apart; give the checkpoint a plain "
                    "template (chat_template.jinja)"
                )
            spans.append((len(prefix), len(whole)))
        inputs = self.processor(images=images or None, text=[full], return_tensors="pt")
        ids = inputs["input_ids"][0]
        tag = getattr(self.processor, "image_token", TAG)
        times = int((ids == self.image_token_id).sum()) // max(len(images), 1)

        def expanded(position: int) -> int:
            return position + full[:position].count(tag) * (times - 1) * len(tag)

        tokens = self.processor.tokenizer(full.replace(tag, tag * times), return_offsets_mapping=True)
        if tokens["input_ids"] != ids.tolist():
            raise UserError("the checkpoint's processor and tokenizer disagree about a text; answers cannot be located")
        labels = torch.full_like(ids, IGNORED)
        for start, stop in ((expanded(a), expanded(b)) for a, b in spans):
            within = [k for k, (first, last) in enumerate(tokens["offset_mapping"]) if start <= first < last <= stop]
            if within:  # the whole run: some tokenizers give a token of blanks no width
                labels[within[0] : within[-1] + 1] = ids[within[0] : within[-1] + 1]
        sample = {"input_ids": ids, "attention_mask": inputs["attention_mask"][0], "labels": labels}
        length, sample = len(ids), {name: tensor[: self.max_length] for name, tensor in sample.items()}
        kept, rest = divmod(int((sample["input_ids"] == self.image_token_id).sum()), max(times, 1))
        if rest:
            raise CutInsideImageError(f"cut inside an image at {self.max_length} of {length} tokens; raise max_length")
        pixels = {"pixel_values": inputs["pixel_values"][:kept]} if kept else {}
        return sample | pixels | ({"cut": True} if length > self.max_length else {})


def collate(samples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Pads samples on the right and joins their images.

    What is to be noted of samples is under the names of `NOTES`. Where none is left, the batch is two
    unsupervised tokens, which cost nothing and move nothing.
    """
    notes = {kind: [sample[kind] for sample in samples if kind in sample] for kind in NOTES}
    good = [sample for sample in samples if "skipped" not in sample]
    if not good:
        ids = torch.full((2,), pad_id)
        good = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}]
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    batch: dict[str, Any] = {
        name: torch.nn.utils.rnn.pad_sequence([s[name] for s in good], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    pixels = [sample["pixel_values"] for sample in good if "pixel_values" in sample]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    labelled = [sample["patch_labels"] for sample in good if "patch_labels" in sample]
    if labelled:
        batch["patch_labels"] = torch.cat(labelled)
    for kind in ("teacher_pixels", "teacher_features"):
        with_target = [row for row, sample in enumerate(good) if kind in sample]
        if with_target:
            batch["target_rows"] = torch.tensor(with_target)
            chosen: list[dict[str, Any]] = [good[row][kind] for row in with_target]
            batch[kind] = {name: torch.stack([one[name] for one in chosen]) for name in chosen[0]}
    batch["names"] = [sample["name"] for sample in good if "name" in sample]
    return batch | {kind: names for kind, names in notes.items() if names}


def _patch_labels(patches: PatchWords, images: list[tuple[str, tuple[int, int]]]) -> dict[str, Any]:
    """What a sample says of the patches of its images, each a name and a size; see `ConversationDataset`."""
    labels, reasons, scaled = [], [], []
    for name, size in images:
        try:
            labels.append(patches(name, size))
            if patches.annotations.size(name) not in (None, size):
                scaled.append(name)
        except OSError as error:
            labels.append(torch.full((patches.grid[0] * patches.grid[1],), -1))
            reasons.append(f"{name}: {error}")
    notes = {"unlabelled": "; ".join(reasons), "scaled": "; ".join(scaled)}
    return {"patch_labels": torch.stack(labels)} | {kind: note for kind, note in notes.items() if note}


@dataclass(frozen=True)
class KeptFeatures:
    """Features of every teacher that are kept on disk.

    Attributes:
        rows: place of every image in the caches.
        caches: by name of the teacher.
    """

    rows: dict[str, int]
    caches: Mapping[str, Kept]

    def of(self, image: str) -> dict[str, Tensor] | None:
        """Features (N, D) of one image by teacher; None where it could not be read when they were made."""
        if image not in self.rows:
            return None
        found = {name: cache.read(self.rows[image]) for name, cache in self.caches.items()}
        whole = {name: features for name, features in found.items() if features is not None}
        return whole if len(whole) == len(found) else None


class ConversationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded conversations.

    A sample whose image cannot be read, or does not fit, is `{"skipped": name and reason}`; one whose end was cut off
    has its own name under `cut`. A sample with exactly one image has it under `teacher_pixels` too, as each teacher
    wants it, or what teachers make of it under `teacher_features`, where that is kept; with several it would not be
    clear which of them is meant. Where patches are labelled, `patch_labels` (images, patches) go with `pixel_values`;
    an image whose annotations cannot be used is named under `unlabelled`, one whose label map is scaled to its size
    under `scaled`.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        image_root: Path,
        encoder: Encoder,
        squared: bool = False,
        teachers: dict[str, Callable[[Sequence[Any]], Tensor]] | None = None,
        single: bool = False,
        patches: PatchWords | None = None,
        kept: KeptFeatures | None = None,
    ) -> None:
        """Puts a data set together.

        Args:
            conversations: the samples.
            image_root: folder that image names are relative to.
            encoder: makes model inputs of them.
            squared: squash every image to a square first, so that student and teachers see the same.
            teachers: each teacher's `prepare`.
            single: leave out samples with several images, for models that see the teachers' features of one.
            patches: labels the patches of every image.
            kept: teachers' features that are read instead of being computed from pixels.
        """
        self.conversations, self.image_root, self.encoder = conversations, image_root, encoder
        self.squared, self.teachers, self.single, self.patches = squared, teachers or {}, single, patches
        self.kept = kept

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            ignore_signals()
        conversation = self.conversations[index]
        called = f"conversation {conversation.number}" + (f" (id {conversation.id})" if conversation.id else "")
        if self.single and len(conversation.images) > 1:
            return {"skipped": f"{called}: {len(conversation.images)} images, and a multi-encoder model takes one"}
        turned = self.patches.annotations.turned if self.patches is not None else frozenset()
        images, sizes = [], []
        for name in conversation.images:
            try:
                image = read_image(self.image_root / name, name in turned)
                sizes.append(image.size)
                images.append(square(image) if self.squared else image)
            except FileNotFoundError:
                return {"skipped": f"{name}: missing"}
            except OSError as error:
                # without the image root, so that the note means the same elsewhere
                reason = str(error).replace(f"{self.image_root}/", "")
                return {"skipped": f"{name}: {reason.splitlines()[0][:120] if reason else 'corrupt'}"}
        try:
            sample = self.encoder(conversation, images)
        except CutInsideImageError as error:
            return {"skipped": f"{called}: {error}"}
        if self.teachers and len(images) == 1 and "pixel_values" in sample:
            if self.kept is not None:
                features = self.kept.of(conversation.images[0])
                if features is None:
                    return {"skipped": f"{conversation.images[0]}: could not be read when teachers' features were kept"}
                sample = sample | {"teacher_features": features}
            else:
                seen = {name: prepare(images)[0] for name, prepare in self.teachers.items()}
                sample = sample | {"teacher_pixels": seen}
        if self.patches is not None and "pixel_values" in sample:
            shown = list(zip(conversation.images, sizes, strict=True))[: len(sample["pixel_values"])]
            sample = sample | _patch_labels(self.patches, shown)
        return sample | {"name": called} | ({"cut": called} if "cut" in sample else {})
