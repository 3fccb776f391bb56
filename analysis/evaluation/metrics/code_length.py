"""Bits that a layer saves in describing a teacher's features, over describing them by their mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.evaluation.registry import Metric, MetricInfo, register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from analysis.evaluation.scores import ScoreFile

CONSTANTS = {False: (("mean", ""), ("constant", "")), True: (("mean", "pooled"),)}
"""Probe and position of the constants that features and mean features are compared with."""
RESOLUTION = 2.0**-10
"""Smallest standard deviation of a code, relative to that of the mean target's; about the rounding of float16."""


def bits_saved(
    errors: NDArray[np.float64], constants: NDArray[np.float64], parts: NDArray[np.int64], size: int
) -> NDArray[np.float64]:
    """Computes the bits per image that a prequential Gaussian code saves over one with the mean target.

    Each part of the images is coded with a prediction from all earlier parts (Voita & Titov, 2020, arXiv:2003.12298,
    sec. 2.2) and the variance of its own errors, which costs the same few bits for every probe. The mean target is that
    of each position, or the same for all where that is the shorter code, as after few images.

    Args:
        errors: sum of squared errors (images) of the predictions; NaN where there is none.
        constants: likewise of constants (constants, images).
        parts: part (images) of each image.
        size: numbers N · D in a feature.

    Returns:
        (images); NaN where either has no error.
    """
    import numpy as np

    saved = np.full(len(errors), np.nan)
    valid = np.isfinite(errors) & np.isfinite(constants).all(axis=0)
    for part in np.unique(parts[valid]):
        rows = valid & (parts == part)
        mean_errors = constants[constants[:, rows].sum(axis=1).argmin()]
        mean_variance = mean_errors[rows].mean() / size
        if not mean_variance:
            continue  # a constant target takes no bits
        variance = max(errors[rows].mean() / size, RESOLUTION**2 * mean_variance)
        gain = mean_errors[rows] / mean_variance - errors[rows] / variance
        saved[rows] = (size * np.log(mean_variance / variance) + gain) / (2 * np.log(2))
    return saved


@register
class CodeLength(Metric):
    """Code length of the training images' features."""

    name = "code_length"
    help = "bits per image that a layer saves over the mean target, recorded in training"
    recorded = True
    infos = (
        MetricInfo(
            "code_length",
            "strict",
            "code length saved (bits per image)",
            "Bits per training image that a probe saves over the mean target, when each part of the images is coded by "
            "what was fitted on the parts before it. It is higher for layers from which fewer images suffice to read "
            "the feature; the mean target saves 0.",
            digits=0,
        ),
        MetricInfo(
            "code_length_mean",
            "strict",
            "code length of the mean feature saved (bits per image)",
            "The same for a feature's mean over its positions, read from the mean state at one kind of tokens: those "
            "of the image, the text after it, the last one, or the special tokens. At layer 0 the text is the same for "
            "every image; what it holds later was moved there by attention.",
            digits=0,
        ),
    )

    def read(self) -> ScoreFile:
        """Computes the scores from the errors that training recorded.

        Raises:
            UserError: there are none, as of imported probes or of a single batch, or the training images have changed.
        """
        from dataclasses import replace

        import numpy as np
        from safetensors.numpy import load_file

        from analysis.evaluation.scores import ScoreFile, ScoreKey
        from probing.training.prequential import ErrorKey
        from probing.training.run import training_images
        from probing.utils.errors import UserError
        from probing.utils.files import reading

        run, table = self.context.run, {}
        images = training_images(run.recipe.data)
        if images.digest() != run.manifest["data"]["train_digest"]:
            raise UserError(
                f"the images of {images.split} have changed since training; put them back, or train a new run"
            )
        for weights in ("none", "random"):
            file = run.errors(weights)
            if weights == "none" or file.exists():
                with reading(file, "train a new run for code_length"):
                    stored = load_file(file)
                parts = stored.pop("parts")
                keys = {ErrorKey.from_text(text): values.astype(np.float64) for text, values in stored.items()}
                coded = parts >= 0
                for key, values in keys.items():
                    if key.layer:
                        constants = CONSTANTS[bool(key.position)]
                        means = [keys[ErrorKey(probe, weights, key.teacher, "", 0, at)] for probe, at in constants]
                        positions, width = self.teachers[key.teacher].shape
                        size = width if key.position else positions * width
                        bits = bits_saved(values[coded], np.stack(means)[:, coded], parts[coded], size)
                        metric = "code_length_mean" if key.position else self.name
                        score = ScoreKey(key.teacher, key.layer, key.probe, key.control, metric, "strict")
                        table[replace(score, variant=key.position, seed=key.seed)] = bits.astype(np.float32)
        if not table:
            raise UserError("code_length needs more than one batch of images; lower fit.batch_size and train again")
        names = [name for name, one in zip(images.names, coded, strict=True) if one]
        return ScoreFile(table, names, images.split, self.settings)
