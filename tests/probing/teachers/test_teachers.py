import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPVisionModelWithProjection,
    DepthAnythingForDepthEstimation,
    OneFormerForUniversalSegmentation,
)

from probing.recipe import TeacherRecipe
from probing.teachers import load_teacher
from probing.teachers.registry import CATALOGUE
from probing.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_depth_is_the_last_backbone_feature(models, image):
    teacher = load_teacher("depth", TeacherRecipe(id=str(models["depth"])), CPU)
    pixels = teacher.prepare([image])
    reference = DepthAnythingForDepthEstimation.from_pretrained(models["depth"]).eval()
    with torch.no_grad():
        hidden = reference.backbone(pixels, output_hidden_states=True).hidden_states[-1]
        expected = reference.backbone.layernorm(hidden)[:, 1:]
    assert teacher.shape == (16, 16) and teacher.grid == (4, 4)
    torch.testing.assert_close(teacher.target(pixels), expected)


def test_seg_is_the_last_swin_stage_on_the_target_grid(models, image):
    teacher = load_teacher("seg", TeacherRecipe(id=str(models["seg"]), grid=5), CPU)
    pixels = teacher.prepare([image])
    reference = OneFormerForUniversalSegmentation.from_pretrained(models["seg"]).eval()
    with torch.no_grad():
        stage = reference.model.pixel_level_module.encoder(pixels).feature_maps[-1]
    assert stage.shape[-2:] == (3, 3) and teacher.shape == (25, 64)
    expected = F.interpolate(stage, size=(5, 5), mode="bilinear", align_corners=False)[0, :, 2, 1]
    torch.testing.assert_close(teacher.target(pixels)[0, 2 * 5 + 1], expected)  # row-major


def test_gen_is_the_projected_embedding(models, image):
    teacher = load_teacher("gen", TeacherRecipe(id=str(models["gen"])), CPU)
    pixels = teacher.prepare([image])
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(models["gen"]).eval()(pixels).image_embeds
    assert teacher.shape == (1, 12) and teacher.grid is None
    torch.testing.assert_close(teacher.target(pixels)[:, 0], expected)


def test_gen_is_found_inside_a_pipeline_folder(models, tmp_path):
    shutil.copytree(models["gen"], tmp_path / "image_encoder")
    (tmp_path / "feature_extractor").mkdir()
    shutil.move(tmp_path / "image_encoder" / "preprocessor_config.json", tmp_path / "feature_extractor")
    (tmp_path / "model_index.json").write_text("{}")
    inside = load_teacher("gen", TeacherRecipe(id=str(tmp_path)), CPU)
    alone = load_teacher("gen", TeacherRecipe(id=str(models["gen"])), CPU)
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(inside.target(pixels), alone.target(pixels))


@pytest.mark.parametrize("name", CATALOGUE)
def test_pixels_are_rgb_and_every_aspect_gives_one_grid(models, name):
    teacher = load_teacher(name, TeacherRecipe(id=str(models[name])), CPU)
    pixels = teacher.prepare([Image.new("RGB", (60, 30), (255, 0, 0)), Image.new("RGB", (30, 60), (255, 0, 0))])
    assert pixels.shape[0] == 2 and pixels.shape[2] == pixels.shape[3]
    assert (pixels[:, 0] > pixels[:, 1]).all() and (pixels[:, 0] > pixels[:, 2]).all()
    assert teacher.target(pixels).shape == (2, *teacher.shape)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_batch_equals_single_images(models, name, image):
    teacher = load_teacher(name, TeacherRecipe(id=str(models[name])), CPU)
    pixels = teacher.prepare([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    alone = torch.cat([teacher.target(pixels[:1]), teacher.target(pixels[1:])])
    torch.testing.assert_close(teacher.target(pixels), alone, rtol=1e-4, atol=1e-5)


def test_the_papers_grid_is_the_default_for_finer_teachers(tmp_path):
    from tests.helpers import tiny

    folder = tiny.depth_teacher(tmp_path / "depth", size=7 * 30)
    assert load_teacher("depth", TeacherRecipe(id=str(folder)), CPU).shape == (576, 16)


def test_a_folder_of_another_class_is_named(models):
    with pytest.raises(UserError, match="cannot be the gen teacher: it holds OneFormerForUniversalSegmentation"):
        load_teacher("gen", TeacherRecipe(id=str(models["seg"])), CPU)


@pytest.mark.parametrize(("name", "grid"), [("depth", 1), ("seg", 1), ("gen", 4)])
def test_grids_that_a_decoder_could_not_read_are_refused(models, name, grid):
    with pytest.raises(UserError, match=rf"teachers\.{name}.*grid"):
        load_teacher(name, TeacherRecipe(id=str(models[name]), grid=grid), CPU)


def test_every_teacher_has_default_id_and_licence():
    assert all(entry.default_id in entry.licences for entry in CATALOGUE.values())
    assert "CC-BY-NC" in CATALOGUE["depth"].licences[CATALOGUE["depth"].default_id]
