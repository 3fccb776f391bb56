"""The available teachers: what each file of this package says about its teacher, read without importing torch."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One kind of teacher, from the dictionary `ENTRY` of the file that loads it.

    Attributes:
        default_id: Hub id of the paper's teacher (OLA-VLM, sec. 3).
        class_name: class that must be found there.
        target: which feature the probes predict.
        licences: licences of the weights, by Hub id.
    """

    default_id: str
    class_name: str
    target: str
    licences: dict[str, str]


def find_teachers(folders: Iterable[str | Path]) -> dict[str, Entry]:
    """Reads the teachers of a package's folders, by name of their file.

    The files are parsed instead of imported, because reports and `probing teachers` do without torch.
    """
    entries = {}
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENTRY":
                entries[file.stem] = Entry(**ast.literal_eval(node.value))
    return entries


CATALOGUE = find_teachers([Path(__file__).parent])

ENCODERS = {
    "dino": ("facebook/dinov2-large", "Apache-2.0"),
    "siglip": ("google/siglip2-so400m-patch14-384", "Apache-2.0"),
    "internvit": ("OpenGVLab/InternVL3-1B-hf", "of the publisher; only the encoder is read"),
    "sam": ("facebook/sam-vit-large", "Apache-2.0"),
    "vit": ("timm/vit_base_patch16_224.augreg_in21k", "Apache-2.0"),
}
"""Examples of plain encoders; any name and any encoder works."""
