"""Where the time of each stage goes, and what this machine could do: `python tests/bench/limits.py --data PHOTOS`.

The stages run as `dvc.yaml` says, with the defaults and from a cold cache, then `finetune` again with another rate;
each in a process of its own that counts the seconds in some of its functions. Images are decoded in that process
(`workers: 0`), so that decoding can be counted: with the default, several processes decode while the network computes.
"""

import argparse
import builtins
import importlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.project import ROOT, Project, run

# What counts as what: the functions of modules; of nested ones, the inner one has the time.
COUNTED = {
    "reading": ["stages.images.decode.read_image"],
    "decoding": ["stages.images.decode.decode", "stages.images.decode.decode_with_facts"],
    "resizing": ["torchvision.transforms.v2.Compose.forward"],
    "frozen blocks": ["stages.training.features.FrozenPrefix.forward"],
    "forward": ["stages.training.loop.Trainer._forward"],
    "backward": ["torch.Tensor.backward"],
    "optimizer": ["torch.optim.Adam.step", "torch.optim.AdamW.step"],
    "kept rows": ["stages.training.features.find", "stages.training.features.Kept.gather"],
    "search": ["stages.training.search.search", "stages.training.search._train_again"],
    "near-duplicates": ["stages.images.near_duplicates.find_pairs"],
    "scores": ["stages.scores.evaluation.evaluate"],
    "Grad-CAM": ["stages.report.gradcam.grad_cam"],
    "drawing": ["stages.report.style.save_figure"],
    "writing": ["stages.common.files.write_bytes", "stages.common.files.write_text"],
}
STAGES = ("split", "build_model", "train_head", "finetune", "evaluate", "plot")


def count_stage(stage: str) -> None:
    """Run a stage in this process, with the rest of the command line, and print what it spent where, as JSON."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    open_calls: list[float] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: object, **options: object) -> object:
            begun = time.perf_counter()
            open_calls.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                took = time.perf_counter() - begun
                seconds[name] = seconds.get(name, 0.0) + took - open_calls.pop()
                if open_calls:
                    open_calls[-1] += took

        return call

    compiler = importlib.import_module("stages.common.compiler")
    compiler.postpone_compiler()  # as `python -m` does
    page = importlib.import_module(f"stages.{stage}")
    seconds["imports"] = time.perf_counter() - started
    builtins.__import__ = counted("imports", builtins.__import__)  # later ones: scikit-learn's takes two seconds
    for name, paths in COUNTED.items():
        for path in paths:
            module, _, attribute = path.rpartition(".")
            owner: Any = sys.modules.get(module)
            if owner is None and module.rpartition(".")[0] in sys.modules:
                owner = getattr(sys.modules[module.rpartition(".")[0]], module.rpartition(".")[2], None)
            if owner is None:
                continue
            original = getattr(owner, attribute)
            replaced = counted(name, original)
            setattr(owner, attribute, replaced)
            # Modules that have imported it have it under their own name.
            for other in [value for key, value in sys.modules.items() if key.startswith("stages.")] + [page]:
                if vars(other).get(attribute) is original:
                    setattr(other, attribute, replaced)
    try:
        vars(page)["main"]()
    finally:
        total = time.perf_counter() - started
        seconds["rest"] = total - sum(seconds.values())
        print(json.dumps(seconds))


def measure_machine(data: Path) -> dict[str, float]:
    """Return what this machine does at best: GFLOP/s of a product of matrices, images/s decoded, MB/s written."""
    import simplejpeg
    import torch

    a = torch.randn(2048, 2048)
    _ = a @ a
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 2:
        _ = a @ a
        rounds += 1
    gflops = rounds * 2 * 2048**3 / (time.perf_counter() - started) / 1e9
    files = sorted(data.rglob("*.jp*g"))[:300]
    contents = [file.read_bytes() for file in files]
    started = time.perf_counter()
    for content in contents:
        simplejpeg.decode_jpeg(content)
    decoded = len(contents) / (time.perf_counter() - started) if contents else 0.0
    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        file.write(bytes(2**28))
        file.flush()
        written = 2**28 / 1e6 / (time.perf_counter() - started)
    return {"GFLOP/s": gflops, "JPEGs decoded a second, one process": decoded, "MB/s written": written}


def measure_network(arch: str, size: int) -> float:
    """Return the GFLOP of a forward pass of an image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from stages.network.backbones import stock_model

    network = stock_model(arch, size).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def main() -> None:
    """Run all stages, and print a table."""
    if len(sys.argv) > 2 and sys.argv[1] == "--stage":
        stage = sys.argv[2]
        sys.argv = [stage, *sys.argv[3:]]
        count_stage(stage)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arch", default="mobilenet_v3_large")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        project = Project(Path(name))
        project.set("workers", 0)
        project.set("data", path=str(options.data.resolve()))
        weights = str(options.weights.resolve()) if options.weights else None
        project.set("model", arch=options.arch, weights=weights, image_size=options.image_size)
        for stage in (*STAGES, "finetune"):
            if stage in columns:
                project.set("finetune", lr=1e-4)
            cmd = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]["cmd"]
            done = run(project.folder, Path(__file__), "--stage", stage, *shlex.split(cmd)[3:])
            columns["another lr" if stage in columns else stage] = done.json() | {"whole process": done.seconds}
    names = [
        name for name in ("imports", *COUNTED, "rest", "whole process") if any(name in one for one in columns.values())
    ]
    print("| seconds | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for name in names:
        cells = (f"{own[name]:.1f}" if own.get(name, 0) >= 0.05 else "" for own in columns.values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name, value in measure_machine(options.data).items():
        print(f"{name}: {value:,.0f}")
    print(f"GFLOP of a forward pass of an image: {measure_network(options.arch, options.image_size):.3f}")


if __name__ == "__main__":
    main()
