"""A few images of `probing align`: the words near each patch, and how near each patch is to the labels' words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from analysis.alignment.forward_pass import Subject
from analysis.alignment.metrics.patch_words import nearest_words, similarity
from analysis.alignment.metrics.sparse_codes import orthogonal_matching_pursuit
from probing.models import Layer, layer_name
from probing.utils.files import whole_file, write_text
from probing.utils.images import square

SIDE = 256
"""Of the photograph, in pixels."""
NEAREST, SUMMED = 3, 3
"""Words shown for each patch: those nearest to it, and those of which it is most nearly a sum."""
LABELS = 4
"""Labels whose similarity is drawn, the largest of the image."""


def draw_pictures(subject: Subject, centres: dict[str, Tensor], folder: Path, count: int) -> None:
    """Writes `patches.json` and `patches.safetensors` for the first so many images.

    Args:
        subject: what is measured.
        centres: by layer, the mean state (H) that similarities are measured without.
        folder: where to.
        count: of images.
    """
    backbone, tokenizer = subject.backbone, subject.tokenizer
    some: list[Layer] = [0, backbone.layers // 2, backbone.layers]
    drawn = [layer for layer in subject.layers if layer in some] or [subject.layers[0]]
    atoms = F.normalize(subject.vocabulary.float(), dim=-1).to(subject.vocabulary.dtype)
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for number, name in enumerate(subject.images.names[:count]):
        (prepared,) = subject.read([[number]], teachers=False)
        if prepared.student is None or prepared.annotations is None:
            continue
        student = prepared.student.to(backbone.device)
        shares = prepared.annotations[0]
        there = (shares.sum(dim=0) > 0).nonzero().flatten().tolist()
        there = sorted(there, key=lambda label: -float(shares[:, label].sum()))[:LABELS]
        states: dict[Layer, Tensor] = {}

        def visit(layer: Layer, hidden: Tensor, student: Any = student, states: Any = states) -> None:
            states[layer] = student.tokens.image_states(hidden)[0].detach()

        backbone.stream(student, drawn, visit)
        words, sums = {}, {}
        for layer, state in states.items():
            state = state.nan_to_num(0, 0, 0)  # drawn as nothing where it is not finite
            nearest = nearest_words(state, atoms, NEAREST).tolist()
            words[layer_name(layer)] = [[tokenizer.decode([token]).strip() for token in row] for row in nearest]
            found = orthogonal_matching_pursuit(state.float(), subject.vocabulary, SUMMED, non_negative=True)
            sums[layer_name(layer)] = [
                [[tokenizer.decode([token]).strip(), round(part, 3)] for token, part in zip(*row, strict=True) if part]
                for row in zip(found.atoms.tolist(), found.coefficients.tolist(), strict=True)
            ]
            centre = centres[layer_name(layer)].nan_to_num()
            own = similarity(state[None] - centre, subject.words["centred"][there])[0]
            tensors[f"similarity.{number}.{layer_name(layer)}"] = own.cpu().contiguous()
        picture = square(subject.images.read(number)).resize((SIDE, SIDE))
        tensors[f"photograph.{number}"] = torch.from_numpy(np.array(picture))
        labels = [subject.names[label] for label in there]
        entries.append({"image": name, "labels": labels, "words": words, "sums": sums})
    whole = {"grid": list(subject.annotate.grid), "layers": [layer_name(layer) for layer in drawn], "images": entries}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "patches.safetensors") as file:
        save_file(tensors, file)
    write_text(folder / "patches.json", json.dumps(whole))
