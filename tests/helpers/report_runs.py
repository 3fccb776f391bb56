"""Evaluated runs made up from nothing, for the reports: tables, curves, pictures, differences."""

import json

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

COLUMNS = [
    *("checkpoint", "teacher", "layer", "probe", "control", "metric", "protocol", "variant", "split", "seed"),
    *("value", "ci_low", "ci_high", "n", "chance"),
]
OFFSETS = {("resampler", "none"): 0.5, ("resampler", "shuffled"): 0.02, ("ridge", "none"): 0.6}


def make_run(path, name="tiny", layers=12, random=0.3, width=0.01, final=True):
    """A run whose curves fall by 0.01 a layer from their offset."""
    places = [str(k) for k in range(layers + 1)] + (["final"] if final else [])
    offsets = dict(OFFSETS) | (
        {("resampler", "random"): random, ("ridge", "random"): random} if random is not None else {}
    )
    rows, convergence_rows = [], []
    for teacher in ("gen", "depth", "seg"):
        for metric, protocol, lift in (
            ("cosine", "strict", 0.3),
            ("cosine_centred", "strict", 0.0),
            ("cosine", "paper", 0.3),
        ):
            mean = 0.0 if metric == "cosine_centred" else lift + 0.1
            rows.append(
                [name, teacher, "", "constant", "mean", metric, protocol, "", "val2017", 0, mean, mean, mean, 50, ""]
            )
            for (probe, control), offset in offsets.items():
                for rank, layer in enumerate(reversed(places)):  # out of order on purpose
                    value = offset + lift - 0.01 * (len(places) - 1 - rank)
                    place = [name, teacher, layer, probe, control, metric, protocol, "", "val2017", 0]
                    rows.append([*place, value, value - width, value + width, 50, ""])
        convergence_rows += [
            {"control": "none", "teacher": teacher, "layer": layer, "seed": 0, "state": "flat"} for layer in places
        ]
    path.mkdir(parents=True)
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path / "results.csv", index=False)
    steps = np.arange(100)
    curves = [
        pd.DataFrame(
            {"control": "none", "teacher": t, "layer": k, "seed": 0, "step": steps, "loss": np.exp(-steps / 30)}
        )
        for t in ("depth", "seg", "gen")
        for k in places
    ]
    pd.concat(curves).to_csv(path / "learning_curves.csv", index=False)
    teacher = {"id": "org/teacher", "class": "Teacher", "shape": [4, 8], "licence": "MIT", "sha256": "x"}
    checkpoint = {
        "name": name,
        "path": "/models/x",
        "family": "llava",
        "sha256": "s",
        "layers": layers,
        "hidden_size": 8,
    }
    splits = {"train_split": "train2017", "eval_split": "val2017", "train_images": 9, "eval_images": 50}
    manifest = {
        "checkpoint": checkpoint,
        "prompt": "Describe",
        "teachers": {t: teacher for t in ("depth", "seg", "gen")},
        "data": {"path": "coco:x", "view": "square", **splits},
        "skipped": [{"image": "bad.jpg", "split": "train2017", "reason": "corrupt"}],
        "versions": {"torch": "2"},
        "fit": {"epochs": 1, "batch_size": 8, "steps": 100, "seeds": [0], "lr": 1e-3},
        "convergence": convergence_rows,
        "seconds": 1.0,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def add_rows(run, metric, protocol, teacher, rows, n=50, variant=""):
    """Adds (layer, probe, control, value, half width) of one metric to a run's table."""
    table = pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False)
    more = [
        ["tiny", teacher, layer, probe, control, metric, protocol, variant, "val2017", 0,
         value, value - width, value + width, n, ""]
        for layer, probe, control, value, width in rows
    ]  # fmt: skip
    pd.concat([table, pd.DataFrame(more, columns=COLUMNS)]).to_csv(run / "results.csv", index=False)


