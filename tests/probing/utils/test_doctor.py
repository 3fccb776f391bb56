"""What `probing doctor` finds, and that it calls broken what is broken."""

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from probing.cli import cli
from probing.utils import doctor

ROOT = Path(__file__).parents[3]


def broken() -> list[str]:
    return [finding.text for finding in doctor.examine() if finding.level == "broken"]


def test_this_machine_is_usable_and_the_hub_is_not_asked_when_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "ask_hub", lambda seconds: pytest.fail("asked"))
    done = CliRunner().invoke(cli, ["doctor"], catch_exceptions=False)
    assert done.exit_code == 0 and done.output.endswith("usable\n"), done.output
    for word in ("torch ", "cores", "diffusers", "HF_HUB_OFFLINE", "GB free"):
        assert word in done.output


@pytest.mark.parametrize(
    ("package", "there", "said"),
    [
        ("torch", "2.99.0", "torchvision needs torch==2.13.0, 2.99.0 is installed; type: pip install 'torch==2.99.0'"),
        ("transformers", "4.57.0", "mllm-probing needs transformers<6,>=5.17, 4.57.0 is installed; type: pip install"),
        ("timm", None, "timm<2,>=1.0.20, not installed; type: pip install 'timm<2,>=1.0.20'"),
    ],
)
def test_versions_that_do_not_fit_are_named_with_what_to_type(monkeypatch, package, there, said):
    real, asked = importlib.metadata.version, importlib.metadata.requires

    def version(name):
        if name != package:
            return real(name)
        if there is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return there

    def requires(name):  # of torchvision as of this torch; CPU builds of others may ask for something else
        return ["torch (==2.13.0)"] if name == "torchvision" else asked(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = [finding.text for finding in doctor._requirements()]
    assert any(said in text for text in found), found


def test_a_library_that_does_not_import_is_broken_and_the_command_ends_with_2(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from probing.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stdout
    assert "broken" in done.stdout and "torchvision cannot be imported (operator torchvision::nms" in done.stdout
    assert done.stderr.startswith("probing: 1 of these must be mended") and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLLM_PROBING_CACHE", str(tmp_path / "file"))
    assert any("set MLLM_PROBING_CACHE to" in text for text in broken())


def test_a_hub_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(doctor, "ask_hub", lambda seconds: answered.wait() and "answers")
    (found,) = doctor._hub()
    answered.set()  # only now could the Hub have answered
    assert found.level == "note" and "does not answer" in found.text
