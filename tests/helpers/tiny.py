"""Tiny random checkpoints of the real classes, and a COCO folder small enough to write in a test."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(["USER: Describe the image in two lines. ASSISTANT: a red cube"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def llava(path: Path, layers: int = 3, hidden: int = 32, image: int = 32, patch: int = 8, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    text = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=image,
            patch_size=patch,
        ),
        text_config=LlamaConfig(
            vocab_size=len(text),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        image_token_index=text.convert_tokens_to_ids("<image>"),
        image_token_id=text.convert_tokens_to_ids("<image>"),
        image_seq_length=(image // patch) ** 2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(path)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": image}, crop_size={"height": image, "width": image}),
        tokenizer=text,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    return path


def _text(kind: type, hidden: int = 32, layers: int = 3) -> Any:
    return kind(
        vocab_size=len(tokenizer()), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=2,
    )  # fmt: skip


def vipllava(path: Path, seed: int = 0) -> Path:
    """Reads several layers of a CLIP tower."""
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        text_config=_text(LlamaConfig), image_token_index=3, image_token_id=3, image_seq_length=16,
        vision_feature_layers=[-2, -3, 1],
    )  # fmt: skip
    VipLlavaForConditionalGeneration(config).save_pretrained(path)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return path


def llava_next(path: Path, seed: int = 0) -> Path:
    """Tiles of 32 pixels on a Mistral."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        MistralConfig,
    )

    torch.manual_seed(seed)
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            patch_size=8,
        ),
        text_config=_text(MistralConfig), image_token_index=3, image_token_id=3, image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    LlavaNextForConditionalGeneration(config).save_pretrained(path)
    size = {"height": 32, "width": 32}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)  # fmt: skip
    return path


def llava_onevision(path: Path, seed: int = 0) -> Path:
    """Tiles of 32 pixels on a SigLIP and a Qwen2, shrunk where there are more than one."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            patch_size=8, vision_use_head=False,
        ),
        text_config=_text(Qwen2Config), image_token_index=3, image_token_id=3, image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(path)
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer(), video_processor=LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE, vision_aspect_ratio="anyres_max_2",
    ).save_pretrained(path)  # fmt: skip
    return path


def depth_teacher(path: Path, width: int = 16, size: int = 28, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    backbone = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=size,
        patch_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=7,
        reassemble_hidden_size=width,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_in_index=-1,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(path)
    DPTImageProcessor(
        size={"height": size, "width": size}, ensure_multiple_of=7, keep_aspect_ratio=True
    ).save_pretrained(path)
    return path


def seg_teacher(path: Path, width: int = 8, size: int = 96, seed: int = 2) -> Path:
    torch.manual_seed(seed)
    config = OneFormerConfig(
        backbone_config=SwinConfig(
            image_size=size,
            patch_size=4,
            embed_dim=width,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=3,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        num_queries=8,
        hidden_dim=32,
        mask_dim=32,
        conv_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=64,
        num_labels=133,
    )
    OneFormerForUniversalSegmentation(config).save_pretrained(path)
    path.joinpath("class_info.json").write_text(json.dumps({"0": {"isthing": 1, "name": "person"}}))
    OneFormerImageProcessor(
        class_info_file="class_info.json", repo_path=str(path), num_text=4, size={"height": size, "width": size}
    ).save_pretrained(path)
    return path


def gen_teacher(path: Path, width: int = 16, projection: int = 12, size: int = 32, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=8,
            projection_dim=projection,
        )
    ).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(path)
    return path


def unclip(path: Path, projection: int = 12, size: int = 32, seed: int = 4) -> Path:
    """A whole `StableUnCLIPImg2ImgPipeline`, random and tiny; generates images of 16 x 16 pixels."""
    import diffusers as d
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    encoder = CLIPVisionModelWithProjection.from_pretrained(gen_teacher(path / "encoder", projection=projection))
    shutil.rmtree(path / "encoder")
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    d.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        image_encoder=encoder,
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=projection),
        image_noising_scheduler=d.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=4),
        text_encoder=CLIPTextModel(text),
        unet=d.UNet2DConditionModel(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * projection,
        ),
        scheduler=d.DDPMScheduler(prediction_type="v_prediction"),
        vae=d.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        ),
    ).save_pretrained(path)  # fmt: skip
    return path


def inception_weights(file: Path, seed: int = 5) -> Path:
    """Random weights in the file format of pytorch-fid's Inception.

    Scaled so that features of different images differ: its default initialisation gives nearly nothing.
    """
    from pytorch_fid import inception

    torch.manual_seed(seed)
    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch("torchvision.models.Inception3.load_state_dict"),
    ):
        net = inception.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(net.state_dict(), file)
    return file


def coco(root: Path, train: int = 12, val: int = 6, seed: int = 0) -> Path:
    """COCO's layout with captions: portrait, landscape and grey images of simple shapes."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    identity = 0
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            identity += 1
            height, width = ((40, 56), (56, 40), (48, 48))[index % 3]
            pixels = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            picture = Image.fromarray(pixels)
            name = f"{identity:012d}.jpg"
            (picture.convert("L") if index % 4 == 3 else picture).save(root / split / name)
            images.append({"id": identity, "file_name": name, "height": height, "width": width})
            annotations.append({"id": identity, "image_id": identity, "caption": "a picture"})
        text = json.dumps({"images": images, "annotations": annotations})
        (root / "annotations" / f"captions_{split}.json").write_text(text)
    return root


def conversations(root: Path, count: int, seed: int = 0) -> Path:
    """LLaVA-format conversations about images of four coarse patches, in `data.json`; the first has no image."""
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(count):
        pixels = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(root / f"{index}.png")
        question = {"from": "human", "value": "<image>\nWhich?" if index else "Which?"}
        entry = {"id": str(index), "conversations": [question, {"from": "gpt", "value": f"number {index}"}]}
        entries.append(entry | ({"image": f"{index}.png"} if index else {}))
    (root / "data.json").write_text(json.dumps(entries))
    return root
