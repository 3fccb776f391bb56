"""Writes scenes in the formats of COCO 2017, DA-2K (pairs of points) and LLaVA (conversations)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probing.recipe import DEFAULT_PROMPT
from probing.toyworld.language import caption, questions
from probing.toyworld.scenes import CLASSES, SHAPES, SIZE, SKY_DEPTH, Scenes, generate
from probing.utils.files import atomic_folder

DESCRIPTION = "Procedural toy world; not comparable with COCO."
MAX_ROWS_APART = 3
"""Maximal distance of the points of a depth pair in rows, so that the image row alone does not solve them."""
MIN_DEPTH_RATIO = 1.15
"""Minimal ratio of the depths of a pair."""


def write_world(root: Path, train: int, val: int, seed: int, test: int = 0) -> Path:
    """Writes a world; reuses an existing one.

    Args:
        root: output folder, written atomically.
        train: number of scenes in train2017.
        val: number of scenes in val2017.
        seed: seed of the scenes, which differ between splits.
        test: number of scenes in test2017, for results after model selection on val2017; has the depth pairs if not 0.
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
        image_id = start + index
        Image.fromarray(scenes.images[index]).save(folder / split / name)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE, "license": 0})
        captions.append({"id": image_id, "image_id": image_id, "caption": caption(scenes, index)})
        segments, panoptic_png = _segments(scenes, index)
        Image.fromarray(panoptic_png).save(panoptic_folder / name)
        panoptic.append({"image_id": image_id, "file_name": name, "segments_info": segments})
        for segment in segments:
            if segment["category_id"] <= len(SHAPES):
                mask = scenes.instance[index] == segment["id"]
                fields = {key: segment[key] for key in ("category_id", "area", "bbox", "iscrowd")}
                entry = {"id": len(instances) + 1, "image_id": image_id, "segmentation": _run_lengths(mask)}
                instances.append(entry | fields)
    files: dict[str, dict[str, Any]] = {
        "captions": {"annotations": captions},
        "instances": {"annotations": instances, "categories": categories[: len(SHAPES)]},
        "panoptic": {"annotations": panoptic, "categories": categories},
    }
    for kind, content in files.items():
        document = {
            "info": {"description": DESCRIPTION},
            "licenses": [{"id": 0, "name": "CC0"}],
            "images": images,
            **content,
        }
        (folder / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(document), encoding="utf-8")


def _segments(scenes: Scenes, index: int) -> tuple[list[dict[str, Any]], np.ndarray[Any, Any]]:
    """Returns panoptic segments and their PNG, id = R + 256 G + 65536 B: solid k has id k + 1, stuff 100 + class."""
    instance, semantic = scenes.instance[index], scenes.semantic[index]
    ids = np.where(instance > 0, instance, 100 + semantic).astype(np.uint8)
    segments = []
    for segment_id in np.unique(ids):
        rows, columns = np.nonzero(ids == segment_id)
        left, top = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": int(segment_id),
                "category_id": int(semantic[rows[0], columns[0]]) + 1,
                "area": len(rows),
                "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
                "iscrowd": 0,
            }
        )
    return segments, np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=-1)


def _run_lengths(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Encodes a mask as COCO's uncompressed run lengths: by column, starting with the background."""
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
    """Writes pt.json (captions), ift.json (questions) and text.json (both, without images)."""
    pt, ift, text = [], [], []
    for index, name in enumerate(names):
        description = (DEFAULT_PROMPT, caption(scenes, index))
        answered = [(question.text, question.answer) for question in questions(scenes, index, rng)]
        pt.append({"id": name, "image": f"{split}/{name}", "conversations": _turns(description)})
        ift.append({"id": name, "image": f"{split}/{name}", "conversations": _turns(*answered)})
        text.append({"id": name, "conversations": _turns(description, *answered, image=False)})
    for file, entries in (("pt", pt), ("ift", ift), ("text", text)):
        (folder / f"{file}.json").write_text(json.dumps(entries), encoding="utf-8")


def _write_questions(folder: Path, split: str, scenes: Scenes, names: list[str], rng: np.random.Generator) -> None:
    """Writes all questions, and as conversations one of each scene."""
    lines, first = list[str](), list[dict[str, Any]]()
    for index, name in enumerate(names):
        chosen = questions(scenes, index, rng)
        image = f"{split}/{name}"
        rows = [{"image": image, "kind": q.kind, "question": q.text, "answer": q.answer} for q in chosen]
        lines += map(json.dumps, rows)
        first.append({"id": name, "image": image, "conversations": _turns((chosen[0].text, chosen[0].answer))})
    (folder / f"questions_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"conversations_{split}.json").write_text(json.dumps(first), encoding="utf-8")


def depth_pairs(scenes: Scenes, index: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Samples up to two pairs of points with clearly different depth, in DA-2K's format.

    The points are a few rows apart, and the closer one is the upper or the lower one, first or second, at random:
    otherwise the image row alone would solve most pairs.
    """
    depth = scenes.depth[index]
    pairs: list[dict[str, Any]] = []
    closer_is_upper = bool(rng.random() < 0.5)
    for _ in range(400):
        if len(pairs) == 2:
            break
        row, offset = rng.integers(0, SIZE), rng.integers(1, MAX_ROWS_APART + 1)
        upper_point = np.array([row, rng.integers(0, SIZE)])
        lower_point = np.array([row + offset, rng.integers(0, SIZE)])
        if lower_point[0] >= SIZE:
            continue
        near, far = (upper_point, lower_point) if closer_is_upper else (lower_point, upper_point)
        if depth[tuple(far)] >= SKY_DEPTH or depth[tuple(far)] < MIN_DEPTH_RATIO * depth[tuple(near)]:
            continue
        first, second = (near, far) if rng.random() < 0.5 else (far, near)
        closer = "point1" if first is near else "point2"
        pairs.append({"point1": first.tolist(), "point2": second.tolist(), "closer_point": closer})
        closer_is_upper = not closer_is_upper
    return pairs


def _write_pairs(folder: Path, scenes: Scenes, names: list[str], rng: np.random.Generator) -> None:
    """Writes DA-2K's layout: annotations.json keyed by relative image path."""
    root = folder / "da2k"
    (root / "images" / "toy").mkdir(parents=True)
    annotations = {}
    for index, name in enumerate(names):
        pairs = depth_pairs(scenes, index, rng)
        if pairs:
            Image.fromarray(scenes.images[index]).save(root / "images" / "toy" / name)
            annotations[f"images/toy/{name}"] = pairs
    (root / "annotations.json").write_text(json.dumps(annotations), encoding="utf-8")
