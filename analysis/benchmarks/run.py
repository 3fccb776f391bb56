"""`probing bench`: what share of a benchmark's questions a checkpoint answers rightly."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from analysis.benchmarks.accuracy import Answered, read_answers, summarise
from analysis.benchmarks.answer_parsing import READERS, score
from analysis.benchmarks.tasks import BENCHMARKS, Question, digest, read_questions
from analysis.evaluation.scores import write_rows
from probing import __version__
from probing.data.coco import Skipped, read_image
from probing.models import Identity, identify, load_backbone
from probing.models.chat_templates import rendering_at
from probing.models.generate import ask, sample_conversation
from probing.recipe import BackboneRecipe, Strict, dump_recipe
from probing.runs.compatibility import (
    describe_inputs,
    inputs_file,
    recorded_inputs,
    recorded_moment,
    require_same,
    to_record,
    vocabulary,
)
from probing.runs.manifest import made_of, versions
from probing.utils.errors import UserError
from probing.utils.files import LOST, disk_errors, read_json, read_json_lines, reading, remove_left_overs, write_text
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.paths import local_path
from probing.utils.progress import Progress
from probing.utils.weights_hash import generation_settings

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
        if self.backbone.base and local_path(self.backbone.base).is_dir():
            recipe.backbone.base = str(local_path(self.backbone.base).absolute())
        recipe.data = str(data.absolute())
        return recipe


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
    _require_free(out, recipe)
    recorded = recorded_inputs(out, (out / "state" / "answers.jsonl").exists())
    with rendering_at(recorded_moment(recorded)):
        return _bench(recipe, out, questions, recorded)


def _bench(recipe: BenchRecipe, out: Path, questions: Sequence[Question], recorded: dict[str, Any] | None) -> Path:
    checkpoint = identify(recipe.backbone)
    texts = sample_conversation(checkpoint.prepare.processor, recipe.backbone)
    inputs = describe_inputs(checkpoint, {}, "own", {"questions": digest(questions)}, texts) | vocabulary(checkpoint)
    inputs["generation settings"] = generation_settings(Path(checkpoint.path))
    if recorded is not None:
        require_same(recorded, inputs, out, "put it back, or choose another --out")
    _claim(out, recipe, to_record(inputs))
    asked = hashlib.sha256(f"{__version__} {dump_recipe(recipe)} {digest(questions)}".encode()).hexdigest()
    answers, state = out / "answers.jsonl", out / "state" / "answers.jsonl"
    if not (out / "manifest.json").exists():
        known, started = BENCHMARKS[recipe.benchmark], time.monotonic()
        said = list(zip(questions, _ask_all(recipe, questions, state, asked), strict=True))
        answered = [judged(recipe.benchmark, question, (pair[0], pair[1])) for question, pair in said if pair[0]]
        skipped = [Skipped(question.name, known.split, reason) for question, (image, reason) in said if not image]
        if not answered:
            raise UserError(f"no image of {known.title} can be read, first {skipped[0].reason}; get the files again")
        with disk_errors(out):
            write_text(answers, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in answered))
            manifest = _manifest(recipe, checkpoint, questions, answered, skipped, time.monotonic() - started)
            write_text(out / "manifest.json", json.dumps({**manifest, **to_record(inputs)}, indent=2) + "\n")
            state.unlink(missing_ok=True)
            inputs_file(out).unlink(missing_ok=True)
    with reading(answers, LOST):
        answered = read_answers(answers)
        left_out = read_json(out / "manifest.json", LOST).get("skipped", [])
    if left_out:
        logger.warning(
            "%d questions are left out, first %s: %s", len(left_out), left_out[0]["image"], left_out[0]["reason"]
        )
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


def _require_free(out: Path, recipe: BenchRecipe) -> None:
    """Raises UserError where another run is in a folder."""
    there = out / "recipe.yaml"
    if there.exists() and there.read_text(encoding="utf-8") != dump_recipe(recipe):
        raise UserError(f"{out} holds another run, or one of another recipe; choose another --out, or remove it")
    if not there.exists() and out.is_dir() and any(p for p in out.iterdir() if not p.name.startswith(".")):
        raise UserError(f"{out} is not empty and holds no run; choose another --out")


def _claim(out: Path, recipe: BenchRecipe, recorded: dict[str, Any]) -> None:
    """Writes recipe and inputs into a folder."""
    with disk_errors(out):
        remove_left_overs(out.rglob(".*.tmp"))
        write_text(out / "recipe.yaml", dump_recipe(recipe))
        if not (out / "manifest.json").exists():
            write_text(inputs_file(out), json.dumps(recorded))


def _ask_all(
    recipe: BenchRecipe, questions: Sequence[Question], state: Path, asked: str
) -> Iterator[tuple[str | None, str]]:
    """Image hash and answer of every question; None and the reason where its image cannot be read.

    Answers are kept batch by batch, and those that are kept not asked. Batches are the same however often the run was
    interrupted: what padding does to the last bits of a logit is then the same too.
    """
    kept = read_json_lines(state)
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
            read = [_image(question) for question in part]
            images = [image for image, _ in read if image is not None]
            texts = [q.text + suffix for q, (image, _) in zip(part, read, strict=True) if image is not None]
            answers = iter(ask(backbone, recipe.backbone, images, texts, recipe.max_new_tokens) if images else [])
            found = [(None, note) if image is None else (note, next(answers)) for image, note in read]
            with disk_errors(state.parent), state.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in found))
            yield from found
            bar.advance()
            if interruption.asked:
                raise Interrupted


def _image(question: Question) -> tuple[Image.Image | None, str]:
    """A question's image, and a hash of its file; None and the reason where it cannot be read."""
    try:
        content = question.image()
        return read_image(io.BytesIO(content)), hashlib.sha256(content).hexdigest()[:16]
    except FileNotFoundError:
        return None, "missing"
    except (OSError, ValueError) as error:
        if isinstance(error, UnidentifiedImageError):
            return None, "corrupt: it is no image"
        return None, f"corrupt: {str(error).splitlines()[0][:120]}" if str(error) else "corrupt"


def _manifest(
    recipe: BenchRecipe,
    checkpoint: Identity,
    questions: Sequence[Question],
    answered: Sequence[Answered],
    skipped: Sequence[Skipped],
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
            "questions": len(answered),
            "images": len({one.image for one in answered}),
            "digest": digest(questions),
        },
        "unreadable": sum(one.read is None for one in answered),
        "skipped": [vars(skip) for skip in skipped],
        "seconds": seconds,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
