"""A checkpoint of which we know where the information is: its weights are set by hand, in the real classes.

Every patch of an image shows four bits, which are -1 or 1. The teacher's feature of a patch is the product of the first
two and that of the last two: no linear map of the bits predicts it. One block of the LLM computes the products at the
image tokens, a later one moves their mean to the text, and a still later one erases them from the image tokens. The
answer depends on the text alone.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import probing.utils.torchvision_shim  # noqa: F401
from probing.toyworld.language import CHAT_TEMPLATE, NUMBERS, make_tokenizer
from probing.toyworld.scenes import SIZE
from probing.toyworld.teachers import PATCH, image_processor
from probing.utils.files import atomic_folder

GRID, BITS, PRODUCTS = SIZE // PATCH, 4, 2
TOWER, HIDDEN = 32, 64
"""Widths of tower and teacher, and of the LLM."""
LAYERS, COMPUTED, MOVED, ERASED = 8, 2, 4, 6
"""Decoder blocks, and those that compute, move and erase the products."""
AGREEMENT = 0.85
"""Probability that the product of a patch has the sign of the image."""
BIT, PRODUCT, POOLED = range(0, 4), range(4, 6), range(6, 8)
IMAGE, TEXT, START, ANSWER, CONSTANT = range(8, 13)
POOLED_BIT = range(13, 17)
"""Dimensions of the residual stream; five say what a token is, and nothing reads the last ones."""
MARK, LEVEL = 4.0, 20.0
"""Values of the markers and of the constant, which keeps the norm of all tokens nearly equal."""


@dataclass(frozen=True)
class PlantedWorld:
    """Folders of the checkpoint, its teacher and the images in COCO's layout."""

    checkpoint: Path
    teacher: Path
    data: Path


def image_layers() -> range:
    """Returns the layers whose image tokens hold the products linearly."""
    return range(COMPUTED, ERASED)


def text_layers() -> range:
    """Returns the layers whose text tokens after the image hold the mean products linearly."""
    return range(MOVED, LAYERS + 1)


def write_planted(folder: Path, train: int, val: int, seed: int) -> PlantedWorld:
    """Writes checkpoint, teacher, and images of which `seed` is the seed."""
    world = PlantedWorld(folder / "checkpoint", folder / "teacher", folder / "data")
    with atomic_folder(world.checkpoint) as part:
        model, processor = _checkpoint()
        model.save_pretrained(part)
        processor.save_pretrained(part)
    with atomic_folder(world.teacher) as part:
        _teacher().save_pretrained(part)
        image_processor().save_pretrained(part)
    with atomic_folder(world.data) as part:
        rng = np.random.default_rng(seed)
        _write_split(part, "train2017", train, 1, rng)
        _write_split(part, "val2017", val, 1 + train, rng)
    return world


def _write_split(root: Path, split: str, count: int, start: int, rng: np.random.Generator) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, captions = [], []
    signs = rng.choice([-1, 1], (count, PRODUCTS))
    for number, sign in enumerate(signs, start=start):
        name = f"{number:012d}.png"
        Image.fromarray(_draw(sign, rng)).save(root / split / name)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        captions.append({"id": number, "image_id": number, "caption": _answer(sign)})
    document = {"images": images, "annotations": captions}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _draw(sign: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draws an image: each bit is the brightness of a quarter of its patch, with noise."""
    shape = (GRID, GRID, PRODUCTS)
    first = rng.choice([-1, 1], shape)
    product = np.where(rng.random(shape) < AGREEMENT, sign, -sign)
    bits = np.stack([first, first * product], axis=-1).reshape(GRID, GRID, 2, 2)
    pixels = bits.transpose(0, 2, 1, 3).reshape(2 * GRID, 2 * GRID).repeat(PATCH // 2, 0).repeat(PATCH // 2, 1)
    grey = 127.5 + 80 * pixels + rng.normal(0, 10, pixels.shape)
    return np.repeat(grey.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _answer(sign: np.ndarray[Any, Any]) -> str:
    return NUMBERS[int(2 * (sign[0] > 0) + (sign[1] > 0))]


def _zero(module: nn.Module) -> None:
    """Zeroes all parameters but the weights of norms."""
    for name, parameter in module.named_parameters():
        parameter.fill_(float("norm" in name and name.endswith("weight")))


def _read_bits(weight: Tensor) -> None:
    """Sets a patch embedding (W, 3, P, P): bit i becomes the pair 1, -1 at dimensions 2 i and 2 i + 1, so of mean 0."""
    half = PATCH // 2
    for bit in range(BITS):
        rows, columns = (slice(half * place, half * (place + 1)) for place in divmod(bit, 2))
        for offset, value in enumerate((1.0, -1.0)):
            weight[2 * bit + offset, :, rows, columns] = value / (3 * half * half)


@torch.no_grad()
def _teacher() -> Any:
    """Builds a ViT whose feature is the pair product, -product for each product; all other dimensions are 0."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(
        ViTConfig(
            hidden_size=TOWER, num_hidden_layers=1, num_attention_heads=1, intermediate_size=2 * PRODUCTS,
            image_size=SIZE, patch_size=PATCH, hidden_act="gelu",
        )
    )  # fmt: skip
    _zero(model)
    _read_bits(model.embeddings.patch_embeddings.projection.weight)
    mlp: Any = model.layers[0].mlp
    # gelu(z) + gelu(-z) = |z| for large z. With z = 3 (a + b), it is 6 if bits a and b are equal, else 0.
    norm = (TOWER / (2 * BITS)) ** 0.5
    for product in range(PRODUCTS):
        for offset, sign in enumerate((1.0, -1.0)):
            neuron = 2 * product + offset
            for bit in (2 * product, 2 * product + 1):
                mlp.fc1.weight[neuron, 2 * bit] = 3 * sign / norm
            for dimension, value in ((0, 1.0), (1, -1.0)):
                mlp.fc2.weight[2 * BITS + 2 * product + dimension, neuron] = value / 3
        mlp.fc2.bias[2 * BITS + 2 * product] = -1
        mlp.fc2.bias[2 * BITS + 2 * product + 1] = 1
    model.layernorm.weight.zero_()
    model.layernorm.weight[2 * BITS : 2 * (BITS + PRODUCTS)] = 1
    return model.eval()


