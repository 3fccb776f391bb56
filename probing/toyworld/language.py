"""Captions, questions with one-word answers, and the tokenizer of the toy world."""

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
    """A question about one scene with a one-word answer; `kind` is one of `KINDS`."""

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
    """Describes the solids from left to right, floor, background, and the nearest solid."""
    count = int(scenes.count[index])
    order = np.argsort(scenes.position[index, :count, 0])
    solids = [f"a {' '.join(_solid(scenes, index, slot))}" for slot in order]
    nearest = COLOURS[scenes.colour[index, np.argmin(scenes.position[index, :count, 1])]]
    floor, back = FLOORS[scenes.floor[index]], BACKGROUNDS[scenes.background[index]]
    return f"{NUMBERS[count - 1]} : {' , '.join(solids)} . on {floor} before {back} , {nearest} is nearest ."


def questions(scenes: Scenes, index: int, rng: np.random.Generator) -> list[Question]:
    """Returns all kinds of questions that apply to a scene, about random solids, in random order."""
    count = int(scenes.count[index])
    slots = rng.permutation(count)
    first = int(slots[0])
    size, colour, shape = _solid(scenes, index, first)
    result = [
        Question("count", "how many solids are there ?", NUMBERS[count - 1]),
        Question("shape", f"what shape is the {colour} solid ?", shape),
        Question("size", f"is the {colour} solid small or large ?", size),
        Question("floor", "what is the floor ?", FLOORS[scenes.floor[index]]),
    ]
    unique = [slot for slot in slots if (scenes.shape[index, :count] == scenes.shape[index, slot]).sum() == 1]
    if unique:
        _, colour, shape = _solid(scenes, index, int(unique[0]))
        result.append(Question("colour", f"what colour is the {shape} ?", colour))
    if count > 1:
        second = int(slots[1])
        names = [COLOURS[scenes.colour[index, slot]] for slot in (first, second)]
        column, distance = scenes.position[index, :, 0], scenes.position[index, :, 1]
        side = "left" if column[first] < column[second] else "right"
        nearer = names[0] if distance[first] < distance[second] else names[1]
        result.append(Question("side", f"is the {names[0]} solid left or right of the {names[1]} one ?", side))
        result.append(Question("nearer", f"which is nearer , the {names[0]} or the {names[1]} solid ?", nearer))
    return [result[i] for i in rng.permutation(len(result))]


def vocabulary() -> list[str]:
    """Returns every word of the toy language."""
    question_words = (
        "how many solids are there what shape is the solid small or large colour floor left right of one which nearer"
    )
    caption_words = "a on before nearest , . : ? USER ASSISTANT"
    words = [*question_words.split(), *caption_words.split(), *DEFAULT_PROMPT.replace(".", "").split()]
    return list(dict.fromkeys([*words, *NUMBERS, *COLOURS, *SHAPES, *SIZES, *FLOORS, *BACKGROUNDS]))


def make_tokenizer() -> Any:
    """Builds a word-level fast tokenizer with LLaVA-1.5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import probing.utils.torchvision_shim  # noqa: F401

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    vocab = {word: code for code, word in enumerate([*special, *vocabulary()])}
    model = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer
