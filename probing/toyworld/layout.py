"""Writes scenes in the layouts that the rest of the toolkit reads.

COCO 2017 (images, captions, instances, panoptic), DA-2K (pairs of points) and LLaVA (conversations).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probing.recipe import DEFAULT_PROMPT
from probing.toyworld.language import caption, questions
from probing.toyworld.scenes import CLASSES, SHAPES, SIZE, SKY_DEPTH, Scenes, generate
from probing.utils.files import atomic_folder

NOTE = "Procedural toy world; its numbers are its own."
MAX_ROWS_APART = 3
"""Points of a depth pair lie within so many rows of each other, or the image row alone would solve them."""
RATIO = 1.15
"""The farther point of a pair is at least so much farther."""


def write_world(root: Path, train: int, val: int, seed: int, test: int = 0) -> Path:
    """Writes a world, or keeps the one that is there.

    Args:
        root: folder to make, whole or not at all.
        train: scenes in train2017.
        val: scenes in val2017; other scenes than those of training.
        seed: of all of them.
        test: scenes in test2017, for what is reported where val2017 was used to choose; depth pairs are theirs then.
    """
    if (root / "annotations").exists():
        return root
    with atomic_folder(root) as folder:
        start = 1
        splits = [("train2017", train, 2 * seed), ("val2017", val, 2 * seed + 1), ("test2017", test, seed + 10**6)]
        for offset, (split, count, scenes_seed) in enumerate(splits):
            if not count:
                continue
            scenes = generate(count, scenes_seed)
            _write_split(folder, split, scenes, start)
            start += count
            rng = np.random.default_rng([seed, offset, 7])
            names = _names(scenes, start - count)
            if split == "train2017":
                _write_conversations(folder, split, scenes, names, rng)
                continue
            _write_questions(folder, split, scenes, names, rng)
            if split == "test2017" or not test:
                _write_pairs(folder, scenes, names, rng)
    return root


def _names(scenes: Scenes, start: int) -> list[str]:
    return [f"{start + index:012d}.png" for index in range(len(scenes))]


def _write_split(folder: Path, split: str, scenes: Scenes, start: int) -> None:
    categories = [
        {"id": code + 1, "name": name, "supercategory": "solid" if code < len(SHAPES) else "stuff",
         "isthing": int(code < len(SHAPES))}
        for code, name in enumerate(CLASSES)
    ]  # fmt: skip
    panoptic_folder = folder / "annotations" / f"panoptic_{split}"
    panoptic_folder.mkdir(parents=True)
    (folder / split).mkdir()
    images, captions, panoptic = [], [], []
    instances: list[dict[str, Any]] = []
    for index, name in enumerate(_names(scenes, start)):
        identity = start + index
        Image.fromarray(scenes.images[index]).save(folder / split / name)
        images.append({"id": identity, "file_name": name, "width": SIZE, "height": SIZE, "license": 0})
        captions.append({"id": identity, "image_id": identity, "caption": caption(scenes, index)})
        segments, coded = _segments(scenes, index)
        Image.fromarray(coded).save(panoptic_folder / name)
        panoptic.append({"image_id": identity, "file_name": name, "segments_info": segments})
        for segment in segments:
            if segment["category_id"] <= len(SHAPES):
                mask = scenes.instance[index] == segment["id"]
                number = len(instances) + 1
                box = {key: segment[key] for key in ("category_id", "area", "bbox", "iscrowd")}
                rle = _run_lengths(mask)
                instances.append({"id": number, "image_id": identity, "segmentation": rle, **box})
    things = categories[: len(SHAPES)]
    files: dict[str, dict[str, Any]] = {
        "captions": {"annotations": captions},
        "instances": {"annotations": instances, "categories": things},
        "panoptic": {"annotations": panoptic, "categories": categories},
    }
    for kind, content in files.items():
        whole = {"info": {"description": NOTE}, "licenses": [{"id": 0, "name": "CC0"}], "images": images, **content}
        (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(whole), encoding="utf-8")


def _segments(scenes: Scenes, index: int) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any]]:
    """Panoptic segments and their PNG, id = R + 256 G + 65536 B: solid k has id k + 1, stuff 100 + class."""
    instance, semantic = scenes.instance[index], scenes.semantic[index]
    ids = np.where(instance > 0, instance, 100 + semantic).astype(np.uint8)
    segments = []
    for identity in np.unique(ids):
        rows, columns = np.nonzero(ids == identity)
        left, top = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": int(identity),
                "category_id": int(semantic[rows[0], columns[0]]) + 1,
                "area": len(rows),
                "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
                "iscrowd": 0,
            }
        )
    return segments, np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=-1)


def _run_lengths(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, starting with the background."""
    flat = mask.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _turns(*pairs: tuple[str, str], image: bool = True) -> list[dict[str, str]]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        tag = "<image>\n" if image and number == 0 else ""
        turns += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return turns


