"""Renders messages to text with a checkpoint's chat template."""

import contextlib
import datetime
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jinja2

from probing.utils.errors import UserError, first_line

TAG = "<image>"
HELP = "give one: backbone.template, or chat_template.jinja next to the weights"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def _chat_template(start: str, user: tuple[str, str], assistant: tuple[str, str]) -> str:
    """Makes a chat template from a fixed beginning and the text before and after each role's turns.

    All text is in expressions: transformers' Jinja drops line feeds next to a block.
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
_PARTS_TO_TEXT = (
    "{% set flat = namespace(messages=[]) %}{% for m in messages %}{% set turn = namespace(text='') %}"
    "{% if m['content'] is string %}{% set turn.text = m['content'] %}{% else %}{% for p in m['content'] %}"
    "{% set turn.text = turn.text + ('<image>\\n' if p['type'] == 'image' else p['text']) %}{% endfor %}{% endif %}"
    "{% set flat.messages = flat.messages + [{'role': m['role'], 'content': turn.text}] %}{% endfor %}"
    "{% set messages = flat.messages %}{{ '' }}"
)
_clock: ContextVar[datetime.datetime | None] = ContextVar("clock", default=None)


@contextlib.contextmanager
def rendering_at(moment: datetime.datetime | None) -> Iterator[None]:
    """Makes chat templates that write the date use this moment; None is the present."""
    token = _clock.set(moment)
    try:
        yield
    finally:
        _clock.reset(token)


def rendering_moment() -> datetime.datetime | None:
    """Returns the moment that chat templates use now."""
    return _clock.get()


def find_template(text: str) -> str:
    """Returns a chat template by its name in `TEMPLATES`, or the Jinja text itself; raises UserError for other text."""
    if "{" not in text and text not in TEMPLATES:
        raise UserError(f"no template is called {text!r}; give {', '.join(TEMPLATES)}, or Jinja")
    return TEMPLATES.get(text, text)


def with_images(template: str) -> str:
    """Returns an LLM's chat template, which takes texts, as one that also takes items of text and images."""
    return _PARTS_TO_TEXT + template


def render(processor: Any, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
    """Renders messages, without a leading BOS that the tokenizer adds again.

    Args:
        processor: the checkpoint's.
        messages: as transformers' chat templates take them, with images as separate items.
        generation_prompt: end with the beginning of an answer.

    Raises:
        UserError: there is no template, it cannot be rendered, or it does not write every image.
    """
    tokenizer = processor.tokenizer
    name = tokenizer.name_or_path or "the checkpoint"
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"{name} has no chat template; {HELP}")
    options = {"chat_template": _with_fixed_date(processor), "add_generation_prompt": generation_prompt}
    try:
        text = str(processor.apply_chat_template(messages, **options))
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"the chat template of {name} cannot be used ({first_line(error)}); {HELP}") from None
    images = sum(item["type"] == "image" for message in messages for item in message["content"])
    tags = [str(tag) for field in ("image_token", "boi_token") if (tag := getattr(processor, field, None))] or [TAG]
    written = max(text.count(tag) for tag in tags)
    if written != images:
        raise UserError(f"the chat template of {name} writes {written} images instead of {images}; {HELP}")
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text


def _with_fixed_date(processor: Any) -> str | None:
    """Returns the chat template with the moment of `rendering_at` instead of the clock; None if it reads no clock.

    Transformers gives templates a function `strftime_now` that cannot be replaced, so a macro of that name precedes
    the template, on a separate line, which Jinja drops.
    """
    moment, template = _clock.get(), processor.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if moment is None or not isinstance(template, str) or "strftime_now" not in template:
        return None
    text = "format"
    for code in sorted(set(re.findall(r"%[-#_^]?[A-Za-z]", template))):
        with contextlib.suppress(ValueError):  # unknown to this system
            text += f" | replace({code!r}, {moment.strftime(code)!r})"
    return f"{{% macro strftime_now(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"
