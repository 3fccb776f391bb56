"""Changed inputs of a run are refused if and only if they affect numbers."""

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from analysis.alignment.run import AlignRecipe, align
from analysis.benchmarks.run import BenchRecipe, bench
from analysis.evaluation.options import Options
from analysis.evaluation.run import evaluate
from probing.models import identify, load_backbone
from probing.recipe import BackboneRecipe, ProbeRunRecipe, TeacherRecipe
from probing.runs import recorded_inputs
from probing.runs.recorded_inputs import describe_inputs, require_same
from probing.teachers import load_teacher
from probing.toyworld.layout import write_world
from probing.training.run import train
from probing.utils import weights_hash
from probing.utils.errors import UserError
from probing.utils.processors import changed_input
from tests.helpers.benchmark_files import as_parquet, cvbench_rows

CPU = torch.device("cpu")


@pytest.fixture
def root(models, tmp_path):
    """A checkpoint and a teacher that may be edited."""
    for name in ("llava", "depth"):
        shutil.copytree(models[name], tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def before(models):
    """Numbers and inputs before anything is edited, of the same files in another folder."""
    root = models["llava"].parent
    return numbers(root), json.loads(json.dumps(describe(root)))


def describe(root):
    teacher = load_teacher("depth", TeacherRecipe(id=str(root / "depth")), CPU)
    return describe_inputs(identify(BackboneRecipe(checkpoint=str(root / "llava"))), {"depth": teacher}, "own", {})


def numbers(root):
    """The last layer's states and the teacher's targets of one image: all that training reads."""
    backbone = load_backbone(BackboneRecipe(checkpoint=str(root / "llava")), CPU)
    teacher = load_teacher("depth", TeacherRecipe(id=str(root / "depth")), CPU)
    image = tiny_image()
    states, _ = backbone.hidden_states([image], "final")
    return states["final"], teacher.target(teacher.prepare([image]))


def tiny_image():
    pixels = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def edit(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def processor(**values):
    return lambda root: edit(root / "llava/processor_config.json", lambda v: v["image_processor"].update(values))


def field(name, part, **values):
    return lambda root: edit(root / name / "config.json", lambda v: v[part].update(values))


def edit_template(root):
    file = root / "llava/chat_template.jinja"
    file.write_text(file.read_text().replace("USER: ", "Answer briefly. USER: "))


def lower_case(root):
    edit(root / "llava/tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"}))


def add_token(root, token="two lines"):
    words = AutoTokenizer.from_pretrained(root / "llava")
    words.add_tokens([token])
    words.save_pretrained(root / "llava")


