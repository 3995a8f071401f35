"""The report: the whole run on one page of Markdown, for a git host."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from stages.common.format import number, p_value, percent, percent_range, plural, points, points_range, signed
from stages.common.params import Params
from stages.images.division import CONFLICT
from stages.images.index import PARTS, class_counts
from stages.images.near_duplicates import LOOKED_FOR, Leak
from stages.report.markdown import bullets, cell, code, table, tabulate_first
from stages.report.probabilities import ONE, TITLES
from stages.scores.classes import ClassScores
from stages.scores.evaluation import Evaluation, describe_none
from stages.scores.suspects import Judged, Suspect, estimate_wrong_labels, find_inseparable
from stages.scores.verdict import describe_gain, describe_groups, loss_range
from stages.training.history import Epoch, out_of_patience, still_falling
from stages.training.line import Point
from stages.training.search import Candidate

_MOST_CLASSES = 100
# With more classes, so many with the lowest recall are shown.
_MOST_SCORED_CLASSES, _WORST_CLASSES = 40, 20
_MOST_LISTED = 20

# In the order in which they are read: file name without its ending, title, what to see in it.
FIGURES = (
    ("training", "Training", "Filled: validation images; hollow: training images; ringed: the epoch kept."),
    ("confusion", "Which classes are taken for which", ""),
    ("curves", "Every threshold", "How well the probabilities order the images, whatever threshold is chosen."),
    ("reliability", "Calibration", "Below the diagonal: too sure. Bars: 95% interval (Wilson)."),
    (
        "coverage",
        "Leaving images to a person",
        "Most confident first; ring: at the threshold that validation gave.",
    ),
    ("losses", "Where the loss comes from", ""),
    ("wrong", "The most confident mistakes", "A wrong label shows here first."),
    ("confused", "Most confused", "Images from the largest cells of the confusion matrix."),
    ("changed", "What fine-tuning fixed and broke", ""),
    ("alike", "Images that are nearly the same", "Are they? If not: `split.near_duplicates=report`."),
)

# Title, field of `Scores`, how a value and how a difference is written.
_ROWS: tuple[tuple[str, str, Callable[[float], str], Callable[[float], str]], ...] = (
    ("accuracy", "accuracy", percent, points),
    ("balanced accuracy", "balanced_accuracy", percent, points),
    ("F1, mean over classes", "f1_macro", percent, points),
    ("log-loss (lower is better)", "loss", number, signed),
    ("Brier score (lower is better)", "brier", number, signed),
    ("area under ROC", "auroc", number, signed),
    ("average precision", "average_precision", number, signed),
    ("expected calibration error (lower is better)", "ece", percent, points),
)


@dataclass(frozen=True)
class Results:
    """What the report is about.

    `copies`: files of the test part that are not counted, since their bytes are those of another one; `split`:
    `split.json`; `recipe`: the parameters to list, a section's as a dictionary; `pairs`: the near-duplicates, the most
    similar first; `suspects`, `probabilities` and `training`: what the functions `describe_...` say of them.
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


