"""Images that are rotated by EXIF or resized, and annotations of another size: labels match the pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from analysis.alignment.context import Annotator
from analysis.evaluation.metrics.depth_pairs import read_images
from probing.data.coco import list_images, read_headers, read_image, same_shape
from probing.data.da2k import read_pairs
from probing.data.instances import LabelledImages, keep_annotated_size, labels_on, read_label_maps
from probing.data.patch_words import PatchWords, read_annotations
from probing.utils.errors import UserError
from tests.helpers import tiny

STORED_BY = {  # what a camera writes, so that the orientation turns it back
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
NAMES = [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]


def upright(width=30, height=40):
    """A person, red, in the upper left quarter of a car, blue."""
    labels = np.ones((height, width), np.uint8)
    labels[: height // 2, : width // 2] = 0
    return labels


def save(file, labels, turn=1, scale=1.0):
    colours = np.array([[250, 0, 0], [0, 0, 250]], np.uint8)[labels]
    image = Image.fromarray(colours)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = turn
    image = image if STORED_BY[turn] is None else image.transpose(STORED_BY[turn])
    image.save(file, exif=exif.tobytes(), quality=95, subsampling=0)


def world(root, kind, turns, size=(30, 40), scale=1.0, annotated=None):
    """Images 1.jpg, 2.jpg … of some orientations, with the annotations of one kind, as a person sees them."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    width, height = annotated or size
    labels, images, entries = upright(width, height), [], []
    for number, turn in enumerate(turns, 1):
        save(root / "val2017" / f"{number}.jpg", upright(*size), turn, scale)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        if kind == "panoptic":
            Image.fromarray(np.stack([labels + 1, 0 * labels, 0 * labels], -1)).save(
                root / "annotations" / "panoptic_val2017" / f"{number}.png"
            )
            segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
            entries.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
        else:
            for category, (x, y) in ((2, (width, height)), (1, (width // 2, height // 2))):
                outline = [[0, 0, x, 0, x, y, 0, y]]
                entry = {"image_id": number, "category_id": category, "area": x * y, "segmentation": outline}
                entries.append(entry)
    text = json.dumps({"images": images, "annotations": entries, "categories": NAMES})
    (root / "annotations" / f"{kind}_val2017.json").write_text(text)
    return root


def red_is_person(picture, labels):
    red = np.asarray(picture)[..., 0] > 125
    assert labels.shape == red.shape
    return (red == (labels == 0)).mean() > 0.97


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
@pytest.mark.parametrize(("size", "turns"), [((30, 40), range(1, 9)), ((31, 30), range(1, 9)), ((30, 40), [6])])
def test_labels_lie_on_turned_images(tmp_path, caplog, kind, size, turns):
    root = world(tmp_path, kind, list(turns), size)
    images, maps = list_images(root, "val2017"), read_label_maps(root, "val2017")
    assert images.turned == {f"{n}.jpg" for n, turn in enumerate(turns, 1) if turn != 1}
    assert f"{len(images.turned)} images are turned upright" in caplog.text
    for index, name in enumerate(images.names):
        picture = images.read(index)
        assert picture.size == size
        assert red_is_person(picture, labels_on(maps, name, picture.size))
    assert len(keep_annotated_size(images, maps)) == len(images)


def test_images_annotated_as_stored_stay(tmp_path, caplog):
    """As the reference reads COCO: no turn, where annotations do not ask for it."""
    root = world(tmp_path, "instances", [6, 8, 3, 1], size=(30, 40), annotated=(40, 30))
    images = list_images(root, "val2017")
    assert not images.turned and [images.read(k).size for k in range(2)] == [(40, 30)] * 2
    assert "1 images are read as stored: annotations do not confirm their EXIF orientation" in caplog.text
    file = root / "annotations" / "instances_val2017.json"
    whole = json.loads(file.read_text())
    for image in whole["images"]:
        del image["width"]
    file.write_text(json.dumps(whole))
    assert not list_images(root, "val2017").turned


def test_turned_images_are_another_list(tmp_path):
    """What is cached of the stored images is not what is seen of the turned ones."""
    root = world(tmp_path, "instances", [6, 1])
    turned = list_images(root, "val2017")
    file = root / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"width": 30, "height": 40', '"width": 40, "height": 30'))
    assert list_images(root, "val2017").digest() != turned.digest()


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
@pytest.mark.parametrize(("scale", "turn"), [(2.0, 1), (0.5, 1), (1.37, 1), (0.71, 6), (3.0, 8)])
def test_labels_lie_on_resized_copies(tmp_path, caplog, kind, scale, turn):
    root = world(tmp_path, kind, [turn, turn], (60, 80), scale)
    maps = read_label_maps(root, "val2017")
    images = keep_annotated_size(list_images(root, "val2017"), maps)
    assert "2 label maps are scaled to their images, first 1.jpg" in caplog.text
    picture = images.read(0)
    assert picture.size == (round(60 * scale), round(80 * scale))
    assert red_is_person(picture, labels_on(maps, "1.jpg", picture.size))
    checked = LabelledImages(**vars(images), maps=maps)
    assert checked.read(1).size == picture.size


@pytest.mark.parametrize("kind", ["instances", "panoptic"])
def test_other_sizes_are_left_out_and_named(tmp_path, caplog, kind):
    root = world(tmp_path, kind, [1, 1])
    save(root / "val2017" / "1.jpg", upright(50, 40))
    maps, images = read_label_maps(root, "val2017"), list_images(root, "val2017")
    found = keep_annotated_size(images, maps)
    reason = "30 x 40 pixels are annotated, the image has 50 x 40"
    assert found.names == ["2.jpg"] and [(s.image, s.reason) for s in found.skipped] == [("1.jpg", reason)]
    assert f"1 images are skipped, first 1.jpg: {reason}" in caplog.text
    with pytest.raises(OSError, match="30 x 40 pixels are annotated"):
        Annotator(maps, (2, 2))("1.jpg", (50, 40))
    with pytest.raises(OSError, match="30 x 40 pixels are annotated"):
        LabelledImages(**vars(images), maps=maps).read(0)
    save(root / "val2017" / "2.jpg", upright(50, 40))
    with pytest.raises(UserError, match="no image of val2017 has its annotated size"):
        keep_annotated_size(list_images(root, "val2017"), maps)


def test_patches_in_training_follow_turned_images(tmp_path):
    from transformers import CLIPImageProcessor

    root = world(tmp_path, "panoptic", [6, 1])
    names = ["val2017/1.jpg", "val2017/2.jpg"]
    annotations = read_annotations(root, root, names)
    assert annotations.turned == {"val2017/1.jpg"}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    words = PatchWords(annotations, processor, (2, 2), 0.5, True)
    for name in names:
        size = read_image(root / name, name in annotations.turned).size
        assert words(name, size).tolist() == [0, 1, 1, 1]


def test_depth_pairs_say_how_images_are_turned(tmp_path, models, caplog):
    """Points below the stored image are inside the upright one; so are those of the set's other images."""
    for number, turn in ((1, 6), (2, 6), (3, 1), (4, 1)):
        save(tmp_path / f"{number}.jpg", upright(), turn)
    pair = {"point1": [2, 3], "point2": [9, 8], "closer_point": "point1"}
    low = pair | {"point2": [39, 8]}
    for last, turned in ((low, {"1.jpg", "2.jpg"}), (pair, set())):
        outside = pair | {"point1": [40, 0]}
        pairs = {"1.jpg": [pair], "2.jpg": [last], "3.jpg": [outside, pair], "4.jpg": [outside]}
        (tmp_path / "annotations.json").write_text(json.dumps(pairs))
        images, usable, sizes = read_images(tmp_path, read_pairs(tmp_path), None)
        assert images.turned == turned
        assert sizes["1.jpg"] == ((40, 30) if turned else (30, 40))
        reason = "1 pairs outside its 30 x 40 pixels"
        assert [(s.image, s.reason) for s in images.skipped] == [("4.jpg", reason)]
        assert len(usable["3.jpg"]) == 1 and "4.jpg" not in images.names
    assert "2 images have points outside, first 3.jpg" in caplog.text
    assert "2 images with an EXIF orientation are rotated by it" in caplog.text
    assert "2 images with an EXIF orientation are read as stored" in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((640, 480), (320, 240), True),
        ((640, 427), (500, 334), True),
        ((500, 334), (640, 427), True),
        ((640, 480), (480, 640), False),
        ((640, 480), (640, 427), False),
        ((640, 480), (336, 336), False),
        ((333, 500), (334, 500), True),
        ((333, 500), (335, 500), False),
    ],
)
def test_what_counts_as_a_scaled_copy(one, other, same):
    assert same_shape(one, other) is same


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_data_do_not_matter(tmp_path):
    Image.fromarray(upright()).save(tmp_path / "1.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    assert read_headers(tmp_path, ["1.jpg"]) == {"1.jpg": ((30, 40), 1)}
    assert read_image(tmp_path / "1.jpg").size == (30, 40)


def test_images_without_annotated_sizes_are_listed(tmp_path):
    root = tiny.coco(tmp_path / "coco", train=2, val=2)
    assert list_images(root, "val2017").turned == frozenset()
