"""Trains the toy teachers: real model classes in small configurations, minutes on two CPU cores.

Each function trains one model, saves it with its image processor, and returns its quality on held-out scenes, with the
score of a trivial baseline.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401
from probing.toyworld.language import caption, make_tokenizer
from probing.toyworld.layout import depth_pairs
from probing.toyworld.scenes import CLASSES, SHAPES, SIZE, Scenes, batches
from probing.training.schedule import learning_rate
from probing.utils.progress import Progress

logger = logging.getLogger(__name__)

Quality = dict[str, float]
PATCH = 8
"""Pixels per patch: all teachers and the tower have 6 x 6 patches."""
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def pixels(scenes: Scenes) -> Tensor:
    """Returns normalised images (n, 3, 48, 48), like the saved image processors."""
    return torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_loop(
    name: str,
    parameters: Iterable[nn.Parameter],
    data: Iterable[Any],
    compute_loss: Callable[[Any], Tensor],
    steps: int,
    lr: float,
) -> float:
    """Trains with AdamW, warm-up and cosine decay.

    Returns:
        Mean loss of the last tenth of the steps.
    """
    trainable = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, fused=True)
    losses = []
    with Progress(name, steps) as progress:
        for step, batch in enumerate(data):
            loss = compute_loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, 0.05)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            progress.advance(f"loss {losses[-1]:.3f}")
    return float(np.mean(losses[-max(steps // 10, 1) :]))


def save(model: Any, processor: Any, folder: Path) -> None:
    """Saves a model and its image processor."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


def train_depth(scenes: Scenes, held_out: Scenes, folder: Path, steps: int, seed: int = 0) -> Quality:
    """Trains Depth Anything with a tiny DINOv2 on exact inverse depth.

    Every other step feeds the last feature to all four inputs of the neck, as when a probe's output is decoded.
    """
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(seed)
    backbone = Dinov2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4, image_size=SIZE, patch_size=PATCH,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=PATCH, reassemble_hidden_size=64, neck_hidden_sizes=[16, 32, 48, 64],
        fusion_hidden_size=32, head_hidden_size=16,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config)
    grid = SIZE // PATCH
    step = 0

    def predict(images: Tensor, replicated: bool) -> Tensor:
        maps = list(model.backbone(images).feature_maps)
        states = model.neck([maps[-1]] * 4 if replicated else maps, grid, grid)
        return model.head(states, grid, grid)

    def compute_loss(batch: Scenes) -> Tensor:
        nonlocal step
        step += 1
        return F.l1_loss(predict(pixels(batch), step % 2 == 0), 5 * torch.from_numpy(batch.inverse_depth))

    train_loop("depth teacher", model.parameters(), batches(scenes, 32, steps, seed), compute_loss, steps, 2e-3)
    save(model, DPTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD), folder)
    quality: Quality = {}
    with torch.no_grad():
        for name, replicated in (("pairs", False), ("pairs_from_last_feature", True)):
            quality[name] = _pair_accuracy(held_out, predict(pixels(held_out), replicated).numpy())
    rows = np.broadcast_to(np.arange(SIZE, dtype=np.float32)[:, None], (len(held_out), SIZE, SIZE))
    return quality | {"pairs_from_image_row": _pair_accuracy(held_out, rows)}


def _pair_accuracy(scenes: Scenes, maps: np.ndarray[Any, Any]) -> float:
    """Returns the share of depth pairs whose closer point has the larger value; ties count half."""
    rng, scores = np.random.default_rng(0), []
    for index in range(len(scenes)):
        for pair in depth_pairs(scenes, index, rng):
            first, second = (maps[index][tuple(pair[name])] for name in ("point1", "point2"))
            correct = first > second if pair["closer_point"] == "point1" else second > first
            scores.append(0.5 if first == second else float(correct))
    return float(np.mean(scores))


