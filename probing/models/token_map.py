"""Kinds of tokens: system prompt, image, special tokens, text, answer, padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from probing.recipe import TOKEN_KINDS
from probing.utils.errors import UserError
from probing.utils.notebook import picture, strip, table

IMAGE_KINDS = ("cls", "image", "tile", "newline")
"""Kinds of the tokens whose inputs come from the vision tower."""
COLOURS = dict(
    zip(
        TOKEN_KINDS,
        ("#999999", "#000000", "#0072b2", "#56b4e9", "#004466", "#cc79a7", "#d55e00", "#f0e442", "#e69f00", "#009e73",
         "#eeeeee"),
        strict=True,
    )
)  # fmt: skip
"""Colour of each kind in notebooks."""
SPECIAL = ("gen", "depth", "seg")
"""Tasks that have special tokens, in their order."""


@dataclass(frozen=True)
class TokenMap:
    """The kind of every position of a batch of sequences.

    It stays on the CPU, so that choosing positions never waits for a GPU.

    Attributes:
        kinds: (B, T) integer codes, indices into `probing.recipe.TOKEN_KINDS`.
        grid: rows and columns of the image tokens of one image.
        tiles: per image, rows and columns of its tile tokens, if the family has them.
        dropped: patches at the beginning of the grid that have no token.
        picture: the first image, for notebooks.
    """

    kinds: Tensor
    grid: tuple[int, int]
    tiles: tuple[tuple[int, int], ...] = ()
    dropped: int = 0
    picture: Image.Image | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind} {number}" for kind, number in self.counts().items())
        return f"TokenMap({len(self.kinds)} x {self.kinds.shape[1]} positions, grid {self.grid}: {counts})"

    def _repr_html_(self) -> str:
        names = [TOKEN_KINDS[code] for code in self.kinds[0].tolist()]
        segments = [(len(list(run)), COLOURS[kind], kind) for kind, run in groupby(names)]
        rows = []
        for kind, number in self.counts().items():
            first, last = names.index(kind), len(names) - 1 - names[::-1].index(kind)
            rows.append((kind, f"{first} to {last}", number))
        html = table(f"{len(names)} positions", rows, ("kind", "positions", "number")) + strip(segments)
        if self.picture is None or "image" not in names:
            return html
        width, height = self.picture.size
        grid = self.grid if width * self.grid[0] == height * self.grid[1] else None
        first, last = names.index("image"), len(names) - 1 - names[::-1].index("image")
        return html + picture(self.picture, grid, first, last)

    def mask(self, *kinds: str) -> Tensor:
        """Returns (B, T), True at positions of the kinds."""
        codes = torch.tensor([TOKEN_KINDS.index(kind) for kind in kinds], device=self.kinds.device)
        return torch.isin(self.kinds, codes)

    def counts(self) -> dict[str, int]:
        """Returns the number of positions of each kind in the first sequence, without absent kinds."""
        codes, numbers = self.kinds[0].unique(return_counts=True)
        return {TOKEN_KINDS[int(code)]: int(number) for code, number in zip(codes, numbers, strict=True)}

    def select(self, states: Tensor, kinds: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Selects the positions of some kinds.

        Returns:
            The states (B, T', H), zero at invalid positions, and the mask (B, T') of valid ones; None if all are
            valid, as is usual: all sequences of a batch have the same layout.
        """
        mask = self.mask(*kinds)
        columns = mask.any(dim=0)
        chosen = states if bool(columns.all()) else states.index_select(1, _positions(columns, states))
        if bool((mask == mask[:1]).all()):
            return chosen, None
        mask = mask[:, columns].to(states.device, non_blocking=True)
        return chosen.masked_fill(~mask[..., None], 0), mask

    def mean_weights(self, positions: Sequence[str]) -> Tensor:
        """Returns weights (B, P, T) of the mean over each of some positions, see `fit.positions`.

        Raises:
            UserError: a sequence has no such position.
        """
        masks = [self._at(position) for position in positions]
        for position, mask in zip(positions, masks, strict=True):
            if not bool(mask.any(dim=1).all()):
                raise UserError(f"the prompt has no {position} tokens; leave {position!r} out of fit.positions")
        weights = torch.stack(masks, dim=1).float()
        return weights / weights.sum(dim=2, keepdim=True)

    def _at(self, position: str) -> Tensor:
        if position == "last":
            real = (self.kinds != TOKEN_KINDS.index("padding")).long()
            return (real.cumsum(dim=1) == real.sum(dim=1, keepdim=True)) & (real == 1)
        return self.mask(*(SPECIAL if position == "special" else (position,)))

    def image_states(self, states: Tensor) -> Tensor:
        """Returns the states of the image's patches, (B, rows * columns, H), row-major.

        A dropped patch gets the state of the first one that has a token.
        """
        rows, columns = self.grid
        patches = states.flatten(0, 1).index_select(0, _positions(self.mask("image").flatten(), states))
        patches = patches.view(states.shape[0], rows * columns - self.dropped, states.shape[-1])
        return torch.cat((patches[:, :1].expand(-1, self.dropped, -1), patches), dim=1) if self.dropped else patches


def _positions(mask: Tensor, states: Tensor) -> Tensor:
    return mask.nonzero().flatten().to(states.device, non_blocking=True)


def token_name(task: str, number: int) -> str:
    """Returns the text of a special token."""
    return f"<{task}_{number}>"


def special_ids(tokenizer: Any, tasks: Sequence[str] = SPECIAL) -> dict[str, list[int]]:
    """Returns the ids of each task's special tokens, in order, without tasks that have none."""
    ids: dict[str, list[int]] = {}
    vocabulary = tokenizer.get_added_vocab()
    for task in tasks:
        while (name := token_name(task, len(ids.get(task, ())))) in vocabulary:
            ids.setdefault(task, []).append(vocabulary[name])
    return ids


def token_kinds(
    ids: Tensor,
    attention: Tensor,
    image_id: int,
    special: dict[str, list[int]] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Returns the kind of each position of a batch, (B, T) indices into `probing.recipe.TOKEN_KINDS`.

    Everything before the first image is system prompt; a sequence without image has none.

    Args:
        ids: (B, T) input ids.
        attention: (B, T), 0 for padding.
        image_id: id of the placeholder of one image token.
        special: ids of the special tokens of each task.
        labels: (B, T), -100 at unsupervised positions; the others are the answer.
    """
    code = {kind: index for index, kind in enumerate(TOKEN_KINDS)}
    image = ids == image_id
    kinds = torch.full_like(ids, code["text"])
    kinds[(image.cumsum(dim=1) == 0) & image.any(dim=1, keepdim=True)] = code["system"]
    if labels is not None:
        kinds[labels != -100] = code["answer"]
    kinds[image] = code["image"]
    for kind, numbers in (special or {}).items():
        kinds[torch.isin(ids, torch.tensor(numbers, device=ids.device))] = code[kind]
    kinds[attention == 0] = code["padding"]
    return kinds
