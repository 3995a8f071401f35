"""The figures and the numbers in them, on made-up predictions."""

import csv
import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import SURE, looks_at_colors, measured
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from stages.common.format import probability
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing
from stages.report.figures import (
    describe_losses,
    draw_confusion,
    draw_coverage,
    draw_curves,
    draw_losses,
    draw_reliability,
    draw_training,
)
from stages.report.galleries import Album, draw_alike, draw_changed, draw_confused, draw_wrong
from stages.report.style import save_figure, short_names, shorten_path
from stages.scores.calibration import measure_calibrations
from stages.scores.curves import GRID, precision_recall_curves, roc_curves, write_curves
from stages.scores.metrics import Scores
from stages.scores.predictions import Predictions, find_changed, find_confused, find_wrong
from stages.training.history import Epoch

SCORES = dict.fromkeys(("head", "finetuned"), Scores(0.9, 0.8, 0.95, 0.9, 0.3, 0.97, None, 0.9, 0.1, 0.05))
LONG = "An_American_$Staffordshire$_Terrier_of_{any}_colour_which_is_friendly"


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def made_up(
    names: list[str], count: int, skill: float, absent: frozenset[int] = frozenset(), seed: int = 0
) -> Predictions:
    noise = np.random.default_rng(seed)
    present = [label for label in range(len(names)) if label not in absent]
    labels = noise.permutation(np.resize(present, count))

    def guess(strength: float) -> np.ndarray:
        logits = noise.normal(size=(count, len(names)))
        logits[np.arange(count), labels] += strength
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    return Predictions([f"{n}.png" for n in range(count)], labels, names, guess(skill), guess(1.2 * skill))


def draw_numbers(predictions: Predictions, temperatures: tuple[float, float]) -> dict[str, Figure | str]:
    validation = (predictions.labels, predictions.finetuned)
    calibrations = measure_calibrations(replace(predictions, identical=False), temperatures, ("a", "b"), validation)
    return {
        "confusion": draw_confusion(predictions),
        "curves": draw_curves(predictions, SCORES),
        "reliability": draw_reliability(predictions, calibrations),
        "coverage": draw_coverage(predictions, calibrations),
        "losses": draw_losses(predictions),
    }


def history(start: float, *val_losses: float) -> list[Epoch]:
    epochs = [Epoch(number, 0.1 / number, 0.9, loss, 0.8) for number, loss in enumerate(val_losses, start=1)]
    return [Epoch(0, None, None, start, 0.8), *epochs]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def ink(path: Path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(2**22) or [])


@pytest.mark.parametrize(
    "predictions",
    [
        made_up([f"{LONG}_{number}" for number in range(100)], 300, skill=3, absent=frozenset({7})),
        made_up(["$a_b$", "größe", "猫"], 1, skill=60),
    ],
    ids=["100 classes with long names", "one image, perfect, odd names"],
)
def test_every_figure_of_numbers_is_drawn_without_a_warning(predictions: Predictions, tmp_path: Path) -> None:
    figures = draw_numbers(predictions, (1.2, 0.9))
    figures["training"] = draw_training((history(0.7, 0.3, 0.2), history(0.1)), ((2, 1.0), (0, 0.0)))
    if len(predictions.labels) == 1:
        assert "need test images of two classes" in figures.pop("curves")
    for name, figure in figures.items():
        save_figure(tmp_path / f"{name}.png", figure)
        assert ink(tmp_path / f"{name}.png") > 20, name
        width, height = figure.get_size_inches()
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            # Names and captions stay within what the figure was meant to take.
            assert image.width <= 150 * (width + 0.5)
            assert image.height <= 150 * (height + 0.5)


def test_identical_checkpoints_are_drawn_once(tmp_path: Path) -> None:
    both = made_up(["cat", "dog"], 60, skill=1.5)
    one = replace(both, head=both.finetuned, identical=True)
    figures = draw_numbers(one, (1.2, 1.2))
    for figure in figures.values():
        assert "head phase" not in words(figure)
        assert "fine-tuned" in words(figure).lower()
    assert len(figures["confusion"].axes) == 2  # with the colour bar
    assert len(describe_losses(one).splitlines()) == 1
    assert "neither fixed nor broke an image" in draw_changed(one, album(tmp_path, one))


def test_the_kept_epochs_are_ringed_even_epoch_0() -> None:
    figure = draw_training((history(0.7, 0.5, 0.3), history(0.3, 0.9)), ((2, 1.0), (0, 0.0)))
    losses, accuracies = figure.axes
    for axes, heights in ((losses, [0.3, 0.3]), (accuracies, [0.8, 0.8])):
        rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == list(zip([2, 3], heights, strict=True))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert lines["head phase: validation"] == ([0, 1, 2], [0.7, 0.5, 0.3])
    assert np.isfinite(lines["head phase: training"][1]).tolist() == [False, True, True]
    assert lines["fine-tuned: validation"] == ([3, 4], [0.3, 0.9])
    assert [text.get_text() for text in accuracies.get_xticklabels()] == ["0", "1", "2", "0", "1"]
    assert losses.get_title("right").startswith("fine-tuning: epoch 0 kept")


