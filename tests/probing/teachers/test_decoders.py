"""Decoding a feature is what the teacher itself does with it."""

import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    DepthAnythingForDepthEstimation,
    OneFormerForUniversalSegmentation,
    OneFormerImageProcessor,
    OneFormerProcessor,
)

from probing.recipe import TeacherRecipe
from probing.teachers import depth, load_teacher
from probing.teachers.gen import GenDecoder
from probing.teachers.seg import TASK, SegDecoder, label_map, replace_early
from probing.utils.errors import UserError
from tests.helpers import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """A seg teacher with its tokenizer, as it is published."""
    path = tmp_path_factory.mktemp("seg") / "teacher"
    shutil.copytree(models["seg"], path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def seg(folder):
    recipe = TeacherRecipe(id=str(folder), grid=3)
    return SegDecoder.load(load_teacher("seg", recipe, CPU), recipe)


def test_depth_feeds_one_feature_to_all_inputs_of_the_neck(models, images):
    teacher = load_teacher("depth", TeacherRecipe(id=str(models["depth"])), CPU)
    pixels = teacher.prepare(images)
    reference = DepthAnythingForDepthEstimation.from_pretrained(models["depth"]).eval()
    with torch.no_grad():
        maps = reference.backbone(pixels).feature_maps  # with the true class token, which must not matter
        expected = reference.head(reference.neck([maps[-1]] * 4, *teacher.grid), *teacher.grid)
        torch.testing.assert_close(depth.decode(teacher, teacher.target(pixels)), expected)
        torch.testing.assert_close(depth.predict(teacher, pixels), reference(pixels).predicted_depth)
    assert not torch.equal(depth.predict(teacher, pixels), expected)


def test_seg_decodes_its_own_stages_to_its_own_answer(folder, seg, images):
    pixels = seg.teacher.prepare(images)
    reference = OneFormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = OneFormerImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = reference(pixels, task_inputs=seg.task.expand(2, -1))
    expected = processor.post_process_semantic_segmentation(output, [(50, 70), (31, 20)])
    stages = seg.stages(pixels)
    for scores in (seg.predict(stages), seg.decode(seg.teacher.target(pixels), stages)):
        for got, size, wanted in zip(scores, [(50, 70), (31, 20)], expected, strict=True):
            assert torch.equal(label_map(got, size), wanted)
    assert len(seg.names) == 133


def test_seg_can_still_encode_after_it_decoded(seg, images):
    pixels = seg.teacher.prepare(images)
    before = seg.teacher.target(pixels)
    seg.decode(before + 1, seg.stages(pixels))
    assert torch.equal(seg.teacher.target(pixels), before)


def test_the_task_is_put_as_oneformers_own_processor_puts_it(folder, seg):
    processor = OneFormerProcessor(OneFormerImageProcessor.from_pretrained(folder), tiny.tokenizer())
    assert torch.equal(seg.task, processor._preprocess_text([TASK], max_length=77))


def test_blind_decoding_sees_nothing_of_the_image(seg, images):
    one, two = (seg.stages(seg.teacher.prepare([image])) for image in images)
    means = [m.mean((0, 2, 3)) for m in one[:-1]]
    feature = seg.teacher.target(seg.teacher.prepare(images[:1]))
    blind = [seg.decode(feature, replace_early(stages, "blind", means)) for stages in (one, two)]
    leaky = [seg.decode(feature, replace_early(stages, "strict")) for stages in (one, two)]
    assert torch.equal(*blind) and not torch.allclose(*leaky)


def test_the_papers_decoding_shrinks_the_early_stages(seg, images):
    stages = seg.stages(seg.teacher.prepare(images))
    shrunk = replace_early(stages, "paper")
    assert {m.shape[-2:] for m in shrunk} == {stages[-1].shape[-2:]}
    expected = F.interpolate(stages[0], size=(3, 3), mode="bilinear", align_corners=False)
    assert torch.equal(shrunk[0], expected) and shrunk[-1] is stages[-1]


def test_a_teacher_without_tokenizer(models):
    recipe = TeacherRecipe(id=str(models["seg"]))
    with pytest.raises(UserError, match="has no tokenizer"):
        SegDecoder.load(load_teacher("seg", recipe, CPU), recipe)


@pytest.fixture(scope="module")
def gen(unclip):
    recipe = TeacherRecipe(id=str(unclip))
    return GenDecoder.load(load_teacher("gen", recipe, CPU), recipe, steps=3, guidance=2.0)


def test_gen_paints_what_the_pipeline_paints(gen, unclip):
    from diffusers import DPMSolverMultistepScheduler, StableUnCLIPImg2ImgPipeline

    reference = StableUnCLIPImg2ImgPipeline.from_pretrained(unclip)
    reference.scheduler = DPMSolverMultistepScheduler.from_config(reference.scheduler.config)
    embeds = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(7)
    expected = reference(
        prompt="", image_embeds=embeds, generator=noise, num_inference_steps=3, guidance_scale=2.0, output_type="np"
    ).images
    assert np.array_equal(gen.decode(embeds, [7]), (expected * 255).round().astype(np.uint8))


def test_gen_gives_an_image_the_same_noise_in_every_batch(gen):
    embeds = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    whole = gen.decode(embeds, [1, 2, 3]).astype(int)
    alone = np.concatenate([gen.decode(embeds[i : i + 1], [i + 1]) for i in range(3)]).astype(int)
    assert abs(whole - alone).max() <= 1 and whole.shape == (3, 16, 16, 3)
    assert abs(gen.decode(embeds, [4, 2, 3]).astype(int) - whole)[0].max() > 1  # other noise, other image
    assert abs(gen.decode(embeds.flip(0), [1, 2, 3]).astype(int) - whole).max() > 1  # the embedding matters


def test_gen_decoder_of_another_model(unclip, tmp_path):
    shutil.copytree(unclip, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "image_encoder")
    shutil.copytree(
        tiny.unclip(tmp_path / "other", projection=8) / "image_encoder", tmp_path / "mixed" / "image_encoder"
    )
    recipe = TeacherRecipe(id=str(tmp_path / "mixed"))
    with pytest.raises(UserError, match=r"width 12 and its encoder gives 8: they are of two models"):
        GenDecoder.load(load_teacher("gen", recipe, CPU), recipe)


def test_gen_without_diffusers_is_one_line(unclip, monkeypatch):
    recipe = TeacherRecipe(id=str(unclip))
    teacher = load_teacher("gen", recipe, CPU)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'mllm-probing\[decode\]'"):
        GenDecoder.load(teacher, recipe)
