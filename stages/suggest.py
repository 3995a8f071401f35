"""Which images to label next: folders of unlabelled images -> a table to fill in, and a contact sheet."""

import argparse
import shlex
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stages.common.cli import StageError, run
from stages.common.device import make_deterministic, resolve_device
from stages.common.format import plural
from stages.common.machine import resolve_workers, reuse_freed_memory
from stages.common.params import GROUP_RULES, load_params
from stages.deploy.classifier import Loaded, TorchNetwork, find_files, load
from stages.deploy.suggestions import (
    Floats,
    choose,
    collect_pool,
    draw_suggestions,
    leave_out_copies,
    write_suggestions,
)
from stages.images.collection import UNLABELLED
from stages.images.dataset import collect


def main() -> None:
    """Rank the images; write the table and the sheet."""
    parser = argparse.ArgumentParser(prog="python -m stages.suggest", description=__doc__)
    parser.add_argument("images", type=Path, nargs="+", help="files, and folders at any depth")
    parser.add_argument("--count", type=int, default=50, help="images to suggest; default: 50")
    parser.add_argument("--output", type=Path, default=Path("suggestions.csv"), help="and .png: the contact sheet")
    parser.add_argument("--checkpoint", type=Path, default=Path("data/checkpoints/finetuned.safetensors"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise StageError(f"--count: should be 1 or more, is {arguments.count}")
    if arguments.output.suffix.lower() != ".csv" or not arguments.output.parent.is_dir():
        raise StageError(f"--output: {arguments.output} should end in .csv, in a folder that is there")
    params = load_params(arguments.params)
    root, grey_max, workers = Path(params.data.path), params.data.grey_max, resolve_workers(params.workers)
    found = collect(params, root)
    paths, _ = find_files([path.absolute() for path in arguments.images])
    make_deterministic(0)
    reuse_freed_memory()
    network = TorchNetwork(arguments.checkpoint, resolve_device(params.device), params.precision)
    unlike = network.unlike
    if unlike is None:
        raise StageError("finetune writes what tells new images from those of training: run `dvc repro`")

    def look(some: Loaded) -> tuple[Floats, Floats, Floats]:
        probabilities, features = network.look(some.images)
        progress.update(len(some.paths))
        return probabilities.float().numpy(), features.numpy(), unlike(features).numpy()

    parts = load(paths, network, params.evaluate.batch_size, workers)
    with tqdm(total=len(paths), desc="predicting", unit=" images", disable=None) as progress, torch.inference_mode():
        pool, unreadable = collect_pool(parts, look)
    labelled = [sample.path for sample in found.samples if sample.path not in found.rejected]
    different = leave_out_copies(pool, labelled, root, grey_max, workers) if pool else None
    if not (pool and different and len(different.paths)):
        raise StageError(f"no image here is new: {plural(len(paths), 'file')}, {unreadable} of them unreadable")
    chosen = different.take(choose(different, unlike.nearest.numpy(), arguments.count))
    groups = params.split.group in GROUP_RULES
    inside = write_suggestions(arguments.output, found, root, chosen, network.classes, groups)
    sheet = arguments.output.with_suffix(".png")
    draw_suggestions(sheet, chosen, network.classes, network.preprocessing)
    strange = int(np.count_nonzero(chosen.unlike > 1))
    left = f"left out: {len(pool.paths) - len(different.paths):,} copies or near-duplicates, {unreadable:,} unreadable"
    print(f"{plural(len(chosen.paths), 'image')} of {len(paths):,} suggested; {left}")
    print(f"{strange} of them may be of no class: `unlike` is above 1")
    print(f"{sheet} shows them")
    if inside:
        grouped = ["-S", "split.group=column"] * (params.split.group == "folder")
        options = shlex.join(["-S", f"data.labels={arguments.output}", *grouped])
        print(f"fill in the column label of {arguments.output}, then: dvc exp run {options}")
    else:
        folder = root / UNLABELLED
        print(f"sort them into the folders of their classes; or move all into {folder}, for a table to fill in")


if __name__ == "__main__":
    run(main)
