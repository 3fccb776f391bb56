import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from probing.data.coco import list_images
from probing.data.conversations import read_conversations
from probing.toyworld.language import KINDS, make_tokenizer, questions
from probing.toyworld.layout import depth_pairs, write_world
from probing.toyworld.scenes import CLASSES, COLOURS, SHAPES, SKY_DEPTH, generate


@pytest.fixture(scope="module")
def scenes():
    return generate(200, 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("toy") / "world", 12, 6, seed=1)


def test_a_seed_gives_the_same_scenes_and_prefixes_agree(scenes):
    again = generate(50, 3)
    assert all(
        np.array_equal(getattr(again, n), getattr(scenes, n)[:50], equal_nan=True)
        for n in ("images", "depth", "position")
    )
    assert not np.array_equal(generate(50, 4).images, again.images)


def test_depth_labels_and_descriptions_agree(scenes):
    for index in range(len(scenes)):
        instance, semantic = scenes.instance[index], scenes.semantic[index]
        assert set(np.unique(instance)) == set(range(scenes.count[index] + 1))
        for slot in range(scenes.count[index]):
            mask = instance == slot + 1
            assert set(semantic[mask]) == {scenes.shape[index, slot]}
            distance = scenes.position[index, slot, 1]
            assert abs(scenes.depth[index][mask].min() - distance) < 1.5  # its front is near its centre
        assert (scenes.depth[index][semantic == CLASSES.index("sky")] == SKY_DEPTH).all()


def test_a_ray_through_a_sphere_meets_it_where_geometry_says():
    """The nearest pixel of an unoccluded sphere is about one radius in front of its centre."""
    scenes = generate(400, 5)
    gaps = []
    for index in np.flatnonzero(scenes.count == 1):
        if scenes.shape[index, 0] == SHAPES.index("sphere"):
            gaps.append(scenes.position[index, 0, 1] - scenes.depth[index][scenes.instance[index] == 1].min())
    assert len(gaps) > 10 and np.min(gaps) > 0.3 and np.max(gaps) < 1.0


def test_the_image_row_does_not_solve_the_depth_pairs(scenes):
    rng = np.random.default_rng(0)
    row_right, first_right, total = 0, 0, 0
    for index in range(len(scenes)):
        for pair in depth_pairs(scenes, index, rng):
            one, two = (scenes.depth[index][tuple(pair[k])] for k in ("point1", "point2"))
            assert (one < two) == (pair["closer_point"] == "point1")
            assert 1 <= abs(pair["point1"][0] - pair["point2"][0]) <= 3
            lower = "point1" if pair["point1"][0] > pair["point2"][0] else "point2"
            row_right += lower == pair["closer_point"]
            first_right += pair["closer_point"] == "point1"
            total += 1
    assert total > 300 and 0.42 < row_right / total < 0.58 and 0.42 < first_right / total < 0.58


def test_answers_follow_from_the_scene(scenes):
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(len(scenes)):
        for question in questions(scenes, index, rng):
            seen.add(question.kind)
            if question.kind == "nearer":
                names = [w for w in question.text.split() if w in COLOURS]
                slots = [list(scenes.colour[index]).index(COLOURS.index(name)) for name in names]
                nearest = min(slots, key=lambda slot: scenes.position[index, slot, 1])
                assert question.answer == COLOURS[scenes.colour[index, nearest]]
    assert seen == set(KINDS)


def test_the_tokenizer_knows_every_word(world):
    tokenizer = make_tokenizer()
    text = "".join(path.read_text() for path in world.glob("*.json"))
    for conversation in json.loads((world / "ift.json").read_text()) + json.loads((world / "text.json").read_text()):
        for turn in conversation["conversations"]:
            ids = tokenizer(turn["value"].replace("two lines.", "two lines"))["input_ids"]
            assert tokenizer.unk_token_id not in ids, turn["value"]
    assert text


def test_the_folder_is_valid_coco(world):
    for split, count in (("train2017", 12), ("val2017", 6)):
        images = list_images(world, split)
        assert len(images) == count and not images.skipped and not images.unlisted
    coco = COCO(str(world / "annotations" / "instances_train2017.json"))
    panoptic = json.loads((world / "annotations" / "panoptic_train2017.json").read_text())
    for entry in panoptic["annotations"]:
        coded = np.asarray(Image.open(world / "annotations" / "panoptic_train2017" / entry["file_name"])).astype(int)
        ids = coded[..., 0] + 256 * coded[..., 1] + 65536 * coded[..., 2]
        assert {s["id"] for s in entry["segments_info"]} == set(np.unique(ids))
        assert all(s["area"] == (ids == s["id"]).sum() for s in entry["segments_info"])
        for annotation in coco.loadAnns(coco.getAnnIds(entry["image_id"])):
            mask = coco.annToMask(annotation).astype(bool)
            (identity,) = set(ids[mask])
            assert mask.sum() == annotation["area"] == (ids == identity).sum()


def test_conversations_and_pairs_are_readable(world):
    for name in ("pt", "ift", "text"):
        assert len(read_conversations(world / f"{name}.json")) == 12
    pairs = json.loads((world / "da2k" / "annotations.json").read_text())
    assert pairs and all((world / "da2k" / path).exists() for path in pairs)
