"""Reads LLaVA-format conversations and encodes them as tokens with labels on the answers alone.

A file is a JSON list or one JSON object per line:
``{"id", "image" (optional, below the image root), "conversations": [{"from": "human" | "gpt", "value"}, ...]}``.
"""

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from probing.data.image_modes import Size, read_image
from probing.data.patch_words import PatchWords
from probing.data.target_cache import TargetCache
from probing.models.chat_templates import TAG, render, rendering_at
from probing.utils.errors import BROKEN, UserError
from probing.utils.images import square
from probing.utils.interrupt import ignore_signals
from probing.utils.paths import is_file, path_below

logger = logging.getLogger(__name__)

IGNORED = -100
ROLES = {"human": "user", "gpt": "assistant"}
NOTES = ("skipped", "cut", "unlabelled", "scaled")
"""Keys of a sample that name it or its images in the log of a stage."""


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        id: for messages.
        images: files below the image root, in the order of their tags.
        turns: (role, text), alternately of `user` and `assistant`; the texts contain no image tag.
        tags: number of images in each turn; they precede its text, as in LLaVA.
        number: its position in the file, for messages.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    tags: tuple[int, ...]
    number: int = 0

    def messages(self) -> list[dict[str, Any]]:
        """Returns the turns in the form that chat templates take."""
        return [
            {"role": role, "content": [*[{"type": "image"}] * tags, {"type": "text", "text": text}]}
            for (role, text), tags in zip(self.turns, self.tags, strict=True)
        ]


