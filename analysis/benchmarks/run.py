"""`probing bench`: the accuracy of a checkpoint on a VQA benchmark."""

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from analysis.benchmarks.accuracy import ScoredAnswer, summarise
from analysis.benchmarks.questions import digest, read_questions
from analysis.benchmarks.recipe import BenchRecipe
from analysis.benchmarks.tasks import BENCHMARKS, Question
from analysis.evaluation.scores import write_rows
from probing import __version__
from probing.data.coco import Skipped, read_image
from probing.models import Identity, identify, load_backbone
from probing.models.chat_templates import rendering_at
from probing.models.generate import ask, sample_conversation
from probing.recipe import dump_recipe
from probing.runs.manifest import manifest_header, versions
from probing.runs.recorded_inputs import (
    describe_inputs,
    inputs_file,
    recorded_inputs,
    recorded_moment,
    to_record,
    vocabulary,
)
from probing.runs.resume import claim, holds_run
from probing.utils.distributed import require_single_process
from probing.utils.errors import UserError, first_line
from probing.utils.files import RESTORE_ADVICE, disk_errors, read_json, read_json_lines, write_text
from probing.utils.interrupt import Interrupted, Interruption
from probing.utils.paths import local_path
from probing.utils.progress import Progress
from probing.utils.weights_hash import generation_settings

logger = logging.getLogger(__name__)

Raw = tuple[str | None, str]
"""Hash of the image and the checkpoint's answer; None and the reason where the image is unreadable."""


def bench(recipe: BenchRecipe, out: Path) -> Path:
    """Asks a checkpoint every question of a benchmark, and scores the answers; an interrupted run resumes.

    Args:
        recipe: the whole run.
        out: its folder.

    Returns:
        The path of `results.csv`.

    Raises:
        UserError: checkpoint or data cannot be used, or `out` holds another run.
        Interrupted: stopped by the user; the same call resumes, to the same answers.
    """
    device = require_single_process("bench").device
    questions = read_questions(recipe.benchmark, local_path(recipe.data))
    known = BENCHMARKS[recipe.benchmark]
    if len(questions) != known.size:
        logger.warning("%d questions; %s as published has %d", len(questions), known.title, known.size)
    holds_run(out, recipe)
    recorded = recorded_inputs(out, (out / "state" / "answers.jsonl").exists())
    with rendering_at(recorded_moment(recorded)):
        checkpoint = identify(recipe.backbone)
        record = to_record(_describe_inputs(recipe, checkpoint, questions))
        claim(out, recipe, record, recorded)
        if not (out / "manifest.json").exists():
            _answer_all(recipe, out, checkpoint, questions, record, device)
    answers = [ScoredAnswer(**line) for line in read_json_lines(out / "answers.jsonl")]
    manifest = read_json(out / "manifest.json", RESTORE_ADVICE)
    if skipped := manifest["skipped"]:
        first = f"{skipped[0]['image']}: {skipped[0]['reason']}"
        logger.warning("%d questions are skipped, first %s", len(skipped), first)
    if unreadable := manifest["unreadable"]:
        line = "%d of %d answers are unreadable, and count as wrong; see %s"
        logger.warning(line, unreadable, len(answers), out / "answers.jsonl")
    with disk_errors(out):
        return write_rows(out / "results.csv", checkpoint.name, list(summarise(recipe.benchmark, answers)))


def _describe_inputs(recipe: BenchRecipe, checkpoint: Identity, questions: Sequence[Question]) -> dict[str, Any]:
    texts = sample_conversation(checkpoint.prepare.processor, recipe.backbone)
    inputs = describe_inputs(checkpoint, {}, "own", {"questions": digest(questions)}, texts) | vocabulary(checkpoint)
    inputs["generation settings"] = generation_settings(Path(checkpoint.path))
    return inputs


