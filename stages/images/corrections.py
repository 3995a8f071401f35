"""Corrected labels: a table beside the images, which stay as they are."""

from dataclasses import replace
from pathlib import Path

from stages.common.cli import StageError
from stages.common.files import read_csv
from stages.common.format import enumerate_names, plural
from stages.images.collection import Collection

# Beside the names of classes.
DROP = "drop"
_COLUMNS = ("path", "correction")


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