def _write_conversations(folder: Path, split: str, scenes: Scenes, names: list[str], rng: np.random.Generator) -> None:
    """pt.json (captions), ift.json (questions) and text.json (both, without the image)."""
    pt, ift, text = [], [], []
    for index, name in enumerate(names):
        described = (DEFAULT_PROMPT, caption(scenes, index))
        asked = [(question.text, question.answer) for question in questions(scenes, index, rng)]
        pt.append({"id": name, "image": f"{split}/{name}", "conversations": _turns(described)})
        ift.append({"id": name, "image": f"{split}/{name}", "conversations": _turns(*asked)})
        text.append({"id": name, "conversations": _turns(described, *asked, image=False)})
    for file, entries in (("pt", pt), ("ift", ift), ("text", text)):
        (folder / f"{file}.json").write_text(json.dumps(entries), encoding="utf-8")


def _write_questions(folder: Path, split: str, scenes: Scenes, names: list[str], rng: np.random.Generator) -> None:
    lines = [
        json.dumps({"image": f"{split}/{name}", "kind": q.kind, "question": q.text, "answer": q.answer})
        for index, name in enumerate(names)
        for q in questions(scenes, index, rng)
    ]
    (folder / f"questions_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def depth_pairs(scenes: Scenes, index: int, rng: np.random.Generator, wanted: int = 2) -> list[dict[str, Any]]:
    """Pairs of points with clearly different depth, in DA-2K's form.

    The points lie a few rows apart, and a coin decides whether the closer one is the upper or the lower one, and
    whether it comes first: lower in the image is usually closer, and alone would solve most pairs drawn at random.
    """
    depth = scenes.depth[index]
    pairs: list[dict[str, Any]] = []
    upper = bool(rng.random() < 0.5)
    for _ in range(400):
        if len(pairs) == wanted:
            break
        row, apart = rng.integers(0, SIZE), rng.integers(1, MAX_ROWS_APART + 1)
        one = np.array([row, rng.integers(0, SIZE)])
        two = np.array([row + apart, rng.integers(0, SIZE)])
        if two[0] >= SIZE:
            continue
        near, far = (one, two) if upper else (two, one)
        if depth[tuple(far)] >= SKY_DEPTH or depth[tuple(far)] < RATIO * depth[tuple(near)]:
            continue
        first, second = (near, far) if rng.random() < 0.5 else (far, near)
        closer = "point1" if first is near else "point2"
        pairs.append({"point1": first.tolist(), "point2": second.tolist(), "closer_point": closer})
        upper = not upper
    return pairs


def _write_pairs(folder: Path, scenes: Scenes, names: list[str], rng: np.random.Generator) -> None:
    """DA-2K's layout: annotations.json keyed by image path below the same root."""
    root = folder / "da2k"
    (root / "images" / "toy").mkdir(parents=True)
    found = {}
    for index, name in enumerate(names):
        pairs = depth_pairs(scenes, index, rng)
        if pairs:
            Image.fromarray(scenes.images[index]).save(root / "images" / "toy" / name)
            found[f"images/toy/{name}"] = pairs
    (root / "annotations.json").write_text(json.dumps(found), encoding="utf-8")
