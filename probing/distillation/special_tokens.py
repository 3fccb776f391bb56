"""Special tokens <g>, <d> and <s> (OLA-VLM, arXiv:2412.09585, sec. 4): N_seek per task, after every image.

They are entries of the vocabulary that the chat template writes after each image, so that a checkpoint with them is an
ordinary LLaVA folder. During training their embeddings are separate parameters, which can be trained next to a frozen
embedding table, or be frozen next to a trained one; saving writes them into the table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from probing.models.token_map import special_ids, token_name
from probing.utils.errors import UserError

IMAGE = "<image>"


def add_special_tokens(processor: Any, model: Any, tasks: Sequence[str], number: int) -> dict[str, list[int]]:
    """Adds special tokens to tokenizer, chat template and embedding table, in place.

    Args:
        processor: of the checkpoint.
        model: a `LlavaForConditionalGeneration`.
        tasks: in the order in which their tokens follow an image.
        number: N_seek, tokens per task.

    Returns:
        Ids of each task's tokens.

    Raises:
        UserError: the chat template does not write images as `<image>`, or there are other special tokens.
    """
    tokenizer = processor.tokenizer
    existing = special_ids(tokenizer)
    if existing:
        counts = {task: len(ids) for task, ids in existing.items()}
        if counts != dict.fromkeys(tasks, number):
            raise UserError(
                f"the checkpoint has special tokens already ({counts}); set the recipe's seek and tasks to these"
            )
        return {task: existing[task] for task in tasks}
    template = processor.chat_template or ""
    if IMAGE not in template:
        raise UserError(f"the chat template does not write images as {IMAGE}; replace chat_template.jinja")
    names = [token_name(task, k) for task in tasks for k in range(number)]
    tokenizer.add_tokens(names, special_tokens=True)
    processor.chat_template = template.replace(IMAGE, IMAGE + "".join(names))
    added = special_ids(tokenizer, tasks)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = [row for ids in added.values() for row in ids]
    tables = {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    with torch.no_grad():
        for weight in (w for w in tables.values() if not w.is_meta):  # one, where they are tied
            others = torch.tensor(sorted(set(range(len(weight))) - set(rows)), device=weight.device)
            weight[rows] = weight[others].mean(dim=0)
    return added


def pool_queries(queries: Iterable[Tensor], seek: int) -> Tensor:
    """Averages each task's queries (n, H) over equal groups of neighbours; returns rows (tasks * seek, H)."""
    return torch.cat([value.unflatten(0, (seek, -1)).mean(dim=1) for value in queries])


class SpecialTokens(nn.Module):
    """Embeddings of the special tokens during training, in place of their rows of the embedding table.

    Attributes:
        ids: ids of each task's tokens.
        queries: (seek, H) per task; empty where predictors hold the queries.
    """

    flat_ids: Tensor
    rows: Callable[[], Tensor]

    def __init__(self, ids: dict[str, list[int]], table: nn.Module, rows: Callable[[], Tensor] | None = None) -> None:
        """Hooks the embeddings into the LLM.

        Args:
            ids: ids of each task's tokens.
            table: the LLM's input embeddings.
            rows: computes the embeddings (tokens, H), in the order of `ids`; by default they start as the table's.
        """
        super().__init__()
        self.ids, self.seek = ids, len(next(iter(ids.values())))
        self.register_buffer("flat_ids", torch.tensor(list(chain(*ids.values()))), persistent=False)
        self.queries = nn.ParameterDict()
        if rows is None:
            weight = cast(Tensor, table.weight).detach()
            self.queries.update({task: nn.Parameter(weight[numbers].clone()) for task, numbers in ids.items()})
        self.rows = rows or (lambda: pool_queries([self.queries[task] for task in ids], self.seek))
        table.register_forward_hook(self._replace)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        match = args[0][..., None] == self.flat_ids
        chosen = self.rows()[match.int().argmax(dim=-1)]
        return torch.where(match.any(dim=-1, keepdim=True), chosen.to(output.dtype), output)

    def write(self, table: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Returns an embedding table with the trained rows, from the unsharded state of a `DistillationModel`."""
        # a task's queries are part of this module or of the predictors
        queries = [next(v for name, v in state.items() if name.endswith(f".queries.{task}")) for task in self.ids]
        table = table.clone()
        table[self.flat_ids.to(table.device)] = pool_queries(queries, self.seek).to(table)
        return table
