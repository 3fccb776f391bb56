"""Finding models: a local folder or a Hub id, checked before anything heavy is loaded."""

import contextlib
import json
import logging
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import probing.utils.torchvision_shim  # noqa: F401
from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.paths import local_path, looks_like_path
from probing.utils.reach import require_hub
from probing.utils.weights_hash import digest, files_hash, model_hash, settings, weights_hash

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""What weights are called; shards are named by an index beside them."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter of peft."""
ADAPTER_TENSOR = re.compile(
    r"\.lora_|\.base_layer\.|\.modules_to_save\.|\.(ia3|hada|lokr|oft|boft|hra|vera_lambda|vblora)_|"
    r"^base_model\.model\.|\.adapters?\."
)
"""Names of tensors of an adapter that was not merged."""
HARMLESS_TENSOR = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked)$|vision_tower\..*\bhead\."
)
"""Names of tensors that older files hold and no hidden state depends on."""


def checkpoint_path(source: str, config: Any) -> str:
    """Folder or Hub id of a checkpoint: of the adapter, where `source` is the base of one."""
    return getattr(config, "adapter", None) or source


def locate(source: str, what: str) -> str:
    """Returns the folder or Hub id to load.

    Raises:
        UserError: there is no such folder, it holds no model, or it is a Hub id and the Hub cannot be reached.
    """
    path = local_path(source)
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / "model_index.json").exists():
            if (path / ADAPTER_CONFIG).exists():
                raise UserError(f"{source} is an adapter alone; merge it into its base first, and give that folder")
            raise UserError(
                f"no {what} in {source}: the folder has no config.json; give a folder made by save_pretrained"
            )
        for stem in WEIGHTS:
            _weight_map(str(path), stem)
        return str(path)
    if path.exists():
        raise UserError(f"no {what} at {source}: it is a file; give the folder that holds config.json")
    if looks_like_path(source) or "/" not in source:
        raise UserError(f"no such {what}: {source}; give an existing folder or a Hub id such as org/name")
    require_hub()
    return source


def identity(source: str, config: Any, device: torch.device | None = None) -> str:
    """Identifies weights and configuration of a model.

    Args:
        source: folder or Hub id.
        config: the model's.
        device: where the model is; on the meta device it has no weights.

    Returns:
        Hash of what is loaded from a folder, or the commit of a Hub repository.
    """
    if device is not None and device.type == "meta":
        return "no weights"
    from probing.utils import adapters

    path = Path(source)
    own = f"commit:{getattr(config, '_commit_hash', None)}"
    if path.is_dir():
        own = f"sha256:{model_hash(path)}"
        tower = local_path(str(getattr(config, "tower", "")))  # a folder apart, in LLaVA's original format
        if getattr(config, "tower", None) and tower.is_dir() and not _has_tower(source):
            own += f", vision tower {weights_hash(tower)}"
    if adapter := getattr(config, "adapter", None):
        configuration = settings(read_json(adapter, ADAPTER_CONFIG))  # holds the scale of its part in the weights
        own += f", adapter {digest([files_hash(adapters.files_of(Path(adapter))), configuration])}"
    return own


def _has_tower(source: str) -> bool:
    listed = [name for stem in WEIGHTS for name in _weight_map(source, stem)]  # an index tells without the shards
    return any(name.startswith("model.vision_tower.") for name in listed or tensor_names(source))