def _answer_all(
    recipe: BenchRecipe,
    out: Path,
    checkpoint: Identity,
    questions: Sequence[Question],
    record: dict[str, Any],
    device: torch.device,
) -> None:
    """Writes `answers.jsonl` and the manifest."""
    known, started, state = BENCHMARKS[recipe.benchmark], time.monotonic(), out / "state" / "answers.jsonl"
    pairs = list(zip(questions, _ask_all(recipe, questions, state, device), strict=True))
    answers = [scored(recipe.benchmark, question, image, text) for question, (image, text) in pairs if image]
    skipped = [Skipped(question.name, known.split, reason) for question, (image, reason) in pairs if not image]
    if not answers:
        raise UserError(f"no image of {known.title} can be read, first {skipped[0].reason}; get the files again")
    manifest = {
        "kind": "benchmark",
        **manifest_header(checkpoint, "the benchmark's questions", {}),
        "benchmark": recipe.benchmark,
        "data": {
            "path": recipe.data,
            "split": known.split,
            "questions": len(answers),
            "images": len({answer.image for answer in answers}),
            "digest": digest(questions),
        },
        "unreadable": sum(answer.parsed is None for answer in answers),
        "skipped": [vars(skip) for skip in skipped],
        "seconds": time.monotonic() - started,
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **record,
    }
    with disk_errors(out):
        lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        write_text(out / "answers.jsonl", "".join(lines))
        write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        state.unlink(missing_ok=True)
        inputs_file(out).unlink(missing_ok=True)


def scored(benchmark: str, question: Question, image: str, answer: str) -> ScoredAnswer:
    """Parses and scores one answer; an unreadable one scores 0."""
    known = BENCHMARKS[benchmark]
    parsed = known.parse(question, answer)
    score = 0.0 if parsed is None else known.score(question, parsed)
    chance = 1 / len(question.choices) if question.choices else None
    return ScoredAnswer(question.name, question.groups, image, answer, parsed, list(question.answers), score, chance)


def _ask_all(recipe: BenchRecipe, questions: Sequence[Question], state: Path, device: torch.device) -> Iterator[Raw]:
    """Yields the raw answer to every question.

    Answers are saved after each batch, and saved ones are not repeated. Batches do not depend on interruptions:
    padding changes the last bits of logits.
    """
    settings = hashlib.sha256(f"{__version__} {dump_recipe(recipe)} {digest(questions)}".encode()).hexdigest()
    saved, batch = read_json_lines(state), recipe.micro_batch
    done: list[Raw] = [(image, text) for image, text in saved[1:]] if saved and saved[0] == settings else []
    if len(done) < len(questions):
        done = done[: len(done) // batch * batch]
    with disk_errors(state.parent):
        write_text(state, "".join(json.dumps(line) + "\n" for line in [settings, *done]))
    if done:
        logger.info("%s: resuming after %d questions", recipe.benchmark, len(done))
    yield from done
    batches = [questions[first : first + batch] for first in range(len(done), len(questions), batch)]
    if not batches:
        return
    backbone, known = load_backbone(recipe.backbone, device, with_head=True), BENCHMARKS[recipe.benchmark]
    suffix = known.suffix if recipe.suffix == "auto" else recipe.suffix or ""
    what = f"{known.title}, {backbone.name}"
    with Interruption().watch() as interruption, Progress(what, len(batches), unit="batches") as bar:
        for part in batches:
            loaded = [_load_image(question) for question in part]
            images = [image for image, _ in loaded if image is not None]
            texts = [q.text + suffix for q, (image, _) in zip(part, loaded, strict=True) if image is not None]
            answers = iter(ask(backbone, recipe.backbone, images, texts, recipe.max_new_tokens) if images else [])
            raw: list[Raw] = [(None, note) if image is None else (note, next(answers)) for image, note in loaded]
            with disk_errors(state.parent), state.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in raw))
            yield from raw
            bar.advance()
            if interruption.requested:
                raise Interrupted


def _load_image(question: Question) -> tuple[Image.Image | None, str]:
    """A question's image and the hash of its file; None and the reason where it is unreadable."""
    try:
        content = question.image()
        return read_image(io.BytesIO(content)), hashlib.sha256(content).hexdigest()[:16]
    except FileNotFoundError:
        return None, "missing"
    except (OSError, ValueError) as error:
        if isinstance(error, UnidentifiedImageError):
            return None, "corrupt: it is no image"
        # without the path, because reasons are published
        return None, f"corrupt: {getattr(error, 'strerror', None) or first_line(error)[:120]}"
