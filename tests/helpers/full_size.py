"""Stand-ins of the papers' sizes, to plan with: configurations, preprocessing and a small tokenizer, and no weights.

    python -m tests.helpers.full_size FOLDER

makes COCO's 118,287 training images (all of them links to one picture) and 591,753 captions, LLaVA's 558,128 captions
and 665,298 conversations, ALLaVA's 663,000 captions, teachers and checkpoints. In FOLDER, `probing plan RECIPE` then
prints the costs that the recipes in examples/ and examples/cluster/README.md state.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

import probing.utils.torchvision_shim  # noqa: F401  # isort: skip
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    DepthAnythingConfig,
    Dinov2Config,
    DPTImageProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    OneFormerConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SwinConfig,
)

from probing.models.chat_templates import SYSTEM, TEMPLATES
from probing.teachers.registry import CATALOGUE

LLM = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
"""Llama-3-8B."""
VICUNA = LLM | {
    "vocab_size": 32064,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
"""Vicuna-7B, as LLaVA-1.5 has it."""
WORDS = "a the of and red green blue small large cat dog car tree house street table on under beside".split()  # noqa: SIM905


def tokenizer() -> PreTrainedTokenizerFast:
    """About a token per word, as a real one makes of plain English."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = f"{SYSTEM} Describe the image in two lines. system user assistant {' '.join(WORDS)}"
    model.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": special[3:]})
    return fast


def ola(path: Path) -> Path:
    """OLA-VLM, Llama-3-8B with ConvNeXt-XXL at 768 pixels, in its original format."""
    tokenizer().save_pretrained(path)
    vision = {
        "mm_vision_tower": "laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup-res768",
        "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
    }  # fmt: skip
    values = {"model_type": "llava_llama", "torch_dtype": "bfloat16"} | LLM | vision
    (path / "config.json").write_text(json.dumps(values))
    return path


def llava(path: Path, llm: dict[str, Any] = LLM) -> Path:
    """A LLaVA of Llama-3-8B, or another LLM, with CLIP ViT-L/336."""
    text, size = tokenizer(), {"height": 336, "width": 336}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(**llm),
        image_token_id=text.convert_tokens_to_ids("<image>"), image_seq_length=576,
    )  # fmt: skip
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(path)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size), tokenizer=text, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATES["llava_llama_3"],
    ).save_pretrained(path)  # fmt: skip
    return path


def teachers(root: Path) -> dict[str, dict[str, str]]:
    """Depth Anything V2 Large, OneFormer Swin-L and the image encoder of unCLIP, as a recipe names them."""
    dinov2 = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14,
        out_indices=[5, 12, 18, 24], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    neck = {"reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024], "fusion_hidden_size": 256}
    DepthAnythingConfig(backbone_config=dinov2, **neck).save_pretrained(root / "depth")
    DPTImageProcessor(size={"height": 518, "width": 518}).save_pretrained(root / "depth")
    swin = SwinConfig(
        image_size=384, patch_size=4, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    OneFormerConfig(backbone_config=swin, num_labels=133).save_pretrained(root / "seg")
    DPTImageProcessor(size={"height": 800, "width": 800}).save_pretrained(root / "seg")
    CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, image_size=224,
        patch_size=14, projection_dim=1024,
    ).save_pretrained(root / "gen")  # fmt: skip
    size = {"height": 224, "width": 224}
    CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=size).save_pretrained(root / "gen")
    return {name: {"id": str(root / name)} for name in ("depth", "seg", "gen")}


def encoders(root: Path) -> None:
    """SigLIP 2 So400m at 384 pixels, and the InternViT-300M of InternVL3-1B at 448."""
    size = {"height": 384, "width": 384}
    SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    ).save_pretrained(root / "siglip")  # fmt: skip
    SiglipImageProcessor(size=size).save_pretrained(root / "siglip")
    InternVLVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=[448, 448],
        patch_size=[14, 14], attention_bias=True, norm_type="layer_norm",
    ).save_pretrained(root / "internvit")  # fmt: skip
    SiglipImageProcessor(size={"height": 448, "width": 448}).save_pretrained(root / "internvit")


