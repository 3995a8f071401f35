"""The fine-tuned checkpoint -> a folder to hand over: ONNX, safetensors, labels and a model card."""

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from stages.common.cli import StageError, require_packages, run
from stages.common.device import make_deterministic
from stages.common.files import read_record, replaced_files, sha256_of, write_json, write_text
from stages.common.machine import resolve_workers, reuse_freed_memory
from stages.common.params import flatten, load_params
from stages.deploy.card import compose_card
from stages.deploy.classifier import TorchNetwork, require_same
from stages.deploy.onnx import OnnxNetwork, write_onnx
from stages.images.index import count_once, read_index, read_summary
from stages.network.backbones import cut_into_blocks, names_in_torchvision, stock_shapes
from stages.network.checkpoint import load_checkpoint, require_classes
from stages.scores.calibration import Calibrations
from stages.scores.evaluation import read_evaluation
from stages.training.reference import read_reference


def main() -> None:
    """Export the network, and make sure on the test images that it is still the same."""
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("exported"), help="folder; default: exported")
    parser.add_argument("--checkpoint", type=Path, default=Path("data/checkpoints/finetuned.safetensors"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--index", type=Path, default=Path("data/index"), help="folder with test.csv")
    parser.add_argument("--metrics", type=Path, default=Path("metrics"), help="folder that the stages wrote")
    arguments = parser.parse_args()
    require_packages("export", "onnx", "onnxruntime", "onnxscript")
    require_replaceable(arguments.output)
    params = load_params(arguments.params)
    make_deterministic(params.seed)
    reuse_freed_memory()

    network, description = load_checkpoint(arguments.checkpoint)
    test = count_once(read_index(arguments.index / "test.csv"))
    require_classes(arguments.checkpoint, description, test)
    evaluation, split = read_evaluation(arguments.metrics), read_summary(arguments.metrics / "split.json")
    sha256 = sha256_of(arguments.checkpoint)
    tested = read_record(arguments.metrics / "calibration.json", Calibrations, "evaluate")
    if tested.finetuned.checkpoint != sha256:
        raise StageError(f"{arguments.metrics}: the scores are not those of {arguments.checkpoint}; run `dvc repro`")
    root, reference = Path(params.data.path), read_reference(arguments.checkpoint)
    recipe = flatten({"split": split.get("settings", {}), **description.recipe})

    with replaced_files(arguments.output) as folder:
        shutil.copyfile(arguments.checkpoint, folder / "model.safetensors")
        write_onnx(folder / "model.onnx", network, description, sha256, reference)
        stock = stock_shapes(description.arch, description.preprocessing.crop)
        write_json(folder / "torchvision_names.json", names_in_torchvision(cut_into_blocks(stock), stock))
        write_text(folder / "labels.txt", name_lines(description.classes))
        compared = "not compared with the checkpoint: the test images are not on the machine that exported it"
        if root.is_dir():
            original = TorchNetwork(arguments.checkpoint, torch.device("cpu"), "float32")
            exported, workers = OnnxNetwork(folder / "model.onnx"), resolve_workers(params.workers)
            compared = require_same(original, exported, root, test, workers)
        tells = reference is not None
        card = compose_card(network, description, root.name, split, recipe, evaluation, compared, len(test), tells)
        write_text(folder / "README.md", card)
    print(compared)
    print(f"exported to {arguments.output}; README.md there says how to use it")


def name_lines(names: Iterable[str]) -> str:
    """Return names as they are, a line each; what would break a line becomes a space."""
    return "".join(f"{' '.join(name.splitlines())}\n" for name in names)


def require_replaceable(folder: Path) -> None:
    """Refuse to write over what is no earlier export."""
    if folder.exists() and not (folder.is_dir() and ((folder / "model.onnx").exists() or not any(folder.iterdir()))):
        raise StageError(f"--output: {folder} is there, and is no earlier export; choose another name")


if __name__ == "__main__":
    run(main)
