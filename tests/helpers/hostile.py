"""What may be wrong with a file: documents of which something is missing or else, and pickles that hold code."""

import copy
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

DEEP = "[" * 100_000
fuzz = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 2**31, 2**63, 0, -1]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["..", "/etc/passwd", "../../x.jpg", "a\0b", "\ud800", "x" * 5000, "<image>", "", ".", "/"]),
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(document):
    """Every place in a document: the container and the key in it."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


@st.composite
def damaged(draw, document):
    """A document of which something is missing, or is something else."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        there = list(places(document))
        if not there:
            break
        container, key = draw(st.sampled_from(there))
        if draw(st.integers(0, 3)):
            container[key] = draw(junk)
        else:
            del container[key]
    return document


def one_line(error):
    assert str(error).strip() and "Traceback" not in str(error)


class Payload:
    """Makes a file when it is unpickled by anything that runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)
