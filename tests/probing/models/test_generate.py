"""Answers of every family, against a loop that takes the largest logit of a whole forward pass, one by one."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from probing.models import load_backbone
from probing.models.chat_templates import TEMPLATES
from probing.models.generate import ask, end_tokens
from probing.models.llava import LlavaInputs
from probing.recipe import BackboneRecipe
from probing.toyworld.models import ASSETS
from probing.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.original import original
from tests.probing.models import test_auto as generic

CPU = torch.device("cpu")
QUESTIONS = ["Which?", "Describe the image in two lines.", "How many red things are there, and why?"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = ((40, 50), (90, 30), (64, 64))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def greedy(model, inputs, most, ends):
    """Tokens after the prompt, each the largest logit of a forward pass over all before it, without a cache."""
    inputs, found = dict(inputs), []
    places = [name for name, value in inputs.items() if value.shape == inputs["input_ids"].shape]
    while len(found) < most:
        token = model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        if int(token) in ends:
            break
        found.append(int(token))
        for name in places:
            value = inputs[name]
            if name != "input_ids":
                inputs[name] = torch.cat([value, torch.full_like(value[:, -1:], int(name == "attention_mask"))], 1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
    return found


def check(path, images, model=None, **settings):
    recipe = BackboneRecipe(checkpoint=str(path), dtype="float32", **settings)
    backbone = load_backbone(recipe, CPU, with_head=True)
    processor = backbone.prepare.processor
    model = model or AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    answers = ask(backbone, recipe, images, QUESTIONS, most=5)
    for image, question, answer in zip(images, QUESTIONS, answers, strict=True):
        text = load_backbone(recipe.model_copy(update={"prompt": question}), CPU).prepare.text
        inputs = backbone.prepare.encode([image], [text])
        tokens = greedy(model, inputs, 5, end_tokens(backbone))
        assert answer == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return answers


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next", "llava_onevision"])
def test_a_batch_is_answered_as_each_question_alone(family, images, tmp_path):
    answers = check(getattr(tiny, family)(tmp_path / family, seed=3), images)
    assert len(set(answers)) > 1  # else images and questions might not have mattered


@pytest.mark.parametrize("name", generic.FAMILIES)
def test_the_generic_adapter_answers_too(name, images, tmp_path):
    build, settings = generic.FAMILIES[name]
    torch.manual_seed(3)
    build(tmp_path / name)
    check(tmp_path / name, images, **settings)


def test_original_format_answers_with_special_tokens(images, tmp_path):
    path = tmp_path / "ola"
    original(path, kind="llava_phi3", own_tower=True, special=4)
    recipe = BackboneRecipe(checkpoint=str(path), dtype="float32")
    backbone = load_backbone(recipe, CPU, with_head=True)
    assert "<gen_0>" in backbone.prepare.text
    check(path, images, backbone.writer)


def test_special_tokens_can_be_left_out_of_the_question(images, monkeypatch):
    encode, prompts = LlavaInputs.encode, []
    monkeypatch.setattr(
        LlavaInputs, "encode", lambda own, shown, texts: prompts.extend(texts) or encode(own, shown, texts)
    )
    for mode in ("auto", "off"):
        recipe = BackboneRecipe(checkpoint=str(ASSETS / "ola"), dtype="float32", special_tokens=mode)
        ask(load_backbone(recipe, CPU, with_head=True), recipe, images[:1], ["what is the floor ?"], most=1)
    with_tokens, without = prompts
    assert "<image><gen_0>" in with_tokens and "gen_0" not in without and "what is the floor ?" in without


def test_an_answer_ends_where_the_template_closes_the_turn(tmp_path):
    """Llama-3's template ends turns with another token than the configuration may name."""
    path = tiny.llava(tmp_path / "llava")
    recipe = BackboneRecipe(checkpoint=str(path), template=TEMPLATES["vicuna_v1"].replace("</s>", "<pad>"))
    backbone = load_backbone(recipe, CPU, with_head=True)
    processor = backbone.prepare.processor
    assert set(end_tokens(backbone)) == {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}


def test_a_checkpoint_without_head_cannot_answer(models, images):
    recipe = BackboneRecipe(checkpoint=str(models["llava"]))
    with pytest.raises(UserError, match="cannot write text"):
        ask(load_backbone(recipe, CPU), recipe, images, QUESTIONS, most=1)
