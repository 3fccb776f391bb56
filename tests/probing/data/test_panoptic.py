"""Panoptic annotations become label maps at full size, in the official order of classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probing.data.da2k import Pair, read_pairs
from probing.data.panoptic import UNLABELED, read_panoptic
from probing.toyworld.layout import write_world
from probing.toyworld.scenes import generate
from probing.utils.errors import UserError

REAL_COCO = Path(__file__).parents[4] / "shared" / "data" / "coco"


def write(root, segments, pixels, png="a.png"):
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "a.png")
    whole = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "categories": [{"id": 9, "name": "tree"}, {"id": 2, "name": "cat"}],
        "annotations": [{"image_id": 7, "file_name": png, "segments_info": segments}],
    }
    folder.with_suffix(".json").write_text(json.dumps(whole))


def test_ids_are_base_256_and_classes_are_ordered_by_category_id(tmp_path):
    pixels = np.array([[[1, 0, 0], [44, 1, 2]], [[0, 0, 0], [5, 5, 5]]], dtype=np.uint8)
    write(tmp_path, [{"id": 1, "category_id": 9}, {"id": 44 + 256 + 2 * 65536, "category_id": 2}], pixels)
    panoptic = read_panoptic(tmp_path, "val2017")
    assert panoptic.names == ["cat", "tree"]
    assert panoptic.labels("a.jpg").tolist() == [[1, 0], [UNLABELED, UNLABELED]]


def test_the_toy_worlds_files_say_what_its_scenes_say(tmp_path):
    world = write_world(tmp_path / "world", 2, 3, seed=5)
    panoptic = read_panoptic(world, "val2017")
    scenes = json.loads((world / "annotations" / "panoptic_val2017.json").read_text())
    area = {s["category_id"]: s["area"] for s in scenes["annotations"][0]["segments_info"]}
    name = next(iter(panoptic.segments))
    labels = panoptic.labels(name)
    assert labels.shape == (48, 48) and UNLABELED not in labels
    assert all((labels == category - 1).sum() >= count for category, count in area.items())
    assert len(generate(1, 0).semantic[0]) == 48


@pytest.mark.skipif(not REAL_COCO.exists(), reason="the small piece of real COCO is not next to the repository")
def test_real_coco_areas():
    panoptic = read_panoptic(REAL_COCO, "val2017")
    assert len(panoptic.names) == 133 and panoptic.names[0] == "person" and panoptic.names[79] == "toothbrush"
    whole = json.loads((REAL_COCO / "annotations" / "panoptic_val2017.json").read_text())
    order = {c["id"]: k for k, c in enumerate(whole["categories"])}
    for entry in whole["annotations"][:10]:
        labels = panoptic.labels(entry["file_name"].replace(".png", ".jpg"))
        for number in {order[s["category_id"]] for s in entry["segments_info"]}:
            expected = sum(s["area"] for s in entry["segments_info"] if order[s["category_id"]] == number)
            assert (labels == number).sum() == expected


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="panoptic annotations"):
        read_panoptic(tmp_path, "val2017")
    write(tmp_path, [{"id": 1, "category_id": 9}], np.zeros((2, 2, 3), dtype=np.uint8), png="../../a.png")
    with pytest.raises(UserError, match="not a plain path"):
        read_panoptic(tmp_path, "val2017")


def test_a_missing_png_is_an_os_error(tmp_path):
    write(tmp_path, [{"id": 1, "category_id": 9}], np.zeros((2, 2, 3), dtype=np.uint8), png="b.png")
    with pytest.raises(OSError):
        read_panoptic(tmp_path, "val2017").labels("a.jpg")


def test_depth_pairs_name_the_closer_point_first(tmp_path):
    entry = {"point1": [3, 4], "point2": [5, 6], "closer_point": "point2"}
    (tmp_path / "annotations.json").write_text(json.dumps({"images/a/x.jpg": [entry], "images/b/x.jpg": []}))
    assert read_pairs(tmp_path) == {"images/a/x.jpg": [Pair((5, 6), (3, 4))], "images/b/x.jpg": []}
    assert Pair((5, 6), (3, 4)).inside(6, 7) and not Pair((5, 6), (3, 4)).inside(5, 7)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"../x.jpg": []}',
        '{"x.jpg": [{"point1": [0, 0], "point2": [1, 1], "closer_point": "left"}]}',
        '{"x.jpg": [{"point1": [0], "point2": [1, 1], "closer_point": "point1"}]}',
    ],
)
def test_depth_annotations_that_are_broken(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError, match=r"annotations\.json"):
        read_pairs(tmp_path)
