"""What each patch shows: against pixels counted one by one, and real annotations of COCO."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO

from probing.data.instances import Instances, read_instances, read_label_maps
from probing.data.panoptic import UNLABELED
from probing.data.patch_labels import patch_labels, patch_shares, plain_name
from probing.utils.errors import UserError

REAL_COCO = Path(__file__).parents[4] / "shared" / "data" / "coco"


def test_shares_are_those_of_counting():
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, UNLABELED], dtype=np.uint8), size=(30, 44))
    shares = patch_shares(labels, 3, (5, 4))
    for row in range(5):
        for column in range(4):
            patch = labels[row * 6 : row * 6 + 6, column * 11 : column * 11 + 11]
            own = [(patch == number).mean() for number in range(3)]
            np.testing.assert_allclose(shares[row * 4 + column], own)
    np.testing.assert_allclose(patch_shares(labels, 3, (7, 6)).mean(axis=0), shares.mean(axis=0), atol=0.05)
    fewer = patch_shares(labels[:3, :2], 3, (5, 4))  # more patches than pixels: some have none
    assert fewer.shape == (20, 3) and not np.isnan(fewer).any()


def test_a_patch_has_the_class_that_covers_enough_of_it():
    shares = np.array([[0.5, 0.4], [0.3, 0.69], [0.49, 0.49], [0.0, 0.0]])
    assert patch_labels(shares).tolist() == [0, 1, -1, -1]
    assert patch_labels(shares, 0.4).tolist() == [0, 1, 0, -1]


def test_names_are_said_plainly():
    assert plain_name("wall-other-merged") == "wall" and plain_name("floor-wood") == "floor wood"
    assert plain_name("other") == "other" and plain_name("hot dog") == "hot dog"


def write(root, annotations, categories=({"id": 3, "name": "cat"}, {"id": 1, "name": "dog"})):
    images = [{"id": 9, "file_name": "000000000009.jpg", "height": 10, "width": 20}]
    whole = {"images": images, "annotations": annotations, "categories": list(categories)}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(whole))


def test_smaller_objects_lie_on_larger_ones_and_crowds_count(tmp_path):
    square = [[0.0, 0.0, 10.0, 0.0, 10.0, 10.0, 0.0, 10.0]]
    small = [[2.0, 2.0, 4.0, 2.0, 4.0, 4.0, 2.0, 4.0]]
    crowd = {"size": [10, 20], "counts": [150, 50]}  # the last five columns
    write(
        tmp_path,
        [
            {"image_id": 9, "category_id": 3, "segmentation": small, "area": 4, "iscrowd": 0},
            {"image_id": 9, "category_id": 1, "segmentation": square, "area": 100, "iscrowd": 0},
            {"image_id": 9, "category_id": 3, "segmentation": crowd, "area": 50, "iscrowd": 1},
        ],
    )
    maps = read_label_maps(tmp_path, "val2017")
    assert maps.names == ["dog", "cat"]
    labels = maps.labels("000000000009.jpg")
    assert (labels[:, 15:] == 1).all() and (labels[:, 10:15] == UNLABELED).all()
    assert (labels[2:4, 2:4] == 1).all() and (labels[:2, :10] == 0).all()


def test_broken_annotations_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither panoptic_val2017\.json nor instances_val2017\.json"):
        read_label_maps(tmp_path, "val2017")
    write(tmp_path, [{"image_id": 9, "category_id": 3, "segmentation": {"counts": 5}, "area": 4}])
    with pytest.raises(UserError, match=r"has no usable entries .1 broken entries"):
        read_instances(tmp_path, "val2017")
    write(tmp_path, [{"image_id": 8, "category_id": 3, "segmentation": [], "area": 4}])
    with pytest.raises(UserError, match="1 annotations of images that are not listed, first id 8"):
        read_instances(tmp_path, "val2017")


@pytest.mark.skipif(not REAL_COCO.exists(), reason="the small piece of real COCO is not next to the repository")
def test_real_coco_agrees_with_pycocotools():
    maps = read_instances(REAL_COCO, "train2017")
    official = COCO(str(REAL_COCO / "annotations" / "instances_train2017.json"))
    number = {category["id"]: index for index, category in enumerate(official.loadCats(official.getCatIds()))}
    assert [official.cats[identity]["name"] for identity in number] == maps.names
    for identity in official.getImgIds():
        labels = maps.labels(official.loadImgs(identity)[0]["file_name"])
        allowed = np.zeros((len(number) + 1, *labels.shape), dtype=bool)
        for entry in official.loadAnns(official.getAnnIds(identity)):
            allowed[number[entry["category_id"]]] |= official.annToMask(entry).astype(bool)
        allowed[-1] = ~allowed[:-1].any(axis=0)
        kind = np.minimum(labels, len(number))
        assert np.take_along_axis(allowed, kind[None].astype(int), axis=0).all()


def test_compressed_runs_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(50):
        inside = rng.random(rng.integers(1, 90, 2)) < rng.random()
        packed = mask.encode(np.asfortranarray(inside, dtype=np.uint8))
        packed["counts"] = packed["counts"].decode()
        found = Instances(["a"], {"x.jpg": inside.shape[::-1]}, {"x.jpg": [(0, packed)]}).labels("x.jpg")
        np.testing.assert_array_equal(found == 0, inside)