def pretrained(
    model_class: Any, source: str, config: Any, device: torch.device, dtype: Any, **kwargs: Any
) -> tuple[Any, set[str], set[str]]:
    """Loads a model of transformers; on the meta device it is built from its configuration, and no weights are read.

    There, names and shapes are compared with those that the files state, so that the sets are the same.

    Args:
        model_class: the class, or one of transformers' Auto classes.
        source: folder or Hub id.
        config: its configuration; where it has an `adapter`, that folder is merged into the weights of `source`.
        device: `meta`, or where the model will be put by the caller.
        dtype: as `from_pretrained` takes it; `auto` is the checkpoint's own, but for bfloat16 where `slow_in_bfloat16`.
        **kwargs: for `from_pretrained`.

    Returns:
        The model, and the names of missing and of unexpected tensors.

    Raises:
        UserError: tensors have other shapes than the architecture's, or belong to an adapter that was not merged.
    """
    from probing.utils import adapters

    any_shape = kwargs.pop("ignore_mismatched_sizes", False)
    adapter, key_mapping = getattr(config, "adapter", None), kwargs.get("key_mapping")
    filled: set[str] = set()
    if device.type != "meta":
        widen = dtype == "auto" and "quantization_config" not in kwargs and slow_in_bfloat16(device)
        stated = widen and getattr(config, "dtype", None) == torch.bfloat16
        if stated:
            dtype = torch.float32
        model, info = model_class.from_pretrained(
            source, config=config, output_loading_info=True, dtype=dtype, ignore_mismatched_sizes=True, **kwargs
        )
        if stated or (widen and any(p.dtype == torch.bfloat16 for p in model.parameters())):
            model = model.float()  # for a configuration that states no type, and the parts that have their own
            logger.info("%s: float32 in place of bfloat16, which this CPU lacks; backbone.dtype decides", source)
    else:
        if dtype == "auto":
            dtype = config.dtype or torch.float32
        own = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
        with device:
            build = getattr(model_class, "from_config", None) or model_class._from_config
            model = build(config, dtype=dtype, **own)
        info = _compare_with_files(model, source, config, key_mapping)
    unexpected = set(info["unexpected_keys"])
    _refuse_adapter(source, unexpected)
    if not any_shape:
        refuse_other_shapes(source, info["mismatched_keys"])
    if adapter:
        filled = adapters.apply(model, Path(adapter), key_mapping or {})
    return model, set(info["missing_keys"]) - filled, unexpected


def _compare_with_files(model: Any, source: str, config: Any, key_mapping: dict[str, str] | None) -> dict[str, Any]:
    """What loading the weights of a local folder would report; nothing where there are none, or they are quantised."""
    known = Path(source).is_dir() and not getattr(config, "quantization_config", None)
    if not known or not has_weights(source):
        return {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}
    with _disable_current_modes():  # a dry run must not count these
        tensors = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(source).items()}
        _, info = type(model).from_pretrained(
            None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True,
            ignore_mismatched_sizes=True, key_mapping=key_mapping,
        )  # fmt: skip
    return dict(info)


def refuse_other_shapes(source: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raises UserError where tensors have another shape in the files than in the architecture.

    Args:
        source: folder or Hub id.
        mismatched: name, shape in the files and shape in the architecture of each.
    """
    listed = sorted((name, list(there), list(wanted)) for name, there, wanted in mismatched)
    if listed:
        name, there, wanted = listed[0]
        more = f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""
        raise UserError(
            f"{source}: {name} has shape {there}, its config.json needs {wanted}{more}; give weights and config.json "
            "of one model"
        )


def _refuse_adapter(source: str, unexpected: set[str]) -> None:
    """Raises UserError where some tensors are those of an adapter that was not merged."""
    found = sorted(name for name in unexpected if ADAPTER_TENSOR.search(name))
    if found:
        raise UserError(
            f"{source} holds an unmerged adapter ({len(found)} tensors, first {found[0]}); merge it with peft's "
            "merge_and_unload and save it again"
        )


def require_whole(source: str, missing: set[str], unexpected: set[str]) -> None:
    """Checks what loading reported; unexpected tensors that may matter are warned of.

    Raises:
        UserError: tensors of the architecture are missing.
    """
    if missing:
        raise UserError(
            f"checkpoint {source} lacks {len(missing)} tensors of its architecture (first: {min(missing)}); "
            "complete the weights"
        )
    unknown = sorted(name for name in unexpected if not HARMLESS_TENSOR.search(name))
    if unknown:
        shown = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        logger.warning("%s: %d tensors do not belong to its architecture and are not used: %s",
                       source, len(unknown), shown)  # fmt: skip


def slow_in_bfloat16(device: torch.device) -> bool:
    """Whether it is a CPU without bfloat16 instructions, on which products take some forty times as long as in float32.

    float16 is as slow there and stays: numbers that overflow in it are a property of the checkpoint.
    """
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def load_config(source: str, what: str, trust: str = "backbone.trust_remote_code", **kwargs: Any) -> Any:
    """Reads a model's configuration.

    Args:
        source: folder or Hub id.
        what: it is, for messages.
        trust: field that allows code of its own.
        **kwargs: for `from_pretrained`.

    Raises:
        UserError: it cannot be read or reached, or its model type is unknown to transformers.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **kwargs)
    except (*BROKEN, StrictDataclassError) as error:
        if "custom code" in str(error):
            raise UserError(
                f"{what} {source} comes with code of its own, which was not run; read it, and to run it set "
                f"{trust}=true"
            ) from None
        place = "" if Path(source).exists() else "there is no such folder, and as a Hub id "
        advice = "mend its config.json, or give another folder or Hub id"
        raise UserError(f"{what} {source} cannot be read: {place}{_said(error)}; {advice}") from None


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever the libraries raise for weights that cannot be read into one line.

    Raises:
        UserError: in place of it. A pickle that holds more than tensors is refused, never run.
    """
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(
            f"{what} cannot be loaded: its weights are a pickle that holds more than tensors, which may run code; give "
            "it as safetensors"
        ) from None
    except (*BROKEN, ImportError, RuntimeError, EOFError, MemoryError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{what} cannot be loaded: {_said(error)}") from None


def _said(error: BaseException) -> str:
    """What an error says; a configuration's own say what is wrong in the one that they come from."""
    said = first_line((isinstance(error, StrictDataclassError) and error.__cause__) or error)
    return f"{type(error).__name__}: {said}" if isinstance(error, TypeError | LookupError | AttributeError) else said


