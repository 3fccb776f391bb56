"""Words near each patch of a few images, and the similarity of each patch to the words of the labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from analysis.alignment.context import AlignmentContext
from analysis.alignment.metrics.sparse_codes import pursue
from analysis.alignment.metrics.word_match import cosines, nearest_words
from probing.models import Layer, layer_name
from probing.utils.files import atomic_file, write_text
from probing.utils.images import square

SIDE = 256
"""Width and height of the image, in pixels."""
NEAREST, SUMMED = 3, 3
"""Words shown per patch: the nearest, and those of its sparse sum."""
LABELS = 4
"""Labels whose similarity is shown, the largest of the image."""


def write_pictures(context: AlignmentContext, centres: dict[str, Tensor], folder: Path) -> None:
    """Writes `patches.json` and `patches.safetensors` for the first images; `centres` are mean states by layer."""
    depth = context.model.layers
    layers = [layer for layer in context.layers if layer in (0, depth // 2, depth)] or context.layers[:1]
    vocabulary = F.normalize(context.vocabulary.float(), dim=-1).to(context.vocabulary.dtype)
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, name in enumerate(context.images.names[: context.recipe.pictures]):
        (prepared,) = context.read([[index]], with_teachers=False)
        if prepared.student is None or prepared.annotations is None:
            continue
        area = prepared.annotations[0].sum(dim=0)
        labels = area.argsort(descending=True, stable=True)[: min(LABELS, int((area > 0).sum()))]
        student = prepared.student.to(context.model.device)
        states: dict[str, Tensor] = {}

        def visit(layer: Layer, hidden: Tensor, tokens: Any = student.tokens, states: Any = states) -> None:
            states[layer_name(layer)] = tokens.image_states(hidden)[0].detach().nan_to_num(0, 0, 0)

        context.model.stream(student, layers, visit)
        words, sums = {}, {}
        for layer, patches in states.items():
            nearest = nearest_words(patches, vocabulary, NEAREST)
            words[layer] = [[_decode(context, token) for token in row] for row in nearest.tolist()]
            sums[layer] = _sums(context, patches)
            centred = (patches - centres[layer].nan_to_num())[None]
            similarity = cosines(centred, context.label_words["centred"][labels])[0]
            tensors[f"similarity.{index}.{layer}"] = similarity.cpu().contiguous()
        image = square(context.images.read(index)).resize((SIDE, SIDE))
        tensors[f"photograph.{index}"] = torch.from_numpy(np.array(image))
        names = [context.annotate.words[label] for label in labels.tolist()]
        entries.append({"image": name, "labels": names, "words": words, "sums": sums})
    content = {"grid": list(context.annotate.grid), "layers": list(map(layer_name, layers)), "images": entries}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "patches.safetensors") as file:
        save_file(tensors, file)
    write_text(folder / "patches.json", json.dumps(content))


def _decode(context: AlignmentContext, token: int) -> str:
    return str(context.tokenizer.decode([token]).strip())


def _sums(context: AlignmentContext, patches: Tensor) -> list[list[list[Any]]]:
    """Word and coefficient of each part of a non-negative sum, for every patch."""
    pursuit = pursue(patches.float(), context.vocabulary, SUMMED, "non-negative")
    return [
        [[_decode(context, token), round(part, 3)] for token, part in zip(*row, strict=True) if part]
        for row in zip(pursuit.atoms.tolist(), pursuit.coefficients.tolist(), strict=True)
    ]
