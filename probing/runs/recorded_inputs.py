"""Compares the inputs of a run with the recorded ones, for every verb that resumes or extends a run."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from probing.models.chat_templates import rendering_moment
from probing.utils.errors import UserError
from probing.utils.files import RESTORE_ADVICE, read_json
from probing.utils.processors import (
    Inputs,
    changed_input,
    describe_processor,
    processor_settings,
    sample_images,
    tensors_hash,
)
from probing.utils.weights_hash import configuration, weights_hash

if TYPE_CHECKING:
    from probing.models import Identity
    from probing.teachers.base import Teacher
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Outputs of a processor that do not come from its image processor."""
SAMPLE = 'Héllo WORLD: 3.14 = \tπ?\n  two blanks, "quotes" & <tags> don\'t\u00a0end…'
"""Text on which tokenizers are compared if the texts are not known in advance."""


def describe_inputs(
    checkpoint: "Identity",
    teachers: Mapping[str, "Teacher"],
    view: str,
    data: Mapping[str, Any],
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Describes the inputs that affect the numbers of a run.

    Args:
        checkpoint: with its processor.
        teachers: by name.
        view: `square` or `own`, see `DataRecipe.view`.
        data: hashes of the data, by name.
        texts: rendered prompts; by default the checkpoint's.

    Returns:
        Values for `require_same`, serialisable as JSON.
    """
    inputs = _model("checkpoint", checkpoint.path, checkpoint.sha256)
    inputs |= _prompt(checkpoint.prepare, view, list(texts) or [checkpoint.prompt])
    for name, teacher in teachers.items():
        inputs |= _model(f"{name} teacher", teacher.source, teacher.sha256, list(teacher.shape))
        inputs[f"{name} teacher's processor"] = describe_processor(teacher.prepare, view)
    return {**inputs, **data}


def to_record(inputs: Inputs) -> dict[str, Any]:
    """Returns the record of a run's inputs: with the time at which its chat template was rendered."""
    moment = rendering_moment()
    return {"rendered_at": moment.isoformat() if moment else None, "inputs": dict(inputs)}


def inputs_file(run: Path) -> Path:
    """Returns the file in which an unfinished run records its inputs; a finished run has them in its manifest."""
    return run / "state" / "inputs.json"


def recorded_inputs(run: Path, begun: bool) -> dict[str, Any] | None:
    """Reads the recorded inputs of a run: None for a new run, empty for a run of an older version.

    Args:
        run: its folder.
        begun: whether the folder holds partial or complete results.
    """
    for file in (run / "manifest.json", inputs_file(run)):
        if file.exists():
            return read_json(file, RESTORE_ADVICE)
    return {} if begun else None


def recorded_moment(recorded: Mapping[str, Any] | None) -> datetime.datetime:
    """Returns the time at which a run's chat template was rendered; now, for a run without record."""
    written = (recorded or {}).get("rendered_at")
    try:
        return datetime.datetime.fromisoformat(written) if isinstance(written, str) else _now()
    except ValueError:
        return _now()


def require_same(recorded: Mapping[str, Any], now: Inputs, run: Path, advice: str) -> None:
    """Raises UserError if inputs of a run changed.

    Args:
        recorded: from `to_record`, or a manifest.
        now: from `describe_inputs`.
        run: its folder.
        advice: what to do.

    Raises:
        UserError: with the first input that changed.
    """
    then = recorded.get("inputs")
    if not isinstance(then, dict) or (unknown := next((name for name in now if name not in then), None)):
        missing = "its inputs" if not isinstance(then, dict) else f"the {unknown}"
        raise UserError(f"{run} does not record {missing}: it is of an older version; start a new run")
    if changed := changed_input(then, now):
        raise UserError(f"the {changed} changed since {run} began; {advice}")


def _model(name: str, source: str, sha256: str, shape: list[int] | None = None) -> dict[str, Any]:
    folder = Path(source)
    local = bool(source) and folder.is_dir() and sha256.startswith("sha256:")
    return {
        **({f"{name}'s target shape": shape} if shape else {}),
        f"{name}'s weights": weights_hash(folder) if local else sha256,
        f"{name}'s configuration": configuration(folder) if local else {},
        name: sha256,  # includes separate vision towers and code
    }


def _prompt(prepare: Any, view: str, texts: Sequence[str]) -> dict[str, Any]:
    """Describes chat template, image processor and tokenizer by their output for prompts and sample images."""
    prepare = getattr(prepare, "inputs", prepare)
    tokenizer = prepare.processor.tokenizer
    encoded = [prepare.encode([image], [texts[0]]) for image in sample_images(view)]
    pixels = [values for one in encoded for name, values in sorted(one.items()) if name not in TEXT_INPUTS]
    return {
        "chat template": "\n".join(texts),
        "image processor": {"settings": processor_settings(prepare), "pixels": tensors_hash(pixels)},
        "tokenizer": tensors_hash([torch.tensor(tokenizer(text).input_ids) for text in texts]),
        "processor's image tokens": tensors_hash([one["input_ids"] for one in encoded]),
    }


def vocabulary(checkpoint: "Identity") -> dict[str, Any]:
    """Describes the tokenizer for texts that are not known in advance: questions, captions, answers."""
    tokenizer = checkpoint.prepare.processor.tokenizer
    words = repr(sorted(tokenizer.get_vocab().items())) + repr(tokenizer(SAMPLE).input_ids)
    return {"tokenizer's vocabulary": hashlib.sha256(words.encode()).hexdigest()}


def _now() -> datetime.datetime:
    return datetime.datetime.now().replace(microsecond=0)
