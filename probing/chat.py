"""A checkpoint's chat template: from messages to text."""

from typing import Any

import jinja2

from probing.errors import UserError
from probing.hub import first_line

TAG = "<image>"
HELP = "give the checkpoint one that fits it, as chat_template.jinja beside its weights"


def render(processor: Any, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
    """The text of some messages, without a leading BOS that the tokenizer adds again.

    Args:
        processor: the checkpoint's.
        messages: as transformers' chat templates take them, images as items of their own.
        generation_prompt: end with what opens an answer.

    Raises:
        UserError: there is no template, it cannot be read, or it does not write down every image.
    """
    tokenizer = processor.tokenizer
    name = tokenizer.name_or_path or "the checkpoint"
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"{name} has no chat template; {HELP}")
    try:
        text = str(processor.apply_chat_template(messages, add_generation_prompt=generation_prompt))
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"the chat template of {name} cannot be used ({first_line(error)}); {HELP}") from None
    images = sum(item["type"] == "image" for message in messages for item in message["content"])
    marks = [str(mark) for name in ("image_token", "boi_token") if (mark := getattr(processor, name, None))] or [TAG]
    found = max(text.count(mark) for mark in marks)
    if found != images:
        raise UserError(f"the chat template of {name} writes {found} images where there are {images}; {HELP}")
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text
