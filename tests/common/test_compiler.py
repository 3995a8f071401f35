"""That a stage starts without torch's compiler and other slow imports, and that who asks for the compiler gets it."""

import subprocess
import sys

import pytest
from conftest import ROOT

from stages.common import compiler

COMPILER, TORCH, LEARN, STATISTICS = "torch._inductor", "torch._C", "sklearn", "scipy.stats"

# As `python -m` begins; then what training needs of torch, and what an exporter or a compiler does.
PROGRAM = """
import sys
sys.argv[0] = "-m"
import stages
import torch, torchvision
from torch import nn
from stages.common.device import make_deterministic

make_deterministic(0)
assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
layer = nn.Linear(3, 2)
for make in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    optimizer = make(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._inductor" not in sys.modules, "loaded by training"
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 4, 4]]), 2).shape == (1, 1, 2, 2)
assert torch._dynamo.is_compiling() is False
assert torch._dynamo.convert_frame is sys.modules["torch._dynamo.convert_frame"]
assert torch.compile(lambda values: values + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""


@pytest.mark.parametrize(
    ("stage", "unloaded"),
    [("split", {TORCH, LEARN}), ("evaluate", {COMPILER, LEARN, STATISTICS}), ("plot", {COMPILER, LEARN, STATISTICS})],
)
def test_a_stage_starts_without_libraries_it_does_not_need(stage: str, unloaded: set[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", "--help"]
    started = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in started.stderr.splitlines()}
    assert "stages.common.params" in loaded
    assert not unloaded & loaded


def test_the_compiler_is_replaced_only_for_the_pinned_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {name: pinned[name] for name in compiler.PINNED} == compiler.PINNED
    for name, another in (("torch", True), ("torchvision", True), ("none", False)):
        monkeypatch.setattr(
            sys, "modules", {key: module for key, module in sys.modules.items() if "_dynamo" not in key}
        )
        monkeypatch.setattr(
            compiler, "version", lambda asked, name=name: "9.9" if asked == name else f"{compiler.PINNED[asked]}+cpu"
        )
        compiler.postpone_compiler()
        assert ("torch._dynamo" not in sys.modules) == another


def test_training_does_not_load_the_compiler_which_loads_on_demand() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
