"""One file per metric; see `analysis.evaluation.registry`."""
