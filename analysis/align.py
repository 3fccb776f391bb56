"""`probing align`: how the projector compresses what the tower saw, and whether each patch says the word for it.

One forward pass per image; the image tokens of every layer are measured while the layer's state exists. Numbers are
kept per image, and `results.csv` summarises them as it does those of probes.
"""

import contextlib
import copy
import functools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from analysis.geometry import anisotropy
from analysis.passes import Resumable, Tally, gather
from analysis.patches import Patches, derangement, nearest_words, scores, similarity
from analysis.projector import (
    effective_rank,
    effective_rank_singular,
    entropy_bound,
    matrix_entropy,
    von_neumann_entropy,
)
from analysis.scores import Curve, ScoreFile, read_if_fits, score_file, summaries, write_rows
from probing import __version__
from probing.backbones import Backbone, Layer, layer_name, load_backbone, parse_layers
from probing.data.coco import ImageList, Skipped, list_images, square
from probing.data.instances import Instances, read_label_maps
from probing.data.loader import Prepared, micro_batches
from probing.data.panoptic import Panoptic
from probing.data.patch_labels import COVERAGE, patch_labels, patch_shares, plain_name, word_numbers
from probing.errors import UserError
from probing.provenance import versions
from probing.recipe import BackboneRecipe, DataRecipe, Strict, dump_recipe
from probing.run import disk_errors, whole_file, write_text
from probing.words import word_vectors

logger = logging.getLogger(__name__)

TOWER = "tower"
"""In place of a layer: what the vision tower gives, before the projector."""
CALIBRATION = 64
"""Images whose mean state is taken from the states for the centred variant."""
PERMUTATIONS = 5
"""Of the labels, for the control: with few labels a single one may happen to fit better, or worse, than chance."""
NEAREST = 3
"""Words shown for each patch of a picture."""


class AlignRecipe(Strict):
    """A whole run of `probing align`."""

    backbone: BackboneRecipe
    data: DataRecipe
    layers: str = "all"
    """`all` (0 to L), or a list such as `0,4,8-12,final`."""
    coverage: float = Field(default=COVERAGE, gt=0, le=1)
    """Share of a patch that a class must cover to be its label."""
    micro_batch: int = Field(default=16, ge=1)
    """Images per forward pass."""
    workers: int = Field(default=2, ge=0)
    """Processes that read images and annotations."""
    pictures: int = Field(default=4, ge=0)
    """Images whose patches' words are kept for the page."""


@dataclass(frozen=True)
class Annotator:
    """Image name → how much of each patch is what every word stands for, (P, K)."""

    maps: Panoptic | Instances
    grid: tuple[int, int]

    @functools.cached_property
    def words(self) -> list[str]:
        """The words for the classes, each once."""
        return list(dict.fromkeys(map(plain_name, self.maps.names)))

    @functools.cached_property
    def _numbers(self) -> NDArray[np.int64]:
        return word_numbers(self.maps.names, self.words)

    def __call__(self, name: str) -> Tensor:
        """Reads one image's label map; raises OSError where it is broken."""
        labels = self._numbers[self.maps.labels(name)]
        return torch.from_numpy(patch_shares(labels, len(self.words), self.grid)).float()


