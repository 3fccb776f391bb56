"""Opens adapters: which one a recipe names, and its base."""

from pathlib import Path

from probing.recipe import BackboneRecipe
from probing.utils.adapters import ADAPTER_WEIGHTS, PROJECTOR, WHOLE_TENSORS, files_of
from probing.utils.errors import UserError
from probing.utils.paths import local_path, looks_like_path
from probing.utils.pretrained import (
    ADAPTER_CONFIG,
    WEIGHTS,
    fetch,
    has_weights,
    loading,
    locate,
    read_json,
    shapes_of_file,
)


def open_adapter(recipe: BackboneRecipe) -> tuple[str, str] | None:
    """Finds out whether a checkpoint is an adapter, and what it is an adapter of.

    Args:
        recipe: names the checkpoint and may name its base.

    Returns:
        Folder of the adapter, and folder or Hub id of its base; None for a checkpoint with weights of its own.

    Raises:
        UserError: the base is not at hand, or there is one for a checkpoint that needs none.
    """
    folder = _adapter_folder(recipe)
    if folder is None:
        if recipe.base:
            raise UserError(f"{recipe.checkpoint} is no adapter; leave out backbone.base")
        return None
    if not files_of(folder):
        raise UserError(f"{recipe.checkpoint} is an adapter without weights; add {ADAPTER_WEIGHTS[0]}")
    if recipe.base:
        return str(folder), locate(recipe.base, "base model")
    peft, own = read_json(str(folder), ADAPTER_CONFIG), read_json(str(folder), "config.json")
    named = str(peft.get("base_model_name_or_path") or own.get("_name_or_path") or "")
    try:
        if named and (local_path(named).is_dir() or (not looks_like_path(named) and fetch(named, "config.json"))):
            return str(folder), locate(named, "base model")
    except UserError:
        pass  # it cannot be reached
    raise UserError(
        f"{recipe.checkpoint} is an adapter of {named or 'an unknown model'}, which is not here; give the base with "
        "backbone.base=DIR"
    )


def _adapter_folder(recipe: BackboneRecipe) -> Path | None:
    """The folder of an adapter; None for anything else."""
    source = recipe.checkpoint
    folder = local_path(source)
    if not folder.is_dir():
        return None if looks_like_path(source) or "/" not in source else _adapter_of_hub(source, recipe.revision)
    if (folder / ADAPTER_CONFIG).is_file():
        if has_weights(source) and not _projector_alone(folder):
            raise UserError(
                f"{source} holds whole weights and an adapter; remove {ADAPTER_CONFIG} if it is merged, else separate "
                "the two"
            )
        return folder
    if has_weights(str(folder)):
        return folder if _projector_alone(folder) else None
    return folder if files_of(folder) else None


def _adapter_of_hub(source: str, revision: str | None) -> Path | None:
    """An adapter of the Hub, downloaded; None where the repository is none, or cannot be reached."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(source, revision=revision)
    except (OSError, ValueError):
        return None
    if not found:
        return None
    names = [ADAPTER_CONFIG, "config.json", *ADAPTER_WEIGHTS, *WHOLE_TENSORS]
    with loading(f"adapter {source}"):
        return Path(snapshot_download(source, revision=revision, allow_patterns=names))


def _projector_alone(folder: Path) -> bool:
    """Whether a folder's weights are one file with tensors of a projector and nothing else."""
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    try:
        return bool(files) and all(PROJECTOR.search(name) for name in shapes_of_file(files[0]))
    except UserError:  # whoever loads it says why
        return False