def fetch(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder or Hub repository, downloaded where it must be; None where there is no such file.

    Raises:
        UserError: the repository cannot be reached.
    """
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {first_line(error)}") from None
    return Path(found) if found else None


def read_json(source: str, name: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a folder or Hub repository; empty where there is none, or it is no JSON object."""
    file = fetch(source, name, revision)
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_tensors(source: str, prefix: str, revision: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model whose names begin with a prefix, one after the other; nothing else of it is read.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """
    for file in weight_files(source, revision, prefix):
        with loading(f"{source}, {file.name}"):
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as stored:
                    for name in (name for name in stored.keys() if name.startswith(prefix)):  # noqa: SIM118
                        yield name, stored.get_tensor(name)
            else:
                whole = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                yield from ((name, tensor) for name, tensor in whole.items() if name.startswith(prefix))


def tensor_names(source: str, revision: str | None = None) -> list[str]:
    """Names of all tensors of a model, without reading them; raises as `tensor_shapes` does."""
    return list(tensor_shapes(source, revision))


def tensor_shapes(source: str, revision: str | None = None) -> dict[str, list[int]]:
    """Shapes of all tensors of a model by name, without reading them.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """
    shapes: dict[str, list[int]] = {}
    for file in weight_files(source, revision):
        shapes |= shapes_of_file(file)
    return shapes


def shapes_of_file(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of one weight file; raises UserError where it cannot be read."""
    with loading(str(file)):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
        stored = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return {name: list(tensor.shape) for name, tensor in stored.items()}


def has_weights(source: str) -> bool:
    """Whether a local folder holds weights of a model, or an index of some."""
    return any((Path(source) / f"{stem}{end}").is_file() for stem in WEIGHTS for end in ("", ".index.json"))


def _weight_map(source: str, stem: str, revision: str | None = None) -> dict[str, str]:
    """Tensor → shard, as the index of a model says; empty where there is none.

    Raises:
        UserError: it names files that do not lie beside it.
    """
    places = read_json(source, f"{stem}.index.json", revision).get("weight_map") or {}
    for file in places.values() if isinstance(places, dict) else [places]:
        if not isinstance(file, str) or not file or PurePosixPath(file).name != file or "\\" in file or file == "..":
            raise UserError(f"{source}: {stem}.index.json names the shard {file!r}, no file beside it; mend the file")
    return dict(places)


def weight_files(source: str, revision: str | None = None, prefix: str = "") -> list[Path]:
    """The weight files of a model that hold tensors whose names begin with a prefix; safetensors are preferred.

    Raises:
        UserError: there are none, or a shard that the index names is missing.
    """
    for stem in WEIGHTS:
        places = _weight_map(source, stem, revision)
        names = sorted({file for tensor, file in places.items() if tensor.startswith(prefix)})
        if not places:
            names = [stem]
        files = [(name, fetch(source, name, revision)) for name in names]
        if places or files[0][1]:
            for name, file in files:
                if file is None:
                    raise UserError(f"{source} lacks the shard {name} that its index names; download it again")
            return [file for _, file in files if file]
    raise UserError(f"{source} has no weights (neither safetensors nor pytorch_model.bin)")
