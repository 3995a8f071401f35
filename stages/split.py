"""Step 1: a folder of labelled images -> the index files of train, validation and test."""

import argparse
import sys
from pathlib import Path

from stages.common.cli import run
from stages.common.files import write_json, write_table
from stages.common.machine import resolve_workers
from stages.common.params import load_params
from stages.images.check import (
    check_images,
    describe_grey,
    describe_remarks,
    describe_shapes,
    find_forms,
    find_shortcuts,
    require_no_masks,
    require_usable,
)
from stages.images.dataset import collect, describe_untracked
from stages.images.division import divide, find_copies, find_overlap, join_groups
from stages.images.index import (
    Entry,
    count_once,
    describe_changes,
    find_kept,
    last_line,
    say_changes,
    summarize,
    write_index,
)
from stages.images.near_duplicates import (
    Leak,
    count_flat,
    describe_near_duplicates,
    find_leaks,
    find_pairs,
    form_groups,
)


def main() -> None:
    """Check every image once, divide the good ones, and report the bad ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder for train.csv, val.csv and test.csv")
    parser.add_argument("--report", type=Path, required=True, help="JSON file for the counts")
    parser.add_argument("--near-duplicates", type=Path, required=True, help="CSV file to write: pairs across parts")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    root, split = Path(params.data.path), params.split

    found = collect(params, root)
    to_check = [image.path for image in found.samples if image.path not in found.rejected]
    checked = check_images(root, to_check, params.data.grey_max, resolve_workers(params.workers))
    damaged = {path: result.problem for path, result in checked.items() if result.problem is not None}
    hashes = {path: result.sha256 for path, result in checked.items() if result.problem is None}
    duplicates, contradictions = find_copies(hashes, {image.path: image.class_name for image in found.samples})
    rejected = dict(sorted({**found.rejected, **damaged, **contradictions}.items()))
    require_usable(root, found, rejected, split.rejected_limit)
    if params.data.labels is None and split.given == "auto":
        require_no_masks(root, found, checked)

    part_of = {image.path: image.part for image in found.samples}
    overlap = find_overlap(hashes, part_of, rejected)
    label_of = {name: label for label, name in enumerate(found.by_class())}
    entries = [
        Entry(one.path, label_of[one.class_name], one.class_name, hashes[one.path], one.group)
        for one in found.samples
        if one.path not in rejected and one.path not in overlap
    ]
    different = count_once(sorted(entries, key=lambda entry: entry.path))
    small = [checked[entry.path].small for entry in different]
    near = find_pairs(small)
    together = form_groups([entry.sha256 for entry in different], near) if split.near_duplicates == "together" else {}
    kept = find_kept(arguments.index, arguments.params, params)
    seed = params.seed if split.seed is None else split.seed
    parts = divide(join_groups(entries, together), part_of, split, seed, kept)
    changes = describe_changes(arguments.index, parts)
    for part, chosen in parts.items():
        write_index(arguments.index / f"{part}.csv", chosen, grouped=split.group is not None or bool(together))
    leaks = find_leaks(near, different, {entry.path: part for part, chosen in parts.items() for entry in chosen})
    write_table(arguments.near_duplicates, Leak, leaks)
    facts = [checked[entry.path] for entry in entries]
    report = summarize(found, parts, part_of, rejected, duplicates, overlap)
    report |= {
        "shapes": describe_shapes(facts),
        "flat": count_flat(small) / len(small),
        "near_duplicates": [[different[one].path, different[other].path] for one, other, _ in near],
        "changes": changes,
        "settings": split.model_dump(),
        "notes": [
            *say_changes(changes),
            *report["notes"],
            *describe_near_duplicates(near, different, together, leaks, count_flat(small)),
            *describe_grey(facts, params.data.grey_max),
            *describe_remarks(facts),
            *find_forms(found, checked),
            *find_shortcuts(facts, [entry.class_name for entry in entries]),
        ],
    }
    write_json(arguments.report, report)
    print(last_line(report, arguments.report))
    if warning := describe_untracked(root):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    run(main)
