"""The report: the whole run on one page of Markdown, for a git host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.format import number, p_value, percent, percent_range, plural, points, points_range, signed
from stages.common.params import Params
from stages.images.division import CONFLICT
from stages.images.index import PARTS
from stages.images.near_duplicates import LOOKED_FOR, Leak
from stages.images.summary import ClassCounts, class_counts
from stages.report.markdown import bullets, cell, code, table
from stages.report.probabilities import ONE, TITLES
from stages.scores.classes import ClassScores
from stages.scores.evaluation import Evaluation
from stages.scores.near_duplicates import describe_none
from stages.scores.suspects import Judged, Suspect, estimate_wrong_labels, find_inseparable
from stages.scores.verdict import describe_gain, describe_groups, loss_range
from stages.training.history import Epoch, out_of_patience, still_falling
from stages.training.line import Point
from stages.training.search import Candidate

_MOST_CLASSES = 100
# With more classes, so many with the lowest recall are shown.
_MOST_SCORED_CLASSES, _WORST_CLASSES = 40, 20
_MOST_PAIRS = 20
_MOST_SUSPECTS = 20

# In the order in which they are read: file name without its ending, title, what to see in it.
FIGURES = (
    (
        "training",
        "Training",
        "Filled: validation images; hollow: training images; ringed: the epoch kept.",
    ),
    ("confusion", "Which classes are taken for which", ""),
    ("curves", "Every threshold", "How well the probabilities order the images, whatever threshold is chosen."),
    (
        "reliability",
        "Calibration",
        "Below the diagonal a network is surer than it is right. Bars: 95% interval (Wilson).",
    ),
    (
        "coverage",
        "Leaving images to a person",
        "Images are answered in the order of their highest probability; ringed: wrong in at most 1% of the answers.",
    ),
    ("losses", "Where the loss comes from", ""),
    ("wrong", "The most confident mistakes", "A wrong label shows here first."),
    ("confused", "Most confused", "Images from the largest cells of the confusion matrix."),
    ("changed", "What fine-tuning fixed and broke", ""),
)

# Title, field of `Scores`, how a value and how a difference is written.
_ROWS: tuple[tuple[str, str, Callable[[float], str], Callable[[float], str]], ...] = (
    ("accuracy", "accuracy", percent, points),
    ("balanced accuracy", "balanced_accuracy", percent, points),
    ("F1, mean over classes", "f1_macro", percent, points),
    ("log-loss", "loss", number, signed),
    ("Brier score", "brier", number, signed),
    ("area under ROC", "auroc", number, signed),
    ("average precision", "average_precision", number, signed),
    ("expected calibration error", "ece", percent, points),
)
_LOWER_IS_BETTER = {"loss", "brier", "ece"}


@dataclass(frozen=True)
class Results:
    """What the report is about.

    Attributes:
        evaluation: what the test found.
        classes: the scores of every class.
        copies: files of the test part that are not counted, since their bytes are those of another one.
        split: `split.json`.
        recipe: the parameters to list, by their names; a section's are a dictionary.
        pairs: the near-duplicates, the most similar pair first.
        suspects: the labels that may be wrong, as `describe_suspects` says it.
        probabilities: what they are worth, as `describe_probabilities` says it.
        training: how both phases went, as `describe_training` says it.
    """

    evaluation: Evaluation
    classes: list[ClassScores]
    copies: int
    split: dict[str, Any]
    recipe: dict[str, Any]
    pairs: list[Leak]
    suspects: str
    probabilities: str
    training: list[str]


def compose_report(results: Results, figures: str, captions: dict[str, str]) -> str:
    """Return the report, as Markdown.

    Args:
        results: of the run.
        figures: the figures' folder, relative to the report, with `/`.
        captions: what to say of a figure in place of what `FIGURES` says, by its name; a line becomes a list's item.
    """
    evaluation, split, copies = results.evaluation, results.split, results.copies
    counts = class_counts(split)
    parts = {part: sum(numbers[part] for numbers in counts.values()) for part in PARTS}
    counted = parts | {"test": parts["test"] - copies}
    return "\n\n".join(
        [
            "# Did fine-tuning help?",
            f"**{describe_gain(evaluation.gain)}**",
            _subject(len(counts), results.recipe["model"], counted),
            *([bullets([cell(remark) for remark in evaluation.remarks])] if evaluation.remarks else []),
            _scores(evaluation, len(results.classes)),
            "## What a probability is worth",
            results.probabilities,
            "## How training went",
            bullets(results.training),
            "## How far to trust this",
            bullets(describe_limits(evaluation, counted, copies)),
            "## Figures",
            *(["Both checkpoints are one network: the figures show it once."] if evaluation.gain.identical else []),
            *(_figure(name, title, captions.get(name, note), figures) for name, title, note in FIGURES),
            "## Images",
            _images(split, counts, parts),
            "## Is the test set clean?",
            _near_duplicates(evaluation, results.pairs),
            "## Labels that may be wrong",
            results.suspects,
            "## Recipe",
            _recipe(results.recipe),
            "## Every class",
            _classes(results.classes, _titles(evaluation)),
        ]
    ) + "\n"  # fmt: skip


def describe_suspects(suspects: list[Suspect], judged: Judged, classes: Sequence[str], split: dict[str, Any]) -> str:
    """Return the labels that are contradicted, those that are believed least, and classes that look alike, as Markdown.

    Args:
        suspects: the least believed first.
        judged: the images that were looked at.
        classes: names by label.
        split: `split.json`.
    """
    everywhere = len(judged.paths) > sum(counts["test"] for counts in class_counts(split).values())
    of = "" if everywhere else " Of the test images alone; `make folds` looks at all images."
    paragraphs = []
    rejected = [one for one in split["rejected"] if CONFLICT in one["reason"]]
    if conflicts := [f"{code(one['path'])}: {cell(one['reason'])}" for one in rejected]:
        more = [f"... {len(conflicts) - _MOST_SUSPECTS:,} more in `split.json`"] * (len(conflicts) > _MOST_SUSPECTS)
        paragraphs.append("These images have two labels each, and are left out:")
        paragraphs.append(bullets([*conflicts[:_MOST_SUSPECTS], *more]))
    if not suspects:
        return "\n\n".join([*paragraphs, f"The network disagrees with no label.{of}"])
    wrong = estimate_wrong_labels(judged.labels, judged.probabilities)
    paragraphs.append(
        f"{plural(len(suspects), 'image')} where the network prefers another label; about {wrong:.0f} of "
        f"{len(judged.paths):,} labels may be wrong, by [confident learning](https://arxiv.org/abs/1911.00068). Look "
        f"at the first ones: a mistake of the network ranks as high as one of the label.{of}"
    )
    if everywhere:
        paragraphs.append(
            "Test images are judged by the fine-tuned network, the others by heads that were trained without them."
        )
    if pairs := find_inseparable(judged, classes)[:_MOST_PAIRS]:
        named = [f"{cell(first)} and {cell(second)} ({percent(apart)})" for first, second, apart in pairs]
        paragraphs.append(
            f"Classes that are hardly told apart, with how often the right one of the two is more probable: "
            f"{', '.join(named)}. Are they one class, or their labels mixed up?"
        )
    return "\n\n".join([*paragraphs, tabulate_suspects(suspects, "suspects.csv")])


def tabulate_suspects(suspects: list[Suspect], file: str) -> str:
    """Return the first of them as a table; `file` has the others."""
    rows = [
        [
            cell(one.path),
            cell(one.label),
            number(one.label_probability),
            cell(one.suggestion),
            number(one.suggestion_probability),
        ]
        for one in suspects[:_MOST_SUSPECTS]
    ]
    if len(suspects) > _MOST_SUSPECTS:
        rows.append([f"... {len(suspects) - _MOST_SUSPECTS:,} more in `{file}`", "", "", "", ""])
    return table(["image", "label", "probability", "suggested", "probability"], rows)


def describe_training(
    head: list[Epoch],
    finetune: list[Epoch],
    selected: tuple[int, int],
    params: Params,
    candidates: list[Candidate],
    line: list[Point],
    alpha: float,
    images: int,
) -> list[str]:
    """Say what each phase kept, why it ended, and what its loss counts.

    Args:
        head: the first phase's history.
        finetune: the second's.
        selected: the number of the epoch kept of each.
        params: with which they were trained.
        candidates: the heads that were tried, the kept one first; none where the head was not searched for.
        line: the points between start and end of fine-tuning, if they were measured.
        alpha: that of the one kept.
        images: number of training images.
    """
    lines, weighted = [], "weighted " * (params.class_weights is not None)
    if candidates:
        best = candidates[0]
        kind = f"hidden layer, lr {best.lr:.2g}" if best.lr else f"linear, L2 penalty {best.penalty:.3g}"
        lines.append(
            f"Head phase: of {len(candidates)} heads tried by folds, this one has the lowest {weighted}out-of-fold "
            f"log-loss: {kind} ({number(best.loss)}, accuracy {percent(best.accuracy)}); `candidates.csv` has all."
        )
    phases = (
        ("Head phase", "train_head", head, params.train_head, 1),
        ("Fine-tuning", "finetune", finetune, params.finetune, 0),
    )
    for (title, section, epochs, phase, first), kept in zip(phases, selected, strict=True):
        best_epoch, last = next(epoch for epoch in epochs if epoch.number == kept), epochs[-1].number
        text = (
            f"{title}: kept epoch {kept} of {last}; {weighted}validation loss {number(epochs[0].val_loss)} at the "
            f"start, {number(best_epoch.val_loss)} kept."
        )
        if section == "finetune" and line:
            text = f"{title}: {describe_line(line, alpha, weighted)}"
        elif kept == 0:
            text = f"{title}: kept epoch 0, the head checkpoint: no epoch lowered the validation loss."
        searched = section == "train_head" and candidates
        if section == "train_head" and not searched and still_falling(epochs, phase.epochs, phase.patience):
            text += f" It was still falling when the epochs ran out: raise `{section}.epochs` ({phase.epochs})."
        elif not searched and last < phase.count_epochs(images) and not out_of_patience(epochs[first:], phase.patience):
            text += f" Training stopped after epoch {last}, where the loss was no longer finite: lower `{section}.lr`."
        lines.append(text)
    if params.class_weights is not None:
        lines.append(
            f"Training and validation losses are weighted by class (`class_weights`: {code(params.class_weights)}); "
            "the scores on the test images are not."
        )
    return lines


def describe_line(line: list[Point], alpha: float, weighted: str = "") -> str:
    """Say which point between the head checkpoint and the end of fine-tuning was kept.

    Args:
        line: the points, the start first.
        alpha: that of the one kept.
        weighted: goes before the name of the loss.
    """
    losses = (
        f"{weighted}validation loss {number(line[0].val_loss)} at the start, {number(line[-1].val_loss)} at the end"
    )
    if not alpha:
        return f"kept the head checkpoint: no point towards the end has a lower validation loss ({losses})."
    kept = next(point for point in line if point.alpha == alpha)
    return f"kept {alpha:.0%} of the change; {losses}, {number(kept.val_loss)} kept."


def _subject(classes: int, model: dict[str, Any], parts: dict[str, int]) -> str:
    weights = "random weights" if model["weights"] is None else f"the weights {code(model['weights'])}"
    others = f"watched on {parts['val']:,}, tested on" if parts["val"] else "watched and tested on the same"
    return (
        f"A {code(model['arch'])} that started from {weights}, trained on {plural(parts['train'], 'image')} of "
        f"{plural(classes, 'class', 'classes')}, {others} {parts['test']:,}."
    )


def _titles(evaluation: Evaluation) -> dict[str, str]:
    """Return the title of each checkpoint's column; the same network has one."""
    return ONE if evaluation.gain.identical else TITLES


