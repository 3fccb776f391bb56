"""Machines without home, with another locale, or with unwritable folders."""

import ast
import errno
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.evaluation.generated_images.features import Extractor, reference_features
from probing.data.coco import ImageList
from probing.utils import cache_dir
from probing.utils.environment import SPIN_COUNT, prepare_environment
from probing.utils.errors import UserError
from probing.utils.files import disk_errors
from tests.helpers.cli import error_line

ROOT = Path(__file__).parents[3]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(*arguments: object, cwd: Path = ROOT, drop: tuple[str, ...] = (), **environment: str):
    inherited = {name: value for name, value in os.environ.items() if name not in drop}
    command = [sys.executable, "-m", "probing", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT)]))
    return subprocess.run(command, cwd=cwd, env=inherited | environment | {"PYTHONPATH": path}, capture_output=True)


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user without HOME and without an entry in the password file."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for name in ("HOME", "USER", "XDG_CACHE_HOME", "MLLM_PROBING_CACHE"):
        monkeypatch.setenv(name, "")  # so that it comes back
        monkeypatch.delenv(name)


def test_any_locale_accepts_unicode_paths_and_text(models, tmp_path):
    folder = tmp_path / "modèle 漢"
    shutil.copytree(models["llava"], folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{# é 漢 #}", encoding="utf-8")
    done = start("inspect", folder, **ASCII, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    shown = done.stdout.decode(errors="replace").splitlines()[0]
    assert "modèle 漢" in shown or r"mod\xe8le \u6f22" in shown


def test_missing_home_moves_caches_to_temporary_folder(homeless, tmp_path):
    with pytest.raises(RuntimeError):
        Path.home()
    assert cache_dir.cache_folder().is_relative_to(tmp_path / "temporary")
    prepare_environment()
    assert Path.home().is_dir() and cache_dir.cache_folder() == Path.home() / ".cache" / "mllm-probing"


def test_training_without_home_creates_none(models, coco, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef unknown(uid):\n    raise KeyError(uid)\npwd.getpwuid = unknown\n", encoding="utf-8"
    )
    (tmp_path / "work").mkdir()
    small = ["fit.batch_size=6", "fit.micro_batch=6", "fit.workers=0", "fit.epochs=1", "layers=0"]
    arguments = ["train", "--checkpoint", models["llava"], "--data", f"coco:{coco}", "--target-cache", "auto"]
    done = start(
        *[*arguments, f"--teacher=gen={models['gen']}", "--out", "run", *small],
        cwd=tmp_path / "work", drop=("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "MLLM_PROBING_CACHE"),
        PYTHONPATH=str(tmp_path), TMPDIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["run"]
    assert list(tmp_path.glob("home-*/.cache/mllm-probing/features/gen-*/targets.bin"))


@pytest.mark.parametrize("where", ["auto", "{file}/cache"])
def test_unwritable_target_cache_is_named(recipe_values, monkeypatch, tmp_path, where):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLLM_PROBING_CACHE", str(tmp_path / "file"))
    recipe_values["data"]["target_cache"] = where.format(file=tmp_path / "file")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values), encoding="utf-8")
    message = error_line("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert str(tmp_path / "file") in message and "--out" not in message
    assert ("MLLM_PROBING_CACHE" if where == "auto" else "give another folder") in message


def test_unwritable_photograph_cache_is_named(coco, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLLM_PROBING_CACHE", str(tmp_path / "file"))
    names = sorted(path.name for path in (coco / "val2017").iterdir())[:2]
    images = ImageList(coco / "val2017", "val2017", names)

    class Constant(Extractor):
        def features(self, images):
            return np.zeros((len(images), 2), dtype=np.float32)

    with pytest.raises(UserError, match=f"{tmp_path / 'file'}.*cannot be written.*set MLLM_PROBING_CACHE"):
        reference_features(Constant("constant", 8, lambda images: None, "x", ("fid", "kid")), images)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize(
    ("name", "advice"),
    [("out/a/b", "choose another --out"), ("out", "choose another --out"), ("elsewhere/cache/x", "HF_HOME")],
)
def test_unwritable_folder_is_named(tmp_path, number, name, advice):
    file = tmp_path / name
    with (
        pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}.* cannot be written.*{advice}"),
        disk_errors(tmp_path / "out"),
    ):
        raise OSError(number, os.strerror(number), str(file))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_spin_count_is_set_unless_the_user_decides(monkeypatch, variables, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONUTF8", "1")
    prepare_environment()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_text_files_are_opened_as_utf8():
    """Lists the calls that open text without an encoding."""
    calls = []
    for file in (file for package in ("probing", "analysis", "reports") for file in (ROOT / package).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
            opens = name in ("read_text", "fdopen", "NamedTemporaryFile", "FileHandler")
            opens |= name == "write_text" and owner != ""
            opens |= name == "open" and owner not in ("Image", "Run", "os", "webbrowser")
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args)
            if opens and not binary and "encoding" not in [keyword.arg for keyword in call.keywords]:
                calls.append(f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert not calls, calls
