"""What is said about a scene: captions, questions with one-word answers, and the tokenizer of that little language."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from probing.recipe import DEFAULT_PROMPT
from probing.toyworld.scenes import BACKGROUNDS, COLOURS, FLOORS, SHAPES, SIZES, Scenes

NUMBERS = ("one", "two", "three", "four")
KINDS = ("count", "colour", "shape", "size", "side", "nearer", "floor")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes:
        kind: one of `KINDS`.
        text: the question.
        answer: one word.
    """

    kind: str
    text: str
    answer: str


def _solid(scenes: Scenes, index: int, slot: int) -> tuple[str, str, str]:
    return (
        SIZES[scenes.size[index, slot]],
        COLOURS[scenes.colour[index, slot]],
        SHAPES[scenes.shape[index, slot]],
    )


def caption(scenes: Scenes, index: int) -> str:
    """Two lines: the solids from left to right, and where they stand and which is nearest."""
    count = int(scenes.count[index])
    order = np.argsort(scenes.position[index, :count, 0])
    things = [f"a {' '.join(_solid(scenes, index, slot))}" for slot in order]
    nearest = COLOURS[scenes.colour[index, np.argmin(scenes.position[index, :count, 1])]]
    floor, back = FLOORS[scenes.floor[index]], BACKGROUNDS[scenes.background[index]]
    return f"{NUMBERS[count - 1]} : {' , '.join(things)} . on {floor} before {back} , {nearest} is nearest ."


def questions(scenes: Scenes, index: int, rng: np.random.Generator) -> list[Question]:
    """Every kind of question that this scene allows, in random order; which solids they are about is drawn."""
    count = int(scenes.count[index])
    slots = rng.permutation(count)
    one = int(slots[0])
    size, colour, shape = _solid(scenes, index, one)
    found = [
        Question("count", "how many solids are there ?", NUMBERS[count - 1]),
        Question("shape", f"what shape is the {colour} solid ?", shape),
        Question("size", f"is the {colour} solid small or large ?", size),
        Question("floor", "what is the floor ?", FLOORS[scenes.floor[index]]),
    ]
    unique = [slot for slot in slots if (scenes.shape[index, :count] == scenes.shape[index, slot]).sum() == 1]
    if unique:
        _, colour_of, shape_of = _solid(scenes, index, int(unique[0]))
        found.append(Question("colour", f"what colour is the {shape_of} ?", colour_of))
    if count > 1:
        other = int(slots[1])
        names = [COLOURS[scenes.colour[index, slot]] for slot in (one, other)]
        column, distance = scenes.position[index, :, 0], scenes.position[index, :, 1]
        side = "left" if column[one] < column[other] else "right"
        nearer = names[0] if distance[one] < distance[other] else names[1]
        found.append(Question("side", f"is the {names[0]} solid left or right of the {names[1]} one ?", side))
        found.append(Question("nearer", f"which is nearer , the {names[0]} or the {names[1]} solid ?", nearer))
    return [found[i] for i in rng.permutation(len(found))]


def vocabulary() -> list[str]:
    """Every word of the language."""
    asked = (
        "how many solids are there what shape is the solid small or large colour floor left right of one which nearer"
    )
    told = "a on before nearest , . : ? USER ASSISTANT"
    words = [*asked.split(), *told.split(), *DEFAULT_PROMPT.replace(".", "").split()]
    return list(dict.fromkeys([*words, *NUMBERS, *COLOURS, *SHAPES, *SIZES, *FLOORS, *BACKGROUNDS]))


def make_tokenizer() -> Any:
    """A word-level tokenizer of the real fast class, with LLaVA-1.5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import probing.utils.torchvision_shim  # noqa: F401

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    words = {word: code for code, word in enumerate([*special, *vocabulary()])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast
