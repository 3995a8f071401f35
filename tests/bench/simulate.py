"""Measure what grows with the number of images, without the images: time and memory of each rule on fake entries.

`python tests/bench/simulate.py 100000 1000000`. Each measurement runs in a process of its own, whose peak memory is all
that was resident, imports included; a first row says what imports alone take. What a measurement needs is prepared in
another process.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from stages.images.index import Entry
    from stages.training.features import FrozenPrefix

Measured = Callable[[], object]

ROOT = Path(__file__).parents[2]
CLASSES = 100
# Rows in a file of activations: 64 MiB of what its backbone makes of an image of 224 px, float32.
ROWS_A_FILE = 357
BATCH, FEATURES = 64, 1280
# Blocks that fine-tuning trains: the tutorial's and the default.
UNFREEZE = (3, 9)

# What is measured imports what it needs, and no more: memory would tell of it.


def fake_entries(count: int) -> "list[Entry]":
    """Return entries of many classes; one image in a hundred has a copy."""
    from stages.images.index import Entry

    return [
        Entry(f"class {label:03d}/image {number:09d}.jpg", label, f"class {label:03d}", fake_hash(number))
        for number, label in ((number, number % CLASSES) for number in range(count))
    ]


def fake_hash(number: int) -> str:
    """Return a SHA-256; one number in a hundred shares it with another of its class."""
    original = number - CLASSES if number // CLASSES % 100 == 1 else number
    return hashlib.sha256(str(original).encode()).hexdigest()


def measure_imports(_: int, __: Path) -> Measured:
    """Load what all but `split` and the index need."""

    def load() -> None:
        import stages.training.batches  # noqa: F401

    return load


def measure_split(count: int, folder: Path) -> Measured:
    """Run `split` on fake files: finding copies, dividing, counting, writing. Nothing is decoded.

    No image has contrast, so none is compared with others: the search has a row of its own.
    """
    from stages import split
    from stages.images.check import Checked
    from stages.images.collection import Collection, Sample
    from stages.images.near_duplicates import SIDE

    found, checked = Collection(), {}
    for entry in fake_entries(count):
        found.samples.append(Sample(entry.path, entry.class_name, entry.path.partition("/")[2]))
        checked[entry.path] = Checked(entry.sha256, 4, 3, small=bytes(SIDE * SIDE))
    vars(split).update(collect=lambda *_: found, check_images=lambda *_: checked)
    sys.argv[1:] = ["--params", str(ROOT / "params.yaml"), "--index", str(folder), "--report", str(folder / "s.json")]
    sys.argv += ["--near-duplicates", str(folder / "near.csv")]
    return split.main


def measure_writing(count: int, folder: Path) -> Measured:
    """Write one index file with all images."""
    from stages.images.index import write_index

    return partial(write_index, folder / "index.csv", fake_entries(count))


def prepare_index(count: int, folder: Path) -> None:
    """Write that file."""
    measure_writing(count, folder)()


def measure_reading(_: int, folder: Path) -> Measured:
    """Read it."""
    from stages.images.index import read_index

    return partial(read_index, folder / "index.csv")


def prepare_store(count: int, folder: Path) -> None:
    """Write a store with as many files as real activations take, but with tiny rows."""
    import torch

    from stages.training.features import Writer

    entries = fake_entries(count)
    for first in range(0, count, ROWS_A_FILE):
        some = entries[first : first + ROWS_A_FILE]
        writer = Writer(folder / "store", {entry.sha256 for entry in some})
        writer.add(some, torch.zeros(len(some), 1))
        writer.flush()


def measure_finding(count: int, folder: Path) -> Measured:
    """Find the kept rows of all images."""
    from stages.training.features import find

    return partial(find, folder / "store", fake_entries(count))


def measure_epoch(count: int, folder: Path) -> Measured:
    """Read the kept rows of all images once, in batches of 64, in a shuffled order."""
    from stages.training.batches import open_batches
    from stages.training.features import find

    prefix, entries = _fake_prefix(folder), fake_entries(count)
    kept = find(folder / "store", entries)
    if missing := kept.missing(entries):
        sys.exit(f"{len(missing):,} of {count:,} rows are not found")

    def read() -> None:
        for _ in open_batches(prefix, entries, kept, BATCH, shuffle_seed=0):
            pass

    return read


def _fake_prefix(folder: Path) -> "FrozenPrefix":
    import torch
    from torch import nn

    from stages.images.preprocessing import Preprocessing
    from stages.training.features import FrozenPrefix

    return FrozenPrefix(nn.Sequential(), folder, Preprocessing(crop=32), torch.device("cpu"), "float32", 0)


def measure_near_duplicates(count: int, _: Path) -> Measured:
    """Search all images for pairs that are nearly the same."""
    import numpy as np

    from stages.images.near_duplicates import SIDE, find_pairs

    noise = np.random.default_rng(0).normal(size=(count, SIDE, SIDE)).cumsum(axis=1).cumsum(axis=2)
    small = (128 + 40 * noise / noise.std(axis=(1, 2), keepdims=True)).clip(0, 255).astype(np.uint8)
    return partial(find_pairs, [one.tobytes() for one in small])


def measure_search(count: int, _: Path) -> Measured:
    """Find the head on made-up features of 1,280 values, nine in ten images to train on."""
    import torch

    from stages.common.params import load_params
    from stages.training.phase import Entries
    from stages.training.search import find_head

    entries = fake_entries(count)
    middles = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))

    def read(some: "list[Entry]") -> "Iterator[torch.Tensor]":
        generator = torch.Generator().manual_seed(1)
        for first in range(0, len(some), 1024):
            labels = torch.tensor([entry.label for entry in some[first : first + 1024]])
            yield 0.2 * middles[labels] + torch.randn(len(labels), FEATURES, generator=generator)

    phase, parts = (
        load_params(ROOT / "params.yaml").train_head,
        Entries(entries[count // 10 :], entries[: count // 10], False),
    )
    return partial(find_head, read, parts, 500, phase, None, 0, torch.device("cpu"))


def measure_evaluation(count: int, _: Path) -> Measured:
    """Score both networks on a fifth of the images, with all intervals, and look for labels that may be wrong."""
    import numpy as np

    from stages.scores.calibration import measure_calibrations
    from stages.scores.evaluation import evaluate, score_classes
    from stages.scores.predictions import Predictions
    from stages.scores.suspects import estimate_wrong_labels, find_suspects

    chance, tested = np.random.default_rng(0), fake_entries(count // 5)
    labels = np.array([entry.label for entry in tested])
    both = []
    for sure in (4.0, 5.0):
        logits = chance.normal(size=(len(labels), CLASSES))
        logits[np.arange(len(labels)), labels] += sure
        both.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    names = sorted({entry.class_name for entry in tested})
    predictions = Predictions([entry.path for entry in tested], labels, names, *both)

    def score() -> None:
        counts = {"train": count, "val": count, "test": len(labels)}
        split: dict[str, Any] = {"rejected": [], "notes": [], "classes": {"all": counts}}
        evaluate(predictions, None, score_classes(predictions), split, [], identical=False)
        measure_calibrations(predictions, (1.1, 1.2), ("", ""), (labels, both[1]))
        find_suspects(predictions.paths, labels, both[1], names)
        estimate_wrong_labels(labels, both[1])

    return score


# Title, what prepares it, what makes ready for it in the same process and returns what is timed.
MEASUREMENTS: dict[str, tuple[str, Callable[[int, Path], None] | None, Callable[[int, Path], Measured]]] = {
    "imports": ("imports", None, measure_imports),
    "split": ("`split`, without reading or comparing the images", None, measure_split),
    "writing": ("writing an index file", None, measure_writing),
    "reading": ("reading it", prepare_index, measure_reading),
    "finding": ("finding kept activations", prepare_store, measure_finding),
    "epoch": ("reading their rows, one epoch (tiny rows)", prepare_store, measure_epoch),
    "near": ("search for near-duplicates", None, measure_near_duplicates),
    "search": ("search for the head, 1,280 features", None, measure_search),
    "evaluation": ("scores of a fifth of them, 100 classes", None, measure_evaluation),
}


def simulate(counts: list[int], folder: Path) -> Iterable[str]:
    """Yield a table, line by line: each measurement, with each number of images."""
    yield f"| | {' | '.join(f'{count:,} images' for count in counts)} |"
    yield f"|---|{'---:|' * len(counts)}"
    for name, (title, prepare, _) in MEASUREMENTS.items():
        cells = []
        for count in counts:
            own = folder / f"{prepare.__name__ if prepare else name}-{count}"
            if not own.exists():
                own.mkdir()
                if prepare:
                    call("prepare", name, count, own)
            seconds, kibibytes = json.loads(call("measure", name, count, own).splitlines()[-1])
            cells.append(f"{seconds:.2f} s, {kibibytes / 2**20:.2f} GiB")
        yield f"| {title} | {' | '.join(cells)} |"
    for unfreeze in UNFREEZE:
        size = float(call("kept", "", unfreeze, folder))
        cells = [f"{size * count / 1e9:.2f} GB" for count in counts]
        yield f"| kept for both phases, pooled head, 224 px, `unfreeze: {unfreeze}` | {' | '.join(cells)} |"


def call(*arguments: object) -> str:
    """Run a part of this script in a process of its own, and return what it prints.

    Raises:
        SystemExit: it failed; with the end of what it printed.
    """
    command = [sys.executable, __file__, "--part", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: failed\n{process.stderr[-2000:]}")
    return process.stdout


def measure_kept(unfreeze: int, folder: Path) -> float:
    """Return the bytes an image of what both phases keep of it, from files with as many rows as real ones."""
    import torch

    from stages.network.backbones import stock_model
    from stages.network.network import build_network, cut
    from stages.training.features import Writer

    network = build_network(stock_model("mobilenet_v3_large"), "pooled", 500, 1, 224).eval()
    entries = fake_entries(ROWS_A_FILE)
    for phase, trained in (("head", 0), ("finetune", unfreeze)):
        with torch.inference_mode():
            row = cut(network, trained)[0](torch.zeros(1, 3, 224, 224))
        writer = Writer(folder / f"kept-{unfreeze}" / phase, {entry.sha256 for entry in entries})
        writer.add(entries, row.expand(len(entries), *row.shape[1:]))
        writer.flush()
    files = (folder / f"kept-{unfreeze}").rglob("*.safetensors")
    return sum(path.stat().st_size for path in files) / len({entry.sha256 for entry in entries})


def run_part(part: str, name: str, count: int, folder: Path) -> None:
    """Prepare a measurement, or make it and print its seconds and its peak memory in KiB."""
    if part == "kept":
        print(measure_kept(count, folder))
        return
    _, prepare, measure = MEASUREMENTS[name]
    if part == "prepare" and prepare:
        prepare(count, folder)
        return
    measured = measure(count, folder)
    started = time.perf_counter()
    measured()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, peak // 1024 if sys.platform == "darwin" else peak]))


def main() -> None:
    """Measure in a temporary folder that goes in any case, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="*", default=[25_000, 100_000], help="how many; at least 500")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, name, count, folder = options.part
        sys.path.insert(0, str(ROOT))
        from stages.common.compiler import postpone_compiler

        postpone_compiler()  # as `python -m stages.NAME` does
        run_part(part, name, int(count), Path(folder))
        return
    if min(options.images) < 500:
        parser.error("give 500 images or more: each class needs a few")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for line in simulate(options.images, Path(name)):
            print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