def train_seg(scenes: Scenes, held_out: Scenes, folder: Path, steps: int, seed: int = 0) -> Quality:
    """Trains OneFormer with a tiny Swin on its matching loss and a per-pixel loss on the last stage.

    The per-pixel head is discarded; it puts the segmentation into the last stage, the probes' target.
    """
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation, OneFormerImageProcessor, SwinConfig

    torch.manual_seed(seed)
    swin = SwinConfig(
        image_size=SIZE, patch_size=1, embed_dim=16, depths=[1, 1, 2, 2], num_heads=[1, 2, 4, 4], window_size=6,
        drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = OneFormerConfig(
        backbone_config=swin, num_queries=10, hidden_dim=64, mask_dim=64, conv_dim=64, encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4, encoder_feedforward_dim=128, dim_feedforward=128, text_encoder_width=64,
        text_encoder_num_layers=1, text_encoder_context_length=16, text_encoder_vocab_size=64, task_seq_len=16,
        train_num_points=256, use_auxiliary_loss=False, is_training=False,
        id2label=dict(enumerate(CLASSES)), label2id={name: code for code, name in enumerate(CLASSES)},
    )  # fmt: skip
    model = OneFormerForUniversalSegmentation(config)
    head = nn.Conv2d(8 * swin.embed_dim, len(CLASSES) * PATCH**2, 1)
    task = torch.zeros(1, config.task_seq_len, dtype=torch.long)
    step = 0

    def dense(feature: Tensor) -> Tensor:
        return F.pixel_shuffle(head(feature), PATCH)

    def without_early_stages(_: nn.Module, __: Any, output: Any) -> Any:
        """Replaces early stages by their means, as when a probe's output is decoded."""
        early = [m.mean((0, 2, 3), keepdim=True).detach().expand_as(m) for m in output.feature_maps[:-1]]
        output.feature_maps = (*early, output.feature_maps[-1])
        return output

    def compute_loss(batch: Scenes) -> Tensor:
        nonlocal step
        step += 1
        images, labels = pixels(batch), torch.from_numpy(batch.semantic).long()
        encoder = model.model.pixel_level_module.encoder
        loss = F.cross_entropy(dense(encoder(images).feature_maps[-1]), labels)
        if step % 2:  # the matching loss is expensive: every other step, on a part of the batch
            part = slice(0, 8)
            masks = [F.one_hot(label, len(CLASSES)).permute(2, 0, 1).float() for label in labels[part]]
            classes = [mask.flatten(1).any(1).nonzero()[:, 0] for mask in masks]
            present = [mask[c] for mask, c in zip(masks, classes, strict=True)]
            hook = encoder.register_forward_hook(without_early_stages) if step % 4 == 3 else contextlib.nullcontext()
            with hook:
                output = model(images[part], task_inputs=task.expand(8, -1), mask_labels=present, class_labels=classes)
            loss = loss + 0.1 * output.loss.squeeze()
        return loss

    parameters = [*model.parameters(), *head.parameters()]
    train_loop("seg teacher", parameters, batches(scenes, 32, steps, seed), compute_loss, steps, 2e-3)
    info = {str(c): {"isthing": int(c < len(SHAPES)), "name": name} for c, name in enumerate(CLASSES)}
    (folder / "class_info.json").write_text(json.dumps(info), encoding="utf-8")
    processor = OneFormerImageProcessor(
        class_info_file="class_info.json", repo_path=str(folder), size={"height": SIZE, "width": SIZE}, num_text=4,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    # The names are in the processor's metadata by now; a path would bind the model to this folder.
    processor.repo_path = processor.class_info_file = None  # type: ignore[assignment]
    save(model, processor, folder)
    padding_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        images, sizes = pixels(held_out), [(SIZE, SIZE)] * len(held_out)
        encoder = model.model.pixel_level_module.encoder
        feature = encoder(images).feature_maps[-1]

        def decoded() -> Tensor:
            output = model(images, task_inputs=task.expand(len(images), -1))
            maps: Any = processor.post_process_semantic_segmentation(output, sizes)
            return torch.stack(maps)

        whole = decoded()
        with encoder.register_forward_hook(without_early_stages):
            last = decoded()
        mean = dense(feature.mean(0, keepdim=True)).argmax(1).expand_as(whole)
        return {
            "miou": _miou(whole, held_out),
            "miou_from_last_stage": _miou(last, held_out),
            "miou_last_stage_head": _miou(dense(feature).argmax(1), held_out),
            "miou_of_mean_feature": _miou(mean, held_out),
        }


def padding_tokenizer() -> Any:
    """Builds the tokenizer of a OneFormer with a single task: every word is padding."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )


def _miou(predicted: Tensor, scenes: Scenes) -> float:
    """Returns the mean IoU from one confusion matrix over all scenes."""
    true = torch.from_numpy(scenes.semantic).long().flatten()
    table = torch.bincount(true * len(CLASSES) + predicted.flatten(), minlength=len(CLASSES) ** 2).view(
        len(CLASSES), -1
    )
    intersection = table.diagonal()
    return float((intersection / (table.sum(0) + table.sum(1) - intersection).clamp(min=1)).mean())


def train_gen(scenes: Scenes, held_out: Scenes, steps: int, seed: int = 0) -> tuple[Any, Quality]:
    """Trains a CLIP image encoder on a contrastive loss with captions and on image reconstruction.

    Only the encoder is returned, for the unCLIP pipeline.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=48, projection_dim=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model, text_encoder = CLIPVisionModelWithProjection(vision), CLIPTextModelWithProjection(text)
    init_position_embeddings(model.vision_model.embeddings)
    decoder = nn.Sequential(
        nn.Linear(64, 96 * 9), nn.GELU(), nn.Unflatten(1, (96, 3, 3)),
        *(layer for a, b in ((96, 64), (64, 48), (48, 32)) for layer in (nn.ConvTranspose2d(a, b, 4, 2, 1), nn.GELU())),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
    )  # fmt: skip
    scale = nn.Parameter(torch.tensor(2.5))

    def embed(batch: Scenes) -> tuple[Tensor, Tensor]:
        captions = [caption(batch, index) + "</s>" for index in range(len(batch))]
        tokens = tokenizer(captions, return_tensors="pt", padding=True)
        tokens.pop("token_type_ids", None)
        return model(pixels(batch)).image_embeds, text_encoder(**tokens).text_embeds

    def compute_loss(batch: Scenes) -> Tensor:
        image, text_embeds = embed(batch)
        logits = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text_embeds, dim=-1).T
        matches = torch.arange(len(batch))
        contrastive = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
        return 0.2 * contrastive + 2 * F.mse_loss(decoder(image), pixels(batch))

    parameters = [*model.parameters(), *text_encoder.parameters(), *decoder.parameters(), scale]
    train_loop("gen teacher", parameters, batches(scenes, 64, steps, seed), compute_loss, steps, 2e-3)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        part = held_out[slice(0, 200)]
        image, text_embeds = embed(part)
        logits = F.normalize(image, dim=-1) @ F.normalize(text_embeds, dim=-1).T
        return model, {
            "caption_r_at_1_of_200": float((logits.argmax(1) == torch.arange(len(part))).float().mean()),
            "caption_r_at_1_chance": 1 / len(part),
            "reconstruction_mse": F.mse_loss(decoder(image), pixels(part)).item(),
            "reconstruction_mse_of_mean_image": F.mse_loss(
                pixels(scenes).mean(0).expand(len(part), -1, -1, -1), pixels(part)
            ).item(),
        }


def image_processor() -> Any:
    """Builds the CLIP preprocessing of the toy models."""
    from transformers import CLIPImageProcessor

    square = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square, image_mean=MEAN, image_std=STD)


def init_position_embeddings(embeddings: Any) -> None:
    """Initialises CLIP's position embeddings with 2-D sines (Vaswani et al., 2017, sec. 3.5, per axis).

    With random embeddings a tiny tower learns positions slowly, and probes stay at the mean target.
    """
    table = embeddings.position_embedding.weight
    width, side = table.shape[1], SIZE // PATCH
    rate = torch.exp(-torch.arange(width // 4) * (4.0 / (width // 4)))
    angle = torch.arange(side)[:, None] * rate * np.pi / 2
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    plane = torch.cat([axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)], dim=2)
    with torch.no_grad():
        table[1:] = 0.3 * plane.flatten(0, 1)
        table[0] = 0
