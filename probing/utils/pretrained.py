"""Loads pretrained models from a folder or the Hub, after checks that need no weights in memory."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError

import probing.utils.torchvision_shim  # noqa: F401
from probing.utils.adapters import ADAPTER_CONFIG, adapter_files, merge_adapter
from probing.utils.checkpoint_files import (
    WEIGHTS,
    commit_of,
    describe_error,
    has_weights,
    read_json_or_empty,
    refuse_unreachable,
    tensor_names,
    tensor_shapes,
    weight_map,
)
from probing.utils.errors import BROKEN, UserError
from probing.utils.open_clip_models import is_open_clip
from probing.utils.paths import local_path, looks_like_path
from probing.utils.weights_hash import digest, files_hash, model_hash, settings, weights_hash

logger = logging.getLogger(__name__)

ADAPTER_TENSOR = re.compile(
    r"\.lora_|\.base_layer\.|\.modules_to_save\.|\.(ia3|hada|lokr|oft|boft|hra|vera_lambda|vblora)_|"
    r"^base_model\.model\.|\.adapters?\."
)
"""Names of tensors of an adapter that was not merged."""
HARMLESS_TENSOR = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked)$|vision_tower\..*\bhead\."
)
"""Names of tensors that older files hold and no hidden state depends on."""
TOWER_TENSOR = re.compile(r"model\.vision_tower\.")


def locate(source: str, what: str) -> str:
    """Returns the folder or Hub id to load.

    Raises:
        UserError: there is no such folder, it holds no model, or it is not downloaded and the Hub cannot be reached.
    """
    if is_open_clip(source):
        return source
    path = local_path(source)
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "model_index.json").exists():
            if (path / ADAPTER_CONFIG).exists():
                raise UserError(f"{source} is an adapter alone; merge it into its base, and give that folder")
            raise UserError(f"no {what} in {source}: it has no config.json; give a folder made by save_pretrained")
        for name in WEIGHTS:
            weight_map(path, name)
        return str(path)
    if path.exists():
        raise UserError(f"no {what} at {source}: it is a file; give the folder that holds config.json")
    if looks_like_path(source) or "/" not in source:
        raise UserError(f"no such {what}: {source}; give an existing folder or a Hub id such as org/name")
    if not constants.HF_HUB_OFFLINE:
        from transformers.utils.hub import cached_file

        try:
            cached_file(source, "config.json")
        except OSError as error:
            refuse_unreachable(source, error)
    return source


def checkpoint_path(source: str, config: Any) -> str:
    """Returns folder or Hub id of a checkpoint: the adapter's if `source` is the base of one."""
    return getattr(config, "adapter", None) or source


def identity(source: str, config: Any, device: torch.device | None = None, revision: str | None = None) -> str:
    """Identifies weights and configuration: hashes of what is loaded from folders, or the commit of a Hub repository.

    Args:
        source: folder or Hub id.
        config: the model's.
        device: of the model; on the meta device it has no weights.
        revision: of a Hub repository.
    """
    if device is not None and device.type == "meta":
        return "no weights"
    if not Path(source).is_dir():
        parts = [f"commit:{commit_of(source, revision)}"]
    else:
        parts = [f"sha256:{model_hash(Path(source))}"]
        tower = getattr(config, "tower", None)  # a separate folder, in LLaVA's original format
        if tower and local_path(tower).is_dir() and not any(map(TOWER_TENSOR.match, tensor_names(source))):
            parts.append(f"vision tower {weights_hash(local_path(tower))}")
    if adapter := getattr(config, "adapter", None):
        values = settings(read_json_or_empty(adapter, ADAPTER_CONFIG))  # they hold the scale of its weights
        parts.append(f"adapter {digest([files_hash(adapter_files(Path(adapter))), values])}")
    return ", ".join(parts)


