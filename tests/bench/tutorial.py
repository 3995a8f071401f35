"""Transfer learning as a tutorial does it, for comparison: the whole network on every image in every epoch.

Reads the index files of the pipeline, so that both see the same images, and prints its results as one line of JSON.
"""

import argparse
import csv
import json
import time
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import mobilenet_v3_large
from torchvision.transforms import v2

CHANNELS, STRIDE = 960, 32  # of what the backbone gives out


class Images(Dataset[tuple[Tensor, float]]):
    """The images of an index file of two classes: (tensor of shape (3, image_size, image_size), label)."""

    def __init__(self, root: Path, index: Path, image_size: int) -> None:
        with index.open(newline="", encoding="utf-8") as file:
            self.entries = [(root / row["path"], float(row["label"])) for row in csv.DictReader(file)]
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

    def __getitem__(self, position: int) -> tuple[Tensor, float]:
        path, label = self.entries[position]
        return self.transform(Image.open(path).convert("RGB")), label


def main() -> None:
    """Train the head, then the last three blocks too; test after every epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="random without")
    for name in ("image-size", "epochs", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    train, test = (Images(arguments.data, index, arguments.image_size) for index in (arguments.train, arguments.test))
    train_batches = DataLoader(train, batch_size=64, shuffle=True, num_workers=0)
    test_batches = DataLoader(test, batch_size=128, num_workers=0)
    model = make_model(arguments.weights, arguments.image_size).to(device)

    report: dict[str, object] = {}
    for phase, unfreeze, lr in (("head", 0, 1e-3), ("finetuned", 3, 1e-5)):
        started = time.perf_counter()
        unfreeze_blocks(model, unfreeze)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=lr, amsgrad=True)
        for _ in range(arguments.epochs):
            train_one_epoch(model, train_batches, optimizer, device)
            accuracy = evaluate(model, test_batches, device)
        report[phase] = {"seconds": time.perf_counter() - started, "accuracy": accuracy}
    print(json.dumps({**report, "device": device.type}))


def make_model(weights: Path | None, image_size: int) -> nn.Sequential:
    """Make a backbone and a flatten head that ends in one logit."""
    stock = mobilenet_v3_large()
    if weights is not None:
        safe = weights.suffix == ".safetensors"
        tensors = safetensors.torch.load_file(weights) if safe else torch.load(weights, weights_only=True)
        features = {key: tensor for key, tensor in tensors.items() if key.startswith("features.")}
        stock.load_state_dict({**stock.state_dict(), **features})
    side = -(-image_size // STRIDE)
    head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * side**2, 500), nn.ReLU(), nn.Linear(500, 1))
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
    batches: DataLoader[tuple[Tensor, float]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Train on every image once; BatchNorm keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    loss_of = nn.BCEWithLogitsLoss()
    for images, labels in batches:
        logits = model(images.to(device)).squeeze(1)
        loss = loss_of(logits, labels.float().to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def evaluate(model: nn.Sequential, batches: DataLoader[tuple[Tensor, float]], device: torch.device) -> float:
    """Return the fraction of images classified rightly."""
    model.eval()
    right, count = 0, 0
    for images, labels in batches:
        decisions = model(images.to(device)).squeeze(1).sigmoid() > 0.5
        right += int((decisions == labels.to(device).bool()).sum())
        count += len(labels)
    return right / count


if __name__ == "__main__":
    main()
