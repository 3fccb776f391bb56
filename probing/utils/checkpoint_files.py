"""Finds and reads the files of a model, in a local folder or a Hub repository."""

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from probing.utils.errors import BROKEN, UserError, first_line

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files, in the order in which transformers looks for them; an index next to them names shards."""


def fetch(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Returns a file of a folder or Hub repository, downloaded if necessary; None if there is no such file.

    Raises:
        UserError: the repository cannot be reached.
    """
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {first_line(error)}") from None
    return Path(file) if file else None


def commit_of(repo: str, revision: str | None) -> str:
    """Returns the commit that a revision of a model on the Hub is at now; None is the main branch.

    Raises:
        UserError: the repository cannot be reached, or holds no model.
    """
    for name in ("config.json", "model_index.json"):
        if file := fetch(repo, name, revision):
            return file.parent.name  # …/snapshots/COMMIT/config.json
    raise UserError(f"{repo} holds no model: it has no config.json; give another repository")


def read_json_or_empty(source: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """Reads a JSON object of a folder or Hub repository; empty if there is no such file or it holds no object."""
    file = fetch(source, name, revision)
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}  # loading the model names the fault
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns the libraries' exceptions for weights that cannot be read into a UserError of one line."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(
            f"{what} cannot be loaded: its pickle may run code, so it was not opened; convert it to safetensors"
        ) from None
    except (*BROKEN, ImportError, RuntimeError, EOFError, MemoryError, SafetensorError, StrictDataclassError) as error:
        refuse_unreachable(what, error)
        raise UserError(f"{what} cannot be loaded: {describe_error(error)}") from None


def refuse_unreachable(source: str, error: BaseException | None) -> None:
    """Raises UserError where a library needed a file from the Hub that it could neither download nor find."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__
    if error is not None and constants.HF_HUB_OFFLINE:
        raise UserError(f"{source} is no folder and not downloaded; unset HF_HUB_OFFLINE, or give a folder") from None
    if error is not None:
        raise UserError(
            f"the Hub cannot be reached, and {source} is not downloaded; check the network, or give a folder"
        ) from None


def describe_error(error: BaseException) -> str:
    """Returns the first line of an error, with its type where the text alone says little."""
    text = first_line((isinstance(error, StrictDataclassError) and error.__cause__) or error)
    return f"{type(error).__name__}: {text}" if isinstance(error, TypeError | LookupError | AttributeError) else text


def has_weights(folder: str | Path) -> bool:
    """Returns whether a local folder holds a weight file or an index of shards."""
    return any((Path(folder) / f"{name}{end}").is_file() for name in WEIGHTS for end in ("", ".index.json"))


def weight_map(source: str | Path, name: str, revision: str | None = None) -> dict[str, str]:
    """Reads tensor → shard from the index of a weight file; empty if there is no index.

    Raises:
        UserError: a shard is not a file in the same folder.
    """
    shards = read_json_or_empty(source, f"{name}.index.json", revision).get("weight_map") or {}
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        if not isinstance(shard, str) or shard in ("", "..") or "\\" in shard or PurePosixPath(shard).name != shard:
            raise UserError(f"{source}: {name}.index.json names the shard {shard!r}, no file next to it; correct it")
    return dict(shards)


def weight_files(source: str | Path, revision: str | None = None, prefix: str = "") -> list[Path]:
    """Lists the weight files that transformers loads, of shards only those with tensors of a name prefix.

    Raises:
        UserError: there are no weights, or a shard is missing.
    """
    name = read_json_or_empty(source, "config.json", revision).get("transformers_weights")
    for stem in (name.removesuffix(".index.json"),) if isinstance(name, str) else WEIGHTS:
        if file := fetch(source, stem, revision):
            return [file]
        if shards := weight_map(source, stem, revision):
            names = sorted({shard for tensor, shard in shards.items() if tensor.startswith(prefix)})
            files = {name: fetch(source, name, revision) for name in names}
            if missing := [name for name, file in files.items() if file is None]:
                raise UserError(f"{source} lacks the shard {missing[0]} that its index names; download it again")
            return [file for file in files.values() if file]
    raise UserError(f"{source} has no weights; add {' or '.join(WEIGHTS)}")


def read_tensors(source: str | Path, prefix: str, revision: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of the tensors of a name prefix, without reading others; raises as `weight_files`."""
    for file in weight_files(source, revision, prefix):
        yield from tensors_of_file(file, prefix)


def tensors_of_file(file: Path, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields name and value of the tensors of one weight file with a name prefix; code in pickles is not run."""
    with loading(str(file)):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield from ((n, tensors.get_tensor(n)) for n in tensors.keys() if n.startswith(prefix))  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from ((name, tensor) for name, tensor in loaded.items() if name.startswith(prefix))


def tensor_names(source: str | Path) -> list[str]:
    """Lists the tensors of a model, from the index where there is one: shards may be absent."""
    for name in WEIGHTS:
        if fetch(source, name) is None and (shards := weight_map(source, name)):
            return list(shards)
    return list(tensor_shapes(source))


def tensor_shapes(source: str | Path, revision: str | None = None) -> dict[str, list[int]]:
    """Returns name → shape of all tensors of a model, without reading them; raises as `weight_files`."""
    return {name: shape for file in weight_files(source, revision) for name, shape in shapes_of_file(file).items()}


def shapes_of_file(file: Path) -> dict[str, list[int]]:
    """Returns name → shape of the tensors of one weight file, without reading them."""
    with loading(str(file)):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        loaded = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return {name: list(tensor.shape) for name, tensor in loaded.items()}
