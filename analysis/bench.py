"""`probing bench`: what share of a benchmark's questions a checkpoint answers rightly."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from analysis.answers import READERS, score
from analysis.scores import Curve, Summary, write_rows
from analysis.statistics import Interval, bootstrap
from probing import __version__
from probing.backbones import Identity, identify, load_backbone
from probing.backbones.answers import ask
from probing.data.benchmarks import BENCHMARKS, Question, digest, read_questions
from probing.data.coco import read_image
from probing.errors import UserError
from probing.fit import Interrupted
from probing.progress import Progress
from probing.provenance import made_of, versions
from probing.recipe import BackboneRecipe, Strict, dump_recipe, local_path
from probing.run import LOST, Interruption, disk_errors, read_json, remove_left_overs, write_text

logger = logging.getLogger(__name__)

KIND = "benchmark"
"""What the manifest of such a run calls it."""


class BenchRecipe(Strict):
    """A whole run of `probing bench`."""

    backbone: BackboneRecipe
    benchmark: Literal["cvbench", "mmstar", "realworldqa", "okvqa"]
    data: str
    """Folder of its published files, or one of them."""
    suffix: str | None = "auto"
    """What follows every question; `auto` is what is usual for the benchmark, and `suffix=` leaves it out."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of an answer; one that ends earlier costs less."""
    micro_batch: int = Field(default=8, ge=1)
    """Questions per forward pass."""

    def with_absolute_paths(self) -> Self:
        """A copy whose existing local folders are absolute, so that the run can be used from anywhere."""
        recipe = self.model_copy(deep=True)
        checkpoint, data = local_path(self.backbone.checkpoint), local_path(self.data)
        recipe.backbone.checkpoint = str(checkpoint.absolute()) if checkpoint.is_dir() else self.backbone.checkpoint
        recipe.data = str(data.absolute())
        return recipe


@dataclass(frozen=True)
class Answered:
    """One question and its answer, a line of `answers.jsonl`.

    Attributes:
        question: its name.
        groups: what it belongs to.
        image: hash of the image file; questions about one image are resampled together.
        said: what the checkpoint wrote.
        read: what the benchmark's rule reads in that; None where it reads nothing.
        right: the right answer, or all that people gave.
        score: 0 to 1.
        guess: what guessing scores on average; None where the question is open.
    """

    question: str
    groups: dict[str, str]
    image: str
    said: str
    read: str | None
    right: list[str]
    score: float
    guess: float | None


def bench(recipe: BenchRecipe, out: Path) -> Path:
    """Asks a checkpoint every question of a benchmark, and scores the answers; an interrupted run goes on.

    Args:
        recipe: the whole run.
        out: its folder.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: checkpoint or data cannot be used, or `out` holds another run.
        Interrupted: stopped by the user; the same call goes on, to the same answers.
    """
    questions = read_questions(recipe.benchmark, local_path(recipe.data))
    known = BENCHMARKS[recipe.benchmark]
    if len(questions) != known.size:
        logger.warning("%d questions; %s as it is published has %d", len(questions), known.title, known.size)
    checkpoint = identify(recipe.backbone)
    asked = hashlib.sha256(
        f"{__version__} {dump_recipe(recipe)} {checkpoint.sha256} {digest(questions)}".encode()
    ).hexdigest()
    _claim(out, recipe, asked)
    answers, state = out / "answers.jsonl", out / "state" / "answers.jsonl"
    if not (out / "manifest.json").exists():
        started = time.monotonic()
        said = list(_ask_all(recipe, questions, state, asked))
        answered = [judged(recipe.benchmark, *pair) for pair in zip(questions, said, strict=True)]
        with disk_errors(out):
            write_text(answers, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answered))
            manifest = _manifest(recipe, checkpoint, questions, answered, time.monotonic() - started)
            write_text(out / "manifest.json", json.dumps({**manifest, "asked": asked}, indent=2) + "\n")
            state.unlink(missing_ok=True)
    answered = [Answered(**line) for line in _lines(answers)]
    unread = sum(one.read is None for one in answered)
    if unread:
        logger.warning("%d of %d answers cannot be read, and count as wrong; see %s", unread, len(answered), answers)
    rows = list(summarise(recipe.benchmark, answered))
    with disk_errors(out):
        return write_rows(out / "results.csv", checkpoint.name, rows)


