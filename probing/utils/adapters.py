"""Merges adapters into their base model: peft's, LLaVA's LoRA folders, and folders that hold a projector alone.

LLaVA's LoRA folders hold the trained projector in `non_lora_trainables.bin`, those of its first stage hold
`mm_projector.bin` alone. Peft merges adapters; whole tensors replace the base's.
"""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from probing.utils.checkpoint_files import WEIGHTS, has_weights, loading, shapes_of_file, tensors_of_file
from probing.utils.errors import UserError
from probing.utils.paths import local_path, looks_like_path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_TENSORS = ("non_lora_trainables.bin", "mm_projector.bin")
"""Files of LLaVA's code with tensors that replace those of the base."""
PROJECTOR = re.compile(r"(^|\.)(mm_projector|multi_modal_projector)\.")


def find_adapter(checkpoint: str, revision: str | None = None) -> Path | None:
    """Returns the folder of an adapter, downloaded if necessary; None for a checkpoint with whole weights.

    Raises:
        UserError: the folder holds both, or an adapter without weights.
    """
    folder = local_path(checkpoint)
    if not folder.is_dir():
        if looks_like_path(checkpoint) or "/" not in checkpoint or not (found := _download(checkpoint, revision)):
            return None
        folder = found
    whole, is_peft = has_weights(folder) and not _is_projector(folder), (folder / ADAPTER_CONFIG).is_file()
    if whole and is_peft:
        raise UserError(f"{checkpoint} holds whole weights and an adapter; if it is merged, remove {ADAPTER_CONFIG}")
    if is_peft and not adapter_files(folder):
        raise UserError(f"{checkpoint} is an adapter without weights; add {ADAPTER_WEIGHTS[0]}")
    return folder if not whole and adapter_files(folder) else None


def _download(checkpoint: str, revision: str | None) -> Path | None:
    """Downloads an adapter from the Hub; None if the repository holds none or cannot be reached."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if not find_adapter_config_file(checkpoint, revision=revision):
            return None
    except (OSError, ValueError):
        return None
    names = [ADAPTER_CONFIG, "config.json", *ADAPTER_WEIGHTS, *WHOLE_TENSORS]
    with loading(f"adapter {checkpoint}"):
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=names))


def _is_projector(folder: Path) -> bool:
    """Returns whether a folder's only weight file holds nothing but a projector."""
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    try:
        return file is not None and all(PROJECTOR.search(name) for name in shapes_of_file(file))
    except UserError:  # loading the file names the fault
        return False


def adapter_files(folder: Path) -> list[Path]:
    """Lists the weight files of an adapter: peft's, then those with whole tensors."""
    return [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()][:1] + _whole_files(folder)


def _whole_files(folder: Path) -> list[Path]:
    files = [folder / name for name in WHOLE_TENSORS if (folder / name).is_file()]
    return files or [folder / name for name in WEIGHTS if (folder / name).is_file()][:1]


def merge_adapter(model: Any, folder: Path, key_mapping: dict[str, str]) -> set[str]:
    """Merges an adapter into its base in place: first whole tensors, as LLaVA does, then peft's.

    Args:
        model: the base; on the meta device, only names and shapes are compared.
        folder: of the adapter.
        key_mapping: pattern → replacement, from names in the folder's files to names of the model.

    Returns:
        Names of the replaced tensors.

    Raises:
        UserError: tensors do not fit the base, or some are missing.
    """
    with loading(f"adapter {folder}"), warnings.catch_warnings():
        if next(model.parameters()).is_meta:
            warnings.simplefilter("ignore")  # torch: copying to the meta device does nothing
        replaced = {name for file in _whole_files(folder) for name in _replace_tensors(model, file, key_mapping)}
        if (folder / ADAPTER_CONFIG).is_file():
            _merge_with_peft(model, folder, key_mapping)
    return replaced


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        detail = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise UserError(f"{path} does not fit the base: {detail}; give another base") from None


def _require_all_fit(path: Path, wrong: Iterable[str]) -> None:
    if names := sorted(wrong):
        raise UserError(f"{path}: {len(names)} tensors do not fit the base, first {names[0]}; give another base")


def _replace_tensors(model: Any, file: Path, key_mapping: dict[str, str]) -> set[str]:
    names, renamed = model.state_dict().keys(), {}
    for name, tensor in tensors_of_file(file):
        target = name.removeprefix("base_model.model.")
        for pattern, replacement in key_mapping.items():
            target = re.sub(pattern, replacement, target)
        renamed[target if target in names else f"model.{target}"] = tensor
    with _fitting(file):
        _require_all_fit(file, model.load_state_dict(renamed, strict=False).unexpected_keys)
    return set(renamed)


def _merge_with_peft(model: Any, folder: Path, key_mapping: dict[str, str]) -> None:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise UserError(f"{folder} is an adapter of type {config.peft_type}, which cannot be merged; give another")
    config.inference_mode = True
    if key_mapping and hasattr(config, "exclude_modules"):
        # LLaVA's code wraps the LLM alone and names modules by their last part, which the tower has too.
        config.exclude_modules = r"(.*\.)?(vision_tower|multi_modal_projector)\..*"
    wrapped = PeftModel(model, config)
    with _fitting(folder):
        result = wrapped.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=key_mapping or None)
    _require_all_fit(folder, [*result.unexpected_keys, *result.missing_keys])
    wrapped.merge_and_unload()
