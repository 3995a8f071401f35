"""Time this pipeline's stages against a tutorial's loop on the same images, and print Markdown tables.

Every part runs in a fresh process, one after the other, in a temporary folder with a cache of its own. Both train on
the same images and watch the same test images. The seconds of a stage are those of its whole process; the
tutorial's are those of its epochs alone. Of several seeds, seconds are means and memory is the largest.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.project import BENCH, PROC, ROOT, Project, class_folders, run

TUTORIAL = "tutorial"


class Row(NamedTuple):
    """A row of a table, and the unit of what is in it: s, GiB or a fraction."""

    title: str
    unit: str


HEAD = Row("first run: head phase", "s")
FINETUNE = Row("first run: fine-tuning", "s")
BOTH = Row("first run: both phases", "s")
DEFAULTS = Row("the defaults, first run: both phases", "s")
OTHER_HEAD = Row("another train_head.lr: both phases", "s")
OTHER_FINETUNE = Row("another finetune.lr: fine-tuning", "s")
START = Row("start-up: imports (the tutorial: all before its first epoch)", "s")
HEAD_MEMORY = Row("peak memory, head phase", "GiB")
FINETUNE_MEMORY = Row("peak memory, fine-tuning", "GiB")


class Table:
    """Values by row and column. Rows are printed by unit, and in the order in which they came."""

    def __init__(self) -> None:
        self.values: dict[Row, dict[str, list[float]]] = {}

    def add(self, row: Row, column: str, value: float) -> None:
        """Add a value to a cell."""
        self.values.setdefault(row, {}).setdefault(column, []).append(value)

    def cell(self, row: Row, column: str) -> str:
        """Return what a cell shows of its values."""
        values = self.values[row].get(column)
        if not values:
            return "-"
        if row.unit == "GiB":
            return f"{max(values):.2f} GiB"
        mean = sum(values) / len(values)
        return f"{mean:.1f} s" if row.unit == "s" else f"{mean:.2%}"

    def ratio(self, row: Row, column: str) -> str:
        """Return how many times as long the tutorial takes."""
        values = self.values[row]
        if row.unit != "s" or not {TUTORIAL, column} <= values.keys():
            return "-"
        return f"{sum(values[TUTORIAL]) / sum(values[column]):.1f} x"

    def lines(self, columns: list[str]) -> Iterable[str]:
        """Yield the table in Markdown: the tutorial, and each of `columns` with its ratio."""
        yield markdown("", TUTORIAL, *(title for column in columns for title in (f"pipeline, {column}", "ratio")))
        yield "|---|" + "---:|" * (1 + 2 * len(columns))
        for row in sorted(self.values, key=lambda row: ("s", "fraction", "GiB").index(row.unit)):
            ours = (text for column in columns for text in (self.cell(row, column), self.ratio(row, column)))
            yield markdown(row.title, self.cell(row, TUTORIAL), *ours)


def markdown(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


class TutorialProject(Project):
    """A project with the tutorial's setting, on some of the images; `made`: how many had to be made for that."""

    def __init__(self, folder: Path, options: argparse.Namespace, seed: int, factor: int) -> None:
        super().__init__(folder)
        self.made = gather(options.data, folder / "images", options.limit, factor)
        self.defaults = {name: self.params[name] for name in ("model", "train_head", "finetune")}
        phase = {"epochs": options.epochs, "batch_size": 64, "optimizer": "adam", "weight_decay": 0.0}
        phase |= {"schedule": "constant", "warmup": 0.0, "clip_norm": None, "label_smoothing": 0.0}
        # The tutorial keeps its last epoch, and stops for nothing.
        phase |= {"augment": "none", "select": "last", "patience": None}
        weights = None if options.weights is None else str(options.weights)
        self.set("seed", seed)
        self.set("data", path=str(folder / "images"))
        self.set("split", val_size=0.0)
        self.set("model", arch="mobilenet_v3_large", weights=weights, head="flatten", hidden=500)
        self.set("model", image_size=options.image_size)
        self.set("train_head", lr=1e-3, **phase)
        self.set("finetune", lr=1e-5, layer_decay=1.0, unfreeze=3, **phase)

    def count(self) -> str:
        """Say how many images each part has."""
        parts = self.read("metrics/split.json")["parts"]
        return ", ".join(f"{parts[part]:,} {part}" for part in ("train", "test"))


