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
from probing.models.token_map import IMAGE_KINDS
from probing.recipe import TOKEN_KINDS, BackboneRecipe
from probing.utils.errors import UserError
from probing.utils.images import square

ANSWER, PADDING = TOKEN_KINDS.index("answer"), TOKEN_KINDS.index("padding")
IMAGE = torch.tensor([TOKEN_KINDS.index(kind) for kind in IMAGE_KINDS])


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
            UserError: the chat template writes no answer, or another prompt before it.
        """
        images, texts, rests = [image for image, _ in pairs], list[str](), dict[str, Tensor]()
        with rendering_at(self.moment):
            for _, (question, answer) in pairs:
                recipe = self.recipe.model_copy(update={"prompt": question})
                unanswered = prompt(self.prepare.processor, recipe)
                texts.append(prompt(self.prepare.processor, recipe, answer))
                if not texts[-1].startswith(unanswered) or texts[-1] == unanswered:
                    raise UserError(
                        "the chat template does not write an answer after the prompt; set backbone.template"
                    )
                if question not in rests:
                    alone = self.prepare(images[:1], [unanswered])
                    rests[question] = alone.inputs["input_ids"][0, _end_of_image(alone.tokens.kinds[0]) :]
        batch = self.prepare(images, texts)
        ids, kinds = batch.inputs["input_ids"], batch.tokens.kinds.clone()
        for row, own, (_, (question, _)) in zip(ids, kinds, pairs, strict=True):  # image tokens may differ in number
            start, rest = _end_of_image(own), rests[question]
            shown = row[start : start + len(rest)]
            start += int((shown == rest[: len(shown)]).cumprod(dim=0).sum())  # a tokenizer may merge prompt and answer
            own[start:] = torch.where(own[start:] == PADDING, PADDING, ANSWER)
        return Batch(batch.inputs, replace(batch.tokens, kinds=kinds))


def _end_of_image(kinds: Tensor) -> int:
    """Returns the position after the last token of the image in a sequence (T)."""
    return 1 + int(torch.isin(kinds, IMAGE).nonzero().max())


def score_answers(final: Tensor, head: torch.nn.Module, ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Computes loss and accuracy of the answers' tokens, each predicted from all tokens before it.

    Args:
        final: (B, T, H), states after the final norm.
        head: states → logits.
        ids: (B, T).
        answer: (B, T), True at the tokens of the answers, on the CPU.

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