def _scores(evaluation: Evaluation, classes: int) -> str:
    models, titles, gain = list(evaluation.scores.values()), _titles(evaluation), evaluation.gain
    rows = []
    for title, key, write, write_difference in _ROWS:
        values = [getattr(scores, key) for scores in models]
        difference = None if None in values else values[-1] - values[0]
        name = f"{title} (lower is better)" if key in _LOWER_IS_BETTER else title
        rows.append([name, *(_or_undefined(value, write) for value in values),
                     _or_undefined(difference, write_difference)])  # fmt: skip
        if key == "accuracy":
            intervals = [percent_range(scores.accuracy_low, scores.accuracy_high) for scores in models]
            rows.append(["95% interval", *intervals, f"{points_range(gain.accuracy_low, gain.accuracy_high)} points"])
        elif key == "loss" and not gain.identical:
            rows.append(["95% interval", "", "", loss_range(gain)])
    header, parts = ["on the test images", *titles.values(), "gain"], []
    if gain.identical:
        header, rows = header[:-1], [row[:-1] for row in rows]
    else:
        p = "" if gain.mcnemar_p is None else f" (exact McNemar test: {p_value(gain.mcnemar_p)}{describe_groups(gain)})"
        parts.append(f"Fine-tuning fixed {plural(gain.fixed, 'image')} and broke {gain.broken:,}{p}.")
    if classes > 2:
        parts.append("Area under ROC and average precision: one class against the rest, mean over the classes.")
    return "\n\n".join([table(header, rows), *parts])