def _parse(entry: Any, number: int) -> Conversation:
    """Checks one entry; raises one of `BROKEN` if it is not a conversation."""
    listed = entry.get("image") or []
    images = tuple(path_below(name) for name in ([listed] if isinstance(listed, str) else listed))
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in entry["conversations"]]
    if not all(isinstance(text, str) for _, text in turns):
        raise ValueError("a turn's value is not text")
    "".join([*images, *(text for _, text in turns)]).encode()  # half a character (a surrogate) is not text
    if len(turns) < 2 or [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns must be human, gpt, human, gpt …, and end with gpt")
    tags = tuple(text.count(TAG) for _, text in turns)
    if sum(tags) != len(images) or any(tags[1::2]):
        raise ValueError(f"it has {len(images)} images and {sum(tags)} {TAG} tags")
    clean = tuple((role, text.replace(TAG, "").strip()) for role, text in turns)
    return Conversation(str(entry.get("id", "")), images, clean, tags, number)


def read_conversations(path: Path, limit: int | None = None) -> list[Conversation]:
    """Reads a conversation file; skips and counts entries that are not conversations.

    Raises:
        UserError: the file is missing, broken, or has no usable conversation.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # not splitlines: JSON allows a bare U+2028 or U+0085 inside a string
            entries: Any = [line for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"no conversation file at {path}; set data.conversations") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; fix it") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is not a list of conversations; set data.conversations")
    conversations, faults = list[Conversation](), list[str]()
    for number, entry in enumerate(entries[:limit]):
        try:
            conversations.append(_parse(json.loads(entry) if path.suffix == ".jsonl" else entry, number))
        except BROKEN as error:
            faults.append(f"entry {number}: {type(error).__name__}: {str(error)[:200]}")
    if not conversations:
        raise UserError(f"{path} has no usable conversation, first {faults[0]}; set data.conversations")
    if faults:
        logger.warning(
            "%s: %d of %d conversations are skipped, first %s", path.name, len(faults), len(entries), faults[0]
        )
    return conversations


def require_some_image(conversations: list[Conversation], image_root: Path) -> None:
    """Detects a wrong image root before training: raises UserError if none of some evenly spaced images exists."""
    if not image_root.is_dir():
        raise UserError(f"no such image folder: {image_root}; set data.image_root")
    names = [name for conversation in conversations for name in conversation.images]
    some = names[:: max(1, len(names) // 64)][:64]
    if some and not any(is_file(image_root / name) for name in some):
        raise UserError(f"{image_root} has none of {len(some)} images, first {some[0]}; set data.image_root")


SAMPLE = Conversation("", ("",), (("user", "?"), ("assistant", "x")) * 2, (1, 0, 0, 0))
"""Two rounds about one image, to test processors and chat templates."""


class CutInsideImageError(ValueError):
    """The length limit of a conversation falls between two tokens of one image."""


@dataclass(frozen=True)
class Encoder:
    """Encodes conversations as model inputs with labels.

    Attributes:
        processor: the checkpoint's processor, with a chat template.
        image_token_id: id of the placeholder of one image token.
        max_length: longer samples are cut at the end.
        moment: date and time that chat templates see, in any process.
    """

    processor: Any
    image_token_id: int
    max_length: int
    moment: datetime.datetime | None = None

    def require_usable(self) -> None:
        """Encodes two rounds about a blank image; raises as encoding a sample does."""
        replace(self, max_length=sys.maxsize)(SAMPLE, [Image.new("RGB", (8, 8))])

    def sample_text(self) -> str:
        """Returns two rounds about an image as the chat template renders them."""
        with rendering_at(self.moment):
            return render(self.processor, self._closed(SAMPLE.messages()))

    def _closed(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Ends every answer with EOS if the template adds no special token: a model must learn to stop."""
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

        Supervised are exactly the tokens that the template adds to its generation prompt for an answer: the answer and
        the marker that ends it.

        Returns:
            input_ids, attention_mask and labels (T); pixel_values (images, 3, S, S) if there are images; `cut` if the
            end was cut off.

        Raises:
            UserError: the chat template is unusable, or changes earlier turns, so that answers cannot be located.
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
                name = self.processor.tokenizer.name_or_path or "the checkpoint"
                raise UserError(
                    f"the chat template of {name} changes earlier turns; give it a plain chat_template.jinja"
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
            raise UserError("the checkpoint's processor and tokenizer disagree; use its published files")
        labels = torch.full_like(ids, IGNORED)
        for start, stop in ((expanded(a), expanded(b)) for a, b in spans):
            within = [k for k, (first, last) in enumerate(tokens["offset_mapping"]) if start <= first < last <= stop]
            if within:  # up to the last: some tokenizers give a token of blanks no width
                labels[within[0] : within[-1] + 1] = ids[within[0] : within[-1] + 1]
        sample = {"input_ids": ids, "attention_mask": inputs["attention_mask"][0], "labels": labels}
        sample = {name: tensor[: self.max_length] for name, tensor in sample.items()}
        whole_images, rest = divmod(int((sample["input_ids"] == self.image_token_id).sum()), max(times, 1))
        if rest:
            raise CutInsideImageError(
                f"cut inside an image at {self.max_length} of {len(ids)} tokens; raise max_length"
            )
        if whole_images:
            sample["pixel_values"] = inputs["pixel_values"][:whole_images]
        return sample | ({"cut": True} if len(ids) > self.max_length else {})


def collate(samples: list[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Pads samples on the right and joins their images.

    Notes about samples are in lists under the names of `NOTES`. If every sample is skipped, the batch is two
    unsupervised tokens, which change no weight.
    """
    notes = {kind: [sample[kind] for sample in samples if kind in sample] for kind in NOTES}
    good = [sample for sample in samples if "skipped" not in sample]
    if not good:
        ids = torch.full((2,), pad_id)
        good = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORED)}]
    padding = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    batch: dict[str, Any] = {
        key: pad_sequence([sample[key] for sample in good], batch_first=True, padding_value=value)
        for key, value in padding.items()
    }
    for key in ("pixel_values", "patch_labels"):
        if tensors := [sample[key] for sample in good if key in sample]:
            batch[key] = torch.cat(tensors)
    for key in ("teacher_pixels", "teacher_features"):
        if rows := [row for row, sample in enumerate(good) if key in sample]:
            batch["target_rows"] = torch.tensor(rows)
            batch[key] = {name: torch.stack([good[row][key][name] for row in rows]) for name in good[rows[0]][key]}
    batch["names"] = [sample["name"] for sample in good if "name" in sample]
    return batch | {kind: names for kind, names in notes.items() if names}


@dataclass(frozen=True)
class CachedTargets:
    """Teacher targets on disk by image name; `rows` are positions in the caches."""

    rows: dict[str, int]
    caches: Mapping[str, TargetCache]

    def read(self, image: str) -> dict[str, Tensor]:
        """Reads the targets (N, D) of one image by teacher; raises OSError if they are not cached."""
        if image not in self.rows:
            raise OSError("was missing when targets were cached")
        return {name: cache.read(self.rows[image]) for name, cache in self.caches.items()}


@dataclass(frozen=True)
class ConversationDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded conversations.

    A sample with exactly one image also has `teacher_pixels`, that image as each teacher takes it, or cached
    `teacher_features`; with several images it would be ambiguous. `patch_labels` (images, patches) accompany
    `pixel_values`. Notes: `skipped`, name and reason, is the only key of a sample whose image is unreadable or does not
    fit; `cut` names a sample whose end was cut off; `unlabelled` images with unusable annotations, `scaled` those whose
    label map is scaled to their size.

    Attributes:
        conversations: the samples.
        image_root: folder that image names are relative to.
        encoder: makes model inputs.
        squared: squash every image to a square first, so that student and teachers see the same.
        teachers: each teacher's `prepare`.
        single: skip samples with several images, for models that see teacher features of one.
        patches: labels the patches of every image.
        cached_targets: read in place of preparing pixels for teachers.
    """

    conversations: list[Conversation]
    image_root: Path
    encoder: Encoder
    squared: bool = False
    teachers: dict[str, Callable[[Sequence[Any]], Tensor]] = field(default_factory=dict)
    single: bool = False
    patches: PatchWords | None = None
    cached_targets: CachedTargets | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if torch.utils.data.get_worker_info() is not None:
            ignore_signals()
        conversation = self.conversations[index]
        label = f"conversation {conversation.number}" + (f" (id {conversation.id})" if conversation.id else "")
        if self.single and len(conversation.images) > 1:
            return {"skipped": f"{label}: {len(conversation.images)} images, and a multi-encoder model takes one"}
        images = []
        for name in conversation.images:
            try:
                images.append(self._read(name))
            except FileNotFoundError:
                return {"skipped": f"{name}: missing"}
            except OSError as error:
                # without the image root, so that the note is the same on other machines
                reason = str(error).replace(f"{self.image_root}/", "")
                return {"skipped": f"{name}: {reason.splitlines()[0][:120] if reason else 'corrupt'}"}
        shown = [square(image) if self.squared else image for image in images]
        try:
            sample = self.encoder(conversation, shown)
        except CutInsideImageError as error:
            return {"skipped": f"{label}: {error}"}
        if self.teachers and len(images) == 1 and "pixel_values" in sample:
            if self.cached_targets is None:
                sample["teacher_pixels"] = {name: prepare(shown)[0] for name, prepare in self.teachers.items()}
            else:
                try:
                    sample["teacher_features"] = self.cached_targets.read(conversation.images[0])
                except OSError as error:
                    return {"skipped": f"{conversation.images[0]}: {error}"}
        if self.patches is not None and "pixel_values" in sample:
            sizes = [image.size for image in images[: len(sample["pixel_values"])]]
            sample |= _patch_labels(self.patches, list(zip(conversation.images, sizes, strict=False)))
        return sample | {"name": label} | ({"cut": label} if "cut" in sample else {})

    def _read(self, name: str) -> Image.Image:
        turned = self.patches.annotations.turned if self.patches is not None else frozenset()
        return read_image(self.image_root / name, name in turned)


def _patch_labels(patches: PatchWords, images: list[tuple[str, Size]]) -> dict[str, Any]:
    """Labels the patches of a sample's images, each a name and a size; notes what is unusual."""
    labels, unlabelled, scaled = [], [], []
    for name, size in images:
        try:
            labels.append(patches(name, size))
            if patches.annotations.size(name) not in (None, size):
                scaled.append(name)
        except OSError as error:
            labels.append(torch.full((patches.grid[0] * patches.grid[1],), -1))
            unlabelled.append(f"{name}: {error}")
    notes = {"unlabelled": "; ".join(unlabelled), "scaled": "; ".join(scaled)}
    return {"patch_labels": torch.stack(labels)} | {kind: note for kind, note in notes.items() if note}
