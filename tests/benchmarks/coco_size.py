"""COCO at its real size: seconds and memory of the commands until their first step.

    python -m tests.benchmarks.coco_size

A folder in COCO's official layout has as many images, objects, segments and captions as train2017 and val2017; its
images are hard links to a few files, so that they need little disk. Models are tiny. Each command runs in a separate
process, which ends after the first step (16 images), or after all of `plan`. Memory is the peak beyond that of the same
command on a tiny COCO.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401
from tests.benchmarks.timing import best_in_turns
from tests.helpers import tiny

COCO = {"train2017": (118_287, 860_001, 591_753), "val2017": (5_000, 36_781, 25_014)}
"""Images, objects and captions by split."""
TINY = {"train2017": (32, 232, 160), "val2017": (32, 232, 160)}
SEGMENTS = 11
"""Per image of the panoptic annotations: 1.3 million of train2017."""
POINTS = (6, 41)
"""Fewest and most points of a polygon; with 23 on average, the file is as long as COCO's, 0.45 GB."""
CROWDS = 100
"""One in this many objects is a crowd, with run lengths instead of polygons."""
SIZES = [(640, 480), (480, 640), (640, 427), (640, 360)]
BATCH = 16
MOST_SECONDS, MOST_MB = 20, 2000


def write_pictures(folder: Path) -> list[tuple[Path, Path]]:
    """Writes one JPEG and one panoptic PNG of each size; the JPEGs are of about 160 kB, as COCO's."""
    rng, written = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for index, (width, height) in enumerate(SIZES):
        coarse = rng.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 16, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
        right = np.arange(width) - width // 2  # the first segment covers the left half; ids are R + 256 G
        segment = 1 + np.maximum(0, 2 * SEGMENTS * right // width)
        colours = np.stack([segment, segment, np.zeros_like(segment)], axis=-1).astype(np.uint8)
        Image.fromarray(np.broadcast_to(colours, (height, width, 3)).copy()).save(folder / f"{index}.png")
        written.append((folder / f"{index}.jpg", folder / f"{index}.png"))
    return written


def outlines(count: int = 64) -> list[str]:
    """Polygons as COCO writes them."""
    rng = np.random.default_rng(1)
    return [
        json.dumps([rng.uniform(0, 360, 2 * rng.integers(*POINTS)).round(2).tolist()]) for _ in range(count)
    ]  # fmt: skip


def crowd(width: int, height: int, runs: int = 200) -> str:
    """Uncompressed run lengths that fill an image."""
    ends = np.sort(np.random.default_rng(2).choice(width * height - 1, runs - 1, replace=False) + 1)
    counts = np.diff(ends, prepend=0, append=width * height).tolist()
    return json.dumps({"counts": counts, "size": [height, width]})


def write_list(file: Path, whole: dict[str, Any], lists: dict[str, Iterator[str]]) -> None:
    """Writes an annotation file whose long lists are text already, one entry after the other."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"info": {"year": 2017}, "licenses": [], **whole})[:-1])
        for name, entries in lists.items():
            stream.write(f', "{name}": [' + next(entries))
            stream.writelines(f", {entry}" for entry in entries)
            stream.write("]")
        stream.write("}")


def write_coco(root: Path, counts: dict[str, tuple[int, int, int]]) -> Path:
    """Writes images and all three kinds of annotations in COCO's official layout."""
    pictures, polygons, crowds = write_pictures(root / "pictures"), outlines(), [crowd(*size) for size in SIZES]
    segments = ", ".join(
        f'{{"id": {257 * number}, "category_id": {number}, "iscrowd": 0, "bbox": [413, 158, 53, 138], "area": 2840}}'
        for number in range(1, SEGMENTS + 1)
    )
    categories = [{"id": n, "name": f"thing {n}", "supercategory": "thing", "isthing": 1} for n in range(1, 134)]
    (root / "annotations").mkdir()
    for first, (split, (images, objects, captions)) in enumerate(counts.items()):
        folders = root / split, root / "annotations" / f"panoptic_{split}"
        for folder in folders:
            folder.mkdir()
        ids = range(1 + 200_000 * first, 1 + 200_000 * first + images)
        for number, identity in enumerate(ids):
            for folder, picture in zip(folders, pictures[number % len(pictures)], strict=True):
                os.link(picture, folder / f"{identity:012d}{picture.suffix}")

        def listed(ids: range = ids) -> Iterator[str]:
            for number, identity in enumerate(ids):
                width, height = SIZES[number % len(SIZES)]
                yield (
                    f'{{"license": 4, "file_name": "{identity:012d}.jpg", "coco_url": '
                    f'"http://images.example.org/train2017/{identity:012d}.jpg", "height": {height}, "width": {width}, '
                    '"date_captured": "2013-11-14 17:02:52", "flickr_url": '
                    f'"http://farm7.example.org/6116/{identity:010d}_da26cf2c9e_z.jpg", "id": {identity}}}'
                )

        def instances(ids: range = ids, total: int = objects) -> Iterator[str]:
            for number in range(total):
                image = number * len(ids) // total
                outline = polygons[number % len(polygons)] if number % CROWDS else crowds[image % len(SIZES)]
                yield (
                    f'{{"segmentation": {outline}, "area": {702.1057499999998 + number % 977}, '
                    f'"iscrowd": {int(number % CROWDS == 0)}, "image_id": {ids[image]}, '
                    f'"bbox": [473.07, 395.93, 38.65, 28.67], "category_id": {number % 80 + 1}, "id": {number + 1}}}'
                )

        def panoptic(ids: range = ids) -> Iterator[str]:
            for identity in ids:
                yield f'{{"segments_info": [{segments}], "file_name": "{identity:012d}.png", "image_id": {identity}}}'

        def texts(ids: range = ids, total: int = captions) -> Iterator[str]:
            for number in range(total):
                image = ids[number * len(ids) // total]
                yield (
                    f'{{"image_id": {image}, "id": {number + 1}, '
                    '"caption": "A man with a red helmet on a small moped on a dirt road."}'
                )

        for kind, entries in (("instances", instances()), ("panoptic", panoptic()), ("captions", texts())):
            whole = {} if kind == "captions" else {"categories": categories[: 80 if kind == "instances" else None]}
            file = root / "annotations" / f"{kind}_{split}.json"
            write_list(file, whole, {"images": listed(), "annotations": entries})
    return root


def without_panoptic(root: Path, out: Path) -> Path:
    """The same COCO with instances alone."""
    (out / "annotations").mkdir(parents=True)
    for split in COCO:
        (out / split).symlink_to(root / split)
        (out / "annotations" / f"instances_{split}.json").symlink_to(root / "annotations" / f"instances_{split}.json")
    return out


def run_to_first_step(arguments: Sequence[str]) -> None:
    """Runs a `probing` command in this process; ends it after the first step."""
    from probing.cli import main
    from probing.utils.progress import Progress

    def end(*_: object) -> None:
        sys.stdout.write("\n" + json.dumps([time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        sys.stdout.flush()
        os._exit(0)

    Progress.advance = end  # type: ignore[method-assign]
    sys.argv = ["probing", *arguments]
    main()
    end()


def measure(arguments: Sequence[object]) -> tuple[float, float]:
    """Seconds and peak MB of a command to its first step."""
    command = [sys.executable, "-m", "tests.benchmarks.coco_size", "--run", *map(str, arguments)]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    end, peak = json.loads(done.stdout.splitlines()[-1])
    return end - start, peak


def commands(root: Path, coco: Path) -> dict[str, list[object]]:
    """The commands on one COCO, by name; trains what `evaluate` needs on a few of its images."""
    teachers = {name: {"id": str(root / name)} for name in ("depth", "seg", "gen")}
    fit = {"epochs": 1, "batch_size": BATCH, "micro_batch": BATCH, "workers": 0, "report_to": "none"}
    values = {"backbone": {"checkpoint": str(root / "llava")}, "data": {"path": f"coco:{coco}"}}
    recipe, run, instances = (coco.parent / f"{coco.name}_{name}" for name in ("recipe.yaml", "run", "instances"))
    recipe.write_text(yaml.safe_dump({**values, "teachers": teachers, "fit": fit, "controls": []}), encoding="utf-8")
    train = ["train", "--recipe", recipe, "--out"]
    limited = [*train, run, f"data.train_limit={BATCH}"]
    subprocess.run([sys.executable, "-m", "probing", "-q", *map(str, limited)], check=True, capture_output=True)

    def align(data: Path, split: str, out: str) -> list[object]:
        paths = ["align", root / "llava", "--data", f"coco:{data}", "--out", coco.parent / f"{coco.name}_{out}"]
        return [*paths, f"data.eval_split={split}", "workers=0", f"sample={BATCH}", f"micro_batch={BATCH}"]

    return {
        "plan": ["plan", recipe],
        "train": [*train, coco.parent / f"{coco.name}_new"],
        "evaluate": ["evaluate", run],
        "align": align(coco, "val2017", "align"),
        "align, train2017, panoptic": align(coco, "train2017", "panoptic"),
        "align, train2017, instances": align(without_panoptic(coco, instances), "train2017", "objects"),
    }


def gflops() -> float:
    """GFLOP/s of a 1024 x 576 x 1536 product in float32."""
    one, two = torch.randn(1024, 576), torch.randn(576, 1536)
    return 2 * 1024 * 576 * 1536 / 1e6 / best_in_turns({"product": lambda: one @ two}, seconds=3)["product"]


def main() -> None:
    """Prints a row for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_to_first_step(options.run)
        return
    out = sys.stdout.write
    out(f"{gflops():.0f} GFLOP/s in float32\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("llava", "depth_teacher", "seg_teacher", "gen_teacher"):
            getattr(tiny, name)(root / name.removesuffix("_teacher"))
        small, large = (commands(root, write_coco(root / name, n)) for name, n in (("small", TINY), ("large", COCO)))
        out("command                       seconds  on a tiny COCO  MB beyond that\n")
        for name in small:
            least, base = measure(small[name])
            seconds, peak = measure(large[name])
            above = " (above the target)" if seconds > MOST_SECONDS or peak - base > MOST_MB else ""
            out(f"{name:28s} {seconds:8.1f} {least:15.1f} {peak - base:15.0f}{above}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
