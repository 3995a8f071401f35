"""What the report says of the probabilities: what the temperatures changed, and how much to leave to a person."""

from stages.common.format import number, percent, plural, points, signed
from stages.report.markdown import table
from stages.scores.calibration import Calibrations, Estimate, describe_coverage

TITLES = {"head": "head phase", "finetuned": "fine-tuned"}
ONE = {"finetuned": "both checkpoints"}


def describe_probabilities(
    calibrations: Calibrations, validation: int, out_of_fold: int, identical: bool = False
) -> str:
    """Return it as Markdown.

    Args:
        calibrations: of both checkpoints.
        validation: number of images in the validation part.
        out_of_fold: number of images with out-of-fold predictions of the head.
        identical: whether both are the same network, which is then described once.
    """
    coverage = describe_coverage(calibrations.coverage)
    if not validation and not out_of_fold:
        return (
            "The probabilities are of the logits as they are: a temperature is fitted on validation images, and "
            f"there are none.\n\n{coverage}"
        )
    rows, titles = [], ONE if identical else TITLES
    for model, title in titles.items():
        own = getattr(calibrations, model)
        sides = (own.before, own.after, own.change)
        for name, key in (("log-loss", "loss"), ("Brier score", "brier")):
            before, after, change = (getattr(side, key) for side in sides)
            rows.append([f"{title}, {name}", _write(before), _write(after), _write(change, difference=True)])
        before, after, change = (side.ece for side in sides)
        rows.append([f"{title}, calibration error", percent(before), percent(after), points(change)])
    temperatures = calibrations.temperatures
    shown = " and ".join(f"{temperatures[model]:.3f} ({title})" for model, title in titles.items())
    fitted = f"fitted to {plural(validation, 'validation image')}"
    if out_of_fold:
        fitted = f"the head's is fitted to {plural(out_of_fold, 'out-of-fold prediction')}"
        if not identical:
            own = f"changes it as {plural(validation, 'validation image')} ask for" if validation else "is the same"
            fitted += f", the fine-tuned network's {own}"
    text = (
        f"All probabilities here, and those of `predict` and of the exported network, come from logits divided by a "
        f"[temperature](https://arxiv.org/abs/1706.04599): {shown}; {fitted}. It changes no prediction. Above 1, it "
        "makes a network less sure."
    )
    changes = table(["on the test images, 95% interval", "without", "with temperature", "change"], rows)
    return f"{text}\n\n{changes}\n\n{coverage}"


def _write(estimate: Estimate, difference: bool = False) -> str:
    write = signed if difference else number
    return f"{write(estimate.value)} ({write(estimate.low)} to {write(estimate.high)})"