def align(recipe: AlignRecipe, out: Path) -> Path:
    """Measures one checkpoint; what was measured with the same recipe is kept, and an interrupted pass goes on.

    Args:
        recipe: the whole run. Images are squashed to squares, so that patches and annotations line up.
        out: its folder.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: checkpoint, data or annotations cannot be used, or `out` holds another run.
        Interrupted: stopped by the user; the same call goes on.
    """
    started = time.monotonic()
    if recipe.data.view != "square":
        raise UserError("data.view is 'own', and patches line up with annotations on squares alone; leave it out")
    device = Accelerator().device
    root = Path(recipe.data.path.removeprefix("coco:")).expanduser()
    maps = read_label_maps(root, recipe.data.eval_split)
    images = _annotated(list_images(root, recipe.data.eval_split), maps, recipe.data.eval_limit)
    backbone = load_backbone(recipe.backbone, device)
    layers = parse_layers(recipe.layers, backbone.layers)
    settings = f"{__version__} {backbone.sha256} {images.digest()} {dump_recipe(recipe)}"
    _claim(out, recipe)
    file = score_file(out, "scores/alignment", images.split)
    found = read_if_fits(file, settings)
    if found is None:
        measure = _Measure(backbone, layers, maps, recipe, images)
        resumable = Resumable(out / "state" / "alignment.safetensors", settings, minutes=10)
        tally = gather("patches and words", images, recipe.micro_batch, measure.read, measure, resumable, device)
        if not tally.names:
            raise UserError(f"no image of {images.split} could be read; check {images.folder}")
        found = tally.file(images.split, settings)
        if not any(curve.layer == TOWER for curve in found.table):
            logger.warning(
                "what goes into the projector is not one row of patches per image here; nothing is measured before it"
            )
        with disk_errors(out):
            if recipe.pictures:
                _draw(measure, out / "pictures", recipe.pictures)
            _write_manifest(out, recipe, backbone, images, maps, found, time.monotonic() - started)
            found.write(file)  # last: where it is there, nothing else is missing
            resumable.file.unlink(missing_ok=True)
    with disk_errors(out):
        return write_rows(out / "results.csv", backbone.name, summaries(found, [0]))


def _annotated(images: ImageList, maps: Panoptic | Instances, limit: int | None) -> ImageList:
    """The images that have annotations; the others count as skipped."""
    there = maps.segments if isinstance(maps, Panoptic) else maps.objects
    names = [name for name in images.names if name in there]
    skipped = [Skipped(name, images.split, "not annotated") for name in images.names if name not in there]
    if not names:
        raise UserError(f"none of the {len(images)} images of {images.split} is annotated; check the annotation files")
    if skipped:
        logger.warning("%s: %d of %d images have no masks and are not used", images.split, len(skipped), len(images))
    return ImageList(images.folder, images.split, names[:limit], images.skipped + skipped, images.unlisted)


def _claim(out: Path, recipe: AlignRecipe) -> None:
    """Writes the recipe into a new folder; raises UserError where another run is in it."""
    there = out / "recipe.yaml"
    text = dump_recipe(recipe)
    if there.exists() and there.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds another run, or one of another recipe; choose another --out, or remove it")
    with disk_errors(out):
        write_text(there, text)


