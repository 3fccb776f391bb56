"""Trains the toy LLaVA: a vision tower by captioning, an LLM on text, then PT and IFT."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import probing.utils.torchvision_shim  # noqa: F401
from probing.data.coco import read_image
from probing.distillation.recipe import DistillRecipe
from probing.distillation.trainer import run_stage
from probing.models import load_backbone
from probing.models.generate import ask
from probing.recipe import BackboneRecipe
from probing.toyworld.language import CHAT_TEMPLATE, KINDS, caption, make_tokenizer
from probing.toyworld.scenes import SIZE, Scenes, batches
from probing.toyworld.teachers import PATCH, image_processor, init_position_embeddings, pixels, train_loop
from probing.utils.files import atomic_folder

logger = logging.getLogger(__name__)

CHOICES = ("size", "side", "nearer")
"""Kinds of questions that name two possible answers: chance is one half."""


@dataclass(frozen=True)
class Schedule:
    """Optimiser steps of each part."""

    tower: int = 900
    text: int = 300
    pt: int = 250
    ift: int = 900


def build(layers: int, width: int, projector: str, seed: int) -> tuple[Any, Any]:
    """Builds an untrained LLaVA and its processor; `projector` is the activation between its two layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, image_size=SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
            eos_token_id=3,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1, projector_hidden_act=projector,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    init_position_embeddings(model.model.vision_tower.embeddings)
    processor = LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    return model, processor


def train_tower(scenes: Scenes, steps: int, seed: int = 0) -> Any:
    """Trains a CLIP vision tower by captioning through a small LLM, which is discarded.

    Captioning yields patch tokens with local information (Tschannen et al., 2023, arXiv:2306.07915); a contrastive loss
    on few scenes yields hardly any.
    """
    model, processor = build(layers=2, width=96, projector="gelu", seed=seed)
    tokenizer = processor.tokenizer
    n_patches = (SIZE // PATCH) ** 2
    image_token = model.config.image_token_id

    def compute_loss(batch: Scenes) -> torch.Tensor:
        captions = [caption(batch, index) + "</s>" for index in range(len(batch))]
        ids = tokenizer(captions, return_tensors="pt", padding=True)["input_ids"]
        inputs = torch.cat([torch.full((len(batch), n_patches), image_token), ids], dim=1)
        labels = inputs.masked_fill((inputs == image_token) | (inputs == 0), -100)
        attention = (inputs != 0).long()
        return model(input_ids=inputs, attention_mask=attention, pixel_values=pixels(batch), labels=labels).loss

    train_loop("vision tower", model.parameters(), batches(scenes, 64, steps, seed), compute_loss, steps, 2e-3)
    return model.model.vision_tower.eval()


def make_tower(scenes: Scenes, folder: Path, steps: int, seed: int = 0) -> Path:
    """Trains the vision tower that all checkpoints share; reuses an existing one."""
    if not (folder / "config.json").exists():
        with atomic_folder(folder) as part:
            train_tower(scenes, steps, seed).save_pretrained(part)
    return folder


def make_base_checkpoint(world: Path, tower: Path, folder: Path, schedule: Schedule, seed: int = 0) -> Path:
    """Trains the starting point of all checkpoints: an LLM on text, with the tower and an untrained projector.

    Tower (one narrow block) and projector (linear, as the first LLaVA's) leave it to the LLM to combine patches. A
    non-linear projector, even a random one, computes functions of a patch that a linear probe then finds at layer 0.

    Args:
        world: folder of `write_world`, for the texts.
        tower: folder of `make_tower`.
        folder: output folder for `untrained/` and `text/`, each a LLaVA folder; the latter is returned.
        schedule: optimiser steps.
        seed: seed of LLM, projector and the order of the texts.
    """
    from transformers import CLIPVisionModel

    untrained = folder / "untrained"
    if not (untrained / "config.json").exists():
        model, processor = build(layers=8, width=128, projector="linear", seed=seed + 1)
        model.model.vision_tower = CLIPVisionModel.from_pretrained(tower)
        with atomic_folder(untrained) as part:
            model.save_pretrained(part)
            processor.save_pretrained(part)
    return _stage(world, "text.json", untrained, folder / "text", "ift", schedule.text, 2e-3, seed)


def make_llava(
    world: Path,
    base: Path,
    folder: Path,
    schedule: Schedule,
    seed: int = 0,
    extra_fields: dict[str, Any] | None = None,
) -> Path:
    """Trains stages pt and ift.

    Args:
        world: folder of `write_world`, for the conversations.
        base: folder of `make_base_checkpoint`.
        folder: output folder for `pt/` and `ift/`, each a LLaVA folder; the latter is returned.
        schedule: optimiser steps.
        seed: seed of the order of the conversations and of new weights.
        extra_fields: further fields of the recipe of stage pt: `embedding` or `encoders`.
    """
    pretrained = _stage(world, "pt.json", base, folder / "pt", "pt", schedule.pt, 2e-3, seed, extra_fields)
    return _stage(world, "ift.json", pretrained, folder / "ift", "ift", schedule.ift, 1e-3, seed)


def _stage(
    world: Path, file: str, source: Path, out: Path, kind: str, steps: int, lr: float, seed: int,
    extra_fields: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    recipe = {
        "checkpoint": str(source), "stage": kind, "max_steps": steps, "lr": lr, "batch_size": 32, "micro_batch": 32,
        "data": {"conversations": str(world / file), "image_root": str(world)}, "workers": 1, "warmup": 0.05,
        "save_steps": 10_000, "seed": seed,
        "trainer": {"report_to": "none"}, **(extra_fields or {}),
    }  # fmt: skip
    logger.info("%s, %s", out.parent.name, out.name)
    return run_stage(DistillRecipe.model_validate(recipe), out)


def answer_accuracy(
    checkpoint: Path, world: Path, split: str = "val2017", limit: int = 600
) -> dict[str, dict[str, float]]:
    """Scores greedy one-word answers to questions about held-out scenes.

    Args:
        checkpoint: LLaVA folder, with one or several encoders.
        world: folder of `write_world`.
        split: split of the scenes.
        limit: maximal number of questions.

    Returns:
        By kind of question, and for all: accuracy, chance (the most common answer, or one half if the question names
        two) and the number of questions.
    """
    recipe = BackboneRecipe(checkpoint=str(checkpoint), dtype="float32")
    backbone = load_backbone(recipe, torch.device("cpu"), with_head=True)
    lines = (world / f"questions_{split}.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    questions = [json.loads(line) for line in lines]
    correct: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    answers: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for first in range(0, len(questions), 64):
        batch = questions[first : first + 64]
        images = [read_image(world / question["image"]) for question in batch]
        predictions = ask(backbone, recipe, images, [question["question"] for question in batch], most=1)
        for question, word in zip(batch, predictions, strict=True):
            correct[question["kind"]].append(word == question["answer"])
            answers[question["kind"]].append(question["answer"])
    result = {}
    for kind in (kind for kind in KINDS if correct[kind]):
        majority = max(answers[kind].count(answer) for answer in set(answers[kind])) / len(answers[kind])
        result[kind] = {
            "accuracy": sum(correct[kind]) / len(correct[kind]),
            "chance": 0.5 if kind in CHOICES else majority,
            "n": len(correct[kind]),
        }
    total = sum(row["n"] for row in result.values())
    result["all"] = {
        name: sum(row[name] * row["n"] for row in result.values()) / total for name in ("accuracy", "chance")
    } | {"n": total}
    return result