def gather(data: Path, folder: Path, limit: int | None, factor: int) -> int:
    """Link the images of each class, `factor` times as many; return how many had to be made for that.

    One that is made is another image with one pixel changed, so that its file is like no other.
    """
    made = 0
    for source in class_folders(data):
        files = [path.resolve() for path in sorted(source.rglob("*")) if path.suffix.lower() in IMG_EXTENSIONS]
        count = min(limit or len(files), len(files))
        (folder / source.name).mkdir(parents=True)
        for number in range(count * factor):
            file = files[number % len(files)]
            target = folder / source.name / f"{number:07d}{file.suffix}"
            if number < len(files):
                target.symlink_to(file)
                continue
            with suppress(OSError, SyntaxError), Image.open(file) as image:
                changed = image.convert("RGB")
                at = (number // len(files) % changed.width, 0)
                red, green, blue = changed.getpixel(at)  # type: ignore[misc] # RGB
                changed.putpixel(at, (255 - red, 255 - green, 255 - blue))
                changed.save(target, quality=95)
                made += 1
    return made


def measure_tutorial(project: Project, options: argparse.Namespace, seed: int, table: Table) -> str:
    """Run the tutorial's loop, and return the kind of device that it ran on."""
    tutorial = project.run_tutorial(options.epochs)
    report = tutorial.json()
    head, finetune = report["head"]["seconds"], report["finetuned"]["seconds"]
    both = head + finetune
    seconds = {HEAD: head, FINETUNE: finetune, BOTH: both, OTHER_HEAD: both, OTHER_FINETUNE: finetune}
    for row, value in {**seconds, DEFAULTS: both, START: tutorial.seconds - both - report["scoring"]}.items():
        table.add(row, TUTORIAL, value)
    for row in (HEAD_MEMORY, FINETUNE_MEMORY):
        table.add(row, TUTORIAL, tutorial.memory)
    add_accuracies(report, seed, TUTORIAL, table)
    return str(report["device"])


def measure_pipeline(project: Project, precision: str, seed: int, table: Table) -> None:
    """Run the phases from a cold cache, then with another rate of the head phase, then of the fine-tuning phase."""
    project.set("precision", precision)
    head, finetune = project.run("train_head"), project.run("finetune")
    evaluate = project.run("evaluate")
    add_accuracies(project.read("metrics/scores.json"), seed, precision, table)
    project.set("train_head", lr=5e-4)
    other_head, after_it = project.run("train_head"), project.run("finetune")
    project.set("finetune", lr=2e-5)
    other_finetune = project.run("finetune")
    project.set("train_head", lr=1e-3)
    project.set("finetune", lr=1e-5)

    table.add(HEAD, precision, head.seconds)
    table.add(FINETUNE, precision, finetune.seconds)
    table.add(BOTH, precision, head.seconds + finetune.seconds)
    table.add(OTHER_HEAD, precision, other_head.seconds + after_it.seconds)
    table.add(OTHER_FINETUNE, precision, other_finetune.seconds)
    table.add(START, precision, run(project.folder, "-m", "stages.train_head", "--help").seconds)
    table.add(Row("evaluate", "s"), precision, evaluate.seconds)
    table.add(HEAD_MEMORY, precision, max(head.memory, other_head.memory))
    table.add(FINETUNE_MEMORY, precision, max(finetune.memory, after_it.memory, other_finetune.memory))


def measure_defaults(project: TutorialProject, precision: str, seed: int, table: Table) -> None:
    """Run both phases as `params.yaml` has them, from a cold cache, on the tutorial's images."""
    own = {key: project.params["model"][key] for key in ("weights", "image_size")}
    for name, values in project.defaults.items():
        project.set(name, **values)
    project.set("model", **own)
    project.set("precision", precision)
    for stage in ("split", "build_model"):
        project.run(stage)
    table.add(DEFAULTS, precision, project.run("train_head").seconds + project.run("finetune").seconds)
    project.run("evaluate")
    add_accuracies(project.read("metrics/scores.json"), seed, precision, table, "the defaults: ")


def add_accuracies(report: dict[str, Any], seed: int, column: str, table: Table, of: str = "") -> None:
    """Add the test accuracy after each phase."""
    for name, phase in (("head", " after the head phase"), ("finetuned", ", fine-tuned")):
        table.add(Row(f"{of}test accuracy{phase}, seed {seed}", "fraction"), column, report[name]["accuracy"])


def compare(folder: Path, options: argparse.Namespace) -> Iterable[str]:
    """Yield the table of both, over all seeds and precisions."""
    table, device, images = Table(), "", ""
    first_seed = yaml.safe_load((ROOT / "params.yaml").read_text())["seed"]
    for seed in range(first_seed, first_seed + options.seeds):
        project = TutorialProject(empty(folder / "project"), options, seed, factor=1)
        prepare = {stage: project.run(stage).seconds for stage in ("split", "build_model")}
        images = project.count()
        if not options.skip_tutorial:
            device = f"{measure_tutorial(project, options, seed, table)}, "
        for precision in options.precision:
            measure_pipeline(project, precision, seed, table)
            measure_defaults(
                TutorialProject(empty(folder / "defaults"), options, seed, factor=1), precision, seed, table
            )
            for stage, seconds in prepare.items():
                table.add(Row(stage, "s"), precision, seconds)
    setting = f"{options.image_size} px, {options.epochs} + {options.epochs} epochs"
    yield f"Images: {images}; {setting}, {device}{os.cpu_count()} CPU cores."
    yield ""
    yield from table.lines(options.precision)


def scale(folder: Path, options: argparse.Namespace) -> Iterable[str]:
    """Yield the table of cost against number of images, in the first precision."""
    yield markdown("", "images", "train_head", "finetune", HEAD_MEMORY.title, FINETUNE_MEMORY.title, "made")
    yield "|---|" + "---:|" * 6
    made = 0
    for factor in options.scale:
        seed = yaml.safe_load((ROOT / "params.yaml").read_text())["seed"]
        project = TutorialProject(empty(folder / "project"), options, seed, factor)
        project.set("precision", options.precision[0])
        _, _, head, finetune = (project.run(stage) for stage in ("split", "build_model", "train_head", "finetune"))
        seconds = (f"{stage.seconds:.1f} s" for stage in (head, finetune))
        memory = (f"{stage.memory:.2f} GiB" for stage in (head, finetune))
        yield markdown(f"x {factor}", project.count(), *seconds, *memory, f"{project.made:,}")
        made += project.made
    if made:
        yield ""
        yield "Made: copies of other images with one pixel changed, where there are not enough."


def empty(folder: Path) -> Path:
    """Make a folder, or make it empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def parse_options() -> argparse.Namespace:
    """Parse the command line; refuse what cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images a class; default: the digits, at 64 px")
    parser.add_argument("--weights", default=ROOT / "data/glyphs/backbone.safetensors", help="a file, or null: random")
    parser.add_argument("--epochs", type=int, default=5, help="of each phase")
    parser.add_argument("--limit", type=int, help="images a class")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--image-size", type=int, help="pixels; default 224")
    parser.add_argument("--scale", type=int, nargs="*", default=[1, 2, 4], help="times as many images")
    parser.add_argument("--skip-tutorial", action="store_true")
    parser.add_argument("--simulate", nargs="+", metavar="N", help="only what grows with so many images: simulate.py")
    parser.add_argument("--sets", metavar="DIR", help="only every set of images in a folder: sets.py has its options")
    options, others = parser.parse_known_args()
    if options.sets is not None:
        os.execv(sys.executable, [sys.executable, str(BENCH / "sets.py"), *sys.argv[1:]])
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data: {options.data}: no such folder")
    options.weights = None if options.weights == "null" else Path(options.weights).resolve()
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"--weights: {options.weights}: no such file")
    options.image_size = options.image_size or (64 if options.data is None else 224)
    return options


def main() -> None:
    """Measure in a temporary folder that goes in any case, and print as the tables grow."""
    options = parse_options()
    if options.simulate:
        # A process of its own: one that has loaded as much as this one would count in the memory of those it starts.
        sys.exit(subprocess.call([sys.executable, BENCH / "simulate.py", *options.simulate]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if options.data is None:
            options.data = folder / "digits"
            run(folder, ROOT / "data" / "digits" / "make.py", "--output", options.data)
        for line in compare(folder, options):
            print(line, flush=True)
        print("\nMemory: " + ("anonymous, page cache aside." if PROC.is_dir() else "resident, page cache included."))
        if options.scale:
            print()
        for line in scale(folder, options) if options.scale else ():
            print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("error: interrupted")
