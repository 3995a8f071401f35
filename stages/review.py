"""A page on this machine to go through labels that may be wrong: keep, take the suggestion, or drop the image."""

import argparse
from pathlib import Path

from stages.common.cli import StageError, require_packages, run
from stages.common.files import read_table
from stages.common.params import load_params
from stages.scores.suspects import Suspect


def main() -> None:
    """Serve the page until Ctrl-C; each decision is on the disk before the page shows the next image."""
    parser = argparse.ArgumentParser(prog="python -m stages.review", description=__doc__)
    parser.add_argument("--suspects", type=Path, default=Path("metrics/suspects.csv"))
    parser.add_argument("--output", type=Path, help="table to extend; default: data.corrections, else corrections.csv")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    arguments = parser.parse_args()
    require_packages("serve", "starlette", "uvicorn")
    from stages.deploy.web import listen, make_review, measure_progress, serve

    data = load_params(arguments.params).data
    output = arguments.output or Path(data.corrections or "corrections.csv")
    suspects = read_table(arguments.suspects, Suspect, "evaluate")
    if not suspects:
        problem = "lists no image, so there is nothing to review; give another --suspects"
        raise StageError(f"{arguments.suspects}: {problem}")
    measure_progress(suspects, output)  # refuses a table that cannot be extended
    listening = listen("127.0.0.1", arguments.port)
    serve(make_review(suspects, Path(data.path), data.grey_max, output), listening)
    done = measure_progress(suspects, output)
    counts = ", ".join(f"{done[what]:,} {what}" for what in ("kept", "corrected", "dropped"))
    print(f"of {len(suspects):,} images {counts}")


if __name__ == "__main__":
    run(main)
