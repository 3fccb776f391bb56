"""Whatever a file holds: one line that names it, or an image that is skipped; nothing outside is read, or run."""

import copy
import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from analysis.align import AlignRecipe
from analysis.features import inception
from analysis.scores import Curve, ScoreFile, read_if_fits, read_summaries
from probing.backbones import load_backbone
from probing.backbones.base import parse_layers
from probing.bank import ProbeBank
from probing.data.coco import FORMATS, image_size, list_images, read_image
from probing.data.conversations import read_conversations, require_some_image
from probing.data.da2k import read_pairs
from probing.data.instances import read_label_maps
from probing.data.patch_labels import plain_name
from probing.data.substitutes import read_captions
from probing.distill.recipe import DistillRecipe
from probing.errors import UserError
from probing.hub import read_tensors
from probing.recipe import BackboneRecipe, ProbeRunRecipe, apply_overrides, dump_recipe, load_recipe
from probing.resampler import ResamplerConfig
from probing.run import Run
from probing.train import train

CPU = torch.device("cpu")
DEEP = "[" * 100_000
fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63, 0, -1]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["..", "/etc/passwd", "../../x.jpg", "a\0b", "\ud800", "x" * 5000, "<image>", "", ".", "/"]),
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(document):
    """Every place in a document: the container and the key in it."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def damaged(draw, document):
    """A document of which something is missing, or is something else."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(document))
        if not there:
            break
        container, key = draw(st.sampled_from(there))
        if draw(st.integers(0, 3)):
            container[key] = draw(junk)
        else:
            del container[key]
    return document


def one_line(error):
    assert str(error).strip() and "Traceback" not in str(error)


# annotations

CATEGORIES = [{"id": 1, "name": "thing"}, {"id": 7, "name": "wall-other-merged"}]
IMAGES = [{"id": n, "file_name": f"{n}.jpg", "height": 8, "width": 8} for n in (1, 2)]
SEGMENTS = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 7}]
PANOPTIC = {
    "categories": CATEGORIES,
    "images": IMAGES,
    "annotations": [{"image_id": n, "file_name": f"{n}.png", "segments_info": SEGMENTS} for n in (1, 2)],
}
INSTANCES = {
    "categories": CATEGORIES,
    "images": IMAGES,
    "annotations": [
        {"image_id": 1, "category_id": 1, "area": 9.0, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
        {"image_id": 2, "category_id": 7, "area": 8, "segmentation": {"size": [8, 8], "counts": [8, 16, 40]}},
        {"image_id": 2, "category_id": 1, "area": 3, "segmentation": {"size": [8, 8], "counts": "08h1"}},
    ],
}
CAPTIONS = {"images": IMAGES, "annotations": [{"image_id": n, "caption": "a wall"} for n in (1, 2)]}
PAIRS = {"a/1.jpg": [{"point1": [1, 2], "point2": [3, 4], "closer_point": "point1"}]}
TALK = [
    {
        "id": "1",
        "image": "1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wall"}],
    }
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile") / "data"
    for folder in ("val2017", "annotations/panoptic_val2017"):
        (root / folder).mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "val2017" / f"{number}.jpg")
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / "annotations" / "panoptic_val2017" / f"{number}.png")
    Image.new("RGB", (8, 8)).save(root.parent / "secret.jpg")
    return root


def annotate(root, kind, text):
    for file in (root / "annotations").glob("*.json"):
        file.unlink()
    file = root / "annotations" / f"{kind}_val2017.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))


def read_coco(root, kind):
    """Everything that is made of an annotation file; images and label maps may be unreadable one by one."""
    images = list_images(root, "val2017")
    assert all((root / "val2017").resolve() in (images.folder / name).resolve().parents for name in images.names)
    if kind == "captions":
        assert all(text.isprintable() or text for text in read_captions(root, "val2017").values())
        return
    maps = read_label_maps(root, "val2017")
    assert all(plain_name(name) or not name for name in maps.names)
    for name in images.names:
        if name in getattr(maps, "segments", getattr(maps, "sizes", {})):
            try:
                assert maps.labels(name).ndim == 2
            except OSError as error:
                one_line(error)


