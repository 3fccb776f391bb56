"""Rows of published question files: parquet with images inside, JSONL, TSV with base64, and VQA's JSON."""

import base64
import binascii
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from probing.utils.errors import BROKEN, UserError
from probing.utils.paths import is_file, path_below

KINDS = ("parquet", "tsv", "jsonl")
"""What is read where a folder has several, the first first: data sets are published in more than one form."""
REFERENCE = 64
"""A cell of a TSV's image column that is no longer than this names the row that has the image, as in VLMEvalKit."""


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        file: it comes from.
        number: its place there, from 0.
        values: by column, the image apart.
        image: reads the image file.
        path: of the image, where it is a file of its own.
    """

    file: Path
    number: int
    values: dict[str, Any]
    image: Callable[[], bytes]
    path: Path | None = None

    def name(self, *columns: str) -> str:
        """What the row is called: the first column that it has of these, else file and number."""
        found = next((self.values[c] for c in columns if str(self.values.get(c, "")).strip()), None)
        return f"{self.file.name}:{self.number}" if found is None else str(found)

    def missing_image(self) -> Path | None:
        """The image's path, where there is no such file."""
        return self.path if self.path is not None and not is_file(self.path) else None


def find_rows(where: Path, title: str) -> list[Row]:
    """Every row of a file, or of the files of one kind below a folder.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    if where.is_file():
        files = [where]
    elif where.is_dir():
        found = {kind: sorted(where.rglob(f"*.{kind}")) for kind in KINDS}
        files = next((paths for paths in found.values() if paths), [])
    else:
        raise UserError(f"no such folder: {where}; give the folder with the files of {title}")
    if not files:
        raise UserError(f"{where} has no files of {title}; put its parquet, TSV or JSONL there")
    rows: list[Row] = []
    for file in files:
        reader = {".parquet": _parquet, ".tsv": _tsv, ".jsonl": _jsonl}.get(file.suffix)
        if reader is None:
            raise UserError(f"{file} is neither parquet nor TSV nor JSONL; give a file of {title}")
        own = _whole(reader, file)
        if not own:
            raise UserError(f"{file} holds no question; get it again")
        rows += own
    return rows


def _whole(reader: Callable[[Path], Iterator[Row]], file: Path) -> list[Row]:
    try:
        return list(reader(file))
    except UserError:
        raise
    except (*BROKEN, RuntimeError) as error:  # pyarrow's NotImplementedError is one
        said = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {said}); get it again") from None


class _Shard:
    """A parquet file whose images are read one row group at a time."""

    def __init__(self, file: Path) -> None:
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{file.name} is read with pyarrow; type: pip install 'mllm-probing[bench]'") from None
        self.file = parquet.ParquetFile(file)
        self.held = -1
        self.images: list[Any] = []
        self.starts = [0]
        for group in range(self.file.num_row_groups):
            self.starts.append(self.starts[-1] + self.file.metadata.row_group(group).num_rows)

    def rows(self, path: Path) -> Iterator[Row]:
        """All rows; images stay in the file until they are read."""
        names = self.file.schema_arrow.names
        if "image" not in names:
            raise ValueError("there is no column image")
        texts = self.file.read(columns=[name for name in names if name != "image"]).to_pylist()
        for number, values in enumerate(texts):
            yield Row(path, number, values, partial(self.image, number))

    def image(self, number: int) -> bytes:
        """The image of one row, as `datasets` writes it: a struct of bytes and path, or bytes alone."""
        group = next(g for g in range(len(self.starts) - 1) if number < self.starts[g + 1])
        if group != self.held:
            self.images = self.file.read_row_group(group, columns=["image"]).column("image").to_pylist()
            self.held = group
        cell = self.images[number - self.starts[group]]
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if not isinstance(content, bytes):
            raise OSError("the image column holds no image")
        return content


def _parquet(file: Path) -> Iterator[Row]:
    return _Shard(file).rows(file)


def _tsv(file: Path) -> Iterator[Row]:
    table = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    if "image" not in table:
        raise ValueError("there is no column image")
    cells = [str(cell) for cell in table["image"]]
    owners = dict(zip(table["index"] if "index" in table else map(str, range(len(table))), cells, strict=True))
    for number, values in enumerate(table.drop(columns="image").to_dict("records")):
        cell = cells[number]
        cell = owners[cell] if len(cell) <= REFERENCE and cell in owners else cell
        yield Row(file, number, {str(k): v for k, v in values.items()}, partial(_decoded, cell))


def _decoded(cell: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise OSError(f"no base64: {error}") from None


def _jsonl(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"line {number + 1} is no object")
            name = next(
                (values[c] for c in ("filename", "image_path", "image") if isinstance(values.get(c), str)), None
            )
            if name is None:
                raise ValueError(f"line {number + 1} names no image: no filename, image_path or image")
            try:
                relative = path_below(name)
            except ValueError as error:
                raise UserError(f"{file}: the image {error}; fix the file") from None
            path = file.parent / "img" / relative
            path = path if is_file(path) else file.parent / relative if is_file(file.parent / relative) else path
            yield Row(file, number, {k: v for k, v in values.items() if k != "image"}, path.read_bytes, path)


def okvqa_rows(where: Path) -> list[Row]:
    """OK-VQA's official files: questions, annotations with ten answers each, and COCO's images; empty where none are.

    Raises:
        UserError: the annotations are missing, or a file cannot be read.
    """
    files = sorted(where.rglob("OpenEnded_mscoco_*_questions.json")) if where.is_dir() else []
    if not files:
        return []
    source = next((file for file in files if "val2014" in file.name), files[0])
    split = source.name.removeprefix("OpenEnded_mscoco_").removesuffix("_questions.json")
    annotations = source.parent / f"mscoco_{split}_annotations.json"
    if not annotations.exists():
        raise UserError(f"{source} is there, and {annotations} is not; put it there")
    answers = {entry["question_id"]: entry["answers"] for entry in _entries(annotations, "annotations")}
    rows = []
    for number, entry in enumerate(_entries(source, "questions")):
        try:
            path = _coco_image(where, split, int(entry["image_id"]))
            values = {**entry, "answers": answers[entry["question_id"]]}
        except BROKEN as error:
            raise UserError(
                f"{source}, question {number}, has no annotation or image id ({type(error).__name__}: {error}); get "
                "both files again"
            ) from None
        rows.append(Row(source, number, values, path.read_bytes, path))
    return rows


def _entries(file: Path, name: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))[name]
        if not isinstance(entries, list) or not all("question_id" in entry for entry in entries):
            raise ValueError(f"no list of {name} with ids")
    except BROKEN as error:
        raise UserError(
            f"{file} is not as OK-VQA publishes it ({type(error).__name__}: {error}); get it again"
        ) from None
    return entries


def _coco_image(where: Path, split: str, identity: int) -> Path:
    """Where COCO's image is: in its split of 2014, or under the name that it has since 2017."""
    name = f"COCO_{split}_{identity:012d}.jpg"
    places = [where / split / name, where / name]
    places += [where / other / f"{identity:012d}.jpg" for other in ("train2017", "val2017")]
    return next((place for place in places if is_file(place)), places[0])
