"""`probing plan`: what an evaluation costs before it begins, and what of it is there already.

What training costs is in `analysis.planning.probe_training`.
"""

from dataclasses import dataclass, replace

import torch

from analysis.evaluation.forward_pass import ARMS, WITHOUT_RIDGE, Selection
from analysis.evaluation.metrics.generated_images import feature_folder
from analysis.evaluation.metrics.image_features import Extractor, classifier, inception, inception_file, reference_file
from analysis.evaluation.run import GENERATED, Options, protocols_of, require_protocols, selection
from analysis.evaluation.scores import score_file
from probing.data.coco import ImageList
from probing.data.da2k import read_pairs
from probing.models import count_blocks, layer_name
from probing.recipe import ProbeRunRecipe
from probing.runs.directory import Run
from probing.training.run import held_out_images
from probing.utils.errors import UserError


@dataclass(frozen=True)
class Cost:
    """What one metric takes.

    Attributes:
        metric: its name.
        work: how much of what.
        there: what of it is there already.
    """

    metric: str
    work: str
    there: str


def plan(run: Run | None, recipe: ProbeRunRecipe, options: Options) -> list[Cost]:
    """Says what evaluating takes; loads no model but the network that features come from.

    Args:
        run: a finished run; None where there is only its recipe.
        recipe: of the run.
        options: as for `analysis.evaluation.run.evaluate`.

    Raises:
        UserError: something that was asked for does not exist.
    """
    blocks = run.manifest["checkpoint"]["layers"] if run else count_blocks(recipe.backbone)
    images = held_out_images(recipe.data)
    require_protocols(options)
    costs = []
    for metric in options.metrics:
        protocols = protocols_of(metric, options.protocols)
        chosen = selection(recipe, blocks, options, metric)
        if metric in GENERATED:
            costs += _generation(run, recipe, metric, chosen, images, options)
            continue
        number, split = len(images) if metric == "cosine" else min(len(images), options.images or len(images)), None
        if metric == "da2k":
            if options.da2k is None:
                raise UserError("the metric da2k needs its images and pairs; give --da2k DIR")
            number, split = min(len(read_pairs(options.da2k)), options.images or len(images)), "da2k"
        curves = len(_names(chosen, recipe))
        work = f"{number:,} images x {len(_arms(chosen))} forward passes of the backbone"
        if metric != "cosine":
            work += f"; {number:,} x {curves} curves x {len(protocols)} protocols = "
            work += f"{number * curves * len(protocols):,} decodings"
        file = score_file(run.path, f"scores/{metric}", split or images.split) if run else None
        there = f"{file}, kept where its settings are these" if file and file.exists() else "nothing"
        costs.append(Cost(metric, work, there))
    return costs


def _arms(chosen: Selection) -> list[str]:
    """Passes of the backbone: with its own weights, with random ones, and shown something else."""
    return [arm for arm in ARMS if chosen.arm(arm).controls]


def _kinds(chosen: Selection) -> list[tuple[str, str]]:
    """Kinds of curves: probes by control."""
    return [(p, c) for p in chosen.probes for c in chosen.controls if p != "ridge" or c not in WITHOUT_RIDGE]


def _generation(
    run: Run | None, recipe: ProbeRunRecipe, metric: str, chosen: Selection, images: ImageList, options: Options
) -> list[Cost]:
    """Painting, and the features of the real images."""
    names = images.names[: options.images]
    sets = len(_names(chosen, recipe)) + 2  # and the mean target, and the true feature
    calls = options.steps * (2 if options.guidance > 1 else 1)
    work = (
        f"{sets} sets x {len(names):,} images = {sets * len(names):,} images x {calls} calls of the diffusion model "
        f"({options.steps} steps{', twice for guidance' if options.guidance > 1 else ''}) = "
        f"{sets * len(names) * calls:,} calls"
    )
    extractor = _extractor(metric, options)
    if extractor is None:
        return [
            Cost(metric, work, "nothing"),
            Cost(f"{metric}, real images", f"features of {len(names):,} images; download of Inception", "nothing"),
        ]
    painted = 0
    if run is not None:
        teacher = run.manifest["teachers"]["gen"]["sha256"]
        folder = feature_folder(run.path, extractor, teacher, options.steps, options.guidance)
        wanted = [*_names(chosen, recipe), "constant-mean", "target-teacher"]
        painted = sum(any(folder.glob(f"{name}-*.safetensors")) for name in wanted)
    real = reference_file(extractor, replace(images, names=names))
    there = f"in the cache ({real})" if real.exists() else "nothing"
    return [
        Cost(metric, work, f"{painted} of {sets} sets" if painted else "nothing"),
        Cost(f"{metric}, real images", f"features of {len(names):,} images", there),
    ]


def _names(chosen: Selection, recipe: ProbeRunRecipe) -> list[str]:
    """How the files of painted curves begin."""
    return [
        f"{layer_name(layer)}-{probe}-{control}-{seed}"
        for layer in chosen.layers
        for probe, control in _kinds(chosen)
        for seed in (recipe.fit.seeds if probe == "resampler" else recipe.fit.seeds[:1])
    ]


def _extractor(metric: str, options: Options) -> Extractor | None:
    """The network that features come from, unless it would have to be downloaded."""
    device = torch.device("cpu")
    if metric == "fid":
        file = options.inception_weights or inception_file()
        return inception(file, device) if file else None
    if options.extractor is None:
        raise UserError("the metric frechet needs a network for its features; give --extractor DIR, or use fid")
    return classifier(options.extractor, device)
