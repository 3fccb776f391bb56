"""Paired differences with any checkpoint as reference."""

import pandas as pd

from reports.results import sort_measures


def references(differences: pd.DataFrame) -> list[str]:
    """Returns every checkpoint that can be the reference, the first one first."""
    return list(dict.fromkeys([*differences["reference"], *differences["checkpoint"]]))


def differences_from(differences: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Selects the differences from one reference.

    Each pair is compared once; if the reference is the other checkpoint of a pair, value and interval are negated.
    """
    direct = differences[differences["reference"] == reference]
    reverse = differences[(differences["checkpoint"] == reference) & (differences["reference"] != reference)]
    negated = reverse.assign(
        checkpoint=reverse["reference"],
        reference=reference,
        value=-reverse["value"],
        ci_low=-reverse["ci_high"],
        ci_high=-reverse["ci_low"],
        seeds=[", ".join(reversed(str(seeds).split(", "))) for seeds in reverse["seeds"]],
        higher="",
    )
    return pd.concat([negated, direct], ignore_index=True)


def compared_metrics(differences: pd.DataFrame, first: tuple[str, str]) -> list[tuple[str, str]]:
    """Returns metric and protocol of all differences of probes, `first` before the others."""
    probed = differences[differences["probe"] != ""]
    metrics = sort_measures(zip(probed["metric"], probed["protocol"], strict=True))
    return sorted(metrics, key=lambda metric: metric != first)
