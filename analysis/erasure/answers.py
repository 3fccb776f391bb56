"""Images with prompts and their answers, so that a forward pass gives the loss of the answers' tokens."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from probing.models.base import Batch, InputProcessor
from probing.models.chat_templates import rendering_at
from probing.models.llava import prompt
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError
from probing.utils.images import square

TEXT, ANSWER, PADDING = (TOKEN_KINDS.index(kind) for kind in ("text", "answer", "padding"))


Answer = tuple[str, str]
"""A prompt and its answer."""


@dataclass(frozen=True)
class AddAnswer:
    """Puts prompt and answer next to an image, for `MicroBatches.replace`."""

    names: list[str]
    answers: dict[str, Answer]
    view: str

    def __call__(self, index: int, image: Image.Image) -> tuple[Image.Image, Answer]:
        """Returns image, prompt and answer."""
        return (square(image) if self.view == "square" else image), self.answers[self.names[index]]


@dataclass(frozen=True)
class AnsweredInputs:
    """Prepares images with prompts and answers.

    Attributes:
        prepare: prepares images with the prompt of the run.
        recipe: of the backbone.
        moment: date and time that chat templates see, in any process.
    """

    prepare: InputProcessor
    recipe: BackboneRecipe
    moment: datetime.datetime | None

    def __call__(self, pairs: Sequence[tuple[Image.Image, Answer]]) -> Batch:
        """Prepares a batch; kind `answer` marks what the template adds for the answers.

        Raises:
            UserError: the chat template writes another prompt where an answer follows.
        """
        images, processor = [image for image, _ in pairs], self.prepare.processor
        with rendering_at(self.moment):
            recipes = [self.recipe.model_copy(update={"prompt": question}) for _, (question, _) in pairs]
            asked = [prompt(processor, recipe) for recipe in recipes]
            answered = [prompt(processor, recipe, text) for recipe, (_, (_, text)) in zip(recipes, pairs, strict=True)]
            own = self.prepare(images[:1])
        if not all(text.startswith(before) for text, before in zip(answered, asked, strict=True)):
            raise UserError("the chat template writes another prompt before an answer; set backbone.template")
        inputs = self.prepare.encode(images, answered)
        ids = inputs["input_ids"]
        first_text = _shared(ids, own.inputs["input_ids"].expand(len(ids), -1))
        first_answer = _shared(ids, self.prepare.encode(images, asked)["input_ids"])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        kinds = torch.full_like(ids, TEXT)
        for row, count in enumerate(first_text.tolist()):
            kinds[row, :count] = own.tokens.kinds[0, :count]
        kinds[positions >= first_answer[:, None]] = ANSWER
        kinds[inputs["attention_mask"] == 0] = PADDING
        return Batch(inputs, replace(own.tokens, kinds=kinds, tiles=own.tokens.tiles * len(images)))


def _shared(ids: Tensor, others: Tensor) -> Tensor:
    """Counts equal tokens before the first different one (B), of (B, T) and (B, U); a tokenizer may merge the ends."""
    width = min(ids.shape[1], others.shape[1])
    return (ids[:, :width] == others[:, :width]).long().cumprod(dim=1).sum(dim=1)


def score_answers(final: Tensor, head: torch.nn.Module, ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Computes loss and accuracy of the answers' tokens, each predicted from all tokens before it.

    Args:
        final: (B, T, H), states after the final norm.
        head: states → logits.
        ids: (B, T).
        answer: (B, T), True at the tokens of the answers.

    Returns:
        Mean negative log-likelihood in nats (B), and share of tokens that are the most likely ones (B).
    """
    rows, columns = answer[:, 1:].nonzero(as_tuple=True)
    logits: Any = head(final[rows, columns]).float()
    wanted = ids[rows, columns + 1].to(logits.device)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    values = torch.stack((losses, (logits.argmax(dim=-1) == wanted).float()))
    sums = values.new_zeros(2, len(ids)).index_add_(1, rows.to(values.device), values)
    loss, right = sums / answer[:, 1:].sum(dim=1).to(values.device)
    return loss, right