def describe_limits(evaluation: Evaluation, parts: dict[str, int], copies: int) -> list[str]:
    """Say how far the scores can be trusted.

    Args:
        evaluation: what the test found.
        parts: part -> number of its images that are counted.
        copies: as for `Results`.
    """
    gain, count = evaluation.gain, parts["test"]
    lines = [f"The test set has {plural(count, 'image')}: one of them is {100 / count:.2f} points of accuracy."]
    if copies:
        lines.append(
            f"{plural(copies, 'more file')} of the test part {'has' if copies == 1 else 'have'} the same bytes as one "
            "of these, and no score, interval or figure counts an image twice."
        )
    if gain.mcnemar_p is not None and not gain.identical:
        bounds = points_range(gain.accuracy_low, gain.accuracy_high)
        lines.append(f"The data are consistent with a true gain of {bounds} points of accuracy.")
    lines.append(
        "The intervals cover the choice of test images. They say nothing of what another seed's training would give, "
        "nor of images from elsewhere."
    )
    if gain.groups is not None:
        lines.append(
            f"The test images are of {plural(gain.groups, 'group')} (`split.group`, near-duplicates); those of a "
            "group are alike. The verdicts and the intervals of accuracies and gains take each group as one "
            "observation (signs are tossed by group; [cluster bootstrap]"
            "(https://doi.org/10.1111/j.1467-9868.2007.00593.x)); those of "
            "calibration count images."
        )
    if not parts["val"]:
        lines.append("There is no validation part: training watched the test images, so these numbers flatter.")
    return lines


