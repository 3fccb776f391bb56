"""Images with their captions as the answer to the prompt, so that a forward pass gives the caption's loss."""

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


@dataclass(frozen=True)
class AddCaption:
    """Puts an image's caption next to it, for `MicroBatches.replace`."""

    names: list[str]
    captions: dict[str, str]
    view: str

    def __call__(self, index: int, image: Image.Image) -> tuple[Image.Image, str]:
        """Returns image and caption; raises OSError if there is none."""
        if (caption := self.captions.get(self.names[index])) is None:
            raise OSError("no caption")
        return (square(image) if self.view == "square" else image), caption


@dataclass(frozen=True)
class AnsweredInputs:
    """Prepares images and captions as the recipe's prompt and its answer.

    Attributes:
        prepare: prepares the prompt.
        recipe: of the backbone.
        moment: date and time that chat templates see, in any process.
    """

    prepare: InputProcessor
    recipe: BackboneRecipe
    moment: datetime.datetime | None

    def __call__(self, pairs: Sequence[tuple[Image.Image, str]]) -> Batch:
        """Prepares a batch; kind `answer` marks what the template adds for the captions.

        Raises:
            UserError: the chat template writes no answer, or another prompt before it.
        """
        images = [image for image, _ in pairs]
        with rendering_at(self.moment):
            texts = [prompt(self.prepare.processor, self.recipe, caption) for _, caption in pairs]
            asked = self.prepare(images[:1])
        if not all(text.startswith(self.prepare.text) and text != self.prepare.text for text in texts):
            raise UserError("the chat template does not write an answer after the prompt; set backbone.template")
        batch = self.prepare(images, texts)
        ids, kinds = batch.inputs["input_ids"], batch.tokens.kinds.clone()
        rest = asked.inputs["input_ids"][0, _end_of_image(asked.tokens.kinds[0]) :]
        for row, own in zip(ids, kinds, strict=True):  # images may have different numbers of tokens
            start = _end_of_image(own)
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
