"""Adapters: LoRA folders of peft and of LLaVA, and folders that hold a projector alone; each is loaded on its base.

LLaVA's LoRA folders hold, next to the adapter, `non_lora_trainables.bin` with the trained projector. The folders of its
first stage hold `mm_projector.bin` alone. Peft loads and merges what is an adapter; whole tensors replace the base's.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from probing.utils.errors import UserError
from probing.utils.pretrained import ADAPTER_CONFIG, WEIGHTS, loading

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_TENSORS = ("non_lora_trainables.bin", "mm_projector.bin")
"""Files of LLaVA's code with tensors that replace those of the base."""
PROJECTOR = re.compile(r"(^|\.)(mm_projector|multi_modal_projector)\.")


def files_of(folder: Path) -> list[Path]:
    """The weight files of an adapter: of peft, and with whole tensors."""
    peft = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
    return peft + _whole_files(folder)


def _whole_files(folder: Path) -> list[Path]:
    found = [folder / name for name in WHOLE_TENSORS if (folder / name).is_file()]
    return found or [folder / name for name in WEIGHTS if (folder / name).is_file()][:1]


def apply(model: Any, folder: Path, key_mapping: dict[str, str]) -> set[str]:
    """Loads an adapter on its base, in place: whole tensors first, as LLaVA does, then peft merges the rest.

    Args:
        model: the base; on the meta device names and shapes are checked alone.
        folder: of the adapter.
        key_mapping: pattern → replacement, from names in the folder's files to names of the model.

    Returns:
        Names of the tensors that the folder holds as a whole.

    Raises:
        UserError: tensors do not fit the base.
    """
    state = dict(model.state_dict())
    filled: set[str] = set()
    for file in _whole_files(folder):
        for name, tensor in _read(file).items():
            target = _target(name, state, key_mapping)
            if target is None:
                raise UserError(f"{file}: the base has no tensor {name}; give the base it was trained on")
            if state[target].shape != tensor.shape:
                raise UserError(
                    f"{file}: {name} has shape {list(tensor.shape)}, the base needs {list(state[target].shape)}; give "
                    "the base it was trained on"
                )
            if not state[target].is_meta:
                state[target].copy_(tensor)
            filled.add(target)
    if (folder / ADAPTER_CONFIG).is_file():
        with loading(f"adapter {folder}"), warnings.catch_warnings(), _disable_current_modes():
            if next(model.parameters()).is_meta:
                warnings.simplefilter("ignore")  # torch's, that copying to the meta device does nothing
            _merge(model, folder, key_mapping)
    return filled


def _read(file: Path) -> dict[str, Tensor]:
    with loading(str(file)):
        if file.suffix == ".safetensors":
            return load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))


def _target(name: str, state: dict[str, Tensor], key_mapping: dict[str, str]) -> str | None:
    """The model's name of a tensor of an adapter's file; None where it has no such tensor."""
    name = name.removeprefix("base_model.model.")
    for pattern, replacement in key_mapping.items():
        name = re.sub(pattern, replacement, name)
    return next((known for known in (name, f"model.{name}") if known in state), None)


def _merge(model: Any, folder: Path, key_mapping: dict[str, str]) -> None:
    """Merges an adapter with peft; every tensor of it must fit, and none of its modules may lack one."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise UserError(f"{folder} is an adapter of type {config.peft_type}, which cannot be merged into its base")
    config.inference_mode = True
    if key_mapping and hasattr(config, "exclude_modules"):
        # LLaVA's code wraps the LLM alone, and then names modules by their last part, as the tower has them too.
        config.exclude_modules = r"(.*\.)?(vision_tower|multi_modal_projector)\..*"
    wrapped = PeftModel(model, config)
    try:
        result = wrapped.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=key_mapping or None)
    except RuntimeError as error:
        detail = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise UserError(f"{folder}: the adapter does not fit the base: {detail}") from None
    wrong = sorted([*result.unexpected_keys, *result.missing_keys])
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} tensors of the adapter do not fit the base, first {wrong[0]}; give the base it "
            "was trained on"
        )
    wrapped.merge_and_unload()
