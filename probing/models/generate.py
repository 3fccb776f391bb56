"""A checkpoint's answers to questions about images: greedy, in batches, with its own processor and chat template."""

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
        recipe: of the backbone; decides whether its special tokens follow the image.
        images: RGB images, which the processor gets at their own size.
        questions: the user's turn for each.
        most: number of tokens of an answer.

    Raises:
        UserError: the checkpoint cannot write text, or its chat template cannot be used.
    """
    if not hasattr(backbone.writer, "generate"):
        raise UserError(f"{backbone.name} cannot write text: its class has no generate(); give another checkpoint")
    processor = backbone.prepare.processor
    texts, tokenizer = [_render_question(processor, recipe, question) for question in questions], processor.tokenizer
    tokenizer.padding_side = "left"
    try:
        inputs = backbone.prepare.encode(images, texts)
    finally:
        tokenizer.padding_side = "right"
    inputs = {name: value.to(backbone.device) for name, value in inputs.items()}
    output = backbone.writer.generate(
        **inputs,
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(backbone) or None,
    )
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def end_tokens(backbone: Backbone) -> list[int]:
    """Returns ids of the tokens that end an answer: the checkpoint's, and its chat template's.

    A template may close a turn with another token than the configuration names (Llama-3).
    """
    tokenizer = backbone.prepare.processor.tokenizer
    configured = backbone.writer.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])}
    closing = tokenizer(_text_after_answer(backbone.prepare.processor), add_special_tokens=False).input_ids[:1]
    return sorted((ends | (set(closing) & set(tokenizer.all_special_ids))) - {None})


def _text_after_answer(processor: Any) -> str:
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in
             (("user", "?"), ("assistant", "yes"))]  # fmt: skip
    try:
        return render(processor, turns).rsplit("yes", 1)[-1].strip()
    except UserError:  # a template may require an image, or its own form of answers
        return ""


def _render_question(processor: Any, recipe: BackboneRecipe, question: str) -> str:
    return prompt(processor, recipe.model_copy(update={"prompt": question}))


def sample_conversation(processor: Any, recipe: BackboneRecipe) -> list[str]:
    """Renders a question as `ask` does, and the text after an answer: all that a chat template contributes."""
    return [_render_question(processor, recipe, "What is this?"), _text_after_answer(processor)]
