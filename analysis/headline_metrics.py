"""Which measures of `probing align` are told where checkpoints are compared.

Apart from `compare`, because the page has the same ones, and does without torch.
"""

TOLD = {
    ("word_cosine", "centred"): "cosine with the label's word, centred",
    ("word_retrieval", "centred"): "nearest word is the label's, centred",
    ("word_miou", "centred"): "mIoU of the nearest words, centred",
    ("lens_retrieval", "final norm"): "label of the largest logit is right",
    ("lens_miou", "final norm"): "mIoU of largest logits",
    ("explained_energy", "orthogonal, 4"): "explained by 4 words",
    ("von_neumann_entropy", ""): "von Neumann entropy (nats)",
    ("effective_rank", ""): "effective rank, centred",
}
"""Metric and beginning of the protocol, and the words for it; `differences.csv` has the rest."""
