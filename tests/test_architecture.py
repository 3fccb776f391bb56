"""Which package may import which: `probing`, then `analysis`, then `reports`; the command line may import all."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {"probing": 0, "analysis": 1, "reports": 2}
FREE = ("probing.cli", "probing.__main__", "probing.api", "probing.toyworld.demo")


def imports() -> list[tuple[str, str]]:
    """Pairs of importing and imported modules of ours, imports inside functions too, those for types alone not."""
    files = [file for package in LEVELS for file in (ROOT / package).rglob("*.py")]
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    pairs = []
    for module, file in modules.items():
        nodes = [ast.parse(file.read_text(encoding="utf-8"))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                pairs += [(module, name if name in modules else node.module or "") for name in names]
            elif isinstance(node, ast.Import):
                pairs += [(module, alias.name) for alias in node.names]
    return [(one, other) for one, other in pairs if other in modules]


def room(module: str) -> str:
    """The package below the top that holds a module, or the module itself."""
    return "the command line" if module.startswith(FREE) else ".".join(module.split(".")[:2])


def test_imports_run_from_probing_to_reports():
    wrong = [
        f"{one} imports {other}"
        for one, other in imports()
        if LEVELS[one.split(".")[0]] < LEVELS[other.split(".")[0]] and not one.startswith(FREE)
    ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_toy_world_is_imported_by_its_verb_alone():
    wrong = [one for one, other in imports() if other.startswith("probing.toyworld")]
    assert all(one.startswith(("probing.toyworld", "probing.cli")) for one in wrong), wrong


def test_packages_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for one, other in imports():
        if room(one) != room(other) and other not in LEVELS:
            graph.setdefault(room(one), set()).add(room(other))
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]
        steps = [f"{a} imports {b}" for a, b in imports() if (room(b), room(a)) in pairwise(circle)]
        pytest.fail(f"{' <- '.join(circle)}\n" + "\n".join(sorted(set(steps))))


def test_reports_do_not_load_torch():
    modules = [f"reports.{file.stem}" for file in sorted((ROOT / "reports").glob("*.py")) if file.stem != "__init__"]
    code = f"import sys\nfor name in {modules}:\n    __import__(name)\n    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
