"""The two passes of `probing align`: a sample for what is dear, and all images for the rest.

One forward pass per image in each; the image tokens of every layer are measured while the layer's state exists.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from analysis.alignment.metrics.attention import can_watch, image_shares
from analysis.alignment.metrics.layer_similarity import ITEMS
from analysis.alignment.metrics.patch_words import Patches, derangement, scores, similarity
from analysis.alignment.metrics.similarity import anisotropy, linear_cka
from analysis.alignment.metrics.sparse_codes import Pursuit, matching_pursuit, orthogonal_matching_pursuit, random_atoms
from analysis.alignment.metrics.spectrum import (
    effective_rank,
    effective_rank_singular,
    matrix_entropy,
    von_neumann_entropy,
)
from analysis.evaluation.forward_pass import Tally
from analysis.evaluation.scores import ScoreFile, ScoreKey
from probing.data.coco import ImageList
from probing.data.dataloader import MicroBatches, Prepared, micro_batches
from probing.data.image_modes import Size
from probing.data.instances import Instances, labels_on
from probing.data.panoptic import Panoptic
from probing.data.patch_labels import patch_labels, patch_shares, plain_name, word_numbers
from probing.models import FINAL, Backbone, Layer, layer_name
from probing.models.finite import finite_rows, zero_others
from probing.models.word_embeddings import word_ids, word_vectors
from probing.probes.ridge import place_states
from probing.teachers.base import Teacher

TOWER = "tower"
"""In place of a layer: what the vision tower gives, before the projector."""
PERMUTATIONS = 5
"""Of the labels, for the control: with few labels a single one may happen to fit better, or worse, than chance."""
LENS_PATCHES, PURSUED_PATCHES = 32, 2
"""Of each image of the sample, where the whole vocabulary is gone through; chosen at random, once."""
ATOMS = (1, 2, 4, 8)
"""Numbers of words that a patch is composed of."""
PURSUITS: dict[str, Callable[[Tensor, Tensor, int], Pursuit]] = {
    "matching pursuit": matching_pursuit,
    "orthogonal": orthogonal_matching_pursuit,
    "non-negative": functools.partial(orthogonal_matching_pursuit, non_negative=True),
}
POOLED = "pooled"
"""Metric under which pooled features are gathered until they are compared."""
MEAN = "mean_state"
"""Metric under which the sample's sum of mean states is kept, and in the last place the number of images."""
NORMED, BARE = "final norm", "no norm"
"""The two logit lenses: with the final norm before the output embeddings, and without."""


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

    def __call__(self, name: str, size: Size | None = None) -> Tensor:
        """Reads one image's label map, of its width and height; raises OSError where it is broken, or of another."""
        labels = self._numbers[self.maps.labels(name) if size is None else labels_on(self.maps, name, size)]
        return torch.from_numpy(patch_shares(labels, len(self.words), self.grid)).float()