@pytest.mark.parametrize(
    ("kind", "document"), [("captions", CAPTIONS), ("panoptic", PANOPTIC), ("instances", INSTANCES)]
)
def test_annotations(world, kind, document):
    annotate(world, kind, document)
    read_coco(world, kind)

    @fuzz
    @given(damaged(document))
    @example([])
    @example(DEEP)
    @example(document | {"images": [{**IMAGES[0], "id": float("inf")}]})
    @example(document | {"images": [{**IMAGES[0], "width": -3}, {**IMAGES[1], "width": 10**9, "height": 10**9}]})
    @example(document | {"images": [*IMAGES, {"id": 3, "file_name": "x" * 5000, "width": 8, "height": 8}]})
    @example(document | {"categories": [{"id": 1}, {"id": 7}]})
    @example(document | {"categories": [{"id": 1, "name": 3}, {"id": 7, "name": None}]})
    def check(found):
        annotate(world, kind, found)
        try:
            read_coco(world, kind)
        except UserError as error:
            one_line(error)

    check()


@pytest.mark.parametrize(
    "outline",
    [
        [[1e9, 1e9, 0, 0, 1e9, 0]],
        [[float("nan")] * 6],
        [[0, 0, 1, 1]],
        [],
        [["0", "0"]],
        [[]],
        [[0, 0, 4, 0, 4, 4], []],
        {"size": [8, 8], "counts": [2**31, 2**31]},
        {"size": [8, 8], "counts": [-8, 72]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        {"size": [8, 8], "counts": "~~~~~~~~~~~~~~~~~~~~~~~~"},
        {"size": [8, 8], "counts": ""},
        {"counts": "08h1"},
        7,
    ],
    ids=str,
)
def test_outlines_that_no_image_can_have(world, outline):
    """What comes after is in C, which would write where it is told to."""
    entry = {"image_id": 1, "category_id": 1, "area": 9.0, "segmentation": outline}
    annotate(world, "instances", INSTANCES | {"annotations": [entry]})
    try:
        assert read_label_maps(world, "val2017").labels("1.jpg").shape == (8, 8)
    except OSError as error:
        assert "broken outline of a thing" in str(error)


@pytest.mark.parametrize("name", ["../../../secret.jpg", "/etc/passwd", "..", ".", "/", "a/b.png", "..\\x.png", ""])
def test_label_maps_lie_beside_their_annotations(world, name):
    entry = PANOPTIC["annotations"][0] | {"file_name": name}
    annotate(world, "panoptic", PANOPTIC | {"annotations": [entry]})
    with pytest.raises(UserError, match="not a plain file name"):
        read_label_maps(world, "val2017")


def test_depth_pairs(tmp_path):
    @fuzz
    @given(damaged(PAIRS))
    @example(DEEP)
    @example({"x": [{"point1": [float("inf"), 0], "point2": [0, 0], "closer_point": "point1"}]})
    def check(document):
        text = document if isinstance(document, str) else json.dumps(document)
        (tmp_path / "annotations.json").write_text(text)
        try:
            for name, pairs in read_pairs(tmp_path).items():
                assert tmp_path in (tmp_path / name).resolve().parents or name in ("", ".")
                assert all(pair.inside(10**40, 10**40) or not pair.inside(1, 1) for pair in pairs)
        except UserError as error:
            one_line(error)

    check()


def test_conversations(tmp_path):
    @fuzz
    @given(damaged(TALK))
    @example([DEEP])
    @example([TALK[0] | {"image": ["../x.jpg"]}])
    @example([TALK[0] | {"image": "/etc/passwd"}])
    @example([TALK[0] | {"image": "x" * 5000}])
    @example([TALK[0] | {"conversations": [TALK[0]["conversations"][0], {"from": "gpt", "value": "\ud800"}]}])
    def check(document):
        text = document[0] if document and document[0] is DEEP else json.dumps(document)
        (tmp_path / "data.json").write_text(text)
        try:
            found = read_conversations(tmp_path / "data.json")
            for conversation in found:
                assert all(text.encode() or not text for _, text in conversation.turns)
                assert all(tmp_path in (tmp_path / name).resolve().parents or not name for name in conversation.images)
            require_some_image(found, tmp_path)
        except UserError as error:
            one_line(error)

    check()


# recipes

PROBES = {
    "backbone": {"checkpoint": "org/name", "prompt": "Describe"},
    "data": {"path": "coco:/data", "train_limit": 4},
    "teachers": {"gen": {"id": "org/gen", "grid": 4}},
    "layers": "0,4",
    "fit": {"epochs": 2, "lr": 0.1, "seeds": [0, 1]},
    "controls": ["random"],
}
STAGE = {
    "checkpoint": "org/name",
    "stage": "pt",
    "data": {"conversations": "a.json", "image_root": "b"},
    "embedding": {"teachers": {"gen": {"id": "org/gen"}}, "layers": {"gen": "1"}},
    "trainer": {"logging_steps": 1},
}
ALIGN = {name: PROBES[name] for name in ("backbone", "data", "teachers", "layers")} | {"coverage": 0.5}
TEXTS = (  # CANARY stands for a file that appears if one of them is run
    "{a: 2001-13-45}",
    "!!timestamp x",
    "!!int ''",
    "!!bool maybe",
    "!!python/object/apply:os.system [touch CANARY]",
    "&a [*a]",
    "? [a]\n: b",
    "{a: " + "[" * 1000,
    "a: \0",
    "backbone: {checkpoint: !!binary aGk=, quantization_config: {x: !!binary /w==}}",
    'backbone: {checkpoint: a/b, prompt: "\\ud800"}',
    "backbone: &b {checkpoint: a/b, quantization_config: {x: *b}}",
    "backbone: {checkpoint: ~nobody_of_that_name/x}\ndata: {path: 'coco:~nobody_of_that_name/y'}",
    "backbone: {checkpoint: " + "x" * 5000 + "}",
    "fit: {lr: .inf, epochs: 1e400}",
    'backbone: {checkpoint: a/b, prompt: "a\\Nb\\Lc"}',
)


@pytest.mark.parametrize(("model", "values"), [(ProbeRunRecipe, PROBES), (DistillRecipe, STAGE), (AlignRecipe, ALIGN)])
def test_recipes(tmp_path, model, values):
    file, canary = tmp_path / "recipe.yaml", tmp_path / "it_ran"
    texts = [text.replace("CANARY", str(canary)) for text in TEXTS]

    def check(text):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            recipe = load_recipe(model, file)
            recipe = recipe.with_absolute_paths() if hasattr(recipe, "with_absolute_paths") else recipe
            file.write_text(dump_recipe(recipe))
        except UserError as error:
            one_line(error)
        else:
            assert dump_recipe(load_recipe(model, file)) == dump_recipe(recipe)

    for text in texts:
        check(text)
    rest = yaml.safe_dump({key: value for key, value in values.items() if key != "backbone"})
    for text in texts[-7:]:
        check(f"{text}\n{rest}" if "data:" not in text else text)

    @fuzz
    @given(damaged(values))
    def damage(document):
        check(yaml.safe_dump(document))

    @fuzz
    @given(st.binary(max_size=40) | st.text(alphabet="a:{}[]&*!?|>-'\"# \n0.", max_size=30))
    def nonsense(text):
        check(text)

    damage()
    nonsense()
    assert not canary.exists()


def test_overrides(tmp_path):
    def check(text):
        try:
            apply_overrides(copy.deepcopy(PROBES), [text])
        except UserError as error:
            one_line(error)

    canary = tmp_path / "it_ran"
    texts = [text.replace("CANARY", str(canary)) for text in TEXTS]
    yaml.unsafe_load(next(text for text in texts if str(canary) in text))
    assert canary.exists()  # so it would
    canary.unlink()
    for text in texts:
        check(f"fit.lr={text}")
    assert not canary.exists()
    fuzz(given(st.text(alphabet="fit.lrdata=[]{}:&*!-0 ", max_size=20))(check))()


@pytest.mark.parametrize("text", ["0-99999999999999", "-1", "", ",", "1-", "x", "9" * 6000, "²", "1e3"])
def test_layers(text):
    with pytest.raises(UserError):
        parse_layers(text, 4)


# images


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_images(tmp_path, form):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=form)
    whole, file = buffer.getvalue(), tmp_path / "1.jpg"  # whatever it is called
    file.write_bytes(whole)
    if form in FORMATS:
        assert read_image(file).size == image_size(file) == (16, 12)
    else:
        with pytest.raises(OSError, match="cannot identify"):
            read_image(file)

    @fuzz
    @given(st.data())
    def check(data):
        content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, min(len(content), 80)))
            content[at : at + 4] = data.draw(st.binary(max_size=4))
        file.write_bytes(content)
        try:
            assert read_image(file).mode == "RGB"
        except OSError as error:
            one_line(error)

    check()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_an_absurd_size(tmp_path):
    header = struct.pack(">II", 60_000, 60_000) + bytes([8, 2, 0, 0, 0])
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(png)
    with pytest.raises(OSError, match="bomb"):
        read_image(tmp_path / "bomb.png")


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    (tmp_path / "1.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(OSError):
        read_image(tmp_path / "1.jpg")
    assert not started


# tensors


def broken(whole: bytes) -> dict[str, bytes]:
    """A safetensors file in every way in which it can be wrong."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [name for name in header if name != "__metadata__"]

    def packed(changed, start=None):
        text = changed.encode() if isinstance(changed, str) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text) if start is None else start) + text + data

    first, last = header[names[0]], header[names[-1]]
    return {
        "empty": b"",
        "header cut off": whole[: 8 + length // 2],
        "data cut off": whole[:-5],
        "length beyond the file": packed(header, 2**40),
        "length of everything": packed(header, 2**64 - 1),
        "length too small": packed(header, 3),
        "overlap": packed(header | {names[0]: last | {"data_offsets": last["data_offsets"]}}),
        "outside": packed(header | {names[0]: first | {"data_offsets": [2**50, 2**50 + 4]}}),
        "backwards": packed(header | {names[0]: first | {"data_offsets": first["data_offsets"][::-1]}}),
        "huge shape": packed(header | {names[0]: first | {"shape": [2**40, 2**40]}}),
        "other shape": packed(header | {names[0]: first | {"shape": []}}),
        "other type": packed(header | {names[0]: first | {"dtype": "X9"}}),
        "no tensors": packed({"__metadata__": header.get("__metadata__", {})}),
        "junk": packed("{" * 100),
        "deep": packed(DEEP),
        "pickle": pickle.dumps({"a": 1}),
    }


SMALLEST = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
KINDS = list(broken(struct.pack("<Q", len(SMALLEST)) + SMALLEST + bytes(4)))


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    file = tmp_path_factory.mktemp("scores") / "cosine-val2017.safetensors"
    curve = Curve("depth", "0", "resampler", "no", "cosine", "strict", 0)
    ScoreFile({curve: np.ones(3)}, ["a", "b", "c"], "val2017", "x", {curve: np.ones((2, 2))}).write(file)
    return file


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    ProbeBank.build({"gen": ResamplerConfig(8, 1, 12, 12)}, [0, 2], [0], ["image"], CPU).save(folder, {})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_tensor_files(models, scores, bank, tmp_path, kind):
    file = tmp_path / "scores.safetensors"
    file.write_bytes(broken(scores.read_bytes())[kind])
    with pytest.raises(UserError, match=r"scores\.safetensors cannot be read .*; remove it and evaluate again"):
        ScoreFile.read(file)
    assert read_if_fits(file, "x") is None
    shutil.copytree(bank, tmp_path / "bank")
    weights = tmp_path / "bank" / "gen" / "model.safetensors"
    weights.write_bytes(broken(weights.read_bytes())[kind])
    with pytest.raises(UserError, match=r"gen/model\.safetensors cannot be read .*; put it back, or train"):
        ProbeBank.load(tmp_path / "bank", CPU)
    shutil.copytree(models["llava"], tmp_path / "llava")
    weights = tmp_path / "llava" / "model.safetensors"
    weights.write_bytes(broken(weights.read_bytes())[kind])
    with pytest.raises(UserError, match="llava"):
        load_backbone(BackboneRecipe(checkpoint=str(tmp_path / "llava")), CPU)


def test_what_is_said_beside_tensors(scores, bank, tmp_path):
    """The metadata of scores, and the configuration of a bank."""
    content = scores.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    config = json.loads((bank / "gen" / "config.json").read_text())
    folder = tmp_path / "bank"
    shutil.copytree(bank, folder)

    @fuzz
    @given(damaged(json.loads(header["__metadata__"]["pass"])), damaged(config), junk)
    def check(passed, changed, text):
        for said in (json.dumps(passed), json.dumps(text), DEEP):
            new = json.dumps(header | {"__metadata__": {"pass": said}}).encode()
            (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
            try:
                assert len(ScoreFile.read(tmp_path / "s.safetensors").names) == 3
            except UserError as error:
                one_line(error)
        (tmp_path / "s.json").write_text(json.dumps(text))
        (folder / "gen" / "config.json").write_text(json.dumps(changed))
        for read in (lambda: read_summaries(tmp_path / "s.json"), lambda: ProbeBank.load(folder, CPU)):
            try:
                read()
            except UserError as error:
                one_line(error)

    check()


def test_a_configuration_that_is_nonsense(models, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    config = json.loads((folder / "config.json").read_text())

    @settings(fuzz, max_examples=25)
    @given(damaged(config))
    @example([])
    @example(config | {"text_config": config["text_config"] | {"hidden_size": -1}})
    @example(config | {"text_config": config["text_config"] | {"num_hidden_layers": "two"}})
    @example(config | {"vision_config": 3})
    @example(config | {"model_type": []})
    @example(config | {"model_type": "llava_llama", "mm_vision_tower": 3, "hidden_size": "x"})
    @example(config | {"mm_vision_tower": "/nowhere", "mm_projector_type": "mlp2x_gelu"})
    def check(changed):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            load_backbone(BackboneRecipe(checkpoint=str(folder)), torch.device("meta"))
        except UserError as error:
            one_line(error)

    check()


@pytest.mark.parametrize("place", ["../other/model.safetensors", "/etc/passwd", "..", "a/b", 3, None])
def test_shards_lie_beside_their_index(models, tmp_path, place):
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    shutil.copytree(models["llava"], tmp_path / "other")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: place for name in ("a", "b")}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file beside it"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    with pytest.raises(UserError, match="no file beside it"):
        list(read_tensors(str(folder), ""))


class Payload:
    """Makes a file when it is unpickled by anything that runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_pickle_runs_code(models, recipe_values, tmp_path):
    canary, evil = tmp_path / "it ran", tmp_path / "evil.pt"
    torch.save({"a": torch.ones(1), "step": Payload(canary)}, evil)
    torch.load(evil, weights_only=False)
    assert canary.exists()  # so it would
    canary.unlink()
    folder = tmp_path / "llava"
    shutil.copytree(models["llava"], folder)
    (folder / "model.safetensors").unlink()
    shutil.copy(evil, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="may run code"):
        load_backbone(BackboneRecipe(checkpoint=str(folder)), CPU)
    with pytest.raises(UserError, match="may run code"):
        list(read_tensors(str(folder), "a"))
    with pytest.raises(UserError):
        inception(evil, CPU)
    recipe = ProbeRunRecipe.model_validate(recipe_values | {"layers": "1", "controls": []})
    state = Run.create(tmp_path / "run", recipe).path / "state" / "no" / "state.pt"
    state.parent.mkdir(parents=True)
    shutil.copy(evil, state)
    with pytest.raises(UserError, match=r"may run code.*; remove .* to train from the start"):
        train(recipe, tmp_path / "run")
    torch.save({"banks": [], "step": "x"}, state)
    with pytest.raises(UserError, match="to train from the start"):
        train(recipe, tmp_path / "run")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UserError, match="to train from the start"):
        train(recipe, tmp_path / "run")
    assert not canary.exists()
