"""Same run? What the numbers of a run depend on, and the first thing in which two descriptions of it differ.

Every verb that resumes a run, or adds to it, describes its inputs now and compares them with those that were recorded.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probing.models.chat_templates import rendering_moment
from probing.utils.errors import UserError
from probing.utils.files import LOST, read_json
from probing.utils.processors import Inputs, _hash, _images, describe_processor, first_difference, processor_settings
from probing.utils.weights_hash import configuration, weights_hash

if TYPE_CHECKING:
    from probing.models import Identity
    from probing.teachers.base import Teacher
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


def _now() -> datetime.datetime:
    return datetime.datetime.now().replace(microsecond=0)
