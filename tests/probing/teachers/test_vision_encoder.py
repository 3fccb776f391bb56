"""Plain encoders as teachers: their targets against the model's own output, patch by patch."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import transformers as t
from PIL import Image
from safetensors.torch import load_file, save_file

from probing.recipe import LayersRecipe, TeacherRecipe, validate
from probing.teachers import describe_teacher, load_teacher
from probing.utils.errors import UserError
from tests.helpers import encoders, tiny

CPU = torch.device("cpu")
GRIDS = {
    "dinov2": 4, "dinov2_registers": 4, "dinov3": 4, "siglip": 4, "siglip2": 4, "clip": 4, "internvl": 4, "sam": 8,
    "convnext": 4, "swin": 8, "timm_vit": 4, "timm_cnn": 3, "timm_swin": 8,
}  # fmt: skip
PREFIX = {"dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "clip": 1, "internvl": 1, "timm_vit": 5}
"""Class token and registers."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {name: encoders.make(name, root / name) for name in encoders.MAKERS}


def image(side, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def whole(name, folder):
    """The published model as a user of its library loads it."""
    if name.startswith("timm"):
        config = json.loads((folder / "config.json").read_text())
        model = timm.create_model(config["architecture"], **config["model_args"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    classes = {"internvl": t.InternVLForConditionalGeneration, "convnext": t.ConvNextForImageClassification}
    return classes.get(name, t.AutoModel).from_pretrained(folder).eval()


def own_output(name, model, picture, pixels):
    """Last features and pooled output of the model's own forward pass."""
    if name.startswith("timm"):
        features = model.forward_features(pixels)
        return features, model.forward_head(features, pre_logits=True)
    if name == "siglip2":
        given = t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)(images=picture, return_tensors="pt")
        output = model.vision_model(
            given["pixel_values"], given["pixel_attention_mask"], spatial_shapes=given["spatial_shapes"]
        )
    elif name == "internvl":
        output = model.model.vision_tower(pixels)
    elif name == "sam":
        return model.vision_encoder(pixels).last_hidden_state, None
    elif name == "convnext":
        output = model.convnext(pixels)
    else:
        output = (getattr(model, "vision_model", None) or model)(pixels)
    return output.last_hidden_state, getattr(output, "pooler_output", None)


def at(name, features, row, column):
    """One patch of the model's own features."""
    if name == "timm_swin":
        return features[0, row, column]
    if features.ndim == 4:
        return features[0, :, row, column]
    return features[0, PREFIX.get(name, 0) + row * GRIDS[name] + column]


@pytest.mark.parametrize("name", encoders.MAKERS)
def test_targets_are_what_the_model_gives_at_each_place(folders, name):
    teacher = load_teacher("mine", TeacherRecipe(id=str(folders[name])), CPU)
    side = GRIDS[name]
    assert teacher.grid == (side, side) and teacher.name == "mine"
    pixels = teacher.prepare([image(64)])
    squared = image(64).resize(pixels.shape[-2:], Image.Resampling.BILINEAR)
    with torch.no_grad():
        features, pooled = own_output(name, whole(name, folders[name]), squared, pixels)
    found = teacher.target(pixels)[0]
    exact = {} if name != "siglip2" else {"atol": 0.05, "rtol": 0.05}  # its own processor resizes in uint8
    for row in range(side):
        for column in range(side):
            torch.testing.assert_close(found[row * side + column], at(name, features, row, column), **exact)
    recipe = TeacherRecipe(id=str(folders[name]), features="pooled")
    if pooled is None:
        with pytest.raises(UserError, match="no pooled output; set features=patches"):
            load_teacher("mine", recipe, CPU)
        return
    teacher = load_teacher("mine", recipe, CPU)
    assert teacher.grid is None and teacher.shape == (1, pooled.flatten(1).shape[1])
    torch.testing.assert_close(teacher.target(pixels)[:, 0], pooled.flatten(1), **exact)


@pytest.mark.parametrize("name", encoders.MAKERS)
def test_grid_place_depends_most_on_its_own_pixels(folders, name):
    teacher = load_teacher("mine", TeacherRecipe(id=str(folders[name])), CPU)
    for key, value in teacher.model.named_parameters():  # what mixes patches
        if re.search(r"(out_proj|attn\.proj)\.", key):
            value.zero_()
    side = GRIDS[name]
    near = 1 if name == "sam" else 0  # its neck convolves over neighbours
    for row, column in ((0, 0), (0, side - 1), (side - 1, 0), (1, 2)):
        pixels = teacher.prepare([image(64)]).requires_grad_()
        feature = teacher.encode(pixels)[0, row * side + column]
        weights = torch.randn(len(feature), generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(feature @ weights, pixels)
        cells = torch.nn.functional.adaptive_avg_pool2d(gradient.abs().sum(1), side)[0]
        found = divmod(int(cells.argmax()), side)
        assert abs(found[0] - row) <= near and abs(found[1] - column) <= near


@pytest.mark.parametrize("name", encoders.MAKERS)
def test_pixels_have_the_own_statistics_and_show_the_whole_image(folders, name):
    teacher = load_teacher("mine", TeacherRecipe(id=str(folders[name])), CPU)
    side = teacher.prepare([image(64)]).shape[-1]
    processor = t.AutoImageProcessor.from_pretrained(folders[name])
    own = getattr(processor, "data_config", None) or {"mean": processor.image_mean, "std": processor.image_std}
    mean, std = own["mean"], own["std"]
    values = np.asarray(image(side), dtype=np.float64) / 255
    expected = torch.from_numpy((values - mean) / std).permute(2, 0, 1).float()
    torch.testing.assert_close(teacher.prepare([image(side)])[0], expected, atol=1e-5, rtol=1e-5)
    stripes = Image.fromarray(np.zeros((40, 80, 3), dtype=np.uint8))
    stripes.paste((255, 255, 255), (0, 0, 6, 40))  # a crop would lose it
    assert float(teacher.prepare([stripes])[0, 0, side // 2, 0]) > float(
        teacher.prepare([stripes])[0, 0, side // 2, -1]
    )


def test_finer_encoder_is_resampled_to_any_grid(tmp_path):
    torch.manual_seed(0)
    config = t.ViTConfig(**encoders.VIT | {"image_size": 27 * 8})
    t.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    t.ViTImageProcessor(size={"height": 216, "width": 216}).save_pretrained(tmp_path)
    teacher = load_teacher("vit", TeacherRecipe(id=str(tmp_path)), CPU)
    assert teacher.shape == (576, 24) and teacher.grid == (24, 24)
    pixels = teacher.prepare([image(216)])
    with torch.no_grad():
        plane = t.ViTModel.from_pretrained(tmp_path).eval()(pixels).last_hidden_state[0, 1:].view(27, 27, 24)
    row, column = (10.5 * 27 / 24 - 0.5, 3.5 * 27 / 24 - 0.5)  # centre of target position (10, 3) in units of patches
    r, c = int(row), int(column)
    a, b = row - r, column - c
    expected = (
        (1 - a) * ((1 - b) * plane[r, c] + b * plane[r, c + 1])
        + a * ((1 - b) * plane[r + 1, c] + b * plane[r + 1, c + 1])
    )  # fmt: skip
    torch.testing.assert_close(teacher.target(pixels)[0, 10 * 24 + 3], expected, atol=1e-5, rtol=1e-4)
    assert load_teacher("vit", TeacherRecipe(id=str(tmp_path), grid=30), CPU).shape == (900, 24)
    with pytest.raises(UserError, match=r"grid=1 has a single patch; give 2 or more, or features=pooled"):
        load_teacher("vit", TeacherRecipe(id=str(tmp_path), grid=1), CPU)
    with pytest.raises(UserError, match="lack what pooled features need"):  # the pooler is not among the weights
        load_teacher("vit", TeacherRecipe(id=str(tmp_path), features="pooled"), CPU)


def test_what_a_teacher_would_be_needs_no_weights(folders, tmp_path):
    shutil.copytree(folders["siglip"], tmp_path / "siglip")
    (tmp_path / "siglip" / "model.safetensors").unlink()
    found = describe_teacher({"siglip": {"id": str(tmp_path / "siglip")}}, ["grid=3"])
    assert found["target"] == "9 x 24 (3 x 3 patches)" and found["pixels"] == [32, 32]
    assert found["class"] == "SiglipVisionModel"
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher("siglip", TeacherRecipe(id=str(tmp_path / "siglip")), CPU)


def bert(path):
    t.BertModel(t.BertConfig(**encoders.TEXT)).save_pretrained(path)


def detr(path):
    config = t.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=16, num_queries=100,
        backbone_config=t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2,
    )  # fmt: skip
    t.DetrModel(config).save_pretrained(path)


def without_processor(path):
    t.Dinov2Model(t.Dinov2Config(**encoders.VIT)).save_pretrained(path)


def damaged(path):
    encoders.dinov2(path)
    model = t.Dinov2Model.from_pretrained(path)
    model.layernorm.weight.data[0] = torch.nan
    model.save_pretrained(path)


def incomplete(path):
    encoders.dinov2(path)
    state = load_file(path / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def not_square(path):
    t.ViTModel(t.ViTConfig(**encoders.VIT | {"image_size": [32, 16]}), add_pooling_layer=False).save_pretrained(path)
    t.ViTImageProcessor(size={"height": 32, "width": 16}).save_pretrained(path)


def of_another_size(path):
    t.ViTModel(t.ViTConfig(**encoders.VIT), add_pooling_layer=False).save_pretrained(path)
    t.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(path)


def shuffled_patches(path):
    config = t.ViTMAEConfig(**encoders.VIT, mask_ratio=0.0, decoder_hidden_size=16, decoder_num_attention_heads=2)
    t.ViTMAEModel(config).save_pretrained(path)
    t.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)


def depth(path):
    tiny.depth_teacher(path)


UNFIT = {
    bert: "model type 'bert', BertModel reads input_ids; give a vision encoder",
    detr: "features are answers to queries",
    without_processor: "no image processor",
    damaged: "not finite numbers: its weights are damaged",
    incomplete: "not finite numbers: its weights are damaged, or lack what patches features need",
    not_square: "its images are 32 x 16 pixels, and targets need a square",
    of_another_size: "rejects images of 48 x 48 pixels",
    shuffled_patches: "is not deterministic",
    depth: "cannot be the mine teacher: model type 'depth_anything'",
}


@pytest.mark.parametrize("maker", UNFIT, ids=lambda maker: maker.__name__)
def test_what_cannot_be_a_teacher_is_named_in_one_line(tmp_path, maker):
    maker(tmp_path)
    with pytest.raises(UserError, match=UNFIT[maker]) as caught:
        load_teacher("mine", TeacherRecipe(id=str(tmp_path)), CPU)
    assert "\n" not in str(caught.value)


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

class MineConfig(PretrainedConfig):
    model_type = "mine_vit"

class MineModel(PreTrainedModel):
    config_class = MineConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.width, 8, 8)
        self.post_init()

    def forward(self, pixel_values):
        states = self.patches(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat((states.mean(1, keepdim=True), states), dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])
"""


def test_code_of_its_own_runs_only_on_an_explicit_field(tmp_path, monkeypatch):
    """As InternViT is published."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "mine"
    t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=encoders.SQUARE).save_pretrained(folder)
    (folder / "mine_code.py").write_text(REMOTE)
    code = {"AutoConfig": "mine_code.MineConfig", "AutoModel": "mine_code.MineModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine_vit", "width": 6, "auto_map": code}))
    weight, bias = torch.randn(6, 3, 8, 8), torch.randn(6)
    save_file({"patches.weight": weight, "patches.bias": bias}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its own code, which was not run; .* teachers\.vit\.trust_remote_code=true"):
        load_teacher("vit", TeacherRecipe(id=str(folder)), CPU)
    assert describe_teacher({"vit": {"id": str(folder)}}, ["trust_remote_code=true"])["target"].startswith("16 x 6 ")
    teacher = load_teacher("vit", TeacherRecipe(id=str(folder), trust_remote_code=True), CPU)
    pixels = teacher.prepare([image(32)])
    for row, column in ((0, 0), (1, 3), (3, 0)):
        patch = pixels[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        expected = (weight * patch).sum((1, 2, 3)) + bias
        torch.testing.assert_close(teacher.target(pixels)[0, row * 4 + column], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "Depth", "1st", "tower", "nan", "a b", "x" * 33, "é"])
def test_names_that_folders_or_results_could_not_bear(name):
    values = {"backbone": {"checkpoint": "a"}, "data": {"path": "coco:b"}, "teachers": {name: {"id": "c"}}}
    with pytest.raises(UserError, match="name"):
        validate(LayersRecipe, values, "test")


def test_fields_of_plain_encoders_do_not_change_other_teachers(models):
    with pytest.raises(UserError, match=r"teachers\.depth has its own target"):
        load_teacher("depth", TeacherRecipe(id=str(models["depth"]), features="pooled"), CPU)
    with pytest.raises(UserError, match="pooled features have no grid"):
        validate(TeacherRecipe, {"id": "x", "features": "pooled", "grid": 4}, "test")
