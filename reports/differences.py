"""Paired differences, seen from any of the checkpoints."""

import pandas as pd

from reports.results import sort_measures


def references(differences: pd.DataFrame) -> list[str]:
    """Every checkpoint that differences can be taken from, the first one first."""
    return list(dict.fromkeys([*differences["reference"], *differences["checkpoint"]]))


def against(differences: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The differences from one checkpoint, in the order of the others.

    A pair is compared once. Seen from the other side a difference has the other sign, and so has its interval: the
    ends change places.
    """
    own = differences[differences["reference"] == reference]
    other = differences[(differences["checkpoint"] == reference) & (differences["reference"] != reference)]
    turned = other.assign(
        checkpoint=other["reference"],
        reference=reference,
        value=-other["value"],
        ci_low=-other["ci_high"],
        ci_high=-other["ci_low"],
        seeds=[", ".join(reversed(str(seeds).split(", "))) for seeds in other["seeds"]],
        higher="",
    )
    return pd.concat([turned, own], ignore_index=True)


def measures_of(differences: pd.DataFrame, first: tuple[str, str]) -> list[tuple[str, str]]:
    """Metric and protocol of all differences of probes; the one that is read first stands first."""
    probed = differences[differences["probe"] != ""]
    there = sort_measures(zip(probed["metric"], probed["protocol"], strict=True))
    return sorted(there, key=lambda measure: measure != first)
