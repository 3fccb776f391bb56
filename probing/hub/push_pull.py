"""Publishes runs on the Hugging Face Hub, or in a folder, and downloads them."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.numpy import load_file, save_file

from probing.recipe import ProbeRunRecipe, apply_overrides, cached_repository, dump_recipe, read_yaml, validate
from probing.runs.directory import Run
from probing.utils.cache_dir import home_folder
from probing.utils.errors import UserError, require_probes
from probing.utils.files import atomic_folder, disk_errors, read_json, write_text
from probing.utils.hub import download, hub_errors
from probing.utils.paths import ELSEWHERE, local_path, looks_like_path

logger = logging.getLogger(__name__)

BANKS = ("probes", "ridge", "controls/*/probes", "controls/*/ridge")
"""Folders of a run with one folder of tensors per teacher."""
FILES = (
    *("recipe.yaml", "manifest.json", "mean_targets.safetensors", "learning_curves.csv", "results.csv"),
    *("scores/*.safetensors", "scores/*.json"),
)
CARD = ("README.md", "figures/*")
_LOCAL_PATH = re.compile(r"(/|~|\.{1,2}/).*")
_LAYER = re.compile(r"(?:^|\.)layer_(\w+)\.")
_TOKEN = r"\bhf_[A-Za-z0-9]{20,}"


def published_patterns(teachers: Sequence[str] = ()) -> list[str]:
    """Returns patterns of the files to publish; images, generated features and training state are not among them."""
    return [*FILES, *(f"{bank}/{teacher}/*" for bank in BANKS for teacher in teachers or ["*"])]


def push(path: Path, repo: str, write_card: Callable[[Path, str], None], private: bool = False) -> str:
    """Publishes an evaluated run with a model card.

    Args:
        path: the run.
        repo: USER/NAME on the Hub, created if missing, or a folder.
        write_card: writes `README.md` into a folder with the files to publish; its second argument is the name of the
            repository.
        private: visibility of a new repository.

    Returns:
        URL of the repository, or the folder.

    Raises:
        UserError: the run has no results, `repo` holds anything but this run, the Hub is out of reach, or a file would
            reveal a local path or a token.
    """
    run = Run.open(path)
    if not (path / "results.csv").is_file():
        raise UserError(f"{path} has no results for the card; first type: probing evaluate {path}")
    _require_free(repo, run)
    with tempfile.TemporaryDirectory(prefix="probing-push-") as temporary, disk_errors(Path(temporary)):
        folder = Path(temporary)
        _export(run, folder)
        write_card(folder, local_path(repo).name if _is_folder(repo) else repo)
        _require_no_secrets(folder, run)
        if _is_folder(repo):
            target = local_path(repo)
            with disk_errors(target, "give another folder"), atomic_folder(target) as new:
                for source in (target, folder) if target.exists() else (folder,):
                    shutil.copytree(source, new, dirs_exist_ok=True)
            return repo
        with hub_errors(repo):
            url = HfApi().create_repo(repo, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, delete_patterns=[*published_patterns(), *CARD])
    return str(url)


def _require_free(repo: str, run: Run) -> None:
    """Raises UserError if a repository or folder holds anything but this run."""
    source = local_path(repo)
    if _is_folder(repo):
        names = {file.name for file in source.iterdir()} if source.is_dir() else set()
    else:
        with hub_errors(repo):
            try:
                names = set(HfApi().list_repo_files(repo))
            except RepositoryNotFoundError:
                return
        source = download(repo, ["manifest.json"])
    if "manifest.json" in names:
        same = _same_run(read_json(source / "manifest.json", "push to a new one"), run.manifest)
        free = same and source.resolve() != run.path.resolve()
    else:
        free = names <= {".gitattributes", "README.md"} and not source.is_file()
    if not free:
        raise UserError(f"{repo} holds something else; push to a new repository or folder")


def _same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compares the identities in two manifests: checkpoint, end of training, and selected layers and teachers."""
    first, second = ((m["checkpoint"]["sha256"], m["finished"], m.get("subset")) for m in (one, other))
    return first == second


