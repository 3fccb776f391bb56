"""Teachers of open_clip: targets are those of the models themselves, and wrong names are one line."""

import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher
from probing.utils.errors import UserError

CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "vit": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "timm": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
}
STATISTICS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
ARCHITECTURES = {
    "ViT-B-32": (87.85, 7), "ViT-B-16-quickgelu": (86.19, 14), "ViT-L-14": (303.97, 16), "ViT-B-16-SigLIP": (92.88, 14),
    "EVA02-B-16": (86.26, 14), "RN50": (38.32, 7), "coca_ViT-B-32": (89.16, 7), "convnext_base_w": (88.22, 8),
    "convnext_large_d": (199.77, 8), "convnext_xxlarge": (846.54, 8),
}  # fmt: skip
"""Millions of parameters of the image tower, from open_clip's docs/model_profile.csv, and the side of its map."""


def make(folder, tower):
    """A tiny random model in the layout of open_clip's published folders."""
    config = {"embed_dim": 24, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    folder.mkdir()
    written = {"model_cfg": config, "preprocess_cfg": STATISTICS, "license": "MIT"}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def own_map(visual, pixels):
    """The last map of a tower (B, D, rows, columns), from its modules."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        states = []
        handle = visual.transformer.register_forward_hook(lambda *call: states.append(call[-1]))
        visual(pixels)
        handle.remove()
        tokens = states[0] if visual.attn_pool else visual.ln_post(states[0])
        return tokens[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size)
    if hasattr(visual, "trunk"):
        features = visual.trunk.forward_features(pixels)
        if features.ndim == 4:
            return features
        tokens = features[:, visual.trunk.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, visual.trunk.patch_embed.grid_size)
    return visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))


@pytest.mark.parametrize("tower", TOWERS)
def test_patches_and_embedding_are_the_models_own(tmp_path, tower):
    folder = make(tmp_path / tower, tower)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    pictures = [Image.effect_noise((64, 64), 80).convert("RGB"), Image.new("RGB", (64, 64), (200, 10, 90))]
    patches = load_teacher("clip", TeacherRecipe(id=str(folder), grid=2), CPU)
    pooled = load_teacher("clip", TeacherRecipe(id=str(folder), features="pooled"), CPU)
    pixels = patches.prepare(pictures)
    expected = torch.stack([torch.tensor(list(picture.getdata())).view(64, 64, 3) for picture in pictures]) / 255
    expected = (expected - torch.tensor(STATISTICS["mean"])) / torch.tensor(STATISTICS["std"])
    torch.testing.assert_close(pixels, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        own = F.interpolate(own_map(model.visual, pixels), (2, 2), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(patches.target(pixels), own, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled.target(pixels)[:, 0], model.encode_image(pixels), atol=1e-5, rtol=1e-5)
    assert patches.licence == "MIT" and patches.sha256 == pooled.sha256 != "no weights"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_architectures_have_published_sizes(name):
    millions, side = ARCHITECTURES[name]
    teacher = load_teacher("clip", TeacherRecipe(id=f"open_clip:{name}"), torch.device("meta"))
    assert round(sum(p.numel() for p in teacher.model.parameters()) / 1e6, 2) == millions
    assert teacher.grid == (side, side)
    embedding = teacher.model(torch.zeros(1, 3, *teacher.prepare([Image.new("RGB", (9, 9))]).shape[2:], device="meta"))
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    assert embedding.shape == (1, open_clip.get_model_config(name)["embed_dim"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_of_published_architectures_are_the_models_own(tmp_path, monkeypatch, name):
    """At full width and resolution, with one block per stage."""
    create = timm.create_model
    depth = {"depths": (1, 1, 1, 1)} if "convnext" in name else {"depth": 1}
    monkeypatch.setattr(timm, "create_model", lambda *args, **values: create(*args, **values, **depth))
    config = open_clip.get_model_config(name)
    layers = config["vision_cfg"].get("layers")
    if layers:
        config["vision_cfg"]["layers"] = [1] * len(layers) if isinstance(layers, list) else 1
    config |= {"text_cfg": TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": STATISTICS}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    teacher = load_teacher("clip", TeacherRecipe(id=str(tmp_path), grid=ARCHITECTURES[name][1]), CPU)
    pixels = teacher.prepare([Image.effect_noise((300, 300), 80).convert("RGB")])
    with torch.no_grad():
        own = own_map(model.visual, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher.target(pixels), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("open_clip:ViT-B-33", "no architecture 'ViT-B-33'; nearest: ViT-B-32"),
        ("open_clip:ViT-B-32/laion", "no weights 'laion' of ViT-B-32; give one of openai, "),
        ("open_clip:", "no architecture ''"),
        ("open_clip:RN50", "needs its weights: open_clip:RN50/TAG, one of openai, yfcc15m, cc12m"),
    ],
)
def test_unknown_names_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        load_teacher("clip", TeacherRecipe(id=source), CPU)


def test_broken_folders_are_refused(tmp_path):
    folder = make(tmp_path / "vit", "vit")
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    for content in (weights[:-9], b"", None):
        (folder / "open_clip_model.safetensors").unlink()
        if content is not None:
            (folder / "open_clip_model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"vit cannot be loaded"):
            load_teacher("clip", TeacherRecipe(id=str(folder)), CPU)
        (folder / "open_clip_model.safetensors").write_bytes(weights)
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="no usable open_clip_config"):
        load_teacher("clip", TeacherRecipe(id=str(folder)), CPU)
