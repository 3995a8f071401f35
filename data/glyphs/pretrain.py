"""Train MobileNetV3-Large from random weights to tell printed characters apart, and write its backbone.

The state of training is written every few minutes. A run that was stopped goes on from there when the same command is
given again, and ends with the same bytes.
"""

import argparse
import io
import json
import math
import pickle
import sys
import time
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torchvision.models import mobilenet_v3_large
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from data.glyphs.drawing import CHARACTERS, draw, load_glyphs
from stages.common.cli import run, stop_if_interrupted
from stages.common.device import generator_for, make_deterministic, resolve_device
from stages.common.files import write_bytes
from stages.common.params import Section, Size, load_section
from stages.images.preprocessing import Preprocessing
from stages.network.weights import METADATA_KEY

WARMUP = 0.05  # of the steps
SECONDS_BETWEEN_STATES = 180.0
TEST_STREAM = 2**32  # beyond the seeds that training may have


class Pretraining(Section):
    """`data/glyphs/params.yaml`."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    steps: Size
    test_pictures: Size
    batch_size: Annotated[int, Field(ge=2)]
    image_size: Annotated[int, Field(ge=32)]
    lr: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]


class Pretrainer:
    """A network on its way from random weights to the bundled backbone.

    Args:
        params: how to train.
        device: where to.
    """

    def __init__(self, params: Pretraining, device: torch.device) -> None:
        self.params, self.device = params, device
        self.preprocessing = Preprocessing(crop=params.image_size)
        self.glyphs = load_glyphs()
        self.step, self.steps = 0, params.steps
        # No dropout, and no label smoothing in the loss: both make features that transfer worse
        # (Kornblith et al. 2019, https://arxiv.org/abs/1805.08974).
        network = mobilenet_v3_large(weights=None, num_classes=len(CHARACTERS), dropout=0.0)
        # At 64 pixels training is faster in this layout than in the default one, on a CPU as well.
        self.network: torch.nn.Module = network.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=params.lr, weight_decay=params.weight_decay, fused=True
        )

    def train(self, state: Path) -> None:
        """Take the steps that are left; write `state` now and then."""
        written = time.monotonic()
        with tqdm(total=self.steps, initial=self.step, desc="glyphs", unit="batch", disable=None) as progress:
            while self.step < self.steps:
                stop_if_interrupted()
                loss = self._train_one_step()
                progress.update()
                if time.monotonic() - written < SECONDS_BETWEEN_STATES:
                    continue
                self.save(state)
                written = time.monotonic()
                progress.set_postfix_str(f"train_loss {loss:.4f}")
                if not sys.stderr.isatty():
                    print(f"batch {self.step}/{self.steps}  train_loss {loss:.4f}", flush=True)

    def evaluate(self) -> float:
        """Return the accuracy on pictures that training has not seen."""
        self.network.eval()
        right = 0
        with torch.inference_mode():
            for number, first in enumerate(range(0, self.params.test_pictures, self.params.batch_size)):
                count = min(self.params.batch_size, self.params.test_pictures - first)
                images, labels = self._draw_batch(TEST_STREAM, number, count)
                right += int((self.network(images).argmax(dim=1) == labels).sum())
        return right / self.params.test_pictures

    def save(self, path: Path) -> None:
        """Write all that is needed to go on."""
        content = io.BytesIO()
        state = {"params": self.params.model_dump(), "characters": CHARACTERS, "step": self.step}
        torch.save({**state, "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}, content)
        write_bytes(path, content.getvalue())

    def resume(self, path: Path) -> None:
        """Go on from a state, if there is one that fits; say so, or why not."""
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            return
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            print(f"{path}: damaged, starting from the beginning", flush=True)
            return
        if state["params"] != self.params.model_dump() or state["characters"] != CHARACTERS:
            print(f"{path}: of a run with other parameters, starting from the beginning", flush=True)
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        print(f"going on after batch {self.step} of {self.steps}", flush=True)

    def _train_one_step(self) -> float:
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.params.lr * self._schedule()
        images, labels = self._draw_batch(self.params.seed, self.step, self.params.batch_size)
        loss: Tensor = functional.cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _schedule(self) -> float:
        """Return the fraction of `lr` for this step: up in a straight line, then down along half a cosine."""
        warmup = math.ceil(WARMUP * self.steps)
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / (self.steps - warmup)))

    def _draw_batch(self, stream: int, number: int, count: int) -> tuple[Tensor, Tensor]:
        # A generator for each batch: its pictures do not depend on where training was resumed.
        generator = generator_for(stream, number)
        labels = torch.randint(len(CHARACTERS), (count,), generator=generator)
        images = draw(self.glyphs, labels, self.params.image_size, generator)
        images = normalize(images, list(self.preprocessing.mean), list(self.preprocessing.std))
        return images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)


def main() -> None:
    """Train, measure, and write the backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:N | mps")
    parser.add_argument(
        "--state", type=Path, required=True, help="where a stopped run goes on from; removed at the end"
    )
    parser.add_argument("--output", type=Path, required=True, help="backbone to write, .safetensors")
    arguments = parser.parse_args()
    params = load_section(arguments.params, Pretraining)
    make_deterministic(params.seed)
    pretrainer = Pretrainer(params, resolve_device(arguments.device))
    pretrainer.resume(arguments.state)
    pretrainer.train(arguments.state)

    # Measured as it is stored: float16 halves the file.
    pretrainer.network.half().float()
    accuracy = pretrainer.evaluate()
    about = {
        "task": f"{len(CHARACTERS)} printed characters",
        "characters": CHARACTERS,
        "accuracy": round(accuracy, 4),
        "pictures": params.steps * params.batch_size,
        "image_size": params.image_size,
        "preprocessing": pretrainer.preprocessing.to_json(),
        "seed": params.seed,
    }
    tensors = {
        key: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for key, tensor in pretrainer.network.state_dict().items()
        if key.startswith("features.")
    }
    write_bytes(arguments.output, safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(about)}))
    arguments.state.unlink(missing_ok=True)
    print(f"{len(CHARACTERS)} characters, {about['pictures']:,} pictures, accuracy {accuracy:.2%}")


if __name__ == "__main__":
    run(main)