def coco(root: Path, **splits: int) -> Path:
    """Writes splits with given numbers of images, all links to one picture."""
    (root / "annotations").mkdir(parents=True)
    Image.new("RGB", (640, 480), (120, 130, 140)).save(root / "picture.jpg")
    for split, number in splits.items():
        (root / split).mkdir()
        names = [f"{k:012d}.jpg" for k in range(number)]
        for name in names:
            (root / split / name).symlink_to(root / "picture.jpg")
        listed = {"images": [{"id": k, "file_name": name} for k, name in enumerate(names)], "annotations": []}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(listed))
        thing = {"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "area": 153600, "bbox": [0, 0, 320, 480]}
        drawn = thing | {"segmentation": [[0, 0, 320, 0, 320, 480, 0, 480]]}
        sized = [image | {"width": 640, "height": 480} for image in listed["images"]]
        whole = {"images": sized, "annotations": [drawn], "categories": [{"id": 1, "name": "cat"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    return root


def conversations(
    path: Path, number: int, rounds: tuple[int, int], words: tuple[int, int], without: float = 0,
    about: str = "picture.jpg",
) -> Path:  # fmt: skip
    """A conversation file, and the image that all of it is about.

    Args:
        path: of the file.
        number: of conversations.
        rounds: fewest and most questions of one.
        words: fewest and most words of an answer.
        without: share that has no image.
        about: the picture, where it is another, which there is.
    """
    drawn = random.Random(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (640, 480), (120, 130, 140)).save(path.parent / "picture.jpg")

    def text(least: int, most: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(least, most)))

    entries = []
    for index in range(number):
        shown = drawn.random() >= without
        turns = []
        for turn in range(drawn.randint(*rounds)):
            turns.append({"from": "human", "value": ("<image>\n" if shown and not turn else "") + text(6, 14)})
            turns.append({"from": "gpt", "value": text(*words)})
        image: dict[str, Any] = {"image": about} if shown else {}
        entries.append({"id": str(index), "conversations": turns} | image)
    path.write_text(json.dumps(entries))
    return path


def make(root: Path, share: float = 1.0) -> None:
    """All stand-ins where the recipes and examples/cluster/README.md expect them, with a share of the data."""
    ola(root / "standins/ola")
    llava(root / "checkpoints/llava-untrained")
    for name in ("llava-pt", "llava", "ola-pt", "ola"):
        (root / "checkpoints" / name).symlink_to("llava-untrained")
    llava(root / "llava-hf/llava-1.5-7b-hf", VICUNA)
    teachers(root / "standins")
    encoders(root / "standins")
    for name, entry in CATALOGUE.items():  # recipes name teachers by their ids: a folder of that name comes first
        owner, _, model = entry.default_id.partition("/")
        (root / owner).mkdir(exist_ok=True)
        (root / owner / model).symlink_to(root.resolve() / "standins" / name)
    coco(root.resolve() / "data/coco", train2017=int(118287 * share), val2017=int(5000 * share))
    conversations(
        root / "data/coco/captions_train2017_llava.json", int(591753 * share), rounds=(1, 1), words=(8, 14),
        about="train2017/000000000000.jpg",
    )  # fmt: skip
    conversations(root / "data/ALLaVA-Caption.json", int(663000 * share), rounds=(1, 1), words=(90, 230))
    conversations(
        root / "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", int(558128 * share), rounds=(1, 1), words=(5, 20)
    )
    (root / "data/LLaVA-Pretrain/images").symlink_to(".")
    conversations(
        root / "data/llava_v1_5_mix665k.json", int(665298 * share), rounds=(1, 6), words=(2, 90), without=0.06
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
