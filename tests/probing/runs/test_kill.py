"""Commands killed before any change to their files resume to the results of an uninterrupted run."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from analysis.alignment import run as align
from probing.cli import main
from probing.toyworld.layout import write_world
from tests.helpers import tiny, warm

KILLS = 4
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
"""Python's audit events, in addition to files opened for writing."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def command(arguments: list[str], log: Path, moment: int, counted: Path) -> None:
    """`python -m probing …`, with what it says in a file; killed before its change number `moment` to any file."""
    warm.detach(log)
    align.SAVE_MINUTES = 0.0  # the others' recipes say so
    sys.argv = ["probing", *arguments]
    changes = 0

    def count(event: str, values: tuple[object, ...]) -> None:
        nonlocal changes
        written = event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (written or event in CHANGES) and str(values[0]).startswith(str(log.parent)):
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    main()
    counted.write_text(str(changes))


class Killer:
    """Runs a command again and again, and kills it before changes to its files that are drawn by chance.

    Attributes:
        changes: files that the command creates, renames or removes when nobody disturbs it.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.context, self.folder, self.random = warm.context(), folder, random.Random(seed)
        self.kills = self.survived = self.changes = 0

    def _start(self, arguments: list[object], moment: int = 0) -> int | None:
        """Runs the command; returns its exit code, negative where it was killed."""
        log, counted = self.folder / "log.txt", self.folder / "changes.txt"
        process = self.context.Process(target=command, args=(list(map(str, arguments)), log, moment, counted))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        return process.exitcode

    def finish(self, arguments: list[object]) -> None:
        """Lets the command run to its end."""
        assert self._start(arguments) == 0
        self.changes = self.changes or int((self.folder / "changes.txt").read_text())

    def survive(self, arguments: list[object]) -> None:
        """Kills the command, and starts it again, until it is done or there were kills enough."""
        while self.kills < KILLS:
            if self._start(arguments, self.random.randint(1, self.changes)) == 0:
                break
            self.kills += 1
        else:
            self.finish(arguments)
        self.survived += 1

    def outs(self, folder: Path) -> Iterator[Path]:
        """A new folder for every time that the command gets to its end before it is killed for the last time."""
        while self.kills < KILLS:
            yield folder / str(self.survived)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but TensorBoard's, without times; those being written when a process was killed are among them."""
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in ("manifest.json", "training.json"):
        if name in files:
            values = {k: v for k, v in json.loads(files[name]).items() if k not in ("seconds", "finished", *TIMED)}
            files[name] = json.dumps(values).encode()
    return {name: value for name, value in files.items() if not name.startswith(("runs/", "tensorboard/"))}


TIMED = ("rendered_at", "log", "final_loss")
"""Of a stage; the log has a line every few steps that this process took, with seconds."""


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory) -> Path:
    """A run that saves its state after every step, and a state of its evaluation after every batch."""
    folder = tmp_path_factory.mktemp("recipe")
    values = {
        "backbone": {"checkpoint": str(models["llava"])},
        "data": {"path": f"coco:{tiny.coco(folder / 'coco', val=24)}"},
        "teachers": {"depth": {"id": str(models["depth"])}, "gen": {"id": str(models["gen"])}},
        "layers": "0,3",
        "fit": {"epochs": 4, "batch_size": 4, "micro_batch": 2, "workers": 0, "save_minutes": 0},
        "controls": ["shuffled", "random"],
    }
    (folder / "coco" / "val2017" / "000000000017.jpg").write_bytes(b"broken")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> tuple[Path, int]:
    """An uninterrupted run, and the number of its file changes."""
    folder = tmp_path_factory.mktemp("whole")
    killer = Killer(folder, 0)
    killer.finish(["train", "--recipe", recipe, "--out", folder / "run"])
    return folder / "run", killer.changes


def test_train(recipe, whole, tmp_path):
    run, changes = whole
    killer, expected = Killer(tmp_path, 1), contents(run)
    killer.changes = changes
    for out in killer.outs(tmp_path):
        killer.survive(["train", "--recipe", recipe, "--out", out])
        assert contents(out) == expected


def test_evaluate(whole, tmp_path):
    controls = [f"--control={control}" for control in ("none", "shuffled", "random", "blank")]
    shutil.copytree(whole[0], tmp_path / "whole")
    killer = Killer(tmp_path, 2)
    killer.finish(["evaluate", tmp_path / "whole", *controls])
    expected = contents(tmp_path / "whole")
    assert "000000000017.jpg" in expected["manifest.json"].decode()
    for out in killer.outs(tmp_path):
        shutil.copytree(whole[0], out)
        killer.survive(["evaluate", out, *controls])
        files = contents(out)
        for name in [name for name in files if Path(name).name.startswith(".")]:
            del files[name]  # for an hour it may belong to another process
        assert files == expected


def test_align(models, tmp_path):
    world = write_world(tmp_path / "world", 2, 6, seed=4)
    teachers = [f"--teacher={name}={models[name]}" for name in ("depth", "gen")]
    arguments = ["align", models["llava"], f"--data=coco:{world}", *teachers, "micro_batch=1", "workers=0", "sample=3"]
    killer = Killer(tmp_path, 4)
    killer.finish([*arguments, "--out", tmp_path / "whole"])
    expected = contents(tmp_path / "whole")
    assert {"scores/alignment-val2017.safetensors", "pictures/patches.safetensors"} <= expected.keys()
    for out in killer.outs(tmp_path / "outs"):
        killer.survive([*arguments, "--out", out])
        assert contents(out) == expected


def test_distill(models, tmp_path):
    data = tiny.conversations(tmp_path / "data", 10)
    (data / "3.png").write_bytes(b"broken")
    values = {
        "checkpoint": str(models["llava"]),
        "stage": "ift",
        "data": {"conversations": str(data / "data.json"), "image_root": str(data)},
        "embedding": {"teachers": {"depth": {"id": str(models["depth"])}}, "layers": {"depth": "2"}, "seek": 4},
        **{"batch_size": 2, "micro_batch": 1, "workers": 0, "max_steps": 8, "save_steps": 1},
        "trainer": {"use_cpu": True, "lr_scheduler_type": "constant"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    killer, arguments = Killer(tmp_path, 3), ["distill", tmp_path / "recipe.yaml", "--out"]
    killer.finish([*arguments, tmp_path / "whole"])
    expected = contents(tmp_path / "whole")
    assert "3.png" in expected["training.json"].decode()
    for out in killer.outs(tmp_path / "outs"):
        killer.survive([*arguments, out])
        assert contents(out) == expected
    assert {path.name for path in (tmp_path / "outs").iterdir()} == set(map(str, range(killer.survived)))
