"""The report: a run on one page of Markdown for a git host; the page of several runs; tables for model cards."""

from collections.abc import Sequence
from typing import Any

from stages.common.format import (
    Write,
    bullets,
    cell,
    code,
    first,
    number,
    or_undefined,
    p_value,
    percent,
    percent_range,
    plural,
    points,
    points_range,
    signed,
    table,
)
from stages.common.params import Params, flatten
from stages.images.division import CONFLICT
from stages.images.index import PARTS, class_counts
from stages.images.near_duplicates import LOOKED_FOR, Leak
from stages.scores.calibration import Calibrations, Estimate, describe_coverage
from stages.scores.evaluation import ClassScores, Evaluation, count_parts, describe_near_duplicates
from stages.scores.folds import Together
from stages.scores.suspects import Judged, Suspect, estimate_wrong_labels, find_inseparable
from stages.scores.verdict import describe_gain, describe_groups, loss_range
from stages.training.history import Epoch, out_of_patience, still_falling
from stages.training.line import Point
from stages.training.search import Candidate

# With more classes, scores are listed in order of recall, lowest first.
_MANY_CLASSES = 20

# In reading order: file name without extension, title, caption.
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


# Title, field of `Scores`, formats of a value and of a difference.
_ROWS: tuple[tuple[str, str, Write, Write], ...] = (
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
    split: dict[str, Any],
    recipe: dict[str, Any],
    pairs: list[Leak],
    suspects: str,
    probabilities: str,
    training: list[str],
    losses: str,
    missing: dict[str, str],
) -> str:
    """Return the report, as Markdown.

    `split`: `split.json`; `recipe`: the parameters to list, a section's as a dictionary; `pairs`: the near-duplicates,
    the most similar first; `suspects`, `probabilities`, `training` and `losses`: what the functions `describe_...` say
    of them; `missing`: why there is no figure, by its name.
    """
    gain, tested, figures = evaluation.gain, sum(scores.support for scores in classes), []
    for name, title, note in FIGURES:
        text = bullets(losses.splitlines()) if name == "losses" else missing.get(name, note)
        figures += [f"### {title}", f"![{title}](figures/{name}.png)" * (name not in missing), text]
    p = "" if gain.mcnemar_p is None else f" (exact McNemar test: {p_value(gain.mcnemar_p)}{describe_groups(gain)})"
    changed = f"Fine-tuning fixed {plural(gain.fixed, 'image')} and broke {gain.broken:,}{p}."
    many = "Area under ROC and average precision: one class against the rest, mean over the classes."
    sections = [
        "# Did fine-tuning help?",
        f"**{describe_gain(gain)}**",
        _subject(len(classes), recipe["model"], count_parts(split) | {"test": tested}),
        bullets([cell(remark) for remark in evaluation.remarks]),
        tabulate_scores(evaluation),
        changed * (not gain.identical),
        many * (len(classes) > 2),
        "## What a probability is worth",
        probabilities,
        "## How training went",
        bullets(training),
        "## How far to trust this",
        bullets(describe_limits(evaluation, split, tested)),
        "## Figures",
        "Both checkpoints are one network: the figures show it once." * gain.identical,
        *figures,
        "## Images",
        _images(split),
        "## Is the test set clean?",
        _near_duplicates(evaluation, pairs),
        "## Labels that may be wrong",
        suspects,
        "## Recipe",
        tabulate_recipe(recipe),
        "## Every class",
        _classes(classes, titles_of(gain.identical)),
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
    if wrong is not None:
        parts += [
            "## Labels that may be wrong",
            f"About {wrong:.0f} of {together.images:,}, by [confident learning](https://arxiv.org/abs/1911.00068) on "
            "the fine-tuned networks' probabilities. The images whose label is believed least come first: look at "
            "them (`python -m stages.review --suspects`), for a mistake of the network "
            "ranks as high as one of the label.",
        ]
    if suspects:
        parts.append(tabulate_suspects(suspects))
    return "\n\n".join(parts) + "\n"


def _subject(classes: int, model: dict[str, Any], parts: dict[str, int]) -> str:
    weights = "random weights" if model["weights"] is None else f"the weights {code(model['weights'])}"
    others = f"watched on {parts['val']:,}, tested on" if parts["val"] else "watched and tested on the same"
    return (
        f"A {code(model['arch'])} that started from {weights}, trained on {plural(parts['train'], 'image')} of "
        f"{plural(classes, 'class', 'classes')}, {others} {parts['test']:,}."
    )


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
        return f"{describe_near_duplicates(found, 0)} Nearly the same: {rule}."
    accuracy = [
        ["all test images", *(percent(scores.accuracy) for scores in evaluation.scores.values())],
        ["without them", *(or_undefined(getattr(found, f"{model}_accuracy"), percent) for model in titles)],
    ]
    text = (
        f"{plural(found.test_images, 'test image is', 'test images are')} nearly the same as a training or validation "
        f"image: {plural(found.pairs, 'pair')} with {rule}. Look at them: they measure memorization. {LOOKED_FOR}"
    )
    rows = first([[cell(one.test), cell(one.train), number(one.cosine)] for one in pairs], "near_duplicates.csv")
    listed = table(["test", "training or validation", "cosine"], rows)
    return "\n\n".join([text, table(["accuracy", *titles.values()], accuracy), listed])


def _classes(classes: list[ClassScores], titles: dict[str, str]) -> str:
    title, columns, rows = "class", [(name, model) for name in ("precision", "recall") for model in titles], []
    if len(classes) > _MANY_CLASSES:
        title, classes = "class, lowest recall first", [scores for scores in classes if scores.support]
        classes.sort(key=lambda scores: (scores.finetuned_recall, scores.head_recall))
    for scores in classes:
        values = [or_undefined(getattr(scores, f"{model}_{name}"), percent) for name, model in columns]
        rows.append([cell(scores.class_name), f"{scores.support:,}", *values])
    header = [title, "test images", *(f"{name}, {titles[model]}" for name, model in columns)]
    return table(header, first(rows, "classes.csv"))


def tabulate_counts(split: dict[str, Any]) -> str:
    """Return a table of the number of images by class and part, from the content of `split.json`."""
    rows = [[cell(name), *(f"{numbers[part]:,}" for part in PARTS)] for name, numbers in class_counts(split).items()]
    total = ["**all**", *(f"**{count:,}**" for count in count_parts(split).values())]
    return table(["class", "train", "validation", "test"], [*first(rows, "split.json"), total])


def tabulate_scores(evaluation: Evaluation) -> str:
    """Return a table of the scores of both checkpoints and the gain; for identical ones, of one checkpoint."""
    models, gain = list(evaluation.scores.values()), evaluation.gain
    rows = []
    for title, key, write, write_difference in _ROWS:
        values = [getattr(scores, key) for scores in models]
        difference = or_undefined(None if None in values else values[-1] - values[0], write_difference)
        rows.append([title, *(or_undefined(value, write) for value in values), difference])
        if key == "accuracy":
            intervals = [percent_range(scores.accuracy_low, scores.accuracy_high) for scores in models]
            rows.append(["95% interval", *intervals, f"{points_range(gain.accuracy_low, gain.accuracy_high)} points"])
        elif key == "loss" and not gain.identical:
            rows.append(["95% interval", "", "", loss_range(gain)])
    header = ["on the test images", *titles_of(gain.identical).values(), "gain"]
    return table(header[:-1], [row[:-1] for row in rows]) if gain.identical else table(header, rows)


def tabulate_suspects(suspects: list[Suspect]) -> str:
    """Return a table of the first suspects; `suspects.csv` has the others."""
    rows = []
    for one in suspects:
        suggestion = cell(one.suggestion), number(one.suggestion_probability)
        rows.append([cell(one.path), cell(one.label), number(one.label_probability), *suggestion])
    return table(["image", "label", "probability", "suggested", "probability"], first(rows, "suspects.csv"))


def tabulate_recipe(recipe: dict[str, Any]) -> str:
    """Return a table of parameters, by their dotted names."""
    return table(["parameter", "value"], [[f"`{name}`", code(value)] for name, value in flatten(recipe).items()])


def titles_of(identical: bool) -> dict[str, str]:
    """Return the title of each checkpoint; identical ones share one."""
    return {"finetuned": "both checkpoints"} if identical else {"head": "head phase", "finetuned": "fine-tuned"}


def describe_suspects(suspects: list[Suspect], judged: Judged, classes: Sequence[str], split: dict[str, Any]) -> str:
    """Describe contradictory labels, improbable labels, and classes that are hardly told apart."""
    paths, labels, probabilities = judged
    everywhere = len(paths) > count_parts(split)["test"]
    of = "" if everywhere else " Of the test images alone; `make folds` looks at all images."
    paragraphs = []
    rejected = [one for one in split["rejected"] if CONFLICT in one["reason"]]
    if conflicts := [[cell(one["path"]), cell(one["reason"])] for one in rejected]:
        listed = table(["image", "two labels"], first(conflicts, "split.json"))
        paragraphs = ["These images have two labels each, and are left out:", listed]
    if not suspects:
        return "\n\n".join([*paragraphs, f"The network disagrees with no label.{of}"])
    wrong = estimate_wrong_labels(labels, probabilities)
    paragraphs.append(
        f"{plural(len(suspects), 'image')} where the network prefers another label; about {wrong:.0f} of "
        f"{len(paths):,} labels may be wrong, by [confident learning](https://arxiv.org/abs/1911.00068). Look "
        f"at the first ones: a mistake of the network ranks as high as one of the label.{of}"
    )
    if everywhere:
        paragraphs.append(
            "Test images are judged by the fine-tuned network, the others by heads that were trained without them."
        )
    if pairs := find_inseparable(judged, classes)[:_MANY_CLASSES]:
        named = [f"{cell(one)} and {cell(other)} ({percent(apart)})" for one, other, apart in pairs]
        paragraphs.append(
            "Classes that are hardly told apart, with how often the right one of the two is more probable: "
            f"{', '.join(named)}. Are they one class, or their labels mixed up?"
        )
    return "\n\n".join([*paragraphs, tabulate_suspects(suspects)])


def describe_training(
    histories: list[list[Epoch]],
    kept: list[tuple[int, float]],
    params: Params,
    candidates: list[Candidate],
    line: list[Point],
    images: int,
) -> list[str]:
    """Describe what each phase kept, why it ended, and what its loss includes.

    `histories` and `kept`, what `read_kept` returns, are of both phases; `candidates`: the heads tried, if any were,
    the kept one first; `line`: the points between start and end of fine-tuning, if they were measured; `images`: number
    of training images.
    """
    lines, weighted = [], "weighted " * (params.class_weights is not None)
    if candidates:
        head = candidates[0]
        kind = f"hidden layer, lr {head.lr:.2g}" if head.lr else f"linear, L2 penalty {head.penalty:.3g}"
        lines.append(
            f"Head phase: of {len(candidates)} heads tried by folds, one was chosen by its {weighted}out-of-fold "
            f"log-loss: {kind} ({number(head.loss)}, accuracy {percent(head.accuracy)}); `candidates.csv` has all."
        )
    titles, sections = ("Head phase", "Fine-tuning"), ("train_head", "finetune")
    for title, section, epochs, (epoch, alpha) in zip(titles, sections, histories, kept, strict=True):
        phase, last, is_head = getattr(params, section), epochs[-1].number, section == "train_head"
        what, end, loss = f"epoch {epoch} of {last}", "", {one.number: one.val_loss for one in epochs}[epoch]
        if line and not is_head:
            what, end = f"{alpha:.0%} of the change", f" {number(line[-1].val_loss)} at the end,"
            loss = {point.alpha: point.val_loss for point in line}[alpha]
        start = number(epochs[0].val_loss)
        text = f"kept {what}; {weighted}validation loss {start} at the start,{end} {number(loss)} kept."
        if not epoch:
            text = "kept epoch 0, the head checkpoint: no epoch lowered the validation loss."
        if is_head and candidates:  # `train_head`'s parameters need not be those of the found head
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


def describe_limits(evaluation: Evaluation, split: dict[str, Any], tested: int) -> list[str]:
    """Describe the limits of the scores; `split`: `split.json`; `tested`: test images, duplicates counted once."""
    gain, parts = evaluation.gain, count_parts(split)
    lines = [f"The test set has {plural(tested, 'image')}: one of them is {100 / tested:.2f} points of accuracy."]
    if copies := parts["test"] - tested:
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


def describe_probabilities(calibrations: Calibrations, validation: int, out_of_fold: int, identical: bool) -> str:
    """Describe the effect of the temperatures, and which images to leave to a person.

    `validation` images and `out_of_fold` predictions of the head are what the temperatures were fitted to; `identical`:
    both checkpoints are the same network.
    """
    coverage = describe_coverage(calibrations.coverage)
    if not validation and not out_of_fold:
        return (
            "The probabilities are of the logits as they are: a temperature is fitted on validation images, and "
            f"there are none.\n\n{coverage}"
        )
    rows, titles = [], titles_of(identical)
    for model, title in titles.items():
        own = getattr(calibrations, model)
        for name, key in (("log-loss", "loss"), ("Brier score", "brier")):
            before, after, change = (getattr(side, key) for side in (own.before, own.after, own.change))
            rows.append([f"{title}, {name}", _estimate(before), _estimate(after), _estimate(change, signed)])
        errors = (percent(own.before.ece), percent(own.after.ece), points(own.change.ece))
        rows.append([f"{title}, calibration error", *errors])
    temperatures = calibrations.temperatures
    shown = " and ".join(f"{temperatures[model]:.3f} ({title})" for model, title in titles.items())
    fitted = f"fitted to {plural(validation, 'validation image')}"
    if out_of_fold:
        fitted = f"the head's is fitted to {plural(out_of_fold, 'out-of-fold prediction')}"
        if not identical:
            asked = f"changes it as {plural(validation, 'validation image')} ask for" if validation else "is the same"
            fitted += f", the fine-tuned network's {asked}"
    text = (
        "All probabilities here, and those of `predict` and of the exported network, come from logits divided by a "
        f"[temperature](https://arxiv.org/abs/1706.04599): {shown}; {fitted}. It changes no prediction. Above 1, it "
        "makes a network less sure."
    )
    changes = table(["on the test images, 95% interval", "without", "with temperature", "change"], rows)
    return f"{text}\n\n{changes}\n\n{coverage}"


def _estimate(estimate: Estimate, write: Write = number) -> str:
    return f"{write(estimate.value)} ({write(estimate.low)} to {write(estimate.high)})"
