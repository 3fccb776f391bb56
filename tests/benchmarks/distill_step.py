"""What embedding losses add to a training step of stage pt.

    python -m tests.benchmarks.distill_step

Both steps are forward and backward of the same LLaVA on the same conversations; one has the losses of three tasks at
two layers each, with targets already computed (as from a cache), the other next-token prediction alone.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import AutoModelForImageTextToText, AutoProcessor

from probing.data.conversations import Conversation, ConversationDataset, Encoder, collate
from probing.distillation.losses import EmbeddingLoss
from probing.distillation.model import DistillationModel
from probing.distillation.predictors import EmbeddingPredictors, Task
from probing.distillation.recipe import EmbeddingRecipe
from probing.distillation.special_tokens import SpecialTokens, add_special_tokens
from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher
from tests.benchmarks.timing import best_in_turns
from tests.helpers import tiny

BATCH, BLOCKS, HIDDEN = 16, 16, 256


def make_step(root: Path, embedding: bool) -> Callable[[], None]:
    """One step, with embedding losses or without."""
    checkpoint = tiny.llava(root / "llava", layers=BLOCKS, hidden=HIDDEN, image=96)
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    recipes = {
        "gen": TeacherRecipe(id=str(tiny.gen_teacher(root / "gen", projection=64))),
        "depth": TeacherRecipe(id=str(tiny.depth_teacher(root / "depth", width=64, size=84))),
        "seg": TeacherRecipe(id=str(tiny.seg_teacher(root / "seg")), grid=12),
    }
    teachers = {name: load_teacher(name, recipe, torch.device("cpu")) for name, recipe in recipes.items()}
    auxiliary, special = [], None
    if embedding:
        tasks = [Task(name, (BLOCKS // 4, BLOCKS * 5 // 8), 0.5, teacher.shape) for name, teacher in teachers.items()]
        ids = add_special_tokens(processor, model, list(teachers), 8)
        predictors = EmbeddingPredictors(tasks, HIDDEN, EmbeddingRecipe(teachers=recipes))
        auxiliary = [EmbeddingLoss(predictors, teachers, 0.3, model.config.image_token_id, ids)]
        special = SpecialTokens(ids, model.get_input_embeddings(), predictors.special_rows)
    trainee = DistillationModel(model, "pt", auxiliary, special).train()
    turns = (("user", "Describe the image."), ("assistant", "a red cube on the left of a green sphere, before a wall"))
    conversations = [Conversation(str(k), (f"{k}.png",), turns, (1, 0)) for k in range(BATCH)]
    for k in range(BATCH):
        Image.new("RGB", (96, 96), (k * 16, 90, 255 - k * 16)).save(root / f"{k}.png")
    encoder = Encoder(processor, model.config.image_token_id, 4096)
    prepare = {name: teacher.prepare for name, teacher in teachers.items()}
    samples = ConversationDataset(conversations, root, encoder, True, prepare)
    batch = collate([samples[k] for k in range(BATCH)], processor.tokenizer.pad_token_id)
    for loss in auxiliary:
        loss.prepare([batch], torch.device("cpu"), 1)
    for name in ("names", "teacher_pixels", "target_rows"):
        batch.pop(name, None)

    def step() -> None:
        trainee(**batch)["loss"].backward()
        trainee.zero_grad(set_to_none=True)

    step()
    return step


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as folder:
        steps = {"plain": make_step(Path(plain), False), "embedding": make_step(Path(folder), True)}
        times = best_in_turns(steps)
    out = sys.stdout.write
    plain, embedding = times["plain"], times["embedding"]
    out(f"next token alone {plain:.0f} ms, with embedding losses {embedding:.0f} ms, ratio {embedding / plain:.2f}\n")


if __name__ == "__main__":
    main()
