"""Teachers' features for the batches of one optimiser step."""

from typing import Any

import torch
from torch import Tensor

from probing.distillation.losses import global_targets, unit_rows
from probing.teachers import Teacher


def attach_targets(batches: list[dict[str, Any]], teachers: dict[str, Teacher], world: int) -> None:
    """Puts `targets` into every micro-batch of a step that has samples with an image.

    All micro-batches are looked at together, and those of the other processes too: the contrast is over the targets of
    the global batch, so that its size alone matters and not how it is cut up.

    Args:
        batches: micro-batches of this process; `teacher_pixels` or `teacher_features`, and `target_rows`, are taken
            out of them.
        teachers: by name.
        world: number of processes.
    """
    found: list[tuple[dict[str, Any], Tensor, dict[str, Tensor]]] = []
    for batch in batches:
        pixels, kept = batch.pop("teacher_pixels", None), batch.pop("teacher_features", None)
        rows = batch.pop("target_rows", None)
        if rows is None:
            continue
        if kept is not None:
            features = {name: kept[name].to(teacher.device) for name, teacher in teachers.items()}
        else:
            features = {name: teacher.target(pixels[name]) for name, teacher in teachers.items()}
        found.append((batch, rows, features))
    others, start = {}, 0
    for name, teacher in teachers.items():
        device = teacher.device
        mine = [unit_rows(features[name]) for _, _, features in found]
        tokens, width = teacher.shape
        rows = torch.cat(mine) if mine else torch.zeros(0, tokens * width, device=device)
        others[name], start = global_targets(rows, world)
    images = max((len(rows) for rows in others.values()), default=0)
    for batch, rows, features in found:
        own = torch.arange(start, start + len(rows), device=rows.device)
        batch["targets"] = {"rows": rows, "features": features, "others": others, "own": own, "images": images}
        start += len(rows)
