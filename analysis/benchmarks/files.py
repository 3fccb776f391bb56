"""Rows of published question files: Parquet with images inside, TSV with base64, JSONL next to images."""

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from probing.utils.errors import BROKEN, UserError, first_line
from probing.utils.paths import is_file, path_below

REFERENCE = 64
"""A cell of a TSV's image column of at most this length is the index of the row with the image, as in VLMEvalKit."""


@dataclass(frozen=True)
class QuestionRow:
    """One row of a file.

    Attributes:
        file: it comes from.
        number: its position there, from 0.
        values: by column, without the image.
        image: reads the image file.
        path: of the image, where it is a separate file.
    """

    file: Path
    number: int
    values: dict[str, Any]
    image: Callable[[], bytes]
    path: Path | None = None

    def name(self, *columns: str) -> str:
        """The value of the first of these columns that the row has, else file and number."""
        values = (self.values[column] for column in columns if str(self.values.get(column, "")).strip())
        return str(next(values, f"{self.file.name}:{self.number}"))


def file_row(file: Path, number: int, values: dict[str, Any], image: Path) -> QuestionRow:
    """A row whose image is a separate file."""
    return QuestionRow(file, number, values, image.read_bytes, image)


def find_rows(source: Path, title: str) -> list[QuestionRow]:
    """Reads a file, or the files of one kind below a folder.

    Raises:
        UserError: there is none, or one is unreadable.
    """
    if not source.exists():
        raise UserError(f"no such folder: {source}; give the folder with the files of {title}")
    if source.is_file() and source.suffix not in READERS:
        raise UserError(f"{source} is neither Parquet nor TSV nor JSONL; give a file of {title}")
    by_kind = [[source]] if source.is_file() else [sorted(source.rglob(f"*{kind}")) for kind in READERS]
    files = next(filter(None, by_kind), [])
    if not files:
        raise UserError(f"{source} has no files of {title}; put its Parquet, TSV or JSONL there")
    rows: list[QuestionRow] = []
    for file in files:
        try:
            rows += (found := READERS[file.suffix](file))
        except ImportError:
            raise UserError(f"{file.name} is read with pyarrow; type: pip install 'mllm-probing[bench]'") from None
        except (*BROKEN, RuntimeError) as error:  # pyarrow's NotImplementedError is one
            reason = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise UserError(f"{file} cannot be read ({reason}); get it again") from None
        if not found:
            raise UserError(f"{file} holds no question; get it again")
    return rows


def _parquet(file: Path) -> list[QuestionRow]:
    table = pd.read_parquet(file).astype(object)
    images = table.pop("image")
    records = table.where(table.notna(), None).to_dict("records")
    return [
        QuestionRow(file, n, {str(k): v for k, v in values.items()}, partial(_embedded, cell))
        for n, (values, cell) in enumerate(zip(records, images, strict=True))
    ]


def _embedded(cell: Any) -> bytes:
    """The image as `datasets` writes it: a struct of bytes and path, or bytes alone."""
    content = cell["bytes"] if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise OSError("the image column holds no image")
    return content


def _tsv(file: Path) -> list[QuestionRow]:
    table = pd.read_csv(file, sep="\t", dtype=str, keep_default_na=False)
    cells = list(map(str, table.pop("image")))
    owners = dict(zip(table["index"] if "index" in table else map(str, range(len(table))), cells, strict=True))
    cells = [owners.get(cell, cell) if len(cell) <= REFERENCE else cell for cell in cells]
    return [
        QuestionRow(file, n, {str(k): v for k, v in values.items()}, partial(_decoded, cell))
        for n, (values, cell) in enumerate(zip(table.to_dict("records"), cells, strict=True))
    ]


def _decoded(cell: str) -> bytes:
    try:
        return base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise OSError(f"no base64: {error}") from None


def _jsonl(file: Path) -> list[QuestionRow]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            values = json.loads(line)
            names = (values[c] for c in ("filename", "image_path", "image") if isinstance(values.get(c), str))
            name = path_below(next(names, ""))
            path = next((p for p in (file.parent / "img" / name, file.parent / name) if is_file(p)), None)
            values.pop("image", None)
            rows.append(file_row(file, number, values, path or file.parent / "img" / name))
    return rows


READERS: dict[str, Callable[[Path], list[QuestionRow]]] = {".parquet": _parquet, ".tsv": _tsv, ".jsonl": _jsonl}
"""By suffix. Of a folder with several kinds the first is read: data sets are published in more than one form."""
