"""Whatever annotations, recipes and images hold: one line, or an image that is skipped; nothing outside is read."""

import copy
import io
import json
import struct
import zlib

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from analysis.alignment.run import AlignRecipe
from probing.data.coco import list_images, read_image
from probing.data.conversations import read_conversations, require_some_image
from probing.data.da2k import read_pairs
from probing.data.image_modes import FORMATS, size_of_image
from probing.data.input_substitutes import read_captions
from probing.data.instances import read_label_maps
from probing.data.patch_labels import plain_name
from probing.distillation.recipe import DistillRecipe
from probing.models.base import parse_layers
from probing.recipe import ProbeRunRecipe, apply_overrides, dump_recipe, load_recipe
from probing.utils.errors import UserError
from tests.helpers.hostile import DEEP, damaged, fuzz, one_line

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
    """The rasteriser is in C and would write out of bounds."""
    entry = {"image_id": 1, "category_id": 1, "area": 9.0, "segmentation": outline}
    good = {"image_id": 1, "category_id": 7, "area": 1.0, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
    annotate(world, "instances", INSTANCES | {"annotations": [entry, good]})
    labels = read_label_maps(world, "val2017").labels("1.jpg")
    assert labels.shape == (8, 8) and (labels[:4, :4] == 1).all()


@pytest.mark.parametrize("name", ["../../../secret.jpg", "/etc/passwd", "..", ".", "/", "..\\x.png", ""])
def test_label_maps_are_in_the_folder_of_their_annotations(world, name):
    entry = PANOPTIC["annotations"][0] | {"file_name": name}
    annotate(world, "panoptic", PANOPTIC | {"annotations": [entry]})
    with pytest.raises(UserError, match="not a plain path"):
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
        assert read_image(file).size == size_of_image(file) == (16, 12)
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
    (tmp_path / "huge.png").write_bytes(png + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    with pytest.raises(OSError, match="bomb"):
        read_image(tmp_path / "huge.png")


def test_no_other_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    (tmp_path / "1.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(OSError):
        read_image(tmp_path / "1.jpg")
    assert not started
