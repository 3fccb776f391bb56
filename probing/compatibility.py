"""Same run? What the numbers of a run depend on, and the first thing in which two descriptions of it differ.

Every verb that resumes a run, or adds to it, describes its inputs now and compares them with those that were recorded.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from probing.chat import rendering_moment
from probing.data.coco import square
from probing.errors import UserError
from probing.run import LOST, read_json
from probing.weights_hash import configuration, settings, weights_hash

if TYPE_CHECKING:
    from probing.backbones import Identity
    from probing.teachers.base import Teacher

Inputs = Mapping[str, Any]
"""What numbers depend on, each under the user's word for it."""
SIZES = ((640, 480), (96, 128))
"""Width and height of the images by which image processors are compared."""
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What of a processor's output does not come from its image processor."""
SAMPLE = 'Héllo WORLD: 3.14 = \tπ?\n  two blanks, "quotes" & <tags> don\'t\u00a0end…'
"""Text by which tokenizers are compared where texts are not known in advance."""


def describe_inputs(
    checkpoint: "Identity",
    teachers: Mapping[str, "Teacher"],
    view: str,
    data: Mapping[str, Any],
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Describes what the numbers of a run depend on.

    Args:
        checkpoint: with its input side.
        teachers: by name.
        view: `square` or `own`, see `DataRecipe.view`.
        data: hashes of the data, by name.
        texts: rendered prompts; by default the one of the checkpoint.

    Returns:
        Values for `require_same`, plain enough for JSON.
    """
    found = _model("checkpoint", checkpoint.path, checkpoint.sha256)
    found |= _prompt(checkpoint.prepare, view, list(texts) or [checkpoint.prompt])
    for name, teacher in teachers.items():
        found |= _model(f"{name} teacher", teacher.source, teacher.sha256, list(teacher.shape))
        found[f"{name} teacher's processor"] = describe_processor(teacher.prepare, view)
    return {**found, **data}


def describe_processor(prepare: Any, view: str) -> dict[str, Any]:
    """Describes a teacher's preprocessing by its settings and by what it makes of some images."""
    pixels = [prepare([image]) for image in _images(view)]
    return {"settings": processor_settings(prepare), "pixels": _hash(pixels)}


def to_record(inputs: Inputs) -> dict[str, Any]:
    """What a run writes down about its inputs: themselves, and the moment that its chat template was rendered at."""
    moment = rendering_moment()
    return {"rendered_at": moment.isoformat() if moment else None, "inputs": dict(inputs)}


def inputs_file(run: Path) -> Path:
    """Where an unfinished run records its inputs; a finished one has them in its manifest."""
    return run / "state" / "inputs.json"


def recorded_inputs(run: Path, begun: bool) -> dict[str, Any] | None:
    """What a run recorded about its inputs; None for one that has not begun, nothing where an older version began it.

    Args:
        run: its folder.
        begun: whether the folder holds results, finished or not.
    """
    for file in (run / "manifest.json", inputs_file(run)):
        if file.exists():
            return read_json(file, LOST)
    return {} if begun else None


def recorded_moment(recorded: Mapping[str, Any] | None) -> datetime.datetime:
    """The moment that a run's chat template was rendered at; now, for a new run or one without a record."""
    written = (recorded or {}).get("rendered_at")
    try:
        return datetime.datetime.fromisoformat(written) if isinstance(written, str) else _now()
    except ValueError:
        return _now()


def require_same(recorded: Mapping[str, Any], now: Inputs, run: Path, advice: str) -> None:
    """Refuses to add to a run whose inputs changed.

    Args:
        recorded: what `to_record` made, or a manifest that holds it.
        now: from `describe_inputs`.
        run: its folder, for the message.
        advice: what to do.

    Raises:
        UserError: naming the first input that changed.
    """
    then = recorded.get("inputs")
    if not isinstance(then, dict) or (unknown := next((name for name in now if name not in then), None)):
        what = "its inputs" if not isinstance(then, dict) else f"the {unknown}"
        raise UserError(f"{run} does not record {what}: it is of an older version; start a new run")
    if changed := first_difference(then, now):
        raise UserError(f"the {changed} changed since {run} began; {advice}")


def first_difference(then: Inputs, now: Inputs) -> str:
    """Names the first input of `now` that is another one in `then`, with its field where it has some; empty if none."""
    for name, value in now.items():
        before = then.get(name)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            if "pixels" in value:
                if before.get("settings") == value["settings"] or before.get("pixels") == value["pixels"]:
                    continue  # another library computes other last bits, or names its defaults differently
                before, value = before.get("settings") or {}, value["settings"]
            fields = {key: (before.get(key, "absent"), value.get(key, "absent")) for key in {**before, **value}}
            key, pair = next((key, pair) for key, pair in fields.items() if pair[0] != pair[1])
            return f"{name} ({_both(key, *pair)})"
        if name.endswith("shape"):
            return f"{name} ({_both('', before, value)})"
        return name
    return ""


def processor_settings(prepare: Any) -> dict[str, str]:
    """Settings of the image processor in a checkpoint's or teacher's input side."""
    prepare = getattr(prepare, "inputs", prepare)
    processor = getattr(prepare, "processor", None)
    processor = getattr(processor, "image_processor", processor)
    own = {name: getattr(prepare, name) for name in ("border", "side") if getattr(prepare, name, None) is not None}
    values = processor.to_dict() if processor is not None else {"processor": repr(prepare)}
    return settings({name: value for name, value in values.items() if value is not None} | own)


def _model(what: str, source: str, sha256: str, shape: list[int] | None = None) -> dict[str, Any]:
    folder = Path(source)
    local = bool(source) and folder.is_dir() and sha256.startswith("sha256:")
    return {
        **({f"{what}'s target shape": shape} if shape else {}),
        f"{what}'s weights": weights_hash(folder) if local else sha256,
        f"{what}'s configuration": configuration(folder) if local else {},
        what: sha256,  # what else is loaded: a vision tower of its own, code
    }


def _prompt(prepare: Any, view: str, texts: Sequence[str]) -> dict[str, Any]:
    """Chat template, image processor and tokenizer, by what they make of the prompts and of some images."""
    prepare = getattr(prepare, "inputs", prepare)
    tokenizer = prepare.processor.tokenizer
    encoded = [prepare.encode([image], [texts[0]]) for image in _images(view)]
    pixels = [values for one in encoded for name, values in sorted(one.items()) if name not in TEXT_INPUTS]
    return {
        "chat template": "\n".join(texts),
        "image processor": {"settings": processor_settings(prepare), "pixels": _hash(pixels)},
        "tokenizer": _hash([torch.tensor(tokenizer(text).input_ids) for text in texts]),
        "processor's image tokens": _hash([one["input_ids"] for one in encoded]),
    }


def vocabulary(checkpoint: "Identity") -> dict[str, Any]:
    """The tokenizer for texts that are not known in advance: questions, captions, answers."""
    tokenizer = checkpoint.prepare.processor.tokenizer
    words = repr(sorted(tokenizer.get_vocab().items())) + repr(tokenizer(SAMPLE).input_ids)
    return {"tokenizer's vocabulary": hashlib.sha256(words.encode()).hexdigest()}


def _images(view: str) -> list[Image.Image]:
    """Images with fine and coarse detail, the same on every machine."""
    images = [_pattern(width, height) for width, height in SIZES]
    return [square(image) for image in images] if view == "square" else images


def _pattern(width: int, height: int) -> Image.Image:
    x, y = torch.arange(width)[None, :, None], torch.arange(height)[:, None, None]
    c = torch.arange(3)
    values = (x * (3 + c) + y * (5 - c) + 64 * ((x // 9 + y // 7) % 2) + 96 * c) % 256
    return Image.fromarray(values.to(torch.uint8).numpy())


def _hash(tensors: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = torch.as_tensor(tensor)
        digest.update(f"{tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _both(key: str, before: Any, now: Any) -> str:
    shown = f"{key}: " if key else ""
    return f"{shown}{before} then, {now} now"


def _now() -> datetime.datetime:
    return datetime.datetime.now().replace(microsecond=0)
