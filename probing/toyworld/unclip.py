"""Trains the toy unCLIP with diffusers' pipeline, and a classifier whose features replace Inception's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import probing.utils.torchvision_shim  # noqa: F401
from probing.teachers.gen import GenDecoder
from probing.toyworld.scenes import BACKGROUNDS, COLOURS, FLOORS, MAX_SOLIDS, SHAPES, SIZE, Scenes, batches
from probing.toyworld.teachers import Quality, image_processor, pixels, save, train_loop

CHUNK = 200
"""Scenes per batch outside of training."""
EMBEDDING_DROPOUT, NOISED_FRACTION = 0.1, 0.5
"""Fractions of training embeddings that are dropped (for guidance), or noised (like a probe's output)."""
STEPS, GUIDANCE = 10, 2.0
"""Sampling settings of the toy pipeline: small images need fewer steps and less guidance."""


def train_unclip(encoder: Any, scenes: Scenes, held_out: Scenes, folder: Path, steps: tuple[int, int]) -> Quality:
    """Trains an autoencoder, and a diffusion model on its latents conditioned on the encoder's embedding.

    Args:
        encoder: the gen teacher's image encoder.
        scenes: training scenes.
        held_out: test scenes.
        folder: output folder of the `StableUnCLIPImg2ImgPipeline`.
        steps: optimiser steps of the autoencoder and of the diffusion model.

    Returns:
        Retrieval accuracy of 200 held-out scenes by the embedding of the image generated from them, and squared pixel
        errors of these images to their scene and to another.
    """
    import diffusers as d
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    autoencoder: Any = d.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48), norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False,
    )  # fmt: skip
    _train_autoencoder(autoencoder, scenes, steps[0])
    latents = _in_chunks(scenes, lambda part: autoencoder.encode(pixels(part)).latent_dist.mean)
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())
    embeds = _in_chunks(scenes, lambda part: encoder(pixels(part)).image_embeds)
    width = embeds.shape[1]
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=width)
    normalizer.mean.data, normalizer.std.data = embeds.mean(0, keepdim=True), embeds.std(0, keepdim=True)
    tokenizer, text_encoder = _empty_prompt_encoder()
    pipeline: Any = d.StableUnCLIPImg2ImgPipeline(
        feature_extractor=image_processor(), image_encoder=encoder, image_normalizer=normalizer,
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=tokenizer,
        text_encoder=text_encoder, vae=autoencoder,
        unet=d.UNet2DConditionModel(
            sample_size=latents.shape[-1], down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(32, 64), layers_per_block=1,
            cross_attention_dim=text_encoder.config.hidden_size, attention_head_dim=4, norm_num_groups=8,
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * width,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=d.DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
        ),
    )  # fmt: skip
    _train_diffusion(pipeline, latents * autoencoder.config.scaling_factor, embeds, steps[1])
    for part in (pipeline.unet, pipeline.vae):
        part.eval().to(memory_format=torch.contiguous_format)
    pipeline.save_pretrained(folder)
    return _evaluate(pipeline, held_out)


def _train_autoencoder(model: Any, scenes: Scenes, steps: int) -> None:
    model.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def compute_loss(batch: Scenes) -> Tensor:
        images = pixels(batch).contiguous(memory_format=torch.channels_last)
        latent = model.encode(images).latent_dist
        return F.l1_loss(model.decode(latent.sample()).sample, images) + 2e-7 * latent.kl().mean()

    train_loop("autoencoder", model.parameters(), batches(scenes, 16, steps, 0), compute_loss, steps, 2e-3)