@torch.no_grad()
def _checkpoint() -> tuple[Any, Any]:
    """Builds the LLaVA and its processor."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = make_tokenizer()
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=TOWER, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=SIZE,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=2 * PRODUCTS, num_hidden_layers=LAYERS,
                num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0,
                bos_token_id=2, eos_token_id=3,
                rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            ),
            image_token_index=image_token, image_seq_length=GRID**2,
            vision_feature_layer=-1,
        )
    )  # fmt: skip
    _zero(model)
    _read_bits(model.model.vision_tower.embeddings.patch_embedding.weight)
    _set_projector(model.model.multi_modal_projector)
    language = model.model.language_model
    for block, sign in ((COMPUTED, 1.0), (ERASED, -1.0)):
        _set_product(language.layers[block - 1].mlp, sign, erased=block == ERASED)
    _set_attention(language.layers[MOVED - 1].self_attn)
    _set_words(language.embed_tokens.weight, model.lm_head.weight, tokenizer)
    processor = LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template="<s>" + CHAT_TEMPLATE,
    )  # fmt: skip
    return model.eval(), processor


def _set_projector(projector: Any) -> None:
    """Makes the projector linear: gelu(z) - gelu(-z) = z."""
    norm = (TOWER / (2 * BITS)) ** 0.5
    for bit in range(BITS):
        for offset, sign in enumerate((1.0, -1.0)):
            projector.linear_1.weight[2 * bit + offset, 2 * bit] = sign / norm
            projector.linear_2.weight[BIT[bit], 2 * bit + offset] = sign
    projector.linear_2.bias[IMAGE] = MARK
    projector.linear_2.bias[CONSTANT] = LEVEL


def _mean_square(products: bool) -> float:
    """Returns the mean square of an image token, with or without its products."""
    return (BITS + MARK**2 + LEVEL**2 + PRODUCTS * products) / HIDDEN


def _set_product(mlp: Any, sign: float, erased: bool) -> None:
    """Adds ± the products of bits to image tokens: silu(z) u - silu(-z) u = z u, and the norm divides both."""
    for product in range(PRODUCTS):
        for offset, direction in enumerate((1.0, -1.0)):
            neuron = 2 * product + offset
            mlp.gate_proj.weight[neuron, BIT[2 * product]] = direction
            mlp.up_proj.weight[neuron, BIT[2 * product + 1]] = 1
            mlp.down_proj.weight[PRODUCT[product], neuron] = sign * direction * _mean_square(erased)


def _set_attention(attention: Any) -> None:
    """Copies the mean products and bits of the image tokens to later text; image tokens attend to the start.

    The rotary embedding hardly turns the pair of dimensions with the lowest frequency, so that positions do not matter.
    """
    half = HIDDEN // 2
    text, start = half - 1, HIDDEN - 1  # one pair
    for query, key, dimension in ((TEXT, IMAGE, text), (IMAGE, START, start)):
        attention.q_proj.weight[dimension, query] = 12
        attention.k_proj.weight[dimension, key] = 12
    moved = [(PRODUCT[product], POOLED[product], 2.0) for product in range(PRODUCTS)]
    moved += [(BIT[bit], POOLED_BIT[bit], 1.4 * GRID) for bit in range(BITS)]  # with nearly the variance of products
    for head, (source, target, gain) in enumerate(moved):
        attention.v_proj.weight[head, source] = _mean_square(True) ** 0.5
        attention.o_proj.weight[target, head] = gain


def _set_words(embeddings: Tensor, head: Tensor, tokenizer: Any) -> None:
    """Sets what tokens are, and the logits: an answer by the pooled products, and after it the end."""
    embeddings[:, CONSTANT], embeddings[:, TEXT] = LEVEL, MARK
    start = tokenizer.bos_token_id
    embeddings[start, TEXT], embeddings[start, START] = 0, MARK
    for code, word in enumerate(NUMBERS):
        number = tokenizer.convert_tokens_to_ids(word)
        embeddings[number, ANSWER] = MARK
        head[number, CONSTANT] = 1
        for product, sign in enumerate((2 * (code // 2) - 1, 2 * (code % 2) - 1)):
            head[number, POOLED[product]] = 10 * sign
    head[tokenizer.eos_token_id, ANSWER] = 20
