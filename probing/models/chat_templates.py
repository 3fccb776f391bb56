"""A checkpoint's chat template: from messages to text."""

import contextlib
import datetime
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jinja2

from probing.utils.errors import UserError, first_line

TAG = "<image>"
HELP = "give one that fits it: backbone.template, or chat_template.jinja beside the weights"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def _chat_template(start: str, user: tuple[str, str], assistant: tuple[str, str]) -> str:
    """A chat template of a fixed beginning, and of what stands around either role's turns.

    All text is in expressions: transformers' Jinja drops line feeds that stand beside a block.
    """
    (before_user, after_user), (before, after) = user, assistant
    return (
        f"{{{{ {start!r} }}}}{{% for m in messages %}}{{% set user = m['role'] == 'user' %}}"
        f"{{{{ {before_user!r} if user else {before!r} }}}}{{% for p in m['content'] %}}"
        f"{{{{ '<image>\\n' if p['type'] == 'image' else p['text'] }}}}{{% endfor %}}"
        f"{{{{ {after_user!r} if user else {after!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before!r} }}}}{{% endif %}}"
    )


_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES = {
    "vicuna_v1": _chat_template(f"{SYSTEM} ", ("USER: ", " "), ("ASSISTANT:", "</s>")),
    "llava_llama_3": _chat_template(
        _LLAMA_3.format("system") + SYSTEM + "<|eot_id|>",
        (_LLAMA_3.format("user"), "<|eot_id|>"),
        (_LLAMA_3.format("assistant"), "<|eot_id|>"),
    ),
    "llava_phi_3": _chat_template(
        "<|system|>\nYou are a helpful AI assistant.<|end|>",
        ("\n<|user|>\n", "<|end|>"),
        ("\n<|assistant|>\n", "<|end|>"),
    ),
    "mistral_instruct": _chat_template("", ("[INST] ", " [/INST]"), ("", "</s>")),
}
"""Conversation templates of LLaVA's original code, as chat templates."""


_clock: ContextVar[datetime.datetime | None] = ContextVar("clock", default=None)


@contextlib.contextmanager
def rendering_at(moment: datetime.datetime | None) -> Iterator[None]:
    """Within it, chat templates that write the date see this moment; None is the time of day."""
    token = _clock.set(moment)
    try:
        yield
    finally:
        _clock.reset(token)


def rendering_moment() -> datetime.datetime | None:
    """The moment that chat templates see now."""
    return _clock.get()


def find_template(text: str) -> str:
    """The chat template that a recipe means: one of `TEMPLATES` by its name, or the Jinja text itself.

    Raises:
        UserError: it is neither.
    """
    if "{" not in text and text not in TEMPLATES:
        raise UserError(f"no template is called {text!r}; there are {', '.join(TEMPLATES)}, or give one in Jinja")
    return TEMPLATES.get(text, text)


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
        text = str(
            processor.apply_chat_template(
                messages, chat_template=_dated(processor), add_generation_prompt=generation_prompt
            )
        )
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


def _dated(processor: Any) -> str | None:
    """The chat template with the moment of `rendering_at` in the place of the clock; None where it reads no clock.

    Transformers gives templates a function `strftime_now` and takes no other for it, so a macro of that name is put
    before the template, on a line of its own, which Jinja drops.
    """
    moment, template = _clock.get(), processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if moment is None or not isinstance(template, str) or "strftime_now" not in template:
        return None
    written = "format"
    for code in sorted(set(re.findall(r"%[-#_^]?[A-Za-z]", template))):
        with contextlib.suppress(ValueError):  # no code of this system
            written += f" | replace({code!r}, {moment.strftime(code)!r})"
    return f"{{% macro strftime_now(format) %}}{{{{ {written} }}}}{{% endmacro %}}\n{template}"
