import json

import pytest
import torch
from PIL import Image

from probing.data.coco import list_images, read_image
from probing.data.dataloader import MicroBatches, micro_batches
from probing.utils.errors import UserError
from probing.utils.images import square
from tests.helpers import tiny


@pytest.fixture
def root(tmp_path):
    return tiny.coco(tmp_path / "coco", train=6, val=2)


def annotations(root):
    return root / "annotations" / "captions_train2017.json"


def test_order_is_that_of_the_official_ids(root):
    text = json.loads(annotations(root).read_text())
    text["images"].reverse()
    annotations(root).write_text(json.dumps(text))
    assert list_images(root, "train2017").names == [f"{i:012d}.jpg" for i in range(1, 7)]
    assert len(list_images(root, "train2017", limit=4)) == 4


def test_missing_and_unlisted_images_are_counted(root):
    (root / "train2017" / "000000000003.jpg").unlink()
    Image.new("RGB", (8, 8)).save(root / "train2017" / "999.jpg")
    images = list_images(root, "train2017")
    assert len(images) == 5 and images.unlisted == 1
    assert [(s.image, s.reason) for s in images.skipped] == [("000000000003.jpg", "missing")]


def test_images_of_several_annotation_files_are_joined(root):
    whole = json.loads(annotations(root).read_text())
    annotations(root).write_text(json.dumps({"images": whole["images"][:3]}))
    (root / "annotations" / "panoptic_train2017.json").write_text(json.dumps({"images": whole["images"][2:]}))
    assert len(list_images(root, "train2017")) == 6


def test_every_image_is_read_as_rgb(root):
    images = list_images(root, "train2017")
    assert {images.read(index).mode for index in range(len(images))} == {"RGB"}
    assert Image.open(images.folder / images.names[3]).mode == "L"


def test_reason_of_unreadable_image_holds_no_path(root, monkeypatch):
    images = list_images(root, "train2017")
    (images.folder / images.names[0]).write_bytes(b"no image")
    read = type(images).read

    def refuse(self, index):
        if index == 1:
            raise PermissionError(13, "Permission denied", str(images.folder / images.names[1]))
        return read(self, index)

    monkeypatch.setattr(type(images), "read", refuse)
    (batch,) = micro_batches(MicroBatches(images, [[0, 1, 2]], None, {}, "square"), 0, torch.device("cpu"))
    assert [s.reason for s in batch.skipped] == ["corrupt: cannot identify image file", "corrupt: Permission denied"]


def test_checkpoint_and_teachers_share_one_decoding(tmp_path, monkeypatch):
    images, reads = list_images(tiny.coco(tmp_path / "coco"), "train2017"), []
    monkeypatch.setattr("probing.data.coco.read_image", lambda *a: reads.append(a) or read_image(*a))

    def prepare(pictures):
        return torch.zeros(len(pictures))

    batch = MicroBatches(images, [[0, 1, 2]], prepare, dict.fromkeys(["depth", "seg", "gen"], prepare))[0]
    assert len(batch.student) == len(batch.pixels["gen"]) == len(reads) == 3


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_corrupt_images_raise_oserror(root, content):
    path = root / "train2017" / "000000000001.jpg"
    path.write_bytes(path.read_bytes()[:300] if content == "truncated" else content)
    with pytest.raises(OSError):
        list_images(root, "train2017").read(0)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/x.jpg", "a/../../x.jpg", "..\\x.jpg", ""])
def test_annotations_cannot_point_outside(root, name):
    annotations(root).write_text(json.dumps({"images": [{"id": 1, "file_name": name}]}))
    with pytest.raises(UserError, match="not a plain path"):
        list_images(root, "train2017")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: annotations(root).write_text("{"), "not a COCO annotation file"),
        (lambda root: annotations(root).write_text('{"images": [{"id": 1}]}'), "KeyError: 'id'|KeyError: 'file_name'"),
        (lambda root: annotations(root).unlink(), "has no annotations of train2017"),
        (lambda root: [p.unlink() for p in (root / "train2017").iterdir()], "has no images"),
        (
            lambda root: annotations(root).write_text('{"images": [{"id": 1, "file_name": "x.jpg"}]}'),
            "has none of the 1 annotated images",
        ),
    ],
)
def test_folders_that_cannot_be_used(root, damage, message):
    damage(root)
    with pytest.raises(UserError, match=message):
        list_images(root, "train2017")


def test_a_wrong_split_or_root_says_what_is_there(root):
    with pytest.raises(UserError, match="it has train2017, val2017"):
        list_images(root, "test2017")
    with pytest.raises(UserError, match="no such COCO folder"):
        list_images(root / "nope", "train2017")


def test_square_squashes_without_cropping():
    image = Image.new("RGB", (4, 2))
    image.putpixel((3, 0), (255, 255, 255))
    assert square(image).size == (4, 4)
    assert square(image).getpixel((3, 0))[0] > 200