def judged(benchmark: str, question: Question, said: tuple[str, str]) -> Answered:
    """Reads and scores one answer; `said` is the image's hash and the answer."""
    image, text = said
    read = READERS[benchmark](question, text)
    guess = 1 / len(question.choices) if question.choices else None
    worth = score(benchmark, question, read)
    return Answered(question.name, question.groups, image, text, read, list(question.answers), worth, guess)


def _claim(out: Path, recipe: BenchRecipe, asked: str) -> None:
    """Writes the recipe into a new folder; raises UserError where another run is in it."""
    there, made, text = out / "recipe.yaml", out / "manifest.json", dump_recipe(recipe)
    if there.exists() and there.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} holds another run, or one of another recipe; choose another --out, or remove it")
    if not there.exists() and out.is_dir() and any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{out} is not empty and holds no run; choose another --out")
    if made.exists() and read_json(made, LOST).get("asked") != asked:
        raise UserError(f"checkpoint or questions are not those that {out} was made with; choose another --out")
    with disk_errors(out):
        remove_left_overs(out.rglob(".*.tmp"))
        write_text(there, text)


def _lines(file: Path) -> list[Any]:
    """The whole lines of a JSONL file; a last one that a killed process left unfinished is not counted."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _ask_all(recipe: BenchRecipe, questions: Sequence[Question], state: Path, asked: str) -> Iterator[tuple[str, str]]:
    """Image hash and answer of every question; answers are kept batch by batch, and those that are kept not asked.

    Batches are the same however often the run was interrupted: what padding does to the last bits of a logit is then
    the same too.
    """
    kept = _lines(state)
    done = [tuple(pair) for pair in kept[1:]] if kept and kept[0] == asked else []
    batch = recipe.micro_batch
    if len(done) < len(questions):
        done = done[: len(done) // batch * batch]
    with disk_errors(state.parent):
        write_text(state, "".join(json.dumps(line) + "\n" for line in [asked, *done]))
    if done:
        logger.info("%s: going on after %d questions", recipe.benchmark, len(done))
    yield from done
    plan = [questions[first : first + batch] for first in range(len(done), len(questions), batch)]
    if not plan:
        return
    backbone = load_backbone(recipe.backbone, Accelerator().device, with_head=True)
    suffix = BENCHMARKS[recipe.benchmark].suffix if recipe.suffix == "auto" else recipe.suffix or ""
    what = f"{BENCHMARKS[recipe.benchmark].title}, {backbone.name}"
    with Interruption().watch() as interruption, Progress(what, len(plan), unit="batches") as bar:
        for part in plan:
            images, hashes = zip(*(_image(question) for question in part), strict=True)
            texts = [question.text + suffix for question in part]
            answers = ask(backbone, recipe.backbone, images, texts, recipe.max_new_tokens)
            found = list(zip(hashes, answers, strict=True))
            with disk_errors(state.parent), state.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in found))
            yield from found
            bar.advance()
            if interruption.asked:
                raise Interrupted


def _image(question: Question) -> tuple[Image.Image, str]:
    """A question's image, and a hash of its file; raises UserError where there is none that can be read."""
    try:
        content = question.image()
        return read_image(io.BytesIO(content)), hashlib.sha256(content).hexdigest()[:16]
    except (OSError, ValueError) as error:
        raise UserError(
            f"the image of question {question.name} cannot be read ({str(error).splitlines()[0]}); get the files again"
        ) from None


Part = tuple[str, list[tuple[float, Callable[[Answered], bool]]]]
"""A protocol, and what its accuracy is the weighted mean of: weights, and which questions."""


