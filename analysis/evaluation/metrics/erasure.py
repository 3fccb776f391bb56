"""Descriptions of the numbers of `probing erase`, which computes them itself."""

from analysis.evaluation.registry import OTHER_INFOS, MetricInfo

OTHER_INFOS += [
    MetricInfo(
        "erased_loss",
        "strict",
        "loss of answers when erased (nats per token)",
        "Rise of the mean loss of an answer's tokens (of a caption by default) when what can be read linearly of the "
        "teacher's feature (its leading principal components) is erased from one layer's states at one kind of tokens, "
        "by LEACE. Controls: as many random directions with the same mean squared change (each batch of images gets "
        "one of eight draws), and the features of other images.",
    ),
    MetricInfo(
        "erased_excess",
        "strict",
        "loss of answers when erased, beyond a random subspace (nats per token)",
        "The same loss minus that of a random subspace, image by image. With an interval above 0, what was erased is "
        "used more than a random part of the states.",
    ),
    MetricInfo(
        "erased_accuracy",
        "strict",
        "accuracy of answers when erased (change)",
        "Change of the share of an answer's tokens that the model predicts from all tokens before.",
        higher_is_better=False,
    ),
    MetricInfo(
        "erased_rank",
        "strict",
        "directions erased",
        "Number of directions whose canonical correlation with the feature is above the largest with the features of "
        "other images; at most the number of principal components, and twice that for image and text together. With 0 "
        "nothing is erased.",
        digits=0,
    ),
    MetricInfo(
        "answer_loss",
        "strict",
        "loss of answers (nats per token)",
        "Mean loss of an answer's tokens with nothing erased.",
        higher_is_better=False,
    ),
]
