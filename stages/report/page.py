"""The report: the whole run on one page of Markdown, for a git host; and the page of several runs."""

from collections.abc import Callable, Container
from typing import Any

from stages.common.format import number, p_value, percent, percent_range, plural, points, points_range, signed
from stages.images.index import PARTS, class_counts
from stages.images.near_duplicates import LOOKED_FOR, Leak
from stages.report.markdown import (
    bullets,
    cell,
    code,
    describe_limits,
    table,
    tabulate_counts,
    tabulate_first,
    tabulate_recipe,
    tabulate_suspects,
    titles_of,
)
from stages.scores.evaluation import ClassScores, Evaluation, describe_none
from stages.scores.folds import Together
from stages.scores.suspects import Suspect
from stages.scores.verdict import describe_gain, describe_groups, loss_range

# With more classes, so many with the lowest recall are shown.
_MOST_SCORED_CLASSES, _WORST_CLASSES = 40, 20

# In the order in which they are read: file name without its ending, title, what to see in it.
FIGURES = (
    ("training", "Training", "Filled: validation images; hollow: training images; ringed: the epoch kept."),
    ("confusion", "Which classes are taken for which", ""),
    ("curves", "Every threshold", "How well the probabilities order the images, whatever threshold is chosen."),
    ("reliability", "Calibration", "Below the diagonal: too sure. Bars: 95% interval (Wilson)."),
    ("coverage", "Leaving images to a person", "Most confident first; ring: at the threshold that validation gave."),
    ("losses", "Where the loss comes from", ""),
    ("wrong", "The most confident mistakes", "A wrong label shows here first."),
    ("confused", "Most confused", "Images from the largest cells of the confusion matrix."),
    ("changed", "What fine-tuning fixed and broke", ""),
    ("alike", "Images that are nearly the same", "Are they? If not: `split.near_duplicates=report`."),
)

# Title, field of `Scores`, how a value and how a difference is written.
_Write = Callable[[float], str]
_ROWS: tuple[tuple[str, str, _Write, _Write], ...] = (
    ("accuracy", "accuracy", percent, points),
    ("balanced accuracy", "balanced_accuracy", percent, points),
    ("F1, mean over classes", "f1_macro", percent, points),
    ("log-loss (lower is better)", "loss", number, signed),
    ("Brier score (lower is better)", "brier", number, signed),
    ("area under ROC", "auroc", number, signed),
    ("average precision", "average_precision", number, signed),
    ("expected calibration error (lower is better)", "ece", percent, points),
)