def compose_report(results: Results, figures: str, captions: dict[str, str], drawn: Container[str]) -> str:
    """Return the report, as Markdown.

    Args:
        results: of the run.
        figures: the figures' folder, relative to the report, with `/`.
        captions: what to say of a figure in place of what `FIGURES` says, by its name; a line becomes a list's item.
        drawn: the names of the figures that there are; of others, only the caption is shown.
    """
    evaluation, split, copies = results.evaluation, results.split, results.copies
    counts = class_counts(split)
    parts = {part: sum(numbers[part] for numbers in counts.values()) for part in PARTS}
    counted = parts | {"test": parts["test"] - copies}
    sections = [
        "# Did fine-tuning help?",
        f"**{describe_gain(evaluation.gain)}**",
        _subject(len(counts), results.recipe["model"], counted),
        bullets([cell(remark) for remark in evaluation.remarks]),
        _scores(evaluation, len(results.classes)),
        "## What a probability is worth",
        results.probabilities,
        "## How training went",
        bullets(results.training),
        "## How far to trust this",
        bullets(describe_limits(evaluation, counted, copies)),
        "## Figures",
        "Both checkpoints are one network: the figures show it once." * evaluation.gain.identical,
        *(_figure(name, title, captions.get(name, note), figures * (name in drawn)) for name, title, note in FIGURES),
        "## Images",
        _images(split),
        "## Is the test set clean?",
        _near_duplicates(evaluation, results.pairs),
        "## Labels that may be wrong",
        results.suspects,
        "## Recipe",
        _recipe(results.recipe),
        "## Every class",
        _classes(results.classes, _titles(evaluation)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def tabulate_counts(split: dict[str, Any]) -> str:
    """Return the number of images of each class and part, from the content of `split.json`, as a table."""
    counts = class_counts(split)
    rows = [[cell(name), *(f"{numbers[part]:,}" for part in PARTS)] for name, numbers in counts.items()]
    if len(rows) > _MOST_CLASSES:
        rows = [*rows[:_MOST_CLASSES], [f"... {len(rows) - _MOST_CLASSES:,} more", "", "", ""]]
    rows.append(["**all**", *(f"**{sum(numbers[part] for numbers in counts.values()):,}**" for part in PARTS)])
    return table(["class", "train", "validation", "test"], rows)


def describe_suspects(suspects: list[Suspect], judged: Judged, classes: Sequence[str], split: dict[str, Any]) -> str:
    """Return contradicted labels, those that are believed least, and classes that look alike, as Markdown."""
    everywhere = len(judged.paths) > sum(counts["test"] for counts in class_counts(split).values())
    of = "" if everywhere else " Of the test images alone; `make folds` looks at all images."
    paragraphs = []
    rejected = [one for one in split["rejected"] if CONFLICT in one["reason"]]
    if conflicts := [f"{code(one['path'])}: {cell(one['reason'])}" for one in rejected]:
        more = [f"... {len(conflicts) - _MOST_LISTED:,} more in `split.json`"] * (len(conflicts) > _MOST_LISTED)
        paragraphs.append("These images have two labels each, and are left out:")
        paragraphs.append(bullets([*conflicts[:_MOST_LISTED], *more]))
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
    if pairs := find_inseparable(judged, classes)[:_MOST_LISTED]:
        named = [f"{cell(first)} and {cell(second)} ({percent(apart)})" for first, second, apart in pairs]
        paragraphs.append(
            f"Classes that are hardly told apart, with how often the right one of the two is more probable: "
            f"{', '.join(named)}. Are they one class, or their labels mixed up?"
        )
    return "\n\n".join([*paragraphs, tabulate_suspects(suspects)])


def tabulate_suspects(suspects: list[Suspect]) -> str:
    """Return the first of them as a table; `suspects.csv` has the others."""
    rows = [
        [cell(one.path), cell(one.label), number(one.label_probability), cell(one.suggestion),
         number(one.suggestion_probability)]
        for one in suspects
    ]  # fmt: skip
    header = ["image", "label", "probability", "suggested", "probability"]
    return tabulate_first(header, rows, _MOST_LISTED, "suspects.csv")


def describe_training(
    histories: tuple[list[Epoch], list[Epoch]],
    selected: tuple[int, int],
    params: Params,
    candidates: list[Candidate],
    line: list[Point],
    alpha: float,
    images: int,
) -> list[str]:
    """Say what each phase kept, why it ended, and what its loss counts.

    Args:
        histories: of both phases.
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
    for title, section, epochs, kept in zip(
        ("Head phase", "Fine-tuning"), ("train_head", "finetune"), histories, selected, strict=True
    ):
        phase, last, is_head = getattr(params, section), epochs[-1].number, section == "train_head"
        loss = next(epoch.val_loss for epoch in epochs if epoch.number == kept)
        text = f"kept epoch {kept} of {last}; {weighted}validation loss {number(epochs[0].val_loss)} at the start, "
        text += f"{number(loss)} kept."
        if line and not is_head:
            text = describe_line(line, alpha, weighted)
        elif not kept:
            text = "kept epoch 0, the head checkpoint: no epoch lowered the validation loss."
        if is_head and candidates:  # the parameters may not be those of the head that was found
            pass
        elif is_head and still_falling(epochs, phase.epochs, phase.patience):
            text += f" It was still falling when the epochs ran out: raise `{section}.epochs` ({phase.epochs})."
        elif last < phase.count_epochs(images) and not out_of_patience(epochs[is_head:], phase.patience):
            text += f" Training stopped after epoch {last}, where the loss was no longer finite: lower `{section}.lr`."
        lines.append(f"{title}: {text}")
    if params.class_weights is not None:
        lines.append(
            f"Training and validation losses are weighted by class (`class_weights`: {code(params.class_weights)}); "
            "the scores on the test images are not."
        )
    return lines


def describe_line(line: list[Point], alpha: float, weighted: str = "") -> str:
    """Say which point, by its `alpha`, was kept on the line from the head checkpoint to the end of fine-tuning."""
    start, end = number(line[0].val_loss), number(line[-1].val_loss)
    losses = f"{weighted}validation loss {start} at the start, {end} at the end"
    if not alpha:
        return f"kept the head checkpoint: no point towards the end has a lower validation loss ({losses})."
    kept = next(point for point in line if point.alpha == alpha)
    return f"kept {alpha:.0%} of the change; {losses}, {number(kept.val_loss)} kept."


def describe_limits(evaluation: Evaluation, parts: dict[str, int], copies: int) -> list[str]:
    """Say how far the scores can be trusted; `parts`: number of counted images by part, `copies` as for `Results`."""
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
            f"The test images are of {plural(gain.groups, 'group')} (`split.group`, near-duplicates); those of a group "
            "are alike. The verdicts and the intervals of accuracies and gains take each group as one observation "
            "(signs are tossed by group; [cluster bootstrap](https://doi.org/10.1111/j.1467-9868.2007.00593.x)); those "
            "of calibration count images."
        )
    if not parts["val"]:
        lines.append("There is no validation part: training watched the test images, so these numbers flatter.")
    return lines


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
    models, gain = list(evaluation.scores.values()), evaluation.gain
    rows = []
    for title, key, write, write_difference in _ROWS:
        values = [getattr(scores, key) for scores in models]
        difference = None if None in values else values[-1] - values[0]
        cells = [_or_undefined(value, write) for value in values]
        rows.append([title, *cells, _or_undefined(difference, write_difference)])
        if key == "accuracy":
            intervals = [percent_range(scores.accuracy_low, scores.accuracy_high) for scores in models]
            rows.append(["95% interval", *intervals, f"{points_range(gain.accuracy_low, gain.accuracy_high)} points"])
        elif key == "loss" and not gain.identical:
            rows.append(["95% interval", "", "", loss_range(gain)])
    header, notes = ["on the test images", *_titles(evaluation).values(), "gain"], []
    if gain.identical:
        header, rows = header[:-1], [row[:-1] for row in rows]
    else:
        p = "" if gain.mcnemar_p is None else f" (exact McNemar test: {p_value(gain.mcnemar_p)}{describe_groups(gain)})"
        notes.append(f"Fine-tuning fixed {plural(gain.fixed, 'image')} and broke {gain.broken:,}{p}.")
    if classes > 2:
        notes.append("Area under ROC and average precision: one class against the rest, mean over the classes.")
    return "\n\n".join([table(header, rows), *notes])


def _figure(name: str, title: str, caption: str, folder: str) -> str:
    lines = caption.splitlines()
    text = bullets(lines) if len(lines) > 1 else caption
    shown = [f"### {title}", f"![{title}]({folder}/{name}.png)" * bool(folder), text]
    return "\n\n".join(piece for piece in shown if piece)


def _images(split: dict[str, Any]) -> str:
    rejected, duplicates = len(split["rejected"]), len(split["duplicates"])
    text = "No file was rejected, and no two have the same bytes."
    if rejected or duplicates:
        text = (
            f"{plural(rejected, 'file')} rejected, {plural(duplicates, 'group')} of copies with the same bytes (each "
            "kept in one part); `split.json` names them."
        )
    classes = plural(len(class_counts(split)), "class", "classes")
    return f"{plural(split['pictures'], 'image')} of {classes}. {text}\n\n{tabulate_counts(split)}"


def _near_duplicates(evaluation: Evaluation, pairs: list[Leak]) -> str:
    found, titles = evaluation.near_duplicates, _titles(evaluation)
    rule = (
        f"a cosine of at least {found.threshold:g} between the weighted frequencies of small grey versions, one of "
        "them perhaps mirrored or turned"
    )
    if not found.pairs:
        return f"{describe_none(found)} Nearly the same: {rule}."
    accuracy = [
        ["all test images", *(percent(scores.accuracy) for scores in evaluation.scores.values())],
        ["without them", *(_or_undefined(getattr(found, f"{model}_accuracy"), percent) for model in titles)],
    ]
    text = (
        f"{plural(found.test_images, 'test image is', 'test images are')} nearly the same as a training or validation "
        f"image: {plural(found.pairs, 'pair')} with {rule}. Look at them: they measure memorization. {LOOKED_FOR}"
    )
    shown = [[cell(pair.test), cell(pair.train), number(pair.cosine)] for pair in pairs]
    listed = tabulate_first(["test", "training or validation", "cosine"], shown, _MOST_LISTED, "near_duplicates.csv")
    return "\n\n".join([text, table(["accuracy", *titles.values()], accuracy), listed])


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
    rows = []
    for scores in shown:
        values = [_or_undefined(getattr(scores, f"{model}_{name}"), percent) for name, model in columns]
        rows.append([cell(scores.class_name), f"{scores.support:,}", *values])
    return note + table(["class", "test images", *(f"{name}, {titles[model]}" for name, model in columns)], rows)


def _or_undefined(value: float | None, write: Callable[[float], str]) -> str:
    return "undefined" if value is None else write(value)
