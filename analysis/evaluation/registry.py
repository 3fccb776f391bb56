"""Metrics of `probing evaluate`: each is one file of `metrics/` that registers itself.

Command line and reports read the descriptions: a metric's file imports torch and numpy inside functions only, so that
they stay fast.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from probing.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.evaluation.bootstrap import Statistic
    from analysis.evaluation.context import EvaluationContext
    from analysis.evaluation.options import Options
    from analysis.evaluation.scores import ScoreFile
    from probing.data.coco import ImageList
    from probing.teachers import Teacher

ACCURACY = "accuracy"
"""The metric of benchmarks: share of questions that are answered correctly."""
DECODED = ("", "depth", "seg", "gen")
"""Order of metrics in reports, by the teacher that decodes."""

Series = tuple[str, str]
"""Metric and protocol."""


@dataclass(frozen=True)
class MetricInfo:
    """Describes the numbers of one metric and protocol, as `results.csv` names them.

    Attributes:
        metric: its name; a final `*` is the name of a network.
        protocol: `strict`, `paper` or `blind`.
        label: name in figures and tables, with the unit if there is one; `{}` is the name of the network.
        meaning: definition, in a sentence or two.
        higher_is_better: the direction.
        chance: value by chance, where it is the same for any data.
        statistic: sums over images → value; None for the mean of the images' scores.
        digits: decimals to show.
        column: position among the columns of the table of decoded metrics; 0 for none.
        enough_images: with fewer images the value is biased upwards.
    """

    metric: str
    protocol: str
    label: str
    meaning: str = ""
    higher_is_better: bool = True
    chance: float = math.nan
    statistic: Statistic | None = None
    digits: int = 3
    column: int = 0
    enough_images: int = 0

    def matches(self, metric: str) -> bool:
        """Whether it describes a metric of `results.csv`."""
        return metric.startswith(self.metric[:-1]) if self.metric.endswith("*") else metric == self.metric


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of images.

    Attributes:
        indices: positions of the images in the recorder's list.
        names: of the images.
        pixels: by teacher, as it preprocesses them; cached targets come without.
        targets: features (B, N, D) by teacher.
        extra: what the recorder's `prepare` returned.
    """

    indices: list[int]
    names: list[str]
    pixels: dict[str, Tensor]
    targets: dict[str, Tensor]
    extra: Any = None


class Recorder(ABC):
    """Computes something per image from every predicted feature: scores, embeddings or pictures.

    Attributes:
        stem: folder and start of the name of its file.
        images: images to predict on.
        teachers: teachers whose features are predicted.
        settings: what the values depend on besides the run, as text.
        series: keys of what `update` returns.
        summed: metrics that are stored as one sum over images.
        uses_pixels: whether cached targets do not suffice.
    """

    stem: str
    images: ImageList
    teachers: dict[str, Teacher]
    settings: str
    series: Sequence[Series]
    summed: frozenset[str] = frozenset()
    uses_pixels: bool = True

    def prepare(self, batch: EvaluationBatch) -> Any:
        """Computes once per batch what all its predictions share; it becomes `batch.extra`."""
        return None

    def update(self, teacher: str, prediction: Tensor, batch: EvaluationBatch) -> dict[Series, Tensor]:
        """Computes values (B) or (B, …) of a predicted feature (B, N, D); a `recorded` metric has none."""
        raise NotImplementedError

    def references(self, teacher: str, batch: EvaluationBatch) -> Iterator[tuple[str, str, dict[Series, Tensor]]]:
        """Yields probe, control and values of what probes are compared with, such as the teacher's own output."""
        yield from ()


