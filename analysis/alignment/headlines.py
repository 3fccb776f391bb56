"""Metrics of `probing align` that comparisons of checkpoints show first.

Imported by `reports/` too, so this module must not import torch.
"""

HEADLINE_METRICS = {
    ("word_cosine", "centred"): "cosine with the label's word, centred",
    ("word_retrieval", "centred"): "nearest word is the label's, centred",
    ("word_miou", "centred"): "mIoU of the nearest words, centred",
    ("lens_retrieval", "final norm"): "label of the largest logit is right",
    ("lens_miou", "final norm"): "mIoU of largest logits",
    ("explained_energy_4", "orthogonal"): "explained by 4 words",
    ("von_neumann_entropy", "uncentred"): "von Neumann entropy (nats)",
    ("effective_rank", "centred"): "effective rank, centred",
}
"""Metric and variant → label. `differences.csv` has all metrics."""