def other_weights(root):
    file = root / "llava/model.safetensors"
    tensors = {name: tensor * (1 + ("projector" in name)) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


CHANGES = {
    "chat template": (edit_template, "chat template"),
    "normaliser": (lower_case, "tokenizer"),
    "mean": (processor(image_mean=[0.9, 0.9, 0.9]), r"image processor \(image_mean: \[0.48.* then, \[0.9, 0.9, 0.9\]"),
    "size": (processor(size={"shortest_edge": 40}), r"image processor \(size"),
    "resampling": (processor(resample=0), r"image processor \(resample: 3 then, 0 now"),
    "teacher's mean": (
        lambda root: edit(root / "depth/preprocessor_config.json", lambda v: v.update(image_mean=[0.1, 0.2, 0.3])),
        r"depth teacher's processor \(image_mean",
    ),
    "configuration": (
        field("llava", "text_config", rms_norm_eps=0.5),
        r"checkpoint's configuration \(text_config.rms_norm_eps: 1e-06 then, 0.5 now",
    ),
    "teacher's configuration": (
        field("depth", "backbone_config", layer_norm_eps=0.5),
        r"depth teacher's configuration \(backbone_config.layer_norm_eps",
    ),
    "weights": (other_weights, "checkpoint's weights"),
}


def write_states(root):
    """Adds files that Trainer, DeepSpeed and users leave next to weights, some in other formats."""
    for folder in (root / "llava", root / "depth"):
        names = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")
        (folder / "global_step5").mkdir()
        for name in (*names, "global_step5/zero_pp_rank_0_optim_states.pt", "global_step5/config.json"):
            (folder / name).write_bytes(os.urandom(64))
        for name in ("README.md", "trainer_state.json", "events.out.tfevents.1", "model.safetensors.index.json"):
            (folder / name).write_text("{}")


def lay_out_again(root):
    """Writes every JSON file with its keys in another order."""
    for file in [*root.glob("llava/*.json"), *root.glob("depth/*.json")]:
        file.write_text(json.dumps(dict(reversed(json.loads(file.read_text()).items())), indent=7))


def touch(root):
    for file in [*root.glob("*/*")]:
        os.utime(file, (1, 1))


def other_version(root):
    for file in (root / "llava/config.json", root / "depth/config.json"):
        edit(file, lambda v: v.update(transformers_version="4.0.0", _name_or_path="elsewhere", use_cache=False))


def older_layout(root):
    """Stores the image processor in a separate file, as before transformers 5."""
    values = json.loads((root / "llava/processor_config.json").read_text())
    (root / "llava/preprocessor_config.json").write_text(json.dumps(values.pop("image_processor")))
    (root / "llava/processor_config.json").write_text(json.dumps(values))


HARMLESS = {
    "training states": write_states,
    "layout of JSON": lay_out_again,
    "times": touch,
    "version": other_version,
    "older layout": older_layout,
    "whole numbers": lambda root: edit(
        root / "llava/config.json", lambda v: v["text_config"]["rope_parameters"].update(rope_theta=10000)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_that_affects_numbers_is_named(root, before, change):
    states, then = before
    CHANGES[change][0](root)
    assert not all(torch.equal(one, other) for one, other in zip(states, numbers(root), strict=True))
    with pytest.raises(UserError, match=f"^the {CHANGES[change][1]}.* changed since run began; put it back$"):
        require_same({"inputs": then}, describe(root), "run", "put it back")


@pytest.mark.parametrize("change", HARMLESS)
def test_change_without_effect_is_accepted(root, before, change):
    states, then = before
    HARMLESS[change](root)
    assert all(torch.equal(one, other) for one, other in zip(states, numbers(root), strict=True))
    assert not changed_input(then, describe(root))


def test_added_token_counts_if_in_the_prompt(root, before):
    _, then = before
    add_token(root, "<unused>")
    assert not changed_input(then, describe(root))
    add_token(root, "two lines")
    assert changed_input(then, describe(root)) == "tokenizer"


def test_last_bits_of_pixels_are_ignored():
    then = {"image processor": {"settings": {"image_mean": "[0.5]"}, "pixels": "a"}}
    assert not changed_input(then, {"image processor": {"settings": {"image_mean": "[0.5]"}, "pixels": "b"}})
    more = {"image_mean": "[0.5]", "a_default_of_a_newer_version": "true"}
    assert not changed_input(then, {"image processor": {"settings": more, "pixels": "a"}})
    assert changed_input(then, {"image processor": {"settings": more, "pixels": "b"}})


@pytest.mark.parametrize("recorded", [{}, {"inputs": None}, {"inputs": {"chat template": "x"}}])
def test_run_of_older_version_is_a_user_error(recorded):
    with pytest.raises(UserError, match=r"^run does not record .*older version; start a new run$"):
        require_same(recorded, {"chat template": "x", "tokenizer": "y"}, "run", "")


# Verbs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("inputs") / "world", 4, 4, seed=4)
    as_parquet(folder / "bench", cvbench_rows(4))
    return folder


def call(verb, root, world):
    """Runs a verb, or resumes it."""
    out, backbone = root / f"{verb}-run", {"checkpoint": str(root / "llava")}
    layers = {
        "backbone": backbone,
        "data": {"path": f"coco:{world}", "train_limit": 4, "eval_limit": 4},
        "teachers": {"depth": {"id": str(root / "depth")}},
        "layers": "1",
    }
    if verb == "align":
        align(AlignRecipe.model_validate({**layers, "workers": 0, "pictures": 0, "sample": 2}), out)
    elif verb == "bench":
        values = {"backbone": backbone, "benchmark": "cvbench", "data": str(world / "bench"), "max_new_tokens": 2}
        bench(BenchRecipe.model_validate(values), out)
    else:
        fit = {"epochs": 1, "batch_size": 4, "micro_batch": 2, "workers": 0, "report_to": "none"}
        train(ProbeRunRecipe.model_validate({**layers, "fit": fit, "controls": []}), out)
        if verb == "evaluate":
            evaluate(out, Options(pictures=0))
    return out


BREAKS = {
    "train": "probing.training.run._train_on",
    "align": "analysis.alignment.run.gather",
    "bench": "analysis.benchmarks.run.ask",
}
"""Function in which each verb is interrupted."""
TEACHER = CHANGES["teacher's mean"]


class Cut(Exception):
    pass


@pytest.fixture
def begun(root, world, monkeypatch):
    """Begins a verb: scoring with a finished training, others by interrupting them."""

    def begin(verb):
        if verb == "evaluate":
            return call("evaluate", root, world)

        def cut(*args, **kwargs):
            raise Cut

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(BREAKS[verb], cut)
            call(verb, root, world)
        return root / f"{verb}-run"

    return begin


@pytest.mark.parametrize(
    ("verb", "change", "name"),
    [
        *((verb, edit_template, "chat template") for verb in ("train", "evaluate", "align", "bench")),
        *((verb, *TEACHER) for verb in ("train", "evaluate", "align")),
        ("bench", lambda root: add_token(root, "<unused>"), "tokenizer's vocabulary"),
        ("bench", lambda root: edit(root / "llava/generation_config.json", lambda v: v.update(min_new_tokens=2)),
         r"generation settings \(min_new_tokens: \"absent\" then, 2 now|generation settings \(min_new_tokens"),
    ],
)  # fmt: skip
def test_verbs_refuse_changed_inputs(root, world, begun, verb, change, name):
    out = begun(verb)
    change(root)
    if verb == "evaluate":
        shutil.rmtree(out / "scores")
    with pytest.raises(UserError, match=f"^the {name}.* changed since {out} began; put it back"):
        call(verb, root, world)


@pytest.mark.parametrize("verb", ["train", "evaluate", "align", "bench"])
def test_resumed_prompts_keep_their_date(root, world, begun, monkeypatch, verb):
    file = root / "llava/chat_template.jinja"
    file.write_text("{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}" + file.read_text())

    def today(year):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 12, 31)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        monkeypatch.setattr(recorded_inputs, "_now", Clock.now)

    today(2030)
    out = begun(verb)
    results = (out / "results.csv").read_bytes() if verb == "evaluate" else b""
    today(2031)
    if verb == "evaluate":
        shutil.rmtree(out / "scores")
    call(verb, root, world)
    manifest = json.loads((out / "manifest.json").read_text())
    assert "31 December 2030" in manifest["inputs"]["chat template"] and manifest["rendered_at"].startswith("2030")
    assert "31 December 2030" in manifest["rendered_prompt"]
    assert not results or (out / "results.csv").read_bytes() == results


def test_training_states_do_not_change_the_hash(root, world):
    out = call("evaluate", root, world)
    results = (out / "results.csv").read_bytes()
    for change in ("training states", "layout of JSON", "version", "times"):
        HARMLESS[change](root)
    shutil.rmtree(out / "scores")
    call("evaluate", root, world)
    assert (out / "results.csv").read_bytes() == results


# Hashes of files


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Records hashed files, with a separate cache."""
    monkeypatch.setenv("MLLM_PROBING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights_hash, "SETTLED", -1.0)
    weights_hash._hash_of_version.cache_clear()
    names, digest = [], weights_hash.hashlib.file_digest

    def count(file, kind):
        names.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(weights_hash.hashlib, "file_digest", count)
    return names


def another_process():
    weights_hash._hash_of_version.cache_clear()


def test_checkpoint_is_hashed_once_per_change(root, read):
    first = weights_hash.model_hash(root / "llava")
    another_process()
    assert weights_hash.model_hash(root / "llava") == first and read == ["model.safetensors"]
    file = root / "llava/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)  # of the same size
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    assert weights_hash.model_hash(root / "llava") != first and read == ["model.safetensors"] * 2
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 2))
    assert weights_hash.model_hash(root / "llava") == first and len(read) == 3


def test_recently_written_file_is_not_cached(root, read, monkeypatch):
    monkeypatch.setattr(weights_hash, "SETTLED", 3600.0)
    shutil.copy(root / "llava/model.safetensors", root / "llava/copy")
    shutil.move(root / "llava/copy", root / "llava/model.safetensors")
    weights_hash.model_hash(root / "llava")
    another_process()
    weights_hash.model_hash(root / "llava")
    assert len(read) == 2


@pytest.mark.parametrize("fault", ["not a folder", "corrupt", "another file's", "no home"])
def test_unusable_hash_cache_is_ignored(root, read, monkeypatch, fault):
    cache = root / "cache"
    if fault == "not a folder":
        cache.write_text("in the way")
    right = weights_hash.model_hash(root / "llava")
    another_process()
    for entry in cache.glob("hashes/*.json"):
        text = {"corrupt": '{"stamp": [', "another file's": entry.read_text().replace(str(root), "/other")}
        entry.write_text(text.get(fault, entry.read_text()))
    if fault == "no home":
        monkeypatch.setattr(weights_hash, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert weights_hash.model_hash(root / "llava") == right and len(read) == 2


@pytest.mark.parametrize(
    ("there", "loaded"),
    [
        (("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"), ["model.safetensors"]),
        (("model.safetensors.index.json", "pytorch_model.bin"), ["a.safetensors", "b.safetensors"]),
        (("pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.bin"), ["pytorch_model.bin"]),
        (("pytorch_model.bin.index.json",), ["a.safetensors", "b.safetensors"]),
    ],
)
def test_hashed_files_are_those_transformers_loads(tmp_path, there, loaded):
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    for name in (*there, "a.safetensors", "b.safetensors", "c.safetensors"):
        index = {
            "metadata": {},
            "weight_map": {"one": "a.safetensors", "two": "b.safetensors", "three": "a.safetensors"},
        }
        (tmp_path / name).write_text(json.dumps(index) if "index" in name else "{}")
    assert [file.name for file in weights_hash.loaded_weights(tmp_path)] == loaded
    files, _ = _get_resolved_checkpoint_files(str(tmp_path), None, None, None, None, False)
    assert [Path(file).name for file in files] == loaded