class _Measure:
    """Everything that is measured of one checkpoint."""

    def __init__(
        self,
        backbone: Backbone,
        layers: Sequence[Layer],
        maps: Panoptic | Instances,
        recipe: AlignRecipe,
        images: ImageList,
    ) -> None:
        assert backbone.words is not None
        self.backbone, self.layers, self.recipe, self.images = backbone, layers, recipe, images
        self.annotate = Annotator(maps, cast(Any, backbone.prepare).grid)
        self.tokenizer = cast(Any, backbone.prepare).processor.tokenizer
        self.vocabulary = cast(Tensor, backbone.words.weight).detach()
        self.names = self.annotate.words
        words = word_vectors(self.tokenizer, self.vocabulary, self.names)
        self.words = {"raw": words, "centred": words - self.vocabulary.float().mean(dim=0)}
        self.permuted = [derangement(len(words), seed).to(words.device) for seed in range(PERMUTATIONS)]
        self.fresh = _fresh(backbone.projector)
        self.centres = self._centres()

    def read(self, plan: list[list[int]]) -> Iterator[Prepared]:
        """Batches with the shares of every patch."""
        workers, device = self.recipe.workers, self.backbone.device
        return micro_batches(self.images, plan, self.backbone.prepare, {}, "square", workers, device, self.annotate)

    def _centres(self) -> dict[Layer, Tensor]:
        """Mean state (H) of the image tokens of the first images, by layer."""
        totals: dict[Layer, Tensor] = {}
        number = min(len(self.images), CALIBRATION)
        batch = self.recipe.micro_batch
        plan = [list(range(first, min(first + batch, number))) for first in range(0, number, batch)]
        count = 0
        for prepared in self.read(plan):
            if prepared.student is None:
                continue
            student = prepared.student.to(self.backbone.device)
            count += len(prepared.indices)

            def visit(layer: Layer, hidden: Tensor, student: Any = student) -> None:
                mean = student.tokens.image_states(hidden).float().mean(dim=1).sum(dim=0).detach()
                totals[layer] = totals[layer] + mean if layer in totals else mean

            self.backbone.stream(student, self.layers, visit)
        if not count:
            raise UserError(f"none of the first {number} images could be read; check {self.images.folder}")
        return {layer: total / count for layer, total in totals.items()}

    def __call__(self, prepared: Prepared, tally: Tally) -> None:
        """Measures one batch."""
        assert prepared.student is not None and prepared.annotations is not None
        student = prepared.student.to(self.backbone.device)
        labels = patch_labels(prepared.annotations.flatten(0, 1).numpy(), self.recipe.coverage)
        shares = prepared.annotations.to(self.backbone.device)
        patches = Patches(shares, torch.from_numpy(labels).view(shares.shape[:2]).to(self.backbone.device))

        def note(
            teacher: str, layer: str, control: str, metric: str, protocol: str, values: Tensor, seed: int = 0
        ) -> None:
            tally.note(Curve(teacher, layer, "", control, metric, protocol, seed), values, summed=False)

        def visit(layer: Layer, hidden: Tensor) -> None:
            with torch.no_grad():
                states = student.tokens.image_states(hidden).float()
                for protocol, words in self.words.items():
                    similar = similarity(states - self.centres[layer] if protocol == "centred" else states, words)
                    for metric, values in scores(similar, patches):
                        note("words", layer_name(layer), "no", metric, protocol, values)
                    for seed, order in enumerate(self.permuted):
                        for metric, values in scores(similar[..., order], patches):
                            note("words", layer_name(layer), "permuted", metric, protocol, values, seed)
                for metric, protocol, values in compression(states):
                    note("tokens", layer_name(layer), "no", metric, protocol, values)

        with self._tower(len(prepared.indices)) as seen:
            self.backbone.stream(student, self.layers, visit)
        for tokens in seen:
            for metric, protocol, values in compression(tokens.float()):
                note("tokens", TOWER, "no", metric, protocol, values)
            if self.fresh is not None and 0 in self.layers:
                similar = similarity(self.fresh(tokens), self.words["raw"])
                for metric, values in scores(similar, patches):
                    note("words", "0", "random", metric, "raw", values)

    @contextlib.contextmanager
    def _tower(self, images: int) -> Iterator[list[Tensor]]:
        """Gathers what goes into the projector, (B, P, C); nothing where that is not one row per image."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and args[0].dim() == 3 and args[0].shape[0] == images:
                seen.append(args[0].detach())

        projector = self.backbone.projector
        handle = projector.register_forward_pre_hook(keep) if projector is not None else None
        try:
            yield seen
        finally:
            if handle is not None:
                handle.remove()


def _fresh(projector: nn.Module | None) -> nn.Module | None:
    """The same projector with random weights, the control; None where there is none that can be drawn anew."""
    if projector is None or not any(isinstance(module, nn.Linear) for module in projector.modules()):
        return None
    fresh = copy.deepcopy(projector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in fresh.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return fresh


def compression(tokens: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """How few directions the tokens of each image use.

    Args:
        tokens: (B, N, d).

    Yields:
        Metric, variant with N and bound, and a number per image (B).
    """
    number, width = tokens.shape[-2:]
    bound, centred = entropy_bound(number, width), entropy_bound(number, width, is_centred=True)
    yield "von_neumann_entropy", f"uncentred, {number} tokens, at most {bound:.3f}", von_neumann_entropy(tokens)
    yield "matrix_entropy", f"order 2, uncentred, {number} tokens, at most {bound:.3f}", matrix_entropy(tokens, 2.0)
    most = f"{number} tokens, at most {torch.tensor(centred).exp():.1f}"
    yield "effective_rank", f"centred, {most}", effective_rank(tokens)
    most = f"{number} tokens, at most {torch.tensor(bound).exp():.1f}"
    yield "effective_rank_singular", f"singular values, uncentred, {most}", effective_rank_singular(tokens)
    yield "anisotropy", f"{number} tokens", anisotropy(tokens)


def _draw(measure: _Measure, folder: Path, count: int) -> None:
    """Keeps the words of the patches of a few images, and how similar each patch is to their labels."""
    backbone, names = measure.backbone, measure.images.names[:count]
    depth = backbone.layers
    some: list[Layer] = [0, depth // 2, depth]
    drawn = [layer for layer in measure.layers if layer in some] or [measure.layers[0]]
    atoms = F.normalize(measure.vocabulary.float(), dim=-1).to(measure.vocabulary.dtype)
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        (prepared,) = measure.read([[number]])
        if prepared.student is None or prepared.annotations is None:
            continue
        student = prepared.student.to(backbone.device)
        shares = prepared.annotations[0]
        there = (shares.sum(dim=0) > 0).nonzero().flatten().tolist()
        there = sorted(there, key=lambda label: -float(shares[:, label].sum()))[:4]
        states: dict[Layer, Tensor] = {}

        def visit(layer: Layer, hidden: Tensor, student: Any = student, states: Any = states) -> None:
            states[layer] = student.tokens.image_states(hidden)[0].detach()

        backbone.stream(student, drawn, visit)
        words = {}
        for layer, state in states.items():
            nearest = nearest_words(state, atoms, NEAREST).tolist()
            words[layer_name(layer)] = [[measure.tokenizer.decode([token]).strip() for token in row] for row in nearest]
            own = similarity(state[None] - measure.centres[layer], measure.words["centred"][there])[0]
            tensors[f"similarity.{number}.{layer_name(layer)}"] = own.cpu().contiguous()
        picture = square(measure.images.read(number)).resize((256, 256))
        tensors[f"photograph.{number}"] = torch.from_numpy(np.array(picture))
        entries.append({"image": name, "labels": [measure.names[label] for label in there], "words": words})
    whole = {"grid": list(measure.annotate.grid), "layers": [layer_name(layer) for layer in drawn], "images": entries}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "patches.safetensors") as file:
        save_file(tensors, file)
    write_text(folder / "patches.json", json.dumps(whole))


def _write_manifest(
    out: Path,
    recipe: AlignRecipe,
    backbone: Backbone,
    images: ImageList,
    maps: Panoptic | Instances,
    found: ScoreFile,
    seconds: float,
) -> None:
    identity = vars(backbone.identity)
    skipped = [vars(s) for s in (*images.skipped, *(Skipped(*row) for row in found.skipped))]
    patches = int(next(values for curve, values in found.table.items() if curve.metric == "word_retrieval")[:, 1].sum())
    manifest = {
        "kind": "alignment",
        "checkpoint": {name: value for name, value in identity.items() if name != "prompt"},
        "prompt": recipe.backbone.prompt,
        "rendered_prompt": identity["prompt"],
        "data": {
            "path": recipe.data.path,
            "eval_split": images.split,
            "eval_images": len(found.names),
            "eval_digest": images.digest(),
            "annotations": "panoptic" if isinstance(maps, Panoptic) else "instances",
            "classes": len(maps.names),
            "coverage": recipe.coverage,
            "labelled_patches": patches,
        },
        "skipped": skipped,
        "seconds": seconds,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