def load_config(source: str, what: str, trust: str = "backbone.trust_remote_code", **kwargs: Any) -> Any:
    """Reads a model's configuration.

    Args:
        source: folder or Hub id.
        what: what it is, for messages.
        trust: field of the recipe that allows the checkpoint's own code.
        **kwargs: for `from_pretrained`.

    Raises:
        UserError: it cannot be read, or its model type is unknown to transformers.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **kwargs)
    except (*BROKEN, StrictDataclassError) as error:
        refuse_unreachable(source, error)
        if "custom code" in str(error):
            raise UserError(
                f"{what} {source} has its own code, which was not run; read it, then set {trust}=true"
            ) from None
        what = what if Path(source).exists() else f"no folder, and as a Hub id {what}"
        raise UserError(
            f"{what} {source} cannot be read: {describe_error(error)}; correct its config.json or give another"
        ) from None


def pretrained(
    model_class: Any, source: str, config: Any, device: torch.device, dtype: Any, **kwargs: Any
) -> tuple[Any, set[str], set[str]]:
    """Loads a model of transformers; on the meta device it is built from its configuration, without weights.

    There, names and shapes are compared with those that the files state, so the sets are the same.

    Args:
        model_class: the class, or one of transformers' Auto classes.
        source: folder or Hub id.
        config: its configuration; an adapter in the folder `config.adapter` is merged.
        device: `meta`, or where the caller will put the model.
        dtype: as `from_pretrained` takes it; `auto` is the checkpoint's, or float32 where `slow_in_bfloat16`.
        **kwargs: for `from_pretrained`.

    Returns:
        The model, and the names of missing and of unexpected tensors.

    Raises:
        UserError: tensors have other shapes than the architecture's, or belong to an adapter that was not merged.
    """
    any_shape = kwargs.pop("ignore_mismatched_sizes", False)
    if device.type == "meta":
        dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
        options = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
        with device:
            build = getattr(model_class, "from_config", None) or model_class._from_config
            model = build(config, dtype=dtype, **options)
        info = _compare_with_files(model, source, config, kwargs.get("key_mapping"))
    else:
        widen = dtype == "auto" and "quantization_config" not in kwargs and slow_in_bfloat16(device)
        if widen and getattr(config, "dtype", None) == torch.bfloat16:
            dtype = torch.float32
        model, info = model_class.from_pretrained(
            source, config=config, output_loading_info=True, dtype=dtype, ignore_mismatched_sizes=True, **kwargs
        )
        if widen and (dtype == torch.float32 or any(p.dtype == torch.bfloat16 for p in model.parameters())):
            model = model.float()  # parts with a type of their own, and configurations that state none
            logger.info("%s: float32 instead of bfloat16, which this CPU lacks; set backbone.dtype to choose", source)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if unmerged := sorted(name for name in unexpected if ADAPTER_TENSOR.search(name)):
        raise UserError(
            f"{source} holds an unmerged adapter ({len(unmerged)} tensors, first {unmerged[0]}); use peft's "
            "merge_and_unload and save again"
        )
    if not any_shape:
        refuse_other_shapes(source, info["mismatched_keys"])
    if adapter := getattr(config, "adapter", None):
        missing -= merge_adapter(model, Path(adapter), kwargs.get("key_mapping") or {})
    return model, missing, unexpected


def _compare_with_files(model: Any, source: str, config: Any, key_mapping: dict[str, str] | None) -> dict[str, Any]:
    """Returns what loading the weights would report; nothing if there are none here or they are quantized."""
    if not has_weights(source) or getattr(config, "quantization_config", None):
        return {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(source).items()}
    _, info = type(model).from_pretrained(
        None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True,
        ignore_mismatched_sizes=True, key_mapping=key_mapping,
    )  # fmt: skip
    return dict(info)


def refuse_other_shapes(source: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raises UserError if tensors have another shape in the files than in the architecture.

    Args:
        source: folder or Hub id.
        mismatched: name, shape in the files and shape in the architecture of each tensor.
    """
    if listed := sorted((name, list(stored), list(required)) for name, stored, required in mismatched):
        name, stored, required = listed[0]
        more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
        raise UserError(
            f"{source}: {name} has shape {stored}, its config.json needs {required}{more}; use files of one model"
        )


def require_whole(source: str, missing: set[str], unexpected: set[str]) -> None:
    """Raises UserError if tensors of the architecture are missing; warns of unexpected ones that may matter."""
    if missing:
        raise UserError(
            f"checkpoint {source} lacks {len(missing)} tensors of its architecture (first: {min(missing)}); "
            "complete the weights"
        )
    if unused := sorted(name for name in unexpected if not HARMLESS_TENSOR.search(name)):
        names = ", ".join(unused[:3]) + (", …" if len(unused) > 3 else "")
        logger.warning("%s: %d tensors are not part of its architecture and unused: %s", source, len(unused), names)


def slow_in_bfloat16(device: torch.device) -> bool:
    """Returns whether a CPU lacks bfloat16 instructions: matrix products then take some 40 times as long as in float32.

    float16 is as slow there and stays: numbers that overflow in it are a property of the checkpoint.
    """
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