def test_a_small_confusion_matrix_has_its_counts_and_a_large_one_its_mistakes() -> None:
    predictions = made_up(["cat", "dog"], 40, skill=1)
    count = int(((predictions.labels == 0) & (predictions.head.argmax(axis=1) == 1)).sum())
    assert draw_confusion(predictions).axes[0].texts[1].get_text() == str(count)
    for skill, told in ((2, "taken for"), (60, "no mistakes on 200 images")):
        axes = draw_confusion(made_up([f"class {number}" for number in range(20)], 200, skill)).axes[0]
        assert (len(axes.texts), told in axes.get_xlabel()) == (0, True)


@pytest.mark.parametrize(("classes", "absent"), [(2, frozenset()), (5, frozenset({3}))], ids=["two", "many"])
def test_areas_under_the_curves_equal_scikit_learns(classes: int, absent: frozenset[int]) -> None:
    predictions = made_up([str(number) for number in range(classes)], 60, skill=1, absent=absent)
    # Ties, too.
    rounded = Predictions(predictions.paths, predictions.labels, predictions.classes,
                          predictions.head.round(1), predictions.finetuned.round(1))  # fmt: skip
    counted = [1] if classes == 2 else [label for label in range(classes) if label not in absent]
    roc, precision_recall = roc_curves(rounded), precision_recall_curves(rounded)
    for model, values in rounded.models.items():
        truths = [(rounded.labels == label, values[:, label]) for label in counted]
        area = np.mean([roc_auc_score(*truth) for truth in truths])
        assert np.trapezoid(roc[model], GRID) == pytest.approx(area, abs=3e-3)
        precision = np.mean([average_precision_score(*truth) for truth in truths])
        assert np.trapezoid(precision_recall[model], GRID) == pytest.approx(precision, abs=3e-3)


def test_tables_for_dvc_are_short_and_keep_both_ends(tmp_path: Path) -> None:
    predictions = made_up(["cat", "dog, large"], 3000, skill=0.5)
    write_curves(tmp_path, predictions)
    for name, column in (("roc", "false_positive_rate"), ("precision_recall", "recall")):
        header, *rows = csv.reader(io.StringIO((tmp_path / f"{name}.csv").read_text()))
        assert header == [column, "head", "finetuned"]
        assert len(rows) == 200
        assert (float(rows[0][0]), float(rows[-1][0])) == (0, 1)
    header, *rows = csv.reader(io.StringIO((tmp_path / "confusion.csv").read_text()))
    assert header == ["actual", "head", "finetuned"]
    assert len(rows) == 3000
    assert sum(row[0] == row[1] for row in rows) == (predictions.head.argmax(axis=1) == predictions.labels).sum()
    # Where no curve is defined they are empty.
    write_curves(tmp_path, made_up(["cat", "dog"], 5, skill=1, absent=frozenset({1})))
    assert (tmp_path / "roc.csv").read_text() == "false_positive_rate,head,finetuned\n"


def test_a_loss_that_rose_beside_an_equal_accuracy_is_explained_by_its_numbers() -> None:
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    head = np.array([right] * 99 + [wrong])
    worse = np.array([[0.95, 0.05]] * 99 + [[1e-6, 1 - 1e-6]])
    labels = np.zeros(100, dtype=np.int64)
    risen = Predictions([""] * 100, labels, ["cat", "dog"], head, worse)
    text = describe_losses(risen)
    share = -np.log(1e-6) / (-np.log(1e-6) - 99 * np.log(0.95))
    assert f"Fine-tuned: the worst image carries {share:.1%} of the total loss of 100 images" in text
    assert "the 1 mistake" in text
    assert f"mistakes add {(np.log(0.4) - np.log(1e-6)) / 100:+.2g}" in text
    assert f"all other images {99 * (np.log(0.9) - np.log(0.95)) / 100:+.2g}" in text
    assert "rose although no more images are wrong" in text
    assert "rose" not in describe_losses(Predictions([""] * 100, labels, ["cat", "dog"], worse, head))


def test_short_names_differ_and_fit_and_only_certainty_reads_100_percent() -> None:
    assert " ".join(map(probability, (1, 0.99999, 0.9994, 1e-9, 0))) == "100.0% >99.9% 99.9% <0.1% 0.0%"
    names = [f"{LONG}_{number}_{LONG}" for number in range(30)] + ["cat", "猫"]
    short = short_names(names, 20)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= 20
    assert short[-2] == "cat"
    assert short[-1].startswith("31 ")


