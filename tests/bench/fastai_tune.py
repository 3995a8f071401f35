"""fastai's `fine_tune` as its documentation has it, for comparison; fastai is not a package of this project.

One epoch of the head, then all layers at two rates by one cycle each, on augmented images
(https://docs.fast.ai/callback.schedule.html#learner.fine_tune). Reads the pipeline's files in the present folder, and
prints its results as one line of JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Normalize,
    Resize,
    ResizeMethod,
    aug_transforms,
    imagenet_stats,
    set_seed,
    vision_learner,
)
from torch import nn

from stages.common.params import Params, load_params
from stages.images.index import PARTS, count_once, read_index
from stages.network.backbones import stock_model
from stages.network.weights import find_weights, load_into
from tests.bench.project import measure_scores

BATCH = 64


def main() -> None:
    """Fine-tune on the training images, watch those of validation, and test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, required=True, help="of all layers")
    epochs = parser.parse_args().epochs
    params = load_params(Path("params.yaml"))
    train, val, test = (read_index(Path("data/index") / f"{part}.csv") for part in PARTS)
    test = count_once(test)
    set_seed(params.seed, reproducible=True)
    root, size = Path(params.data.path), params.model.image_size
    classes = 1 + max(entry.label for entry in train)
    images = DataBlock(
        blocks=(ImageBlock, CategoryBlock(list(range(classes)), sort=False)),
        get_x=lambda entry: root / entry.path,
        get_y=lambda entry: entry.label,
        splitter=IndexSplitter(range(len(train), len(train) + len(val))),
        item_tfms=Resize(size, method=ResizeMethod.Squish),
        batch_tfms=[*aug_transforms(), Normalize.from_stats(*imagenet_stats)],
    )
    # fastai leaves out a last batch that is not full.
    batches = images.dataloaders([*train, *val], bs=min(BATCH, len(train)), num_workers=0)
    learner = vision_learner(batches, lambda **_: load_backbone(params))
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs)
        probabilities, _ = learner.get_preds(dl=batches.test_dl(test))
    labels = np.array([entry.label for entry in test])
    print(json.dumps({"fastai": measure_scores(labels, probabilities.double().numpy())}))


def load_backbone(params: Params) -> nn.Module:
    """Make torchvision's model with the weights that the pipeline begins with: what is before its pooling, and that."""
    model = params.model
    assert model.image_size is not None
    stock = stock_model(model.arch, model.image_size)
    load_into(stock, find_weights(model.arch, model.weights), model.arch)
    # fastai cuts before the last pooling, which some of torchvision's models have in `forward`.
    return nn.Sequential(stock.get_submodule("features"), nn.AdaptiveAvgPool2d(1))


if __name__ == "__main__":
    main()