def compose_report(
    evaluation: Evaluation,
    classes: list[ClassScores],
    copies: int,
    split: dict[str, Any],
    recipe: dict[str, Any],
    pairs: list[Leak],
    suspects: str,
    probabilities: str,
    training: list[str],
    captions: dict[str, str],
    drawn: Container[str],
) -> str:
    """Return the report, as Markdown.

    `copies`: files of the test part that are not counted, since their bytes are those of another one; `split`:
    `split.json`; `recipe`: the parameters to list, a section's as a dictionary; `pairs`: the near-duplicates, the most
    similar first; `suspects`, `probabilities` and `training`: what the functions `describe_...` say of them;
    `captions`: what to say of a figure in place of what `FIGURES` says, by its name, of several lines a list; `drawn`:
    the names of the figures in the folder `figures`; of others, only the caption is shown.
    """
    counts = class_counts(split)
    parts = {part: sum(numbers[part] for numbers in counts.values()) for part in PARTS}
    counted = parts | {"test": parts["test"] - copies}
    sections = [
        "# Did fine-tuning help?",
        f"**{describe_gain(evaluation.gain)}**",
        _subject(len(counts), recipe["model"], counted),
        bullets([cell(remark) for remark in evaluation.remarks]),
        _scores(evaluation, len(classes)),
        "## What a probability is worth",
        probabilities,
        "## How training went",
        bullets(training),
        "## How far to trust this",
        bullets(describe_limits(evaluation, counted, copies)),
        "## Figures",
        "Both checkpoints are one network: the figures show it once." * evaluation.gain.identical,
        *(_figure(name, title, captions.get(name, note), name in drawn) for name, title, note in FIGURES),
        "## Images",
        _images(split),
        "## Is the test set clean?",
        _near_duplicates(evaluation, pairs),
        "## Labels that may be wrong",
        suspects,
        "## Recipe",
        tabulate_recipe(recipe),
        "## Every class",
        _classes(classes, titles_of(evaluation.gain.identical)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def compose_runs(kind: str, together: Together, summary: str, wrong: float | None, suspects: list[Suspect]) -> str:
    """Return the page of several runs, `folds` or `seeds`; `wrong`: about how many labels are, where it is known."""
    verdict = summary.splitlines()[-1]
    methods = {
        "folds": "Each image was tested once, by networks that were not trained on it. Folds share most of their "
        "training images, so their gains vary less than those of independent trainings: both intervals of the gain "
        "are at least as wide as [Nadeau and Bengio's](https://doi.org/10.1023/A:1024068626366), which allows for "
        "that, and as those that take all images for one test. A verdict asks for an interval without 0, that on "
        "accuracy for McNemar's p below 0.05, too.",
        "seeds": "One split, several trainings: mean and range show what the chance of training does to the gain. The "
        "choice of test images is not in them, so there is no verdict.",
    }
    rows = [
        [run.name, f"{run.images:,}", percent(run.head), percent(run.finetuned), points(run.gain),
         signed(run.loss), f"{run.fixed:,}", f"{run.broken:,}"]
        for run in together.runs
    ]  # fmt: skip
    header = ["run", "test images", "head phase", "fine-tuned", "gain", "gain, log-loss", "fixed", "broken"]
    parts = ["# Did fine-tuning help, over all runs?", f"**{verdict}**", table(header, rows), methods[kind]]
    parts.append("![Accuracy and gain of each run](gain.png)")
    if wrong is not None:
        parts += [
            "## Labels that may be wrong",
            f"About {wrong:.0f} of {together.images:,}, by [confident learning](https://arxiv.org/abs/1911.00068) on "
            "the fine-tuned networks' probabilities. The images whose label is believed least come first: look at "
            "them, for a mistake of the network ranks as high as one of the label.",
        ]
    if suspects:
        parts += ["![Labels that are believed least](suspects.png)", tabulate_suspects(suspects)]
    return "\n\n".join(parts) + "\n"


def _subject(classes: int, model: dict[str, Any], parts: dict[str, int]) -> str:
    weights = "random weights" if model["weights"] is None else f"the weights {code(model['weights'])}"
    others = f"watched on {parts['val']:,}, tested on" if parts["val"] else "watched and tested on the same"
    return (
        f"A {code(model['arch'])} that started from {weights}, trained on {plural(parts['train'], 'image')} of "
        f"{plural(classes, 'class', 'classes')}, {others} {parts['test']:,}."
    )


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
    header, notes = ["on the test images", *titles_of(gain.identical).values(), "gain"], []
    if gain.identical:
        header, rows = header[:-1], [row[:-1] for row in rows]
    else:
        p = "" if gain.mcnemar_p is None else f" (exact McNemar test: {p_value(gain.mcnemar_p)}{describe_groups(gain)})"
        notes.append(f"Fine-tuning fixed {plural(gain.fixed, 'image')} and broke {gain.broken:,}{p}.")
    if classes > 2:
        notes.append("Area under ROC and average precision: one class against the rest, mean over the classes.")
    return "\n\n".join([table(header, rows), *notes])


def _figure(name: str, title: str, caption: str, is_drawn: bool) -> str:
    lines = caption.splitlines()
    text = bullets(lines) if len(lines) > 1 else caption
    return "\n\n".join(filter(None, [f"### {title}", f"![{title}](figures/{name}.png)" * is_drawn, text]))


def _images(split: dict[str, Any]) -> str:
    rejected, duplicates = len(split["rejected"]), len(split["duplicates"])
    files, groups = plural(rejected, "file"), plural(duplicates, "group")
    text = f"{files} rejected, {groups} of copies with the same bytes (each kept in one part); `split.json` names them."
    if not rejected and not duplicates:
        text = "No file was rejected, and no two have the same bytes."
    classes = plural(len(class_counts(split)), "class", "classes")
    return f"{plural(split['pictures'], 'image')} of {classes}. {text}\n\n{tabulate_counts(split)}"


def _near_duplicates(evaluation: Evaluation, pairs: list[Leak]) -> str:
    found, titles = evaluation.near_duplicates, titles_of(evaluation.gain.identical)
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
    listed = tabulate_first(["test", "training or validation", "cosine"], shown, "near_duplicates.csv")
    return "\n\n".join([text, table(["accuracy", *titles.values()], accuracy), listed])


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


def _or_undefined(value: float | None, write: _Write) -> str:
    return "undefined" if value is None else write(value)