def parts(benchmark: str, answered: Sequence[Answered]) -> list[Part]:
    """What accuracies a benchmark has, the overall one first.

    CV-Bench's is the mean of 2D and 3D, and each of these the mean over its sources (ADE20K and COCO; Omni3D), as its
    card says. Where only one of the two is there, there is no overall accuracy. MMStar's categories are of equal size,
    and its overall accuracy is that of all questions.
    """
    if benchmark != "cvbench":
        found: list[Part] = [(benchmark, [(1.0, lambda one: True)])]
        for category in dict.fromkeys(one.groups.get("category", "") for one in answered):
            if category:
                found.append((f"{benchmark}/{category}", [(1.0, _in(category=category))]))
        return found
    types = sorted({one.groups["type"] for one in answered})
    sources = {kind: sorted({one.groups["source"] for one in answered if one.groups["type"] == kind}) for kind in types}
    of_type = {
        kind: [(1 / len(names), _in(type=kind, source=name)) for name in names] for kind, names in sources.items()
    }
    whole = [(weight / len(types), chosen) for kind in types for weight, chosen in of_type[kind]]
    found = [(benchmark, whole)] if len(types) > 1 else []
    for kind in types:
        found.append((f"{benchmark}/{kind}", of_type[kind]))
        for field, names in (("task", sorted({o.groups["task"] for o in answered if o.groups["type"] == kind})),
                             ("source", sources[kind] if len(sources[kind]) > 1 else [])):  # fmt: skip
            for name in names:
                found.append((f"{benchmark}/{kind}/{name}", [(1.0, _in(**{"type": kind, field: name}))]))
    return found


def _in(**groups: str) -> Callable[[Answered], bool]:
    return lambda one: all(one.groups[field] == name for field, name in groups.items())


def summarise(benchmark: str, answered: Sequence[Answered]) -> Iterator[Summary]:
    """Rows of `results.csv`: accuracy of every part, what guessing scores, and the share that could not be read.

    The intervals are over images: questions about the same one are resampled together.
    """
    split = BENCHMARKS[benchmark].split
    scores = np.array([one.score for one in answered])
    unread = np.array([float(one.read is None) for one in answered])
    guesses = np.array([np.nan if one.guess is None else one.guess for one in answered])
    places = {name: place for place, name in enumerate(dict.fromkeys(one.image for one in answered))}
    images = np.array([places[one.image] for one in answered])
    for protocol, cells in parts(benchmark, answered):
        masks = np.array([[chosen(one) for one in answered] for _, chosen in cells])
        weights = np.array([weight for weight, _ in cells])
        count = int(masks.any(axis=0).sum())
        for metric, values in (("accuracy", scores), ("unreadable", unread)):
            interval = _interval(values, masks, weights, images)
            yield Summary(Curve("", "", "", "no", metric, protocol, 0), split, "0", interval, count)
        if np.isfinite(guesses[masks.any(axis=0)]).all():
            value = float(sum(weight * guesses[mask].mean() for weight, mask in zip(weights, masks, strict=True)))
            guess = Interval(value, value, value)  # known, and not measured
            yield Summary(Curve("", "", "", "guess", "accuracy", protocol, 0), split, "0", guess, count)


def _interval(
    values: NDArray[np.float64], masks: NDArray[np.bool_], weights: NDArray[np.float64], images: NDArray[np.int64]
) -> Interval:
    """Weighted mean of the means of some sets of questions.

    Args:
        values: (questions).
        masks: (sets, questions).
        weights: (sets).
        images: (questions), number of the image that each is about.
    """
    sums = np.zeros((images.max() + 1, 2 * len(masks)))
    for place, mask in enumerate(masks):
        np.add.at(sums[:, 2 * place], images[mask], values[mask])
        np.add.at(sums[:, 2 * place + 1], images[mask], 1)
    there = sums[:, 1::2].any(axis=1)
    return bootstrap(sums[there][None], lambda totals: _weighted(totals, weights))


def _weighted(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean of ratios; not a number where a resample has no question of one of them."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0::2] / sums[..., 1::2]) @ weights


def _manifest(
    recipe: BenchRecipe,
    checkpoint: Identity,
    questions: Sequence[Question],
    answered: Sequence[Answered],
    seconds: float,
) -> dict[str, Any]:
    made = made_of(checkpoint, "the benchmark's questions", {})
    return {
        "kind": KIND,
        **made,
        "benchmark": recipe.benchmark,
        "data": {
            "path": recipe.data,
            "split": BENCHMARKS[recipe.benchmark].split,
            "questions": len(questions),
            "images": len({one.image for one in answered}),
            "digest": digest(questions),
        },
        "unreadable": sum(one.read is None for one in answered),
        "seconds": seconds,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
