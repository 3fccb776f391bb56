"""Small benchmarks in every form in which they are published."""

import base64
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from pyarrow import parquet


def png(seed):
    buffer = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def cvbench_rows(count=12):
    """Rows with CV-Bench's columns: three sources, four tasks, two questions about each image."""
    places = [
        ("2D", "Count", "ADE20K"),
        ("2D", "Relation", "COCO"),
        ("3D", "Depth", "Omni3D"),
        ("3D", "Distance", "Omni3D"),
    ]
    rows = []
    for number in range(count):
        kind, task, source = places[number % 4]
        rows.append({
            "idx": number, "type": kind, "task": task, "image": {"bytes": png(number // 2), "path": None},
            "question": "Which?", "choices": ["chair", "table"], "answer": "(B)" if number % 3 else "(A)",
            "prompt": "Which? Select from the following choices.\n(A) chair\n(B) table",
            "filename": f"{kind}/{number // 2}.png", "source": source,
        })  # fmt: skip
    return rows


def mmstar_rows():
    return [
        {"index": n, "question": "Which?\nOptions: A: x, B: y, C: z, D: w", "image": {"bytes": png(n), "path": "x.png"},
         "answer": "ABCD"[n % 4], "category": ("math", "coarse perception")[n % 2], "l2_category": "geometry",
         "meta_info": {"source": "s", "split": "val", "image_path": "x.png"}}
        for n in range(6)
    ]  # fmt: skip


def realworldqa_rows():
    closed = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    return [
        {"image": {"bytes": png(n), "path": f"{n}.webp"}, "question": closed if n % 2 else "How many?",
         "answer": "B" if n % 2 else "Two", "image_path": f"{n}.webp"}
        for n in range(4)
    ]  # fmt: skip


def okvqa_rows():
    return [
        {"question_id": str(n), "image": {"bytes": png(n), "path": None}, "question": "What?",
         "answers": ["dog"] * 7 + ["cat"] * 3, "question_type": "one", "answer_type": "other"}
        for n in range(3)
    ]  # fmt: skip


def as_parquet(folder, rows, files=1, group=2):
    """As `datasets` writes it: images as structs, in several files and row groups."""
    (folder / "data").mkdir(parents=True)
    size = -(-len(rows) // files)
    for number in range(files):
        table = pa.Table.from_pylist(rows[number * size : (number + 1) * size])
        parquet.write_table(table, folder / "data" / f"test-0000{number}-of-0000{files}.parquet", row_group_size=group)
    return folder


def as_jsonl(folder, rows):
    """As CV-Bench's own: two files, and images below img/."""
    folder.mkdir(parents=True)
    for row in rows:
        path = folder / "img" / row["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"]["bytes"])
    for kind in ("2D", "3D"):
        lines = [json.dumps({k: v for k, v in r.items() if k != "image"}) for r in rows if r["type"] == kind]
        (folder / f"test_{kind.lower()}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def as_tsv(folder, rows):
    """As VLMEvalKit's: images in base64, one that comes again by the index of its first row, choices in columns."""
    folder.mkdir(parents=True)
    found, first = [], {}
    for number, row in enumerate(rows):
        content = base64.b64encode(row["image"]["bytes"]).decode()
        plain = {k: v for k, v in row.items() if isinstance(v, str | int)} | {"index": number}
        if "choices" in row:
            plain |= {letter: text for letter, text in zip("AB", row["choices"], strict=True)}
            plain["answer"] = row["answer"].strip("()")
        found.append(plain | {"image": str(first[content]) if content in first else content})
        first.setdefault(content, number)
    pd.DataFrame(found).to_csv(folder / "bench.tsv", sep="\t", index=False)
    return folder


def as_official_okvqa(folder, rows):
    (folder / "val2014").mkdir(parents=True)
    questions, annotations = [], []
    for number, row in enumerate(rows):
        image = 40 + number
        (folder / "val2014" / f"COCO_val2014_{image:012d}.jpg").write_bytes(row["image"]["bytes"])
        questions.append({"image_id": image, "question": row["question"], "question_id": number})
        answers = [{"answer": a, "raw_answer": a, "answer_confidence": "yes", "answer_id": k + 1}
                   for k, a in enumerate(row["answers"])]  # fmt: skip
        annotations.append({"image_id": image, "question_id": number, "answers": answers, "question_type": "one"})
    for name, key, entries in (("OpenEnded_mscoco_val2014_questions", "questions", questions),
                               ("mscoco_val2014_annotations", "annotations", annotations)):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps({"info": {}, "license": {}, key: entries}))
    return folder
