"""A checkpoint's answers to questions about images: greedy, in batches, through its own processor and chat template."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from probing.models.base import Backbone
from probing.models.chat_templates import render
from probing.models.llava import prompt
from probing.recipe import BackboneRecipe
from probing.utils.errors import UserError


@torch.no_grad()
def ask(
    backbone: Backbone, recipe: BackboneRecipe, images: Sequence[Image.Image], questions: Sequence[str], most: int
) -> list[str]:
    """Answers one question about each image.

    Shorter prompts of a batch are padded at their beginning, so that every answer follows its own question.

    Args:
        backbone: loaded `with_head`.
        recipe: what it was loaded by; says whether its special tokens stand after the image.
        images: RGB images, which the processor gets at their own size.
        questions: the user's turn for each.
        most: tokens of an answer.

    Raises:
        UserError: the checkpoint cannot write text, or its chat template cannot be used.
    """
    if not hasattr(backbone.writer, "generate"):
        raise UserError(f"{backbone.name} cannot write text: its class has no generate(); it can be probed, not asked")
    processor = backbone.prepare.processor  # type: ignore[attr-defined]
    texts = [prompt(processor, recipe.model_copy(update={"prompt": question})) for question in questions]
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    try:
        inputs = backbone.prepare.encode(images, texts)  # type: ignore[attr-defined]
    finally:
        tokenizer.padding_side = "right"
    inputs = {name: value.to(backbone.device) for name, value in inputs.items()}
    written = backbone.writer.generate(
        **inputs,
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(backbone, processor) or None,
    )
    answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _ends(backbone: Backbone, processor: Any) -> list[int]:
    """Tokens that end an answer: those of the checkpoint, and what its chat template writes behind one.

    The latter is needed where a template closes a turn with another token than the configuration names (Llama-3).
    """
    tokenizer = processor.tokenizer
    named = backbone.writer.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(named if isinstance(named, list | tuple) else [named])}
    closing = _closing(processor)
    ends |= set(tokenizer(closing, add_special_tokens=False).input_ids[:1]) & set(tokenizer.all_special_ids)
    return sorted(ends - {None})


def _closing(processor: Any) -> str:
    """What the chat template writes after an answer; empty where that cannot be known."""
    said = [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    try:
        return render(processor, question + said).rsplit("yes", 1)[-1].strip()
    except UserError:  # a template may insist on an image, or on its own form of answers
        return ""


def sample_conversation(processor: Any, recipe: BackboneRecipe) -> list[str]:
    """A question as `ask` renders it, and what it takes for the end of an answer: all that a chat template does."""
    return [prompt(processor, recipe.model_copy(update={"prompt": "What is this?"})), _closing(processor)]
