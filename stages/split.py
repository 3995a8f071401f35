"""Step 1: a folder of labelled pictures -> the index files of train, validation and test."""

import argparse
from pathlib import Path

from stages.common.files import write_json
from stages.common.params import load_params
from stages.common.stage import run
from stages.common.workers import resolve_workers
from stages.pictures.division import assign, find_copies
from stages.pictures.index import Entry, count, write_index
from stages.pictures.scan import check_pictures, find_pictures, require_usable
from stages.pictures.summary import describe_classes


def main() -> None:
    """Check every picture once, divide the good ones, and report the bad ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--index", type=Path, required=True, help="folder for train.csv, val.csv and test.csv")
    parser.add_argument("--report", type=Path, required=True, help="JSON file for the counts")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    root = Path(params.data.path)

    scan = find_pictures(root)
    class_of = {path: name for name, paths in scan.pictures.items() for path in paths}
    hashes, damaged = check_pictures(root, list(class_of), resolve_workers(params.workers))
    duplicates, contradictions = find_copies(hashes, class_of)
    rejected = dict(sorted({**scan.rejected, **damaged, **contradictions}.items()))
    require_usable(scan, rejected, params.split.rejected_limit)

    label_of = {name: label for label, name in enumerate(scan.pictures)}
    entries = [
        Entry(path, label_of[class_of[path]], class_of[path], digest)
        for path, digest in hashes.items()
        if path not in rejected
    ]
    parts = assign(entries, params.split.test_size, params.split.val_size, params.seed)
    for part, chosen in parts.items():
        write_index(arguments.index / f"{part}.csv", chosen)
    report = {
        "pictures": len(entries),
        **describe_classes(count(parts)),
        "rejected": [{"path": path, "reason": reason} for path, reason in rejected.items()],
        "duplicates": duplicates,
        "ignored": dict(sorted(scan.ignored.items())),
    }
    write_json(arguments.report, report)
    print(", ".join(f"{part} {len(chosen)}" for part, chosen in parts.items()), end="")
    print(f"; {len(rejected)} rejected, {len(duplicates)} groups of copies: see {arguments.report}")


if __name__ == "__main__":
    run(main)