class Metric(Recorder):
    """One `--metric`. A metric without `teacher` compares features; with one, it scores what that teacher decodes.

    Attributes:
        name: value of `--metric`.
        help: one line for the command line.
        infos: the numbers that it yields.
        teacher: the teacher whose decoder it needs; by default none, and the metric scores every teacher.
        requires: options it cannot do without.
        expensive: by default scores only the resampler, without controls.
        recorded: training has recorded it, so that it needs no pass.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    infos: ClassVar[tuple[MetricInfo, ...]]
    teacher: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    expensive: ClassVar[bool] = False
    recorded: ClassVar[bool] = False

    def __init__(self, context: EvaluationContext) -> None:
        """Selects images, teachers and protocols.

        Raises:
            UserError: the run lacks the teacher, or a required option is missing.
        """
        self.require_options(context.options)
        if self.teacher and self.teacher not in context.teachers:
            raise UserError(f"{self.name} needs the {self.teacher} teacher; train probes for it, or drop the metric")
        self.context = context
        self.protocols = self.select_protocols(context.options.protocols)
        self.stem, self.uses_pixels = f"scores/{self.name}", bool(self.teacher)
        self.images, self.teachers = context.images, context.teachers
        if self.teacher:
            self.images = replace(context.images, names=context.images.names[: context.options.images])
            self.teachers = {self.teacher: context.teachers[self.teacher]}
        self.settings = self.images.digest()
        self.series = [(info.metric, info.protocol) for info in self.infos if info.protocol in self.protocols]

    def read(self) -> ScoreFile:
        """Returns the scores of a metric that is `recorded`."""
        raise NotImplementedError

    def finish(self, scores: ScoreFile) -> None:
        """Computes what needs the values of all images."""

    @classmethod
    def select_protocols(cls, requested: Iterable[str]) -> list[str]:
        """Returns the requested protocols that the metric has, or all if it has none of them."""
        own = list(dict.fromkeys(info.protocol for info in cls.infos))
        return [protocol for protocol in own if protocol in set(requested)] or own

    @classmethod
    def require_options(cls, options: Options) -> None:
        """Raises UserError if a required option is missing."""
        for option in cls.requires:
            if getattr(options, option) is None:
                needed = f"--{option.replace('_', '-')} DIR"
                raise UserError(f"the metric {cls.name} needs {needed}; give it, or drop the metric")

    @classmethod
    def count_images(cls, options: Options, images: ImageList) -> tuple[int, str]:
        """Returns how many images it scores and the name of their split, for planning."""
        cls.require_options(options)
        return len(images.names[: options.images if cls.teacher else None]), images.split


REGISTRY: dict[str, type[Metric]] = {}
OTHER_INFOS: list[MetricInfo] = []
"""Descriptions of numbers that another verb computes."""
M = TypeVar("M", bound=type[Metric])


def register(metric: M) -> M:
    """Adds a metric under its name."""
    REGISTRY[metric.name] = metric
    return metric


def metrics() -> dict[str, type[Metric]]:
    """Imports every file of `metrics/`; returns the metrics by name, those that decode nothing first, then by name."""
    _import_all(tuple(importlib.import_module("analysis.evaluation.metrics").__path__))

    def position(metric: type[Metric]) -> tuple[int, str]:
        return DECODED.index(metric.teacher) if metric.teacher in DECODED else len(DECODED), metric.name

    return {metric.name: metric for metric in sorted(REGISTRY.values(), key=position)}


@functools.cache
def _import_all(folders: tuple[str, ...]) -> None:
    for file in pkgutil.iter_modules(folders, "analysis.evaluation.metrics."):
        importlib.import_module(file.name)


def infos() -> list[MetricInfo]:
    """Returns the description of all numbers, in the order of reports."""
    return [info for metric in metrics().values() for info in metric.infos] + OTHER_INFOS


def describe(metric: str, protocol: str = "") -> MetricInfo:
    """Returns the description of a metric; with its own names where none is registered.

    Args:
        metric: as in `results.csv`.
        protocol: likewise; by default that of the metric's first description, whose direction is that of all.
    """
    for info in infos():
        if info.matches(metric) and protocol in ("", info.protocol):
            return replace(info, metric=metric, label=info.label.format(metric[len(info.metric) - 1 :]))
    return MetricInfo(metric, protocol, f"{metric}, {protocol}")
