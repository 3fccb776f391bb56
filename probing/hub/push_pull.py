"""`probing push` and `probing pull`: a run's probes and numbers in a repository of the Hub, or in a plain folder.

What analysis and reports know of a run (scores, card) is handed in, because neither is known here.
"""

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from probing.hub.sanitize import (
    CARD,
    PUBLISHED,
    clean_copy,
    elsewhere,
    foreign,
    holds,
    published_files,
    require_banks,
    require_clean,
)
from probing.hub.subset import Part, choose, copy_part, part_of_manifest
from probing.recipe import ProbeRunRecipe, apply_overrides, dump_recipe, read_yaml, validate
from probing.runs.directory import SPEED_ONLY, Run, members
from probing.utils.errors import UserError, first_line
from probing.utils.files import LOST, disk_errors, reading, require_space, whole_folder, write_text
from probing.utils.paths import local_path, looks_like_path

logger = logging.getLogger(__name__)

SAYS = ("*.json", "*.yaml", "*.csv", "*.md")
"""Files of a repository that say what is in it."""
MAY_CHANGE = re.compile(
    r"teachers\.\w+\.id|backbone\.(checkpoint|base|vision_tower|device_map|trust_remote_code)|data\.path"
)
"""Fields that whoever pulls a run may set besides those of speed: where things lie, which moves no number."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def push(path: Path, repo: str, card: Callable[[Path, str], None], private: bool = False, api: Any = None) -> str:
    """Publishes a finished, evaluated run; what is there is replaced as a whole, where it is the same run.

    Args:
        path: the run.
        repo: folder, or USER/NAME on the Hub, which is made where there is none.
        card: writes README.md and figures into the folder that it is given, which holds what will be published; it is
            also given what the run is to be called.
        private: of a repository that is made.
        api: what speaks to the Hub; by default `huggingface_hub.HfApi`.

    Returns:
        Where it is.

    Raises:
        UserError: there is no such run, something else is in the way, the Hub cannot be reached or refuses, or a file
            would name a folder of this machine.
    """
    if members(path):
        raise UserError(f"{path} is a folder of runs; push them one by one: {', '.join(map(str, members(path)[:4]))}")
    run = Run.open(path)
    require_banks(path, choose(path, str(path)).teachers, LOST)
    if not (path / "results.csv").is_file():
        raise UserError(f"{path} has no results yet, which its card would show; type: probing evaluate {path}")
    if _is_folder(repo):
        return str(_push_to_folder(run, local_path(repo), card))
    api = api or _hub_api()
    with _reaching(repo, "or give a folder, as ./NAME"):
        there = _entries(api, repo)
        if there:
            _require_same(run, Path(api.snapshot_download(repo, allow_patterns=["manifest.json"])), repo, there)
    with tempfile.TemporaryDirectory(prefix="probing-push-") as temporary, disk_errors(Path(temporary)):
        folder = Path(temporary)
        clean_copy(run, folder, link=True)
        card(folder, repo)
        require_clean(folder, run)
        with _reaching(repo, "then push again"):
            place = api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Probes of {run.manifest['checkpoint']['name']}",
                delete_patterns=[*PUBLISHED, *(f"{name}*" for name in CARD)],
            )
    return str(place)


def _push_to_folder(run: Run, target: Path, card: Callable[[Path, str], None]) -> Path:
    own, other = run.path.resolve(), target.resolve()
    if own == other or own in other.parents or other in own.parents:
        raise UserError(f"{target} and the run {run.path} lie in one another; give another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; give another folder")
    there = [path.name for path in target.iterdir()] if target.exists() else []
    if there:
        for name in foreign(there):
            raise UserError(f"{target} holds something else ({name}), which a push would remove; give another folder")
        _require_same(run, target, str(target), there)
    with disk_errors(target):
        require_space(target, sum((run.path / file).stat().st_size for file in published_files(run.path)))
        with whole_folder(target) as folder:
            clean_copy(run, folder)
            card(folder, target.name)
            require_clean(folder, run)
    return target


def _require_same(run: Run, folder: Path, repo: str, there: Sequence[str]) -> None:
    if not holds(folder, run.manifest):
        what = "another run" if (folder / "manifest.json").is_file() else f"something else ({sorted(there)[0]})"
        raise UserError(f"{repo} holds {what}; push to another, or empty it first")


def pull(
    repo: str,
    out: Path,
    results: Callable[[Path, Path, Part], None],
    layers: Sequence[str] = (),
    teachers: Sequence[str] = (),
    overrides: Sequence[str] = (),
    api: Any = None,
) -> Run:
    """Makes a run of what was pushed, or of some layers and teachers of it.

    Args:
        repo: folder, or USER/NAME on the Hub.
        out: folder of the run. One that holds the same part of the same run is kept, and told the overrides.
        results: copies results and scores of a part, from one folder to another.
        layers: names of layers; by default all.
        teachers: by default all.
        overrides: `KEY=VALUE`: where checkpoint, data and teachers lie on this machine.
        api: what speaks to the Hub; by default `huggingface_hub.HfApi`.

    Returns:
        The run. Where its recipe still names folders of another machine, that is logged.

    Raises:
        UserError: there is no such repository, or no bank in it, or none that can be read here, or not what was asked
            for; the Hub cannot be reached; or `out` holds something else.
    """
    source, part = _fetch(repo, layers, teachers, api)
    again = f"whoever pushed {repo} must push it again"
    with reading(source / "manifest.json", again):
        manifest = part_of_manifest(json.loads((source / "manifest.json").read_text(encoding="utf-8")), part)
        lacking = {"checkpoint", "teachers", "data", "prompt", "fit", "versions", "skipped"} - manifest.keys()
        if lacking:
            raise ValueError(f"there is no {sorted(lacking)[0]}")
        values = read_yaml(source / "recipe.yaml")
    require_banks(source, part.teachers, again)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not out.is_dir() or not (out / "recipe.yaml").is_file() or not holds(out, manifest):
            raise UserError(f"{out} holds something else, or another part of the run; choose another folder")
        recipe = _recipe(read_yaml(out / "recipe.yaml"), overrides, str(out / "recipe.yaml"))
        logger.info("%s is there already", out)
        with disk_errors(out):
            write_text(out / "recipe.yaml", dump_recipe(recipe))
    else:
        with reading(source / "recipe.yaml", again):
            if not part.whole:
                values["layers"] = ",".join(part.layers)
                values["teachers"] = {name: values["teachers"][name] for name in part.teachers}
            _distrust(values)
        recipe = _recipe(values, overrides, f"{repo}, recipe.yaml")
        with disk_errors(out):
            require_space(out, sum((source / file).stat().st_size for file in published_files(source)))
            with whole_folder(out) as folder:
                copy_part(source, folder, part)
                results(source, folder, part)
                write_text(folder / "recipe.yaml", dump_recipe(recipe))
                write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    for field, name in elsewhere(recipe.model_dump(mode="json")):
        like = "coco:DIR" if field == "data.path" else "DIR"
        logger.info("to say where %r lies on this machine, add to the same command: %s=%s", name, field, like)
    return Run.open(out)


def _fetch(repo: str, layers: Sequence[str], teachers: Sequence[str], api: Any) -> tuple[Path, Part]:
    """A folder with what is asked for, and what that is; from the Hub come the tensors of the chosen teachers alone."""
    if _is_folder(repo):
        source = local_path(repo)
        if not source.is_dir():
            raise UserError(f"no folder {repo}; give one that probing push wrote, or USER/NAME on the Hub")
        _require_bank(source, repo)
        return source, choose(source, repo, layers, teachers)
    api = api or HfApi()
    with _reaching(repo, "or give a folder, as ./NAME"):
        source = Path(api.snapshot_download(repo, allow_patterns=list(SAYS)))
    _require_bank(source, repo)
    part = choose(source, repo, layers, teachers)
    patterns = [*SAYS, "mean_targets.safetensors", "scores/*", *(["figures/*"] if part.whole else [])]
    patterns += [f"*/{teacher}/*" for teacher in part.teachers]
    commit = source.name if _COMMIT.fullmatch(source.name) else None  # both parts of one state
    with _reaching(repo, "then pull again"):
        return Path(api.snapshot_download(repo, allow_patterns=patterns, revision=commit)), part


def _require_bank(source: Path, repo: str) -> None:
    missing = [name for name in ("manifest.json", "recipe.yaml") if not (source / name).is_file()]
    missing += [] if any(source.glob("probes/*/config.json")) else ["probes/TEACHER/config.json"]
    if missing:
        raise UserError(f"{repo} is no probe bank: it has no {missing[0]}; give what probing push RUN REPO wrote")


def _distrust(values: dict[str, Any]) -> None:
    """What others may not decide: that their code is run here, and which folders are filled."""
    if values["backbone"].pop("trust_remote_code", False):
        logger.warning("the run was made with backbone.trust_remote_code=true, which is off here until you set it")
    for name in ("target_cache", "tower_cache"):
        values["data"].pop(name, None)


def _recipe(values: dict[str, Any], overrides: Sequence[str], source: str) -> ProbeRunRecipe:
    """A published recipe with what is said of this machine."""
    for override in overrides:
        field = override.partition("=")[0]
        if "=" in override and not MAY_CHANGE.fullmatch(field) and field not in SPEED_ONLY:
            raise UserError(
                f"{field} stands as the run was made; what can be set is where things lie (backbone.checkpoint, "
                f"data.path, teachers.NAME.id), backbone.device_map, and {', '.join(SPEED_ONLY)}"
            )
        if field.startswith("teachers.") and field.split(".")[1] not in values.get("teachers", {}):
            raise UserError(f"{field}: that teacher is not in the run; it has {', '.join(values.get('teachers', {}))}")
    return validate(ProbeRunRecipe, apply_overrides(values, overrides), source).with_absolute_paths()


def _is_folder(repo: str) -> bool:
    return looks_like_path(repo) or local_path(repo).exists()


def _hub_api() -> Any:
    """The Hub, for writing; raises UserError where nobody is logged in."""
    if not get_token():
        raise UserError("no token of the Hub; log in with: hf auth login, or set HF_TOKEN; a folder is given as ./NAME")
    return HfApi()


def _entries(api: Any, repo: str) -> list[str]:
    """Files of a repository, but for the one that the Hub itself puts into every one; none where it does not exist."""
    try:
        return [name for name in api.list_repo_files(repo) if name != ".gitattributes"]
    except RepositoryNotFoundError:
        return []


@contextlib.contextmanager
def _reaching(repo: str, instead: str) -> Iterator[None]:
    """Turns whatever the Hub's client raises into one line.

    Raises:
        UserError: in place of it.
    """
    from huggingface_hub.errors import HTTPError  # of whichever client the library is built on

    try:
        yield
    except HFValidationError as error:
        raise UserError(
            f"{repo!r} is no name of a repository ({first_line(error)}); write USER/NAME or ./NAME"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"{repo} lies on the Hub, and HF_HUB_OFFLINE is set; unset it, {instead}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no repository {repo} on the Hub, or only for those who may see it; mend the name, log in with: "
            f"hf auth login, {instead}"
        ) from None
    except LocalEntryNotFoundError:
        raise UserError(f"the Hub cannot be reached, and {repo} was not pulled before; mend that, {instead}") from None
    except EntryNotFoundError as error:
        raise UserError(f"{repo} lacks a file: {first_line(error)}; it is no probe bank of probing push") from None
    except HfHubHTTPError as error:
        raise UserError(f"the Hub refuses ({first_line(error)}); mend that, {instead}") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"the Hub cannot be reached ({first_line(error)}); mend that, {instead}") from None
