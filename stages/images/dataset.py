"""Which images a data set has and what their labels are: by folders or a table, corrected by another table."""

from dataclasses import replace
from pathlib import Path

from stages.common.cli import StageError
from stages.common.files import read_csv
from stages.common.format import enumerate_names, plural
from stages.common.params import Params
from stages.images.collection import Collection, require_classes, set_groups
from stages.images.folders import read_folders
from stages.images.table import read_labels

# Beside the names of classes.
DROP = "drop"
_COLUMNS = ("path", "correction")


def collect(params: Params, root: Path) -> Collection:
    """List the images with their corrected labels and their groups, before any is read."""
    labels, corrections = params.data.labels, params.data.corrections
    if labels is None:
        found = read_folders(root, params.split.given)
    else:
        found = read_labels(root, Path(labels), params.split.given)
    if corrections is not None:
        correct(found, read_corrections(Path(corrections)), Path(corrections))
    require_classes(found, root, table=labels is not None)
    set_groups(found, params.split.group)
    return found


def read_corrections(table: Path) -> dict[str, str]:
    """Read a table with the columns `path` and `correction`, a class or `drop`; rows without a correction are skipped.

    Returns:
        Path below `data.path` -> correction.

    Raises:
        StageError: it is absent, not such a table, or corrects an image twice.
    """
    try:
        header, rows = read_csv(table)
        places = [header.index(name) for name in _COLUMNS]
    except FileNotFoundError as error:
        raise StageError(f"data.corrections: {table} does not exist; give a CSV file or null") from error
    except (OSError, ValueError) as error:
        raise StageError(f"data.corrections: {table} is no CSV with the columns path and correction") from error
    corrections: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise StageError(f"data.corrections: {table}, line {number}: not as many cells as the first line has")
        name, correction = (row[place] for place in places)
        if correction and corrections.setdefault(name, correction) != correction:
            raise StageError(f"data.corrections: {table}, line {number}: {name} has another correction above")
    return corrections


def correct(found: Collection, corrections: dict[str, str], table: Path) -> None:
    """Give images their corrected classes, and drop those that are to be dropped.

    Raises:
        StageError: a correction is no class of the data set.
    """
    classes = found.by_class()
    for name, correction in corrections.items():
        if correction != DROP and correction not in classes:
            raise StageError(
                f"data.corrections: {table}: {name} should be {correction}, which is no class of the data set "
                f"({enumerate_names(list(classes))}) and not {DROP}"
            )
    listed = {image.path for image in found.samples}
    wanted = {image.path: corrections.get(image.path, image.class_name) for image in found.samples}
    changed = sum(wanted[image.path] not in (image.class_name, DROP) for image in found.samples)
    dropped = {name for name, correction in wanted.items() if correction == DROP}
    found.samples = [
        replace(image, class_name=wanted[image.path]) for image in found.samples if image.path not in dropped
    ]
    found.rejected = {name: why for name, why in found.rejected.items() if name not in dropped}
    absent = len(corrections.keys() - listed)
    found.notes += [f"{plural(changed, 'label')} corrected, {plural(len(dropped), 'image')} dropped by {table.name}"]
    found.notes += [f"{plural(absent, 'row')} of {table.name} without an image"] * bool(absent)
