"""Transfer learning as a tutorial does it, for comparison: the whole network on every image in every epoch.

Reads the index files of the pipeline, so that both see the same images, and prints its results as one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model
from torchvision.transforms import v2

from stages.images.index import Entry, count_once, read_index
from tests.bench.project import measure_scores


class Images(Dataset[tuple[Tensor, int]]):
    """Images of an index file: (tensor of shape (3, image_size, image_size), label)."""

    def __init__(self, root: Path, entries: list[Entry], image_size: int) -> None:
        self.root, self.entries = root, entries
        self.transform = v2.Compose(
            [
                v2.Resize((image_size, image_size)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        entry = self.entries[position]
        return self.transform(Image.open(self.root / entry.path).convert("RGB")), entry.label


def main() -> None:
    """Train the head, then the last three blocks too; test after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--arch", required=True, help="a network of torchvision's that has `features`")
    parser.add_argument("--weights", type=Path, help="random without")
    for name in ("image-size", "epochs", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    # Of copies, the pipeline tests one.
    entries = [read_index(arguments.train), count_once(read_index(arguments.test))]
    train, test = (Images(arguments.data, own, arguments.image_size) for own in entries)
    train_batches = DataLoader(train, batch_size=64, shuffle=True, num_workers=0)
    test_batches = DataLoader(test, batch_size=128, num_workers=0)
    classes = 1 + max(entry.label for entry in train.entries)
    model = make_model(arguments.arch, arguments.weights, arguments.image_size, 1 if classes == 2 else classes)
    model.to(device)

    seconds, probabilities = {}, {}
    for phase, unfreeze, lr in (("head", 0, 1e-3), ("finetuned", 3, 1e-5)):
        started = time.perf_counter()
        unfreeze_blocks(model, unfreeze)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=lr, amsgrad=True)
        for _ in range(arguments.epochs):
            train_one_epoch(model, train_batches, optimizer, device)
            probabilities[phase] = predict(model, test_batches, device)
        seconds[phase] = time.perf_counter() - started

    # Timed, since no tutorial does it and its import takes a second.
    started = time.perf_counter()
    labels = np.array([entry.label for entry in test.entries])
    report = {
        phase: {"seconds": seconds[phase], **measure_scores(labels, probabilities[phase].numpy())} for phase in seconds
    }
    print(json.dumps({**report, "device": device.type, "scoring": time.perf_counter() - started}))


def make_model(arch: str, weights: Path | None, image_size: int, outputs: int) -> nn.Sequential:
    """Make a backbone and a flatten head that ends in logits: of two classes one, otherwise one a class."""
    stock = get_model(arch, weights=None)
    if weights is not None:
        safe = weights.suffix == ".safetensors"
        tensors = safetensors.torch.load_file(weights) if safe else torch.load(weights, weights_only=True)
        features = {key: tensor for key, tensor in tensors.items() if key.startswith("features.")}
        stock.load_state_dict({**stock.state_dict(), **features})
    with torch.inference_mode():
        inputs = stock.eval().features(torch.zeros(1, 3, image_size, image_size)).numel()
    head = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 500), nn.ReLU(), nn.Linear(500, outputs))
    return nn.Sequential(stock.features, head)


def unfreeze_blocks(model: nn.Sequential, count: int) -> None:
    """Freeze the backbone but for its last `count` blocks, and all of BatchNorm."""
    backbone, _ = model
    assert isinstance(backbone, nn.Sequential)
    backbone.requires_grad_(False)
    backbone[len(backbone) - count :].requires_grad_(True)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def train_one_epoch(
    model: nn.Sequential,
    batches: DataLoader[tuple[Tensor, int]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Train on every image once; BatchNorm keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for images, labels in batches:
        logits, labels = model(images.to(device)), labels.to(device)
        if logits.shape[1] == 1:
            loss = functional.binary_cross_entropy_with_logits(logits.squeeze(1), labels.float())
        else:
            loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.inference_mode()
def predict(model: nn.Sequential, batches: DataLoader[tuple[Tensor, int]], device: torch.device) -> Tensor:
    """Return the probabilities of each class, (n, classes), on the CPU."""
    model.eval()
    logits = torch.cat([model(images.to(device)).cpu() for images, _ in batches]).double()
    if logits.shape[1] > 1:
        return logits.softmax(1)
    positive = logits.sigmoid()
    return torch.cat([1 - positive, positive], dim=1)


if __name__ == "__main__":
    main()
