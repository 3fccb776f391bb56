"""Numbers of a small whole run and of three checkpoint families, compared with those stored in `tests/golden/`.

They hold while code is moved, renamed or rewritten. After a change that moves numbers on purpose, store them anew:

    python -m tests.test_golden

It prints which values are new and which are gone, whatever their keys: after columns are renamed, none should be. On
one machine with one torch the files are the same to the last bit, so that `git diff tests/golden` shows any change.

The tests allow for other processors, whose kernels sum in another order. SSE in place of AVX2 moves scores of probes
and states by less than 1e-6, and kernel distances over eight images by 6e-5 of their value.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401
from analysis.benchmarks.compare import compare_answers
from analysis.evaluation.compare import compare
from probing.cli import cli
from probing.models import load_backbone
from probing.recipe import BackboneRecipe
from probing.toyworld.cvbench import write_cvbench
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.toyworld.scenes import generate
from tests.helpers import tiny
from tests.helpers.original import original

GOLDEN = Path(__file__).parent / "golden"
NUMBERS = ["value", "ci_low", "ci_high", "n", "chance"]
"""Columns that are compared; all others together are a row's key."""
TOLERANCE = 5e-4
"""Absolute, and relative."""
CHECKPOINTS = ("llava", "ola")
FAMILIES = {
    "llava": tiny.llava,
    "llava_next": tiny.llava_next,
    "ola": lambda path: original(path, special=8, kind="probe_dsg_llava_llama", headers=True) and path,
}


def run_verbs(folder: Path) -> dict[str, pd.DataFrame]:
    """Trains, evaluates, aligns, benchmarks and compares two checkpoints of the toy world; returns the tables."""
    world, questions = write_world(folder / "world", 24, 16, seed=5), folder / "questions"
    write_cvbench(questions, generate(6, 6), 6)
    data, float32 = f"coco:{world}", "backbone.dtype=float32"
    teachers = [f"--teacher={name}={ASSETS / name}" for name in ("depth", "seg", "gen")]
    for name in CHECKPOINTS:
        run, checkpoint = folder / "probes" / name, ASSETS / name
        _invoke(
            "train", "--checkpoint", checkpoint, "--data", data, *teachers, "--layers=0,3,6", "--control=random",
            "--out", run, float32, "fit.epochs=1", "fit.batch_size=4", "fit.micro_batch=4", "fit.lr=0.003",
            "fit.workers=0", "fit.report_to=none",
        )  # fmt: skip
        _invoke("evaluate", run, "--metric=cosine", "--micro-batch=8", "--control=none", "--control=shuffled",
                "--control=random", "--control=blank")  # fmt: skip
        _invoke(
            "evaluate", run, "--metric=da2k", "--metric=miou", "--metric=frechet", "--da2k", world / "da2k",
            "--extractor", ASSETS / "toy", "--steps=2", "--guidance=2", "--layers=6", "--images=8", "--micro-batch=8",
            "--control=none", "--pictures=0",
        )  # fmt: skip
        _invoke(
            "align", checkpoint, "--data", data, teachers[0], "--layers=0,3,6", "--out", folder / "align" / name,
            float32, "workers=0", "sample=4", "pictures=0",
        )  # fmt: skip
        _invoke(
            "bench", checkpoint, "--benchmark=cvbench", "--data", questions, "--out", folder / "bench" / name,
            float32, "suffix=null", "max_new_tokens=2", "micro_batch=16",
        )  # fmt: skip
    results = [
        pd.read_csv(folder / kind / name / "results.csv", keep_default_na=False, dtype={"layer": str})
        for kind in ("probes", "align", "bench")
        for name in CHECKPOINTS
    ]
    runs = {kind: [folder / kind / name for name in CHECKPOINTS] for kind in ("probes", "align", "bench")}
    differences = [
        compare(runs["probes"], CHECKPOINTS),
        compare(runs["align"], CHECKPOINTS),
        compare_answers(runs["bench"], CHECKPOINTS),
    ]
    return {"results": pd.concat(results), "differences": pd.concat(differences)}


def _invoke(*arguments: object) -> None:
    result = CliRunner().invoke(cli, ["--quiet", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def describe_states(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Mean, norm and four entries of every layer's states, of tiny random checkpoints of three families."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 72, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1].transpose(1, 0, 2))]
    described: dict[str, dict[str, list[float]]] = {}
    for name, make in FAMILIES.items():
        recipe = BackboneRecipe(checkpoint=str(make(folder / name / "checkpoint")))
        states, tokens = load_backbone(recipe, torch.device("cpu")).hidden_states(images, "all,final")
        described[name] = {f"tokens: {kind}": [float(count)] for kind, count in tokens.counts().items()}
        for layer, state in states.items():
            flat = state.double().flatten()
            entries = flat[:: len(flat) // 4][:4]
            described[name][str(layer)] = [float(flat.mean()), float(flat.norm()), *entries.tolist()]
    return described


def by_key(table: pd.DataFrame) -> dict[str, list[float]]:
    """Numbers of each row, by its other columns."""
    numbers = [column for column in NUMBERS if column in table]
    rows = {
        " | ".join(str(value) for name, value in row.items() if name not in numbers): row[numbers].tolist()
        for _, row in table.iterrows()
    }
    assert len(rows) == len(table), "two rows have the same key"
    return {
        key: [float(number or "nan") if isinstance(number, str) else float(number) for number in row]
        for key, row in sorted(rows.items())
    }


def assert_same(found: dict[str, list[float]], name: str) -> None:
    """Asserts that keys are those stored in a file, and numbers close to them."""
    stored = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    assert list(found) == list(stored)
    for key, numbers in found.items():
        np.testing.assert_allclose(numbers, stored[key], rtol=TOLERANCE, atol=TOLERANCE, err_msg=key)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return run_verbs(tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results", "differences"])
def test_toy_run_gives_stored_numbers(tables, name):
    assert_same(by_key(tables[name]), name)


def test_hidden_states_of_families_are_as_stored(tmp_path):
    assert_same(flat(describe_states(tmp_path)), "states")


def flat(described: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """One level of keys in place of two."""
    return {f"{outer}, {inner}": row for outer, rows in described.items() for inner, row in rows.items()}


def main() -> None:
    """Writes the stored numbers again, and prints the values that are new and those that are gone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: by_key(table) for name, table in run_verbs(Path(folder)).items()}
        found["states"] = flat(describe_states(Path(folder) / "families"))
    for name, rows in found.items():
        file = GOLDEN / f"{name}.json"
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        before, now = (sorted(map(tuple, each.values()), key=repr) for each in (stored, rows))
        print(f"{name}: {len(now)} rows", {"new": _without(now, before), "gone": _without(before, now)})  # noqa: T201
        file.parent.mkdir(exist_ok=True)
        text = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
        file.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def _without(rows: list[tuple[float, ...]], others: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Rows that no other row equals to 1e-6."""
    return [
        row
        for row in rows
        if not any(len(row) == len(o) and np.allclose(row, o, rtol=1e-6, atol=1e-9, equal_nan=True) for o in others)
    ]


if __name__ == "__main__":
    main()
