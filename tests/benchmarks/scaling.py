"""How time and disk grow with the number of images, and the speed-up by a second process.

    python -m tests.benchmarks.scaling

Growth: trains the toy world's probes on 1, 2, 4 and 8 times as many scenes, with the teachers' features cached; lines
are fitted to the seconds of the steps and to the bytes on disk. Processes: the same run by one process of one thread,
and by two, with the same global batch.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from probing.recipe import ProbeRunRecipe
from probing.training.run import train
from tests.benchmarks.sizes import SIZES

SCENES, TIMES = 128, (1, 2, 4, 8)
FIT = {"epochs": 1, "batch_size": 32, "micro_batch": 16, "workers": 0}


def bytes_in(folder: Path) -> int:
    """Size of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def line(times: list[int], values: list[float]) -> tuple[float, float, float]:
    """Slope per unit, intercept, and the share of variance that the line explains."""
    slope, intercept = np.polyfit(times, values, 1)
    rest = np.var(np.array(values) - (slope * np.array(times) + intercept))
    return float(slope), float(intercept), float(1 - rest / np.var(values))


def growth() -> None:
    """Prints seconds and megabytes by number of scenes, and the lines through them."""
    out, seconds, disk = sys.stdout.write, [], []
    out("scenes   seconds of the steps   MB of run and target cache\n")
    for times in TIMES:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            values = SIZES["toy"](root, SCENES * times)
            values["data"]["target_cache"] = str(root / "cache")
            run = train(ProbeRunRecipe.model_validate({**values, "fit": FIT}), root / "run")
            seconds.append(run.manifest["seconds"])
            disk.append((bytes_in(root / "run") + bytes_in(root / "cache")) / 1e6)
            out(f"{SCENES * times:6d} {seconds[-1]:22.1f} {disk[-1]:29.1f}\n")
            sys.stdout.flush()
    for name, values, unit in (("time", seconds, "s"), ("disk", disk, "MB")):
        slope, intercept, explained = line(list(TIMES), values)
        out(f"{name}: {intercept:.1f} + {slope:.1f} {unit} for every {SCENES} scenes, R² {explained:.4f}\n")


def seconds_of(processes: int, recipe: Path, out: Path) -> float:
    """Seconds of the steps of a run by some processes of one thread each."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*(launch if processes > 1 else [sys.executable]), "-m", "probing", "-q", "train"]
    command += ["--recipe", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found: float = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["seconds"]
    return found


def processes() -> None:
    """Prints the speed-up by a second process; the runs take turns, and the best of each counts."""
    out = sys.stdout.write
    for size, images, batch in (("toy", 512, 32), ("middle", 32, 8)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            values: dict[str, Any] = SIZES[size](root, images)
            fit = {**FIT, "batch_size": batch, "micro_batch": batch // 2, "ridge": False}
            recipe = root / "recipe.yaml"
            recipe.write_text(yaml.safe_dump({**values, "fit": fit, "controls": []}), encoding="utf-8")
            turns = [[seconds_of(count, recipe, root / f"run{turn}_{count}") for count in (1, 2)] for turn in range(3)]
            one, two = map(min, zip(*turns, strict=True))
            out(f"{size}: one process {one:.1f} s, two {two:.1f} s, ratio {one / two:.2f}\n")
            sys.stdout.flush()


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    growth()
    processes()


if __name__ == "__main__":
    main()