def album(folder: Path, predictions: Predictions) -> Album:
    entries = []
    for number, (path, label) in enumerate(zip(predictions.paths, predictions.labels, strict=True)):
        Image.new("RGB", (48, 32), (number * 9 % 256, 90, 200)).save(folder / path)
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        entries.append(Entry(path, int(label), predictions.classes[label], digest))
    return Album(folder, entries, Preprocessing(crop=32))


def test_galleries_show_the_most_confident_mistakes_and_what_changed(tmp_path: Path) -> None:
    predictions = made_up([f"{LONG}_{number}" for number in range(3)], 60, skill=0.4)
    wrong, (fixed, broken) = find_wrong(predictions), find_changed(predictions)
    assert min(len(wrong) - 9, len(fixed), len(broken)) > 0
    assert max(predictions.finetuned[wrong[0]]) == max(max(predictions.finetuned[position]) for position in wrong)
    images = album(tmp_path, predictions)
    mistakes, changes = draw_wrong(predictions, images, looks_at_colors(3)), draw_changed(predictions, images)
    assert len(mistakes.axes) == 9
    assert f"{len(wrong)} mistakes on 60 images; the 9 most confident" in words(mistakes)
    assert f"{max(predictions.finetuned[wrong[0]]):.1%}" in words(mistakes)
    assert predictions.paths[wrong[0]] in words(mistakes)
    assert len(changes.axes) == min(len(fixed), 10) + min(len(broken), 10)
    assert f"fixed {len(fixed)} image" in words(changes)
    assert f"broke {len(broken)} image" in words(changes)
    confused = draw_confused(predictions, images)
    pairs = find_confused(predictions, "finetuned")
    counts = [len(found) for *_, found in pairs]
    assert counts == sorted(counts, reverse=True)
    assert all(np.diff(predictions.finetuned[found].max(axis=1)).max(initial=0) <= 0 for *_, found in pairs)
    assert len(confused.axes) == sum(min(len(found), 5) for *_, found in pairs[:4])
    assert {predictions.paths[position] for position in pairs[0][2][:5]} < set(words(confused).splitlines())
    alike = draw_alike([(images.entries[number], images.entries[number + 1]) for number in range(11)], images)
    assert "11 pairs of images are nearly the same; the 8 least alike" in words(alike)
    two = [replace(images.entries[0], class_name="cat"), replace(images.entries[1], class_name="cat")]
    assert words(draw_alike([tuple(two)], images)).count("pair 1: cat") == 2
    assert words(alike).index(predictions.paths[10]) < words(alike).index(predictions.paths[9])
    for name, figure in (("wrong", mistakes), ("confused", confused), ("changed", changes), ("alike", alike)):
        save_figure(tmp_path / name, figure)
        assert ink(tmp_path / name) > 20
        # No caption runs out of the page or into its neighbour.
        edges = [*sorted({axes.get_window_extent().x0 for axes in figure.axes}), figure.bbox.x1]
        for axes in figure.axes:
            right = next(edge for edge in edges if edge > axes.get_window_extent().x0 + 1)
            assert max(text.get_window_extent().x1 for text in axes.texts) < right


def test_empty_galleries_say_so(tmp_path: Path) -> None:
    predictions = made_up(["cat", "dog"], 7, skill=60)
    images = album(tmp_path, predictions)
    assert "no mistakes on 7 images" in draw_wrong(predictions, images, looks_at_colors(1))
    assert "confuses no classes on 7 images" in draw_confused(predictions, images)
    assert "neither fixed nor broke an image, of 7 images" in draw_changed(predictions, images)
    assert draw_alike([], images) == "No two images are nearly the same."


@pytest.mark.parametrize(("temperature", "columns"), [(1.0, 1), (2.0, 2)])
def test_reliability_is_drawn_without_and_with_the_temperature(temperature: float, columns: int) -> None:
    figure = draw_reliability(SURE, measured(1.0, temperature))
    assert len(figure.axes) == 2 * columns
    texts = words(figure).splitlines()
    # 90 that are right and 1% unsure, 10 of which half is right at 80%.
    assert f"fine-tuned, calibration error {(90 * 0.01 + 10 * 0.3) / 100:.2%}" in texts
    assert len({text for text in texts if text.startswith("fine-tuned, calibration error")}) == columns


def test_the_ring_marks_the_coverage_at_the_allowed_error_rate() -> None:
    (axes,) = draw_coverage(SURE, measured(1.0, 1.0)).axes
    (ring,) = (line for line in axes.lines if line.get_fillstyle() == "none")
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([pytest.approx(0.9)], [0])
    assert ring.get_label() == "10.0% left to a person, by validation"


def test_a_long_file_name_keeps_its_end_which_tells_files_apart() -> None:
    assert shorten_path("cat/short.jpg", 10) == "short.jpg"
    assert shorten_path("cat/a photo of a cat 0123.jpg", 10) == "… 0123.jpg"
