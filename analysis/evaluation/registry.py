"""The metrics and their protocols, readable without loading anything heavy."""

PROTOCOLS = {
    "cosine": ("strict", "paper"),
    "da2k": ("strict",),
    "miou": ("blind", "strict", "paper"),
    "fid": ("strict",),
    "frechet": ("strict",),
}
"""Metrics, and the protocols of each. One that `analysis.evaluation.run` does not know is scored by
`analysis/evaluation/metrics/<name>.py`."""
ACCURACY = "accuracy"
"""What `results.csv` and `differences.csv` call the share of a benchmark's questions that is answered rightly."""
