"""Questions about toy scenes in the format of CV-Bench: its columns and its four tasks.

Prompts do not list the choices, and answers are the text of a choice, since the toy vocabulary has no letters.
`source` marks that the images are not from CV-Bench.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from probing.toyworld.language import NUMBERS
from probing.toyworld.scenes import COLOURS, SIZE, Scenes
from probing.utils.files import atomic_folder

SOURCE = "toy world"
LETTERS = "ABCD"


def write_cvbench(folder: Path, scenes: Scenes, seed: int) -> Path:
    """Writes `test_2d.jsonl`, `test_3d.jsonl` and `img/` as CV-Bench does; reuses an existing folder.

    Args:
        folder: output folder.
        scenes: scenes of the questions, at most one question per task and scene.
        seed: seed of the choice of solids and of the order of the choices.
    """
    if folder.exists():
        return folder
    rng = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, Any]]] = {"2D": [], "3D": []}
    with atomic_folder(folder) as part:
        (part / "img").mkdir()
        for index in range(len(scenes)):
            name = f"{index:06d}.png"
            Image.fromarray(scenes.images[index]).save(part / "img" / name)
            for kind, task, text, choices, answer in tasks(scenes, index, rng):
                letters = [f"({letter})" for letter in LETTERS[: len(choices)]]
                row = {
                    "idx": len(rows["2D"]) + len(rows["3D"]), "type": kind, "task": task, "question": text,
                    "choices": choices, "answer": letters[choices.index(answer)], "prompt": text, "filename": name,
                    "source": SOURCE, "source_dataset": SOURCE, "source_filename": name,
                }  # fmt: skip
                rows[kind].append(row)
        for kind, entries in rows.items():
            lines = "".join(json.dumps(entry) + "\n" for entry in entries)
            (part / f"test_{kind.lower()}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def tasks(scenes: Scenes, index: int, rng: np.random.Generator) -> list[tuple[str, str, str, list[str], str]]:
    """Returns type, task, question, shuffled choices and answer of all tasks that apply to a scene."""
    count = int(scenes.count[index])
    slots = rng.permutation(count)
    names = [COLOURS[scenes.colour[index, slot]] for slot in slots]
    result = [("2D", "Count", "how many solids are there ?", list(NUMBERS), NUMBERS[count - 1])]
    if count > 1:
        column, distance = (scenes.position[index, slots, axis] for axis in (0, 1))
        text = f"is the {names[0]} solid left or right of the {names[1]} one ?"
        result.append(("2D", "Relation", text, ["left", "right"], "left" if column[0] < column[1] else "right"))
        text = f"which is nearer , the {names[0]} or the {names[1]} solid ?"
        result.append(("3D", "Depth", text, names[:2], names[int(distance[1] < distance[0])]))
    if count > 2:
        points = _ground_positions(scenes.position[index, slots])
        distances = np.linalg.norm(points[:2] - points[2], axis=1)
        text = f"which is nearer the {names[2]} one , the {names[0]} or the {names[1]} solid ?"
        result.append(("3D", "Distance", text, names[:2], names[int(distances[1] < distances[0])]))
    return [(*entry[:3], [entry[3][i] for i in rng.permutation(len(entry[3]))], entry[4]) for entry in result]


def _ground_positions(position: Any) -> Any:
    """Converts image column and distance to horizontal offset and distance, in units of the scene."""
    slope = np.tan(np.radians(30.0))  # of half the field of view
    return np.stack([(2 * position[:, 0] / SIZE - 1) * position[:, 1] * slope, position[:, 1]], axis=1)
