"""Special tokens <g>, <d> and <s> (OLA-VLM, arXiv:2412.09585, sec. 4): N_seek per task, right after every image.

They are entries of the vocabulary, written by the chat template after each image, so that a checkpoint with them is an
ordinary LLaVA folder: processor, generation and probing need to know nothing. While they are trained, or frozen beside
an LLM that is trained, their embeddings come from outside the embedding table; saving writes them into it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from probing.models.token_map import special_ids, token_name
from probing.utils.errors import UserError

IMAGE = "<image>"


def add_special_tokens(processor: Any, model: Any, tasks: Sequence[str], number: int) -> dict[str, list[int]]:
    """Gives a checkpoint special tokens: in the tokenizer, the chat template and the embedding table.

    Args:
        processor: of the checkpoint; changed in place.
        model: a `LlavaForConditionalGeneration`; changed in place.
        tasks: in the order in which their tokens follow an image.
        number: N_seek, tokens per task.

    Returns:
        Ids of each task's tokens.

    Raises:
        UserError: the chat template does not write images as `<image>`, or there are special tokens already that
            are others.
    """
    tokenizer = processor.tokenizer
    there = special_ids(tokenizer)
    if there:
        counts = {task: len(ids) for task, ids in there.items()}
        if counts != dict.fromkeys(tasks, number):
            raise UserError(
                f"the checkpoint has special tokens already ({counts}), other than the recipe's {number} for each of "
                f"{', '.join(tasks)}; start from one without, or set the recipe's seek and tasks to these"
            )
        return {task: there[task] for task in tasks}
    template = processor.chat_template or ""
    if IMAGE not in template:
        raise UserError(
            f"the checkpoint's chat template does not write images as {IMAGE}, so special tokens cannot follow them; "
            "give it one that does (chat_template.jinja)"
        )
    names = [token_name(task, k) for task in tasks for k in range(number)]
    tokenizer.add_tokens(names, special_tokens=True)
    processor.chat_template = template.replace(IMAGE, IMAGE + "".join(names))
    found = special_ids(tokenizer, tasks)
    table = model.get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = [row for ids in found.values() for row in ids]
    head = model.get_output_embeddings()
    with torch.no_grad():
        for weight in {id(w): w for w in (model.get_input_embeddings().weight, head.weight)}.values():
            others = torch.tensor(sorted(set(range(len(weight))) - set(rows)), device=weight.device)
            weight[rows] = weight[others].mean(dim=0)
    return found
