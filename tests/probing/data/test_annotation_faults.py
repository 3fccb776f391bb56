"""One broken entry of an annotation file costs no other: it is skipped, counted and named."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask

from probing.data.coco import list_images
from probing.data.da2k import Pair, read_pairs
from probing.data.input_substitutes import read_captions
from probing.data.instances import read_instances
from probing.data.panoptic import UNLABELED, read_panoptic
from probing.utils.errors import UserError

LEFT, RIGHT = [0, 0, 4, 0, 4, 4, 0, 4], [4, 0, 8, 0, 8, 4, 4, 4]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]
IMAGES = [{"id": n, "file_name": f"{n}.jpg", "width": 8, "height": 4} for n in (1, 2)]


def thing(image=1, category=3, outline=None, **more):
    return {"image_id": image, "category_id": category, "area": 16, "segmentation": outline or [LEFT]} | more


GOOD = [thing(), thing(category=5, outline=[RIGHT]), thing(image=2)]
CAT_AND_DOG = [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
ONLY_CAT = [[0, 0, 0, 0, 255, 255, 255, 255]] * 4


def write(root, kind, **changes):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "val2017").mkdir(exist_ok=True)
    for number in (1, 2, 3):
        Image.new("RGB", (8, 4)).save(root / "val2017" / f"{number}.jpg")
    whole = {"images": IMAGES, "categories": CATEGORIES, "annotations": GOOD} | changes
    (root / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(whole))
    return root


def without(entry, *names):
    return {key: value for key, value in entry.items() if key not in names}


DAMAGED = {
    "no outline": (thing(outline=[[]]), "1 objects without an outline, first 1.jpg"),
    "empty": (thing() | {"segmentation": []}, "1 objects without an outline, first 1.jpg"),
    "null": (thing() | {"segmentation": None}, "1 objects without an outline"),
    "missing outline": (without(thing(), "segmentation"), "1 objects without an outline"),
    "two points": (thing(outline=[[0, 0, 8, 4]]), "1 objects without an outline"),
    "odd": (thing(outline=[[0, 0, 8, 4, 3, 3, 3]]), "1 objects without an outline"),
    "text": (thing(outline=[["0", "0", "8", "0", "8", "4"]]), "1 objects without an outline"),
    "not a number": (thing(outline=[[0, 0, 8, 0, float("nan"), 4]]), "1 objects without an outline"),
    "far": (thing(outline=[[0, 0, 1e9, 0, 8, 4]]), "1 objects without an outline"),
    "a number": (thing(outline=7), "1 broken entries"),
    "other size": (thing(outline={"size": [8, 4], "counts": [0, 32]}), "1 masks of another size than their image"),
    "too long": (thing(outline={"size": [4, 8], "counts": [0, 64]}), "1 broken entries, first ValueError: the run"),
    "negative": (thing(outline={"size": [4, 8], "counts": [-8, 40]}), "1 broken entries, first OverflowError"),
    "too short": (thing(outline={"size": [4, 8], "counts": [0, 16]}), "1 broken entries, first ValueError: the run"),
    "unfinished": (thing(outline={"size": [4, 8], "counts": "0`1PPPP"}), "1 broken entries, first ValueError: the run"),
    "zero byte": (
        thing(outline={"size": [4, 8], "counts": "P\0000000"}),
        "1 broken entries, first ValueError: the run",
    ),
    "nonsense": (thing(outline={"size": [4, 8], "counts": "~~~~"}), "1 broken entries, first ValueError: the run"),
    "no counts": (thing(outline={"size": [4, 8]}), "1 broken entries, first KeyError: 'counts'"),
    "orphan": (thing(image=9), "1 annotations of images that are not listed, first id 9"),
    "no image": (without(thing(), "image_id"), "1 broken entries, first KeyError: 'image_id'"),
    "category": (thing(category=9), "1 objects of a category that is not listed, first category 9 in 1.jpg"),
    "no category": (without(thing(), "category_id"), "1 broken entries, first KeyError: 'category_id'"),
    "not an object": (17, "1 broken entries, first TypeError"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_broken_object_costs_only_itself(tmp_path, caplog, name):
    entry, message = DAMAGED[name]
    write(tmp_path, "instances", annotations=[GOOD[0], entry, *GOOD[1:]])
    found = read_instances(tmp_path, "val2017")
    assert found.labels("1.jpg").tolist() == CAT_AND_DOG and found.labels("2.jpg").tolist() == ONLY_CAT
    assert f"instances_val2017.json: skipped {message}" in caplog.text
    write(tmp_path, "instances", annotations=[entry])
    with pytest.raises(UserError, match="has no usable entries") as caught:
        read_instances(tmp_path, "val2017")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_short_part_costs_only_itself(tmp_path, caplog):
    write(tmp_path, "instances", annotations=[thing(outline=[LEFT, [1, 1], RIGHT])])
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == [[0] * 8] * 4
    assert "1 parts of objects that are not polygons" in caplog.text


def test_compressed_masks_are_drawn_as_encoded(tmp_path, caplog):
    rng = np.random.default_rng(0)
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 90, "height": 70} for n in range(1, 21)]
    drawn = [np.kron(rng.random((70 // k, 90 // k)) < rng.random(), np.ones((k, k))) for k in (1, 2, 5, 10) * 5]
    counts = [mask.encode(np.asfortranarray(one, np.uint8))["counts"].decode() for one in drawn]
    entries = [thing(image=n, outline={"size": [70, 90], "counts": own}) for n, own in enumerate(counts, 1)]
    write(tmp_path, "instances", images=images, annotations=entries)
    found = read_instances(tmp_path, "val2017")
    assert all(((found.labels(f"{n}.jpg") == 0) == one).all() for n, one in enumerate(drawn, 1)) and not caplog.text


@pytest.mark.parametrize("area", [None, "large", float("nan"), "absent"])
def test_objects_without_area_are_ordered_by_their_pixels(tmp_path, caplog, area):
    whole = thing(category=5, outline=[[0, 0, 8, 0, 8, 4, 0, 4]], area=area)
    small, runs = thing(area=area), thing(outline={"size": [4, 8], "counts": [0, 16, 16]}, area=area)
    for first in (small, runs):
        entries = [without(e, "area") if area == "absent" else e for e in (first, whole)]
        write(tmp_path, "instances", annotations=entries)
        assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG
    assert "skipped" not in caplog.text


@pytest.mark.parametrize("field", ["id", "area", "iscrowd", "bbox"])
def test_fields_that_are_not_needed_may_be_missing(tmp_path, caplog, field):
    whole = [e | {"id": n, "iscrowd": 0, "bbox": [0, 0, 4, 4]} for n, e in enumerate(GOOD)]
    write(tmp_path, "instances", annotations=[without(entry, field) for entry in whole])
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG
    assert not caplog.text


@pytest.mark.parametrize("change", [str, float, lambda n: f"{n:012d}", lambda n: f"image-{n}"])
def test_ids_may_be_text_or_floats(tmp_path, caplog, change):
    images = [image | {"id": change(image["id"])} for image in IMAGES]
    entries = [entry | {"image_id": change(entry["image_id"])} for entry in GOOD]
    captions = [{"image_id": change(n), "caption": f"number {n}"} for n in (1, 2)]
    write(tmp_path, "instances", images=images, annotations=entries)
    write(tmp_path, "captions", images=images, annotations=captions)
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "2.jpg"]
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG
    assert read_captions(tmp_path, "val2017") == {"1.jpg": "number 1", "2.jpg": "number 2"}
    assert "skipped" not in caplog.text
    number = {3: change(3), 5: change(5)}
    categories = [c | {"id": number[c["id"]]} for c in CATEGORIES]
    write(tmp_path, "instances", categories=categories)
    if change in (str, float):
        assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG


@pytest.mark.parametrize(
    "form", ["val2017/{}", "val2017\\{}", "coco\\images\\val2017\\{}", "./{}", "images/val2017/{}", ".\\{}"]
)
def test_file_names_may_begin_with_their_folder(tmp_path, caplog, form):
    images = [image | {"file_name": form.format(image["file_name"])} for image in IMAGES]
    write(tmp_path, "instances", images=images)
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "2.jpg"]
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": 3}, "KeyError: 'file_name'"),
        ({"id": 3, "file_name": "../3.jpg"}, "'../3.jpg' is not a plain path"),
        ({"id": 3, "file_name": "/3.jpg"}, "'/3.jpg' is not a plain path"),
        ({"id": 3, "file_name": None}, "None is not a plain path"),
        ({"id": 3, "file_name": ""}, "'' is not a plain path"),
        ({"file_name": "3.jpg"}, "KeyError: 'id'"),
        ({"id": None, "file_name": "3.jpg"}, "None is not an id"),
        ({"id": [3], "file_name": "3.jpg"}, "is not an id"),
        ({"id": float("inf"), "file_name": "3.jpg"}, "inf is not an id"),
        ("3.jpg", "TypeError"),
    ],
)
def test_a_broken_image_costs_only_itself(tmp_path, caplog, entry, message):
    write(tmp_path, "instances", images=[IMAGES[0], entry, IMAGES[1]])
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "2.jpg"]
    assert "skipped 1 broken entries, first" in caplog.text and message in caplog.text
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG


@pytest.mark.parametrize("size", [{"width": 0}, {"height": -4}, {"width": None}, {"height": "x"}])
def test_an_image_without_size_costs_only_its_labels(tmp_path, caplog, size):
    write(tmp_path, "instances", images=[IMAGES[0] | size, IMAGES[1]])
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "2.jpg"]
    found = read_instances(tmp_path, "val2017")
    assert "1.jpg" not in found.objects and found.labels("2.jpg").tolist() == ONLY_CAT
    assert "2 objects of images without width and height, first 1.jpg" in caplog.text


def test_two_images_with_one_id_get_nobodys_labels(tmp_path, caplog):
    write(tmp_path, "instances", images=[*IMAGES, IMAGES[0] | {"file_name": "3.jpg"}])
    found = read_instances(tmp_path, "val2017")
    assert list(found.objects) == ["2.jpg"]
    assert "2 annotations of an id that several images share, first id 1" in caplog.text
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "3.jpg", "2.jpg"]
    assert "1 ids are shared by images, whose annotations are skipped, first id 1: 1.jpg, 3.jpg" in caplog.text
    write(tmp_path, "captions", images=[IMAGES[0], IMAGES[0] | {"file_name": "3.jpg"}, IMAGES[1]],
          annotations=[{"image_id": n, "caption": f"number {n}"} for n in (1, 2)])  # fmt: skip
    assert read_captions(tmp_path, "val2017") == {"2.jpg": "number 2"}


def test_an_image_listed_twice_has_the_objects_of_both(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    twice = [*IMAGES, IMAGES[0] | {"id": 7}]
    write(tmp_path, "instances", images=twice, annotations=[GOOD[0], GOOD[1] | {"image_id": 7}, GOOD[2]])
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == CAT_AND_DOG
    assert list_images(tmp_path, "val2017").names == ["1.jpg", "2.jpg"]
    assert "1 images are listed twice, first 1.jpg" in caplog.text
    other = [*IMAGES, IMAGES[0] | {"id": 7, "width": 16}]
    write(tmp_path, "instances", images=other, annotations=[GOOD[0], GOOD[1] | {"image_id": 7}, GOOD[2]])
    assert read_instances(tmp_path, "val2017").labels("1.jpg").tolist() == ONLY_CAT
    list_images(tmp_path, "val2017")
    assert "1 images listed again with another size, first 1.jpg" in caplog.text


@pytest.mark.parametrize(
    "category", [{"id": 9}, {"id": 9, "name": None}, {"name": "bird"}, {"id": 3, "name": "bird"}, 9]
)
def test_a_broken_category_costs_only_itself(tmp_path, caplog, category):
    write(tmp_path, "instances", categories=[*CATEGORIES, category])
    found = read_instances(tmp_path, "val2017")
    assert found.names == ["cat", "dog"] and found.labels("1.jpg").tolist() == CAT_AND_DOG
    assert "skipped 1 " in caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_id": 9, "caption": "x"}, "1 annotations of images that are not listed, first id 9"),
        ({"image_id": 1}, "KeyError: 'caption'"),
        ({"image_id": 1, "caption": None}, "1 captions without text, first 1.jpg"),
        ({"image_id": 1, "caption": " "}, "1 captions without text, first 1.jpg"),
    ],
)
def test_a_broken_caption_costs_only_itself(tmp_path, caplog, entry, message):
    good = [{"image_id": n, "caption": f"number {n}"} for n in (1, 2)]
    write(tmp_path, "captions", annotations=[entry, *good])
    assert read_captions(tmp_path, "val2017") == {"1.jpg": "number 1", "2.jpg": "number 2"}
    assert message in caplog.text


@pytest.mark.parametrize(
    "entry",
    [
        {"point1": [0], "point2": [1, 1], "closer_point": "point1"},
        {"point1": [0, 0], "point2": [1, 1], "closer_point": "left"},
        {"point1": [0, 0], "point2": [1, 1]},
        {"point1": [float("nan"), 0], "point2": [1, 1], "closer_point": "point1"},
        None,
    ],
)
def test_a_broken_depth_pair_costs_only_itself(tmp_path, caplog, entry):
    good = {"point1": [0, 0], "point2": [1, 1], "closer_point": "point1"}
    (tmp_path / "annotations.json").write_text(json.dumps({"a\\1.jpg": [entry, good], "../2.jpg": [good], "3.jpg": 7}))
    assert read_pairs(tmp_path) == {"a/1.jpg": [Pair((0, 0), (1, 1))], "3.jpg": []}
    assert "annotations.json: skipped 3 broken entries" in caplog.text


# label maps of one channel

IDS = np.array([[7, 7, 9], [9, 0, 200]])
SEGMENTS = [{"id": 7, "category_id": 3}, {"id": 9, "category_id": 5}]
LABELS = [[0, 0, 1], [1, UNLABELED, UNLABELED]]


def colours(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def indexed(ids, table):
    image = Image.fromarray(ids.astype(np.uint8)).convert("P")
    image.putpalette(table)
    return image


RAINBOW = np.random.default_rng(0).integers(0, 255, 768).tolist()
OPAQUE = np.full(IDS.shape, 255, np.uint8)
CLEAR = np.where(IDS == 9, 0, 255).astype(np.uint8)
PNGS = {
    "official": Image.fromarray(colours(IDS)),
    "with alpha": Image.merge("RGBA", [*Image.fromarray(colours(IDS)).split(), Image.fromarray(OPAQUE)]),
    "hidden by alpha": Image.merge("RGBA", [*Image.fromarray(colours(IDS)).split(), Image.fromarray(CLEAR)]),
    "grey": Image.fromarray(IDS.astype(np.uint8)),
    "grey in three channels": Image.fromarray(np.repeat(IDS[..., None], 3, -1).astype(np.uint8)),
    "grey with alpha": Image.merge("LA", [Image.fromarray(IDS.astype(np.uint8)), Image.fromarray(CLEAR)]),
    "16 bits": Image.fromarray(IDS.astype(np.uint16)),
    "palette of other colours": indexed(IDS, RAINBOW),
    "palette of ids": indexed(IDS, colours(np.arange(256)).reshape(-1).tolist()),
}


def write_panoptic(root, image, segments=SEGMENTS, **changes):
    write(root, "panoptic", annotations=[{"image_id": 1, "file_name": "1.png", "segments_info": segments}], **changes)
    (root / "annotations" / "panoptic_val2017").mkdir(exist_ok=True)
    image.save(root / "annotations" / "panoptic_val2017" / "1.png")


@pytest.mark.parametrize("kind", PNGS)
def test_segment_ids_are_read_however_they_are_coded(tmp_path, kind):
    write_panoptic(tmp_path, PNGS[kind])
    assert read_panoptic(tmp_path, "val2017").labels("1.jpg").tolist() == LABELS


def test_wide_segment_ids_are_read(tmp_path):
    wide, segments = IDS + 4000, [{**s, "id": s["id"] + 4000} for s in SEGMENTS]
    for image in (Image.fromarray(wide.astype(np.uint16)), Image.fromarray(colours(wide))):
        write_panoptic(tmp_path, image, segments)
        assert read_panoptic(tmp_path, "val2017").labels("1.jpg").tolist() == LABELS
    write_panoptic(tmp_path, Image.fromarray(IDS.astype(np.uint8)), [{**s, "id": str(s["id"])} for s in SEGMENTS])
    assert read_panoptic(tmp_path, "val2017").labels("1.jpg").tolist() == LABELS


def test_a_png_without_its_segments_is_named(tmp_path):
    write_panoptic(tmp_path, Image.fromarray(colours(IDS + 20)))
    with pytest.raises(OSError, match=r"1\.png contains none of its 2 segment ids"):
        read_panoptic(tmp_path, "val2017").labels("1.jpg")


@pytest.mark.parametrize("segment", [{"id": 200, "category_id": 99}, {"id": 200}, {"category_id": 3}, None])
def test_a_broken_segment_costs_only_itself(tmp_path, caplog, segment):
    write_panoptic(tmp_path, PNGS["official"], [*SEGMENTS, segment])
    assert read_panoptic(tmp_path, "val2017").labels("1.jpg").tolist() == LABELS
    assert "panoptic_val2017.json: skipped 1 " in caplog.text


@pytest.mark.parametrize(
    "entry",
    [
        {"image_id": 1, "file_name": "../2.png", "segments_info": SEGMENTS},
        {"image_id": 2, "segments_info": SEGMENTS},
        {"image_id": 2, "file_name": "2.png"},
        {"image_id": 9, "file_name": "9.png", "segments_info": SEGMENTS},
        {"image_id": 1, "file_name": "other.png", "segments_info": SEGMENTS},
    ],
)
def test_a_broken_label_map_costs_only_itself(tmp_path, caplog, entry):
    write_panoptic(tmp_path, PNGS["official"])
    file = tmp_path / "annotations" / "panoptic_val2017.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"annotations": [*whole["annotations"], entry]}))
    found = read_panoptic(tmp_path, "val2017")
    assert list(found.segments) == ["1.jpg"] and found.labels("1.jpg").tolist() == LABELS
    assert "skipped 1 " in caplog.text