def _export(run: Run, folder: Path) -> None:
    """Copies the files to publish, without local paths; tensors become symbolic links."""
    for file in _published_files(run.path):
        target = folder / file.relative_to(run.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            values = hide_local_paths(json.loads(file.read_text(encoding="utf-8")))
            target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif file.suffix == ".yaml":
            values = hide_local_paths(read_yaml(file))
            target.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        else:
            target.symlink_to(file.resolve())


def _published_files(folder: Path, teachers: Sequence[str] = ()) -> list[Path]:
    files = {file for pattern in published_patterns(teachers) for file in folder.glob(pattern)}
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def hide_local_paths(values: Any) -> Any:
    """Replaces local paths in nested values by `elsewhere:NAME`, and snapshots in the Hub's cache by their Hub id."""
    if isinstance(values, dict):
        return {name: hide_local_paths(value) for name, value in values.items()}
    if isinstance(values, list):
        return [hide_local_paths(value) for value in values]
    path = values.removeprefix("coco:") if isinstance(values, str) else ""
    if not _LOCAL_PATH.fullmatch(path):
        return values
    return cached_repository(path) or values.replace(path, f"{ELSEWHERE}{Path(path).name}")


def path_fields(recipe: ProbeRunRecipe) -> dict[str, str]:
    """Returns the fields of a recipe that may hold local paths, with their values."""
    backbone = recipe.backbone
    optional = {"base": backbone.base, "vision_tower": backbone.vision_tower}
    return {
        "backbone.checkpoint": backbone.checkpoint,
        **{f"backbone.{name}": path for name, path in optional.items() if path},
        "data.path": recipe.data.path,
        **{f"teachers.{name}.id": teacher.id for name, teacher in recipe.teachers.items()},
    }


def _require_no_secrets(folder: Path, run: Run) -> None:
    """Raises UserError if a text, or the metadata of tensors, holds a token or a path of this machine."""
    paths = {str(home_folder()), str(run.path.resolve())}
    paths |= {value.removeprefix("coco:") for value in path_fields(run.recipe).values()}
    absolute = "|".join(re.escape(path) for path in sorted(paths) if path.startswith("/") and len(path) > 1)
    secret = re.compile(rf"{_TOKEN}|(?<![\w.-])({absolute})(?![\w-])".encode())
    for file in (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png"):
        with file.open("rb") as stream:
            tensors = file.suffix == ".safetensors"
            content = stream.read(int.from_bytes(stream.read(8), "little")) if tensors else stream.read()
        if found := secret.search(content):
            what = found[1].decode() if found[1] else "a Hub token"
            raise UserError(f"{file.relative_to(folder)} would publish {what}; remove it from that file of the run")


def pull(
    repo: str,
    out: Path,
    layers: Sequence[str] = (),
    teachers: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Run:
    """Downloads a published run; a repeated call with other overrides sets paths in the recipe of the same run.

    Results and scores are always those of the whole run.

    Args:
        repo: USER/NAME on the Hub, or a folder.
        out: folder of the run.
        layers: names of the layers whose probes to keep; by default all.
        teachers: whose probes to download; by default all.
        overrides: `KEY=VALUE`, paths of checkpoint, data and teachers on this machine.

    Raises:
        UserError: the repository is out of reach or holds no such probes, or `out` holds something else.
    """
    source = _download(repo, teachers)
    manifest = read_json(source / "manifest.json", f"push {repo} again")
    if layers or teachers:
        manifest["subset"] = {"layers": sorted(layers), "teachers": sorted(teachers)}
    exists = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if not exists:
        values = _untrusted_recipe(source, repo, layers, teachers)
    elif (out / "manifest.json").is_file() and _same_run(Run.open(out).manifest, manifest):
        values = read_yaml(out / "recipe.yaml")
    else:
        raise UserError(f"{out} holds something else; choose another folder")
    recipe = validate(ProbeRunRecipe, apply_overrides(values, overrides), f"{repo}/recipe.yaml").with_absolute_paths()
    with disk_errors(out):
        if exists:
            write_text(out / "recipe.yaml", dump_recipe(recipe))
        else:
            with atomic_folder(out) as folder:
                _copy_run(source, folder, layers, teachers)
                write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
                write_text(folder / "recipe.yaml", dump_recipe(recipe))
    missing = [field for field, value in path_fields(recipe).items() if ELSEWHERE in value]
    if missing:
        paths = " ".join(f"{field}={'coco:' if field == 'data.path' else ''}DIR" for field in missing)
        logger.info("before evaluating, set paths; add to the same command: %s", paths)
    return Run.open(out)


def _download(repo: str, teachers: Sequence[str]) -> Path:
    """Returns a folder with the files of a published run, only with the probes of some teachers."""
    source = local_path(repo) if _is_folder(repo) else download(repo, [*published_patterns(teachers), *CARD])
    if not (source / "manifest.json").is_file() or not (source / "recipe.yaml").is_file():
        raise UserError(f"{repo} is no published run; give a folder or repository written by: probing push")
    return source


def _untrusted_recipe(source: Path, repo: str, layers: Sequence[str], teachers: Sequence[str]) -> dict[str, Any]:
    """Reads a published recipe; it must neither run code nor fill folders on this machine.

    Raises:
        UserError: the recipe is invalid, or a requested layer or teacher has no probes.
    """
    recipe = validate(ProbeRunRecipe, read_yaml(source / "recipe.yaml"), f"{repo}/recipe.yaml")
    recipe.backbone.trust_remote_code = False
    recipe.data.target_cache = "off"
    require_probes(repo, "teacher", teachers, recipe.teachers)
    recipe.teachers = {name: recipe.teachers[name] for name in teachers or recipe.teachers}
    for teacher in recipe.teachers.values():
        teacher.trust_remote_code = False
    configs = [read_json(source / "probes" / name / "config.json", f"push {repo} again") for name in recipe.teachers]
    require_probes(repo, "layer", layers, dict.fromkeys(layer for config in configs for layer in config["layers"]))
    if layers:
        recipe.layers = ",".join(layers)
    return recipe.model_dump(mode="json")


def _copy_run(source: Path, folder: Path, layers: Sequence[str], teachers: Sequence[str]) -> None:
    """Copies a published run and its card, only with the probes of some layers and teachers."""
    for file in [*_published_files(source, teachers), *(file for pattern in CARD for file in source.glob(pattern))]:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        bank = file.parent.parent.name
        if layers and bank == "probes" and file.name == "config.json":
            config = read_json(file, "push it again")
            config["layers"] = [layer for layer in config["layers"] if layer in layers]
            target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        elif layers and bank in ("probes", "ridge") and file.suffix == ".safetensors":
            tensors = {n: t for n, t in load_file(file).items() if (found := _LAYER.search(n)) and found[1] in layers}
            save_file(tensors, target, {"format": "pt"})
        else:
            shutil.copyfile(file, target)


def _is_folder(repo: str) -> bool:
    return looks_like_path(repo) or local_path(repo).exists()
