"""Labels that are probably wrong."""

import numpy as np
import pytest

from stages.scores.suspects import estimate_wrong_labels, find_suspects


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.1])
def test_swapped_labels_are_found_first_and_counted(classes: int, share: float) -> None:
    """A network that is right in 97% of the cases, and of one class less sure than of the others."""
    chance, count = np.random.default_rng(0), 4000
    truth = chance.integers(0, classes, count)
    seen = np.where(chance.random(count) < 0.97, truth, (truth + 1) % classes)
    logits = chance.normal(0, 1, (count, classes))
    logits[np.arange(count), seen] += np.where(seen == 0, 4.0, 6.0)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    swapped = chance.random(count) < share
    labels = np.where(swapped, (truth + chance.integers(1, classes, count)) % classes, truth)
    names = [f"class {number}" for number in range(classes)]
    suspects = find_suspects([str(number) for number in range(count)], labels, probabilities, names)
    found = [int(one.path) for one in suspects]
    if swapped.any():
        # Beside them are the 3% that the network takes for another class.
        assert np.isin(found, np.flatnonzero(swapped)).sum() >= 0.9 * swapped.sum()
    assert len(found) <= 1.1 * (swapped.sum() + 0.03 * count)
    assert estimate_wrong_labels(labels, probabilities) == pytest.approx(swapped.sum() + 0.03 * count, rel=0.35)
    for one in suspects:
        assert one.suggestion != one.label
        assert one.suggestion_probability > one.label_probability
    margins = [one.label_probability - one.suggestion_probability for one in suspects]
    assert margins == pytest.approx(sorted(margins), abs=2e-4)


def test_an_absent_class_and_a_perfect_network_give_no_suspects() -> None:
    probabilities = np.array([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.9, 0.05, 0.05]])
    labels = np.array([0, 1, 0])
    assert find_suspects(["a", "b", "c"], labels, probabilities, ["cat", "dog", "owl"]) == []
    assert estimate_wrong_labels(labels, probabilities) == 0