@dataclass
class Subject:
    """A checkpoint, and what its layers are held against.

    Attributes:
        backbone: with its output embeddings.
        layers: those that are measured.
        images: of the split.
        maps: what each image shows.
        teachers: whose features are compared with every layer's.
        coverage: share of a patch that a class must cover to be its label.
        workers: processes that read.
    """

    backbone: Backbone
    layers: list[Layer]
    images: ImageList
    maps: Panoptic | Instances
    teachers: dict[str, Teacher]
    coverage: float
    workers: int
    annotate: Annotator = field(init=False)
    vocabulary: Tensor = field(init=False)
    words: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        assert self.backbone.words is not None
        self.annotate = Annotator(self.maps, cast(Any, self.backbone.prepare).grid)
        self.tokenizer = cast(Any, self.backbone.prepare).processor.tokenizer
        self.vocabulary = cast(Tensor, self.backbone.words.weight).detach()
        words = word_vectors(self.tokenizer, self.vocabulary, self.names)
        self.words = {"raw": words, "centred": words - self.vocabulary.float().mean(dim=0)}
        permuted = [derangement(len(words), seed) for seed in range(PERMUTATIONS)]
        self.orders = torch.stack([torch.arange(len(words)), *permuted]).to(words.device)
        self.fresh = _fresh(self.backbone.projector)

    @property
    def names(self) -> list[str]:
        """The labels' words."""
        return self.annotate.words

    def read(self, plan: list[list[int]], teachers: bool = True) -> Iterator[Prepared]:
        """Batches with the shares of every patch."""
        prepare = {name: teacher.prepare for name, teacher in self.teachers.items()} if teachers else {}
        device = self.backbone.device
        dataset = MicroBatches(self.images, plan, self.backbone.prepare, prepare, annotate=self.annotate)
        return micro_batches(dataset, self.workers, device)

    def lenses(self, layer: Layer, states: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the output embeddings are given of states (…, H), by name of the lens; the last state is normed."""
        if self.backbone.head is None:
            return
        states = states.to(cast(Tensor, self.backbone.head.weight).dtype)
        if layer == FINAL:
            yield NORMED, states
            return
        yield NORMED, self.backbone.norm.forward(states)  # not through the hook that waits for the last state
        yield BARE, states

    @contextlib.contextmanager
    def tower(self, images: int) -> Iterator[list[Tensor]]:
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


class SamplePass:
    """What is dear, and the mean states that centred measures take away."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        rows, columns = subject.annotate.grid
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
        self.lens_patches, self.pursued = order[:LENS_PATCHES], order[:PURSUED_PATCHES]
        self.atoms = {"none": subject.vocabulary, "random": random_atoms(subject.vocabulary, 0)}

    def __call__(self, prepared: Prepared, tally: Tally) -> None:
        """Measures one batch."""
        assert prepared.student is not None
        subject, backbone = self.subject, self.subject.backbone
        student = prepared.student.to(backbone.device)
        targets = {name: prepared.target(teacher) for name, teacher in subject.teachers.items() if teacher.grid}

        finite = {name: finite_rows(target) for name, target in targets.items()}
        targets = {name: zero_others(target, finite[name]) for name, target in targets.items()}

        def note(
            teacher: str, layer: Layer, control: str, metric: str, variant: str, values: Tensor, ok: Tensor
        ) -> None:
            key = ScoreKey(teacher, layer_name(layer), "", control, metric, variant=variant)
            tally.note(key, values, metric == MEAN, ok)

        def visit(layer: Layer, hidden: Tensor) -> None:
            with torch.no_grad():
                states = student.tokens.image_states(hidden).float()
                ok = finite_rows(states)
                states = zero_others(states, ok)
                tally.leave_out("layer", layer_name(layer), ok)
                note("tokens", layer, "none", MEAN, "", _counted_mean(states), ok)
                for metric, variant, values in compression(states):
                    note("tokens", layer, "none", metric, variant, values, ok)
                for lens, values in self._lens_entropy(layer, states):
                    note("words", layer, "none", "lens_entropy", lens, values, ok)
                for control, metric, pursuit, values in self._explained(states):
                    note("words", layer, control, metric, pursuit, values, ok)
                for name, target in targets.items():
                    places = subject.teachers[name].grid
                    placed = place_states(states, student.tokens.grid, places)
                    values = torch.tensor([linear_cka(*pair) for pair in zip(placed, target, strict=True)])
                    note(name, layer, "none", "cka_places", "", values, ok & finite[name].to(ok.device))

        with subject.tower(len(prepared.indices)) as seen:
            backbone.stream(student, subject.layers, visit)
        for tokens in seen:
            ok = finite_rows(tokens)
            tokens = zero_others(tokens, ok)
            for metric, variant, values in compression(tokens.float()):
                note("tokens", TOWER, "none", metric, variant, values, ok)
            if subject.fresh is not None:
                states = subject.fresh(tokens).float()
                ok = ok & finite_rows(states)
                note("tokens", 0, "random", MEAN, "", _counted_mean(zero_others(states, ok)), ok)

    def _lens_entropy(self, layer: Layer, states: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Entropy (B) of the next token that the lenses read off patches, in nats."""
        for lens, given in self.subject.lenses(layer, states[:, self.lens_patches]):
            logits = cast(nn.Module, self.subject.backbone.head)(given).float()
            cap = _softcap(self.subject.backbone)
            chances = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(dim=-1)
            yield lens, -(chances.exp() * chances).sum(dim=-1).mean(dim=1)

    def _explained(self, states: Tensor) -> Iterator[tuple[str, str, str, Tensor]]:
        """Share of a patch's squared length that few words explain, and few random vectors, (B)."""
        vectors = states[:, self.pursued]
        steps = min(ATOMS[-1], vectors.shape[-1], len(self.subject.vocabulary))
        for control, atoms in self.atoms.items():
            for name, pursue in PURSUITS.items():
                energy = pursue(vectors.flatten(0, 1), atoms, steps).energy.unflatten(0, vectors.shape[:2])
                for count in (count for count in ATOMS if count <= steps):
                    yield control, f"explained_energy_{count}", name, energy[..., count - 1].mean(dim=1)


class WholePass:
    """What is measured of every image: patches beside words, the lenses among the labels, and pooled features."""

    def __init__(self, subject: Subject, sample: ScoreFile) -> None:
        self.subject = subject
        device = subject.backbone.device
        centres = {}
        for curve, total in sample.sums.items():
            state, count = torch.from_numpy(total).to(device).split([len(total) - 1, 1])
            centres[curve] = state / count  # NaN where no image of the sample counts
        self.centres = {curve.layer: centre for curve, centre in centres.items() if curve.control == "none"}
        self.fresh_centre = next((centre for curve, centre in centres.items() if curve.control == "random"), None)
        ids = [word_ids(subject.tokenizer, name) for name in subject.names]
        self.label_ids = torch.tensor(sorted({number for word in ids for number in word}), device=device)
        place = {int(number): row for row, number in enumerate(self.label_ids)}
        self.label_rows = [torch.tensor([place[number] for number in word], device=device) for word in ids]
        self.watches = can_watch(subject.backbone)

    def __call__(self, prepared: Prepared, tally: Tally) -> None:
        """Measures one batch."""
        assert prepared.student is not None and prepared.annotations is not None
        subject, backbone = self.subject, self.subject.backbone
        student = prepared.student.to(backbone.device)
        labels = patch_labels(prepared.annotations.flatten(0, 1).numpy(), subject.coverage)
        shares = prepared.annotations.to(backbone.device)
        patches = Patches(shares, torch.from_numpy(labels).view(shares.shape[:2]).to(backbone.device))
        left = ITEMS - len(tally.names) + len(prepared.indices)  # of this batch, those that are compared

        def note(
            teacher: str,
            layer: str,
            control: str,
            metric: str,
            variant: str,
            values: Tensor,
            ok: Tensor,
            seed: int = 0,
        ) -> None:
            tally.note(ScoreKey(teacher, layer, "", control, metric, "", variant, seed), values, False, ok)

        def pool(name: str, layer: str, features: Tensor) -> None:
            if left > 0:
                means = features[:left].float().mean(dim=1)
                note(name, layer, "", POOLED, "", means, finite_rows(means))

        def match(layer: str, prefix: str, variant: str, similar: Tensor, control: str = "none") -> None:
            ok = finite_rows(similar)
            similar = zero_others(similar, ok)
            for metric, values in scores(similar, patches, subject.orders[: None if control == "none" else 1]):
                if prefix == "lens" and metric == "cosine":
                    continue  # logits are none
                note("words", layer, control, f"{prefix}_{metric}", variant, values[0], ok)
                for seed, permuted in enumerate(values[1:]):
                    note("words", layer, "permuted", f"{prefix}_{metric}", variant, permuted, ok, seed)

        def visit(layer: Layer, hidden: Tensor) -> None:
            with torch.no_grad():
                name, states = layer_name(layer), student.tokens.image_states(hidden).float()
                ok = finite_rows(states)
                tally.leave_out("layer", name, ok)
                match(name, "word", "raw", similarity(states, subject.words["raw"]))
                match(name, "word", "centred", similarity(states - self.centres[name], subject.words["centred"]))
                for lens, given in subject.lenses(layer, states):
                    match(name, "lens", lens, self._label_logits(given))
                note("tokens", name, "none", "anisotropy", "", anisotropy(zero_others(states, ok)), ok)
                pool("tokens", name, states)

        watch = image_shares(backbone, student.tokens) if self.watches else contextlib.nullcontext()
        with subject.tower(len(prepared.indices)) as seen, watch as attended:
            backbone.stream(student, subject.layers, visit)
        for tokens in seen:
            ok = finite_rows(tokens)
            note("tokens", TOWER, "none", "anisotropy", "", anisotropy(zero_others(tokens, ok).float()), ok)
            pool(TOWER, "", tokens)
            if subject.fresh is not None and self.fresh_centre is not None and 0 in subject.layers:
                states = subject.fresh(tokens).float()
                match("0", "word", "raw", similarity(states, subject.words["raw"]), "random")
                match(
                    "0", "word", "centred", similarity(states - self.fresh_centre, subject.words["centred"]), "random"
                )
        for block, found in attended.found.items() if attended else ():
            for queries, (share, uniform) in found.items() if block in subject.layers else ():
                ok = share.isfinite()
                note("tokens", str(block), "none", "image_attention", queries, share, ok)
                note("tokens", str(block), "uniform", "image_attention", queries, uniform, ok)
        if left > 0:
            for name, teacher in subject.teachers.items():
                pool(name, "", prepared.target(teacher))

    def _label_logits(self, given: Tensor) -> Tensor:
        """Logit of every label, the largest of its tokens', (B, P, K); their order is that of the probabilities."""
        head = cast(Any, self.subject.backbone.head)
        logits = given @ head.weight[self.label_ids].to(given).T
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias[self.label_ids].to(given)
        return torch.stack([logits[..., rows].amax(dim=-1) for rows in self.label_rows], dim=-1).float()


def _softcap(backbone: Backbone) -> float | None:
    """What some LLMs bound their logits by."""
    config = getattr(backbone.core, "config", None)
    return getattr(config.get_text_config(), "final_logit_softcapping", None) if config is not None else None


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


def _counted_mean(states: Tensor) -> Tensor:
    """Mean state of each image, and a one that counts it, (B, H + 1); states (B, N, H)."""
    return torch.nn.functional.pad(states.mean(dim=1), (0, 1), value=1.0)


def compression(tokens: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """How few directions the tokens of each image use.

    Args:
        tokens: (B, N, d).

    Yields:
        Metric, variant, and a number per image (B).
    """
    yield "von_neumann_entropy", "uncentred", von_neumann_entropy(tokens)
    yield "matrix_entropy", "uncentred", matrix_entropy(tokens, 2.0)
    yield "effective_rank", "centred", effective_rank(tokens)
    yield "effective_rank_singular", "uncentred", effective_rank_singular(tokens)