def _figure(name: str, title: str, caption: str, folder: str) -> str:
    lines = caption.splitlines()
    text = bullets(lines) if len(lines) > 1 else caption
    return f"### {title}\n\n![{title}]({folder}/{name}.png)" + (f"\n\n{text}" if text else "")


def _images(split: dict[str, Any], counts: ClassCounts, parts: dict[str, int]) -> str:
    rejected, duplicates = split["rejected"], split["duplicates"]
    rows = [[cell(name), *(f"{numbers[part]:,}" for part in parts)] for name, numbers in counts.items()]
    if len(rows) > _MOST_CLASSES:
        rows = [*rows[:_MOST_CLASSES], [f"... {len(rows) - _MOST_CLASSES:,} more", "", "", ""]]
    rows.append(["**all**", *(f"**{count:,}**" for count in parts.values())])
    lines = [
        f"{plural(split['pictures'], 'image')} of {plural(len(counts), 'class', 'classes')}.",
        f"{plural(len(rejected), 'file')} rejected, {plural(len(duplicates), 'group')} of copies with the same bytes "
        "(each kept in one part); `split.json` names them." if rejected or duplicates
        else "No file was rejected, and no two have the same bytes.",
    ]  # fmt: skip
    return "\n\n".join([" ".join(lines), table(["class", "train", "validation", "test"], rows)])


def _near_duplicates(evaluation: Evaluation, pairs: list[Leak]) -> str:
    found, titles = evaluation.near_duplicates, _titles(evaluation)
    rule = (
        f"a cosine of at least {found.threshold:g} between the weighted frequencies of small grey versions, one of "
        "them perhaps mirrored or turned"
    )
    if not found.pairs:
        return f"{describe_none(found)} Nearly the same: {rule}."
    shown = [[cell(pair.test), cell(pair.train), number(pair.cosine)] for pair in pairs[:_MOST_PAIRS]]
    if len(pairs) > _MOST_PAIRS:
        shown.append([f"... {len(pairs) - _MOST_PAIRS:,} more in `near_duplicates.csv`", "", ""])
    accuracy = [
        ["all test images", *(percent(scores.accuracy) for scores in evaluation.scores.values())],
        ["without them", *(_or_undefined(getattr(found, f"{model}_accuracy"), percent) for model in titles)],
    ]
    text = (
        f"{plural(found.test_images, 'test image is', 'test images are')} nearly the same as a training or "
        "validation image: "
        f"{plural(found.pairs, 'pair')} with {rule}. Look at them: they measure memorization. {LOOKED_FOR}"
    )
    tables = (
        table(["accuracy", *titles.values()], accuracy),
        table(["test", "training or validation", "cosine"], shown),
    )
    return "\n\n".join([text, *tables])


def _recipe(recipe: dict[str, Any]) -> str:
    rows = []
    for name, value in recipe.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        rows += [[f"`{name}{'.' if key else ''}{key}`", code(setting)] for key, setting in inner]
    return table(["parameter", "value"], rows)


def _classes(classes: list[ClassScores], titles: dict[str, str]) -> str:
    shown, note = classes, ""
    if len(classes) > _MOST_SCORED_CLASSES:
        tested = [scores for scores in classes if scores.finetuned_recall is not None]
        shown = sorted(tested, key=lambda scores: (scores.finetuned_recall, scores.head_recall))[:_WORST_CLASSES]
        note = (
            f"The {len(shown)} of {len(classes):,} classes of which the fine-tuned network finds the smallest fraction "
            "(recall); `classes.csv` has all.\n\n"
        )
    columns = [(name, model) for name in ("precision", "recall") for model in titles]
    rows = [
        [
            cell(scores.class_name),
            f"{scores.support:,}",
            *(_or_undefined(getattr(scores, f"{model}_{name}"), percent) for name, model in columns),
        ]
        for scores in shown
    ]
    header = ["class", "test images", *(f"{name}, {titles[model]}" for name, model in columns)]
    return note + table(header, rows)


def _or_undefined(value: float | None, write: Callable[[float], str]) -> str:
    return "undefined" if value is None else write(value)
