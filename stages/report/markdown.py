"""Markdown for a git host: its pieces, and what reports and model cards say of a run in sentences."""

from collections.abc import Callable, Sequence
from typing import Any

from stages.common.format import number, percent, plural, points, points_range, signed
from stages.common.params import Params, flatten
from stages.images.division import CONFLICT
from stages.images.index import PARTS, class_counts
from stages.scores.calibration import Calibrations, Estimate, describe_coverage
from stages.scores.evaluation import Evaluation
from stages.scores.suspects import Judged, Suspect, estimate_wrong_labels, find_inseparable
from stages.training.history import Epoch, out_of_patience, still_falling
from stages.training.line import Point
from stages.training.search import Candidate

MOST_LISTED = 20
_MOST_CLASSES = 100


def bullets(lines: list[str]) -> str:
    """Return a list, an item a line."""
    return "\n".join(f"- {line}" for line in lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table: the first column to the left, numbers in the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate_first(header: list[str], rows: list[list[str]], file: str) -> str:
    """Return a table of the first rows, and of how many more there are in a file."""
    more = [[f"... {len(rows) - MOST_LISTED:,} more in `{file}`", *[""] * (len(header) - 1)]]
    return table(header, [*rows[:MOST_LISTED], *more * (len(rows) > MOST_LISTED)])


def cell(text: str) -> str:
    """Let no name of a class or a file be taken for Markdown or for the end of a table's cell."""
    escaped = "".join(f"\\{character}" if character in r"\`*_{}[]<>#|~$&" else character for character in text)
    return " ".join(escaped.split())


def code(value: object) -> str:
    """Write a parameter's value as code; within a table's cell a bar has to be escaped even there."""
    text = "null" if value is None else str(value)
    return f"`` {text} ``".replace("|", "\\|") if "`" in text else f"`{text}`".replace("|", "\\|")


def tabulate_counts(split: dict[str, Any]) -> str:
    """Return the number of images of each class and part, from the content of `split.json`, as a table."""
    counts = class_counts(split)
    rows = [[cell(name), *(f"{numbers[part]:,}" for part in PARTS)] for name, numbers in counts.items()]
    if len(rows) > _MOST_CLASSES:
        rows = [*rows[:_MOST_CLASSES], [f"... {len(rows) - _MOST_CLASSES:,} more", "", "", ""]]
    rows.append(["**all**", *(f"**{sum(numbers[part] for numbers in counts.values()):,}**" for part in PARTS)])
    return table(["class", "train", "validation", "test"], rows)


def tabulate_suspects(suspects: list[Suspect]) -> str:
    """Return the first of them as a table; `suspects.csv` has the others."""
    rows = [
        [cell(one.path), cell(one.label), number(one.label_probability), cell(one.suggestion),
         number(one.suggestion_probability)]
        for one in suspects
    ]  # fmt: skip
    return tabulate_first(["image", "label", "probability", "suggested", "probability"], rows, "suspects.csv")


def tabulate_recipe(recipe: dict[str, Any]) -> str:
    """Return parameters as a table, those of a section by their dotted names."""
    return table(["parameter", "value"], [[f"`{name}`", code(value)] for name, value in flatten(recipe).items()])


def titles_of(identical: bool) -> dict[str, str]:
    """Return the title of each checkpoint; two that are the same network have one."""
    return {"finetuned": "both checkpoints"} if identical else {"head": "head phase", "finetuned": "fine-tuned"}


def describe_suspects(suspects: list[Suspect], judged: Judged, classes: Sequence[str], split: dict[str, Any]) -> str:
    """Return contradicted labels, those that are believed least, and classes that look alike."""
    everywhere = len(judged.paths) > sum(counts["test"] for counts in class_counts(split).values())
    of = "" if everywhere else " Of the test images alone; `make folds` looks at all images."
    paragraphs = []
    rejected = [one for one in split["rejected"] if CONFLICT in one["reason"]]
    if conflicts := [f"{code(one['path'])}: {cell(one['reason'])}" for one in rejected]:
        more = [f"... {len(conflicts) - MOST_LISTED:,} more in `split.json`"] * (len(conflicts) > MOST_LISTED)
        listed = bullets([*conflicts[:MOST_LISTED], *more])
        paragraphs = ["These images have two labels each, and are left out:", listed]
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
    if pairs := find_inseparable(judged, classes)[:MOST_LISTED]:
        named = [f"{cell(first)} and {cell(second)} ({percent(apart)})" for first, second, apart in pairs]
        paragraphs.append(
            f"Classes that are hardly told apart, with how often the right one of the two is more probable: "
            f"{', '.join(named)}. Are they one class, or their labels mixed up?"
        )
    return "\n\n".join([*paragraphs, tabulate_suspects(suspects)])


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

    `histories` and `selected`, the epoch kept, are of both phases; `candidates`: the heads tried, if any were, the kept
    one first; `line`: the points between start and end of fine-tuning, if they were measured, and `alpha` of the one
    kept; `images`: number of training images.
    """
    lines, weighted = [], "weighted " * (params.class_weights is not None)
    if candidates:
        head = candidates[0]
        kind = f"hidden layer, lr {head.lr:.2g}" if head.lr else f"linear, L2 penalty {head.penalty:.3g}"
        lines.append(
            f"Head phase: of {len(candidates)} heads tried by folds, this one has the lowest {weighted}out-of-fold "
            f"log-loss: {kind} ({number(head.loss)}, accuracy {percent(head.accuracy)}); `candidates.csv` has all."
        )
    for title, section, epochs, kept in zip(
        ("Head phase", "Fine-tuning"), ("train_head", "finetune"), histories, selected, strict=True
    ):
        phase, last, is_head = getattr(params, section), epochs[-1].number, section == "train_head"
        if line and not is_head:
            start, end = number(line[0].val_loss), number(line[-1].val_loss)
            losses = f"{weighted}validation loss {start} at the start, {end} at the end"
            best = next(point for point in line if point.alpha == alpha)
            text = f"kept {alpha:.0%} of the change; {losses}, {number(best.val_loss)} kept."
            if not alpha:
                text = f"kept the head checkpoint: no point towards the end has a lower validation loss ({losses})."
        elif not kept:
            text = "kept epoch 0, the head checkpoint: no epoch lowered the validation loss."
        else:
            loss = next(epoch.val_loss for epoch in epochs if epoch.number == kept)
            text = f"kept epoch {kept} of {last}; {weighted}validation loss {number(epochs[0].val_loss)} at the start, "
            text += f"{number(loss)} kept."
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


def describe_limits(evaluation: Evaluation, parts: dict[str, int], copies: int) -> list[str]:
    """Say how far the scores can be trusted; `parts`: number of counted images by part, `copies`: of others."""
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


def describe_probabilities(
    calibrations: Calibrations, validation: int, out_of_fold: int, identical: bool = False
) -> str:
    """Say what the temperatures changed, and how much to leave to a person.

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
        sides = (own.before, own.after, own.change)
        for name, key in (("log-loss", "loss"), ("Brier score", "brier")):
            before, after, change = (getattr(side, key) for side in sides)
            rows.append([f"{title}, {name}", _estimate(before), _estimate(after), _estimate(change, signed)])
        before, after, change = (side.ece for side in sides)
        rows.append([f"{title}, calibration error", percent(before), percent(after), points(change)])
    temperatures = calibrations.temperatures
    shown = " and ".join(f"{temperatures[model]:.3f} ({title})" for model, title in titles.items())
    fitted = f"fitted to {plural(validation, 'validation image')}"
    if out_of_fold:
        fitted = f"the head's is fitted to {plural(out_of_fold, 'out-of-fold prediction')}"
        if not identical:
            asked = f"changes it as {plural(validation, 'validation image')} ask for" if validation else "is the same"
            fitted += f", the fine-tuned network's {asked}"
    text = (
        f"All probabilities here, and those of `predict` and of the exported network, come from logits divided by a "
        f"[temperature](https://arxiv.org/abs/1706.04599): {shown}; {fitted}. It changes no prediction. Above 1, it "
        "makes a network less sure."
    )
    changes = table(["on the test images, 95% interval", "without", "with temperature", "change"], rows)
    return f"{text}\n\n{changes}\n\n{coverage}"


def _estimate(estimate: Estimate, write: Callable[[float], str] = number) -> str:
    return f"{write(estimate.value)} ({write(estimate.low)} to {write(estimate.high)})"