def decode(run):
    """Adds what is decoded: layer 1 is best in one metric, layer 2 in the other, where less is better."""
    for metric, protocol, teacher, values in (
        ("miou", "blind", "seg", (0.4, 0.45, 0.41, 0.43)),
        ("frechet_toy", "strict", "gen", (30.0, 21.0, 20.0, 20.5)),
    ):
        layers = zip(("0", "1", "2", "mean"), values, strict=True)
        rows = [(layer, "resampler", "none", value, 0.01) for layer, value in layers]
        rows += [("", "constant", "mean", 0.08, 0.0), ("", "target", "teacher", 0.52, 0.0)]
        add_rows(run, metric, protocol, teacher, rows)


def pictures(run, teacher, shape, dtype, layers):
    rng = np.random.default_rng(0)

    def some():
        values = rng.random((2, *shape)) * (1 if dtype == np.float16 else 5)
        return values.astype(dtype)

    photographs = rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    tensors = {"photograph": photographs, "target": some()}
    tensors = {f"image:{teacher}//{name}/teacher/picture/strict//0": value for name, value in tensors.items()}
    for layer in layers:
        tensors[f"image:{teacher}/{layer}/resampler/none/picture/strict//0"] = some()
    (run / "pictures").mkdir(exist_ok=True)
    save_pictures(run, teacher, tensors)


def save_pictures(run, teacher, tensors):
    names = [f"{index}.jpg" for index in range(len(next(iter(tensors.values()))))]
    metadata = {"pass": json.dumps({"names": names, "split": "val2017", "settings": ""})}
    save_file(tensors, run / "pictures" / f"{teacher}-val2017.safetensors", metadata)


def wide_pictures(run, layers=32, side=256, images=4, shift=0):
    """Pictures as large and as many as a real run has them: smooth, and other at every layer and checkpoint."""
    y, x = np.mgrid[0:side, 0:side] / side
    columns = np.arange(images)[:, None, None]
    photograph = 127 + 120 * np.stack([np.sin(9 * x + k + columns) * np.cos(7 * y - k) for k in range(3)], axis=-1)
    (run / "pictures").mkdir(exist_ok=True)

    def drawn(teacher, phase):
        waves = np.sin(5 * x + 0.2 * phase + columns) * np.cos(6 * y + 0.1 * phase * columns)
        if teacher == "depth":
            return waves.astype(np.float16)
        if teacher == "seg":
            return (3 * (waves + 1) + 2 * np.sin(20 * x * y + phase)).clip(0, 9).astype(np.uint8)
        colour = [np.sin(8 * x + 6 * y * (k + 1) + 0.3 * phase + columns) for k in range(3)]
        return (127 + 90 * np.stack(colour, axis=-1) * waves[..., None]).astype(np.uint8)

    for teacher in ("depth", "seg", "gen"):
        stem = f"image:{teacher}//{{}}/teacher/picture/strict//0"
        tensors = {stem.format("photograph"): photograph.astype(np.uint8), stem.format("target"): drawn(teacher, -1)}
        for probe in ("resampler", "ridge"):
            for layer in range(layers + 1):
                phase = layer + shift + 7 * (probe == "ridge")
                tensors[f"image:{teacher}/{layer}/{probe}/none/picture/strict//0"] = drawn(teacher, phase)
        save_pictures(run, teacher, tensors)


def make_differences(names, layers=12):
    """What `probing compare` would hand over of such runs, numbers apart; every pair once."""
    rows = []
    for one, reference in enumerate(names):
        for two in range(one + 1, len(names)):
            for teacher in ("depth", "gen", "seg"):
                for probe in ("resampler", "ridge"):
                    for metric, protocol in (("cosine", "strict"), ("cosine_centred", "strict"), ("cosine", "paper")):
                        for rank, layer in enumerate([*map(str, range(layers + 1)), "final", "mean"]):
                            value = 0.01 * (two - one) * (1 + rank / 7) - 0.004 * rank
                            place = [names[two], reference, teacher, layer, probe, metric, protocol, "", "val2017"]
                            rows.append([*place, value, value - 0.005, value + 0.007, 50, "1, 1", ""])
    columns = [*("checkpoint", "reference", "teacher", "layer", "probe", "metric", "protocol", "variant", "split")]
    return pd.DataFrame(rows, columns=[*columns, "value", "ci_low", "ci_high", "n", "seeds", "higher"])
