"""Images a second that one CPU core decodes and prepares: the rate that `probing plan` assumes.

    python -m tests.benchmarks.reading

Pictures of COCO's sizes, squashed to squares; image processors of the sizes of LLaVA-1.5 and the paper's teachers.
Checkpoint and teachers share one decoding. Times are CPU time, so other work on the machine does not count.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401
from analysis.planning.plan import IMAGES_PER_CORE
from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches
from probing.models import load_backbone
from probing.recipe import BackboneRecipe, TeacherRecipe
from probing.teachers import load_teachers
from tests.benchmarks.coco_size import write_pictures
from tests.benchmarks.timing import TURNS
from tests.helpers import tiny

BATCH = 8


def core_seconds(work: Callable[[], object]) -> float:
    """Seconds of CPU time that a work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, cpu = Path(folder), torch.device("cpu")
        pictures = [jpeg.name for jpeg, _ in write_pictures(root / "pictures")]
        images = ImageList(root / "pictures", "pictures", pictures)
        tiny.llava(root / "llava", image=336, patch=14)
        tiny.depth_teacher(root / "depth", size=336)
        tiny.seg_teacher(root / "seg", size=800)
        tiny.gen_teacher(root / "gen", size=224)
        recipes = {name: TeacherRecipe(id=str(root / name)) for name in ("depth", "seg", "gen")}
        teachers = {name: one.prepare for name, one in load_teachers(recipes, cpu).items()}
        prepare = load_backbone(BackboneRecipe(checkpoint=str(root / "llava")), cpu).prepare
        plan = [[index % len(pictures) for index in range(BATCH)]]

        def batch(student: Any, teachers: dict[str, Any]) -> Any:
            dataset = MicroBatches(images, plan, student, teachers)
            return lambda: dataset[0]

        works = {
            "decoded and squashed": batch(None, {}),
            "checkpoint's input": batch(prepare, {}),
            "teachers' input": batch(None, teachers),
            "both": batch(prepare, teachers),
        }
        for name, work in works.items():
            rate = BATCH / min(core_seconds(work) for _ in range(TURNS))
            sys.stdout.write(f"{name:20s} {rate:6.0f} images a second and core\n")
        sys.stdout.write(f"assumed by probing plan {IMAGES_PER_CORE:3d}\n")


if __name__ == "__main__":
    main()
