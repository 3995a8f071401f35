"""The scores without the test images that are nearly the same as others, by which they flatter."""

from dataclasses import dataclass

import numpy as np

from stages.common.format import percent
from stages.images.near_duplicates import LOOKED_FOR, THRESHOLD, Leak
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions


@dataclass(frozen=True)
class NearDuplicates:
    """How many pairs have a cosine of `threshold` or more, and how many test images are in them.

    The accuracies are those on the test images that are in no pair, `None` if no image is left. `compared`: the share
    of all images that have enough contrast to be compared.
    """

    threshold: float
    pairs: int
    test_images: int
    head_accuracy: float | None
    finetuned_accuracy: float | None
    compared: float = 1.0


def summarize(leaks: list[Leak], predictions: Predictions, compared: float) -> NearDuplicates:
    """Count the pairs, and score the models on the test images that are in none; `compared` is only kept."""
    paired = {leak.test for leak in leaks}
    left = np.array([path not in paired for path in predictions.paths])
    head, finetuned = (
        float((predicted_labels(probabilities) == predictions.labels)[left].mean()) if left.any() else None
        for probabilities in (predictions.head, predictions.finetuned)
    )
    return NearDuplicates(THRESHOLD, len(leaks), len(paired), head, finetuned, compared)


def describe_none(found: NearDuplicates) -> str:
    """Say that there is no pair, as far as was looked."""
    flat = f"{percent(1 - found.compared)} of all images have too little contrast"
    if found.compared < 0.5:
        return f"Whether test images are nearly the same as others is not known: {flat} to be compared."
    limits = f"{LOOKED_FOR} {flat}." if found.compared < 1 else LOOKED_FOR
    return f"No test image was found to be nearly the same as a training or validation image. {limits}"


def describe_near_duplicates(found: NearDuplicates, count: int) -> str:
    """Put the result into one line; `count` is the number of all test images."""
    if not found.pairs:
        return describe_none(found)
    verb = "is" if found.test_images == 1 else "are"
    line = f"{found.test_images} of {count} test images {verb} nearly the same as a training or validation image"
    if found.head_accuracy is None or found.finetuned_accuracy is None:
        return f"{line}."
    accuracies = f"head {percent(found.head_accuracy)}, fine-tuned {percent(found.finetuned_accuracy)}"
    return f"{line}; without them: {accuracies}."
