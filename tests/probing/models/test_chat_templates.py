"""Chat templates that write the date."""

import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from probing.models.chat_templates import render, rendering_at

MOMENT = datetime.datetime(2024, 2, 29, 7, 5)
BODY = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
TEMPLATES = {
    "plain": "{{ strftime_now('%d %b %Y') }} " + BODY,
    "blanks first": "\n  {%- set x = 1 %}\n  {{ strftime_now('%A, %B %d, %Y') }}\n" + BODY,
    "line of blocks first": "  {% if true %}\n on {{ strftime_now(\"%Y-%m-%d %H:%M\") }}\n  {% endif %}\n" + BODY,
    "as Llama 3.2": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now(\"%d %b %Y\") %}{%- else %}{%- set date_string = \"26 Jul 2024\" %}"
    "{%- endif %}{%- endif %}{{- \"Today Date: \" + date_string + \"\\n\\n\" }}" + BODY,
    "format in a variable": "{% set f = '%j of %y, %-d %p' %}{{ strftime_now(f) }}" + BODY,
    "in a macro": "{% macro day() %}{{ strftime_now('%x') }}{% endmacro %}{{ day() }}" + BODY,
    "no date": "\n  {% if true %}\nHello {% endif %}" + BODY,
}  # fmt: skip


class Processor:
    """Renders as transformers' processors do."""

    image_token = "<image>"
    tokenizer = SimpleNamespace(name_or_path="it", bos_token=None)

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, chat_template=None, add_generation_prompt=False):
        own = self.chat_template["default"] if isinstance(self.chat_template, dict) else self.chat_template
        return chat_template_utils.render_jinja_template([messages], chat_template=chat_template or own)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("named", [False, True])
def test_a_pinned_date_is_what_the_clock_would_write(monkeypatch, name, named):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return MOMENT

    processor = Processor({"default": TEMPLATES[name]} if named else TEMPLATES[name])
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    with rendering_at(MOMENT):
        pinned = render(processor, messages)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert pinned == render(processor, messages) and pinned.endswith("hello")