def _train_diffusion(pipeline: Any, latents: Tensor, embeds: Tensor, steps: int) -> None:
    """Trains velocity prediction (Salimans & Ho, 2022, app. D); some embeddings are dropped, some noised."""
    batch, unet, schedule = 32, pipeline.unet, pipeline.scheduler
    unet.to(memory_format=torch.channels_last)
    text_states, _ = pipeline.encode_prompt([""] * batch, latents.device, 1, False)
    noise_levels = pipeline.image_noising_scheduler.config.num_train_timesteps

    def random_indices() -> Iterator[Tensor]:
        for _ in range(steps):
            yield torch.randint(len(latents), (batch,))

    def compute_loss(indices: Tensor) -> Tensor:
        clean = latents[indices].contiguous(memory_format=torch.channels_last)
        noise, time = torch.randn_like(clean), torch.randint(schedule.config.num_train_timesteps, (batch,))
        # Add noise like the pipeline: one low level for a part of the batch, none for the rest.
        level, part = int(torch.randint(noise_levels // 4, ())), round(NOISED_FRACTION * batch)
        condition = torch.cat(
            [
                pipeline.noise_image_embeddings(embeds[indices[:part]], level),
                pipeline.noise_image_embeddings(embeds[indices[part:]], 0),
            ]
        )
        condition = condition * (torch.rand(batch, 1) > EMBEDDING_DROPOUT)
        noised = schedule.add_noise(clean, noise, time)
        predicted = unet(noised, time, encoder_hidden_states=text_states, class_labels=condition).sample
        return F.mse_loss(predicted, schedule.get_velocity(clean, noise, time))

    train_loop("diffusion model", unet.parameters(), random_indices(), compute_loss, steps, 2e-3)


@torch.no_grad()
def _in_chunks(scenes: Scenes, encode: Any) -> Tensor:
    return torch.cat([encode(scenes[slice(i, i + CHUNK)]) for i in range(0, len(scenes), CHUNK)])


def _empty_prompt_encoder() -> tuple[Any, Any]:
    """Builds tokenizer and text encoder for the empty prompt, the only one used for decoding."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=2)
    config = CLIPTextConfig(
        vocab_size=2, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config).eval().requires_grad_(False)


@torch.no_grad()
def _evaluate(pipeline: Any, held_out: Scenes) -> Quality:
    part = held_out[slice(0, CHUNK)]
    true = pixels(part)
    embeds = pipeline.image_encoder(true).image_embeds
    generated = GenDecoder(pipeline, STEPS, GUIDANCE).decode(embeds, range(len(part)))
    images = torch.from_numpy(generated).permute(0, 3, 1, 2).float() / 127.5 - 1
    generated_embeds = pipeline.image_encoder(images).image_embeds
    nearest = (F.normalize(generated_embeds, dim=-1) @ F.normalize(embeds, dim=-1).T).argmax(1)
    return {
        "generated_r_at_1_of_200": float((nearest == torch.arange(len(part))).float().mean()),
        "generated_r_at_1_chance": 1 / len(part),
        "generated_mse": F.mse_loss(images, true).item(),
        "generated_mse_of_other_scenes": F.mse_loss(images.roll(1, dims=0), true).item(),
    }


def train_classifier(scenes: Scenes, held_out: Scenes, folder: Path, steps: int, seed: int = 0) -> Quality:
    """Trains a small ResNet to classify the content of scenes; `frechet_toy` compares its pooled features.

    Returns:
        Accuracy over its binary labels, and the accuracy of the majority answers.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        num_labels=_contents(held_out).shape[1],
    )  # fmt: skip
    model = ResNetForImageClassification(config)

    def compute_loss(batch: Scenes) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(pixels(batch)).logits, _contents(batch))

    train_loop("classifier", model.parameters(), batches(scenes, 64, steps, seed), compute_loss, steps, 3e-3)
    save(model, image_processor(), folder)
    with torch.no_grad():
        labels = _contents(held_out)
        accuracy = ((model(pixels(held_out)).logits > 0) == (labels > 0.5)).float().mean()
        majority = torch.maximum(labels.mean(0), 1 - labels.mean(0)).mean()
    return {"label_accuracy": float(accuracy), "label_accuracy_of_majority": float(majority)}


def _contents(scenes: Scenes) -> Tensor:
    """Returns binary labels (n, 39): shape × colour, number of solids, background, floor, colour of the nearest."""
    shape, colour = torch.from_numpy(scenes.shape).long(), torch.from_numpy(scenes.colour).long()
    exists = shape >= 0
    pairs = F.one_hot((shape * len(COLOURS) + colour).clamp(min=0), len(SHAPES) * len(COLOURS)) * exists[..., None]
    distance = torch.from_numpy(scenes.position[..., 1]).nan_to_num(torch.inf)
    nearest = colour.gather(1, distance.argmin(1, keepdim=True))[:, 0]
    one_of = (
        (torch.from_numpy(scenes.count).long() - 1, MAX_SOLIDS),
        (torch.from_numpy(scenes.background).long(), len(BACKGROUNDS)),
        (torch.from_numpy(scenes.floor).long(), len(FLOORS)),
        (nearest, len(COLOURS)),
    )
    return torch.cat([pairs.amax(1), *(F.one_hot(code, number) for code, number in one_of)], dim=1).float()
