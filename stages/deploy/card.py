"""The model card of an exported network, in Hugging Face's format (https://huggingface.co/docs/hub/model-cards)."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from stages.common.format import bullets, cell, code
from stages.deploy.onnx import describe_resize
from stages.images.preprocessing import Preprocessing, margin_colour
from stages.network.backbones import cut_into_blocks, stock_options, stock_shapes
from stages.network.checkpoint import Description
from stages.network.network import Network, Standardize
from stages.report.page import describe_limits, tabulate_counts, tabulate_recipe, tabulate_scores
from stages.scores.evaluation import Evaluation
from stages.scores.metrics import Scores
from stages.scores.verdict import describe_gain

_UNLIKE = (
    " `unlike`, the second output of `model.onnx`, tells: above 1.0, an image is farther from the training images "
    "than 99% of the validation images."
)
_PRINT_UNLIKE = 'print(f"unlike: {unlike[0][0]:.4f} (above 1: farther from the training images than 99% of others)")\n'
_STANDARDIZE = """\
class Standardize(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("spread", torch.ones(count))

    def forward(self, features):
        return (features - self.mean) / self.spread

"""


def compose_card(
    network: Network,
    description: Description,
    data: str,
    split: dict[str, Any],
    recipe: dict[str, Any],
    evaluation: Evaluation,
    compared: str,
    tested: int,
    tells_unlike: bool,
) -> str:
    """Return the card, as Markdown with a YAML head.

    `data`: the name of the data set; `split`: `split.json`; `recipe`: the parameters to list, by their dotted names;
    `compared`: how the exported file and the checkpoint agree; `tested`: number of test images, copies counted once;
    `tells_unlike`: the exported file says how unlike the training images an image is.
    """
    limits = describe_limits(evaluation, split, tested)
    limits.append("Every image gets one of the classes, also one that shows none of them." + _UNLIKE * tells_unlike)
    if recipe.get("model.weights"):
        recipe = recipe | {"model.weights": Path(recipe["model.weights"]).name}  # without its folder on this machine
    weights = "random weights" if description.weights is None else f"the weights {code(Path(description.weights).name)}"
    identical = evaluation.gain.identical
    told = "and fine-tuning changed nothing." if identical else "then the last blocks with it."
    verdict = "" if identical else f"\n{describe_gain(evaluation.gain)}\n"
    return f"""\
{_head(description, data, evaluation.finetuned)}

# {description.arch}, fine-tuned on {cell(data)}

An image classifier for {len(description.classes):,} classes. It started from {weights}; a new head was trained, {told}

## Scores

{tabulate_scores(evaluation)}
{verdict}
`model.onnx` was {compared}.

## Limits

{bullets(limits)}

## Use it

An image has to be upright, RGB, and resized: {describe_resize(description.preprocessing)}. The \
programs below do that for usual files; transparency, 16-bit grey and colour profiles need a conversion \
before. Each is called in this folder, with the path of an image.

With onnxruntime and Pillow:

```python
{onnx_program(description.preprocessing, tells_unlike)}```

With safetensors and torchvision:

```python
{torchvision_program(network, description)}```

## Data

{tabulate_counts(split)}

## Recipe

{tabulate_recipe(recipe)}
"""


def _head(description: Description, data: str, scores: Scores) -> str:
    values = {"accuracy": scores.accuracy, "log-loss": scores.loss}
    metrics = [{"type": name, "value": round(value, 4)} for name, value in values.items()]
    task = {"type": "image-classification"}
    result = {"task": task, "dataset": {"name": data, "type": "imagefolder"}, "metrics": metrics}
    head = {
        "license": "unknown",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "onnx", "safetensors", description.arch],
        "metrics": ["accuracy"],
        "model-index": [{"name": f"{description.arch} fine-tuned on {data}", "results": [result]}],
    }
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n# The license is yours to choose: it depends on the images and on the weights.\n{text}---"


def onnx_program(preprocessing: Preprocessing, tells_unlike: bool = False) -> str:
    """Return a Python program that prints the probabilities of one image, perhaps `unlike`, by `model.onnx` alone."""
    return f"""\
import sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

{_resize(preprocessing)}
images = np.asarray(image).transpose(2, 0, 1)[None]
probabilities, *unlike = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})
print(dict(zip(open("labels.txt", encoding="utf-8").read().splitlines(), probabilities[0].tolist())))
{_PRINT_UNLIKE * tells_unlike}"""


def torchvision_program(network: Network, description: Description) -> str:
    """Return a Python program that prints the probabilities of one image, by `model.safetensors` and torchvision."""
    preprocessing = description.preprocessing
    options = stock_options(description.arch, preprocessing.crop)
    options |= {"aux_logits": False} if "init_weights" in options else {}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    parts = cut_into_blocks(stock_shapes(description.arch, preprocessing.crop))
    two = len(description.classes) == 2
    probabilities = "torch.sigmoid(torch.cat([-logits, logits], 1))" if two else "torch.softmax(logits, 1)"
    temperature = "" if description.temperature == 1 else f" / {description.temperature!r}"
    layers = "".join(f"\n    {_constructor(layer)}," for layer in network.classifier)
    standardizes = any(isinstance(layer, Standardize) for layer in network.classifier)
    return f"""\
import json, sys
import torch, torchvision
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2 import functional

tensors, names = load_file("model.safetensors"), json.load(open("torchvision_names.json"))
model = torchvision.models.get_model("{description.arch}", weights=None{arguments}).eval()
state = model.state_dict()
state.update({{name: tensors[key] for key, name in names.items()}})
model.load_state_dict(state)
{_STANDARDIZE if standardizes else ""}head = torch.nn.Sequential({layers}
).eval()
head.load_state_dict({{key[len("classifier."):]: tensors[key] for key in tensors if key not in names}})
{_resize(preprocessing)}
images = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)[None]
images = functional.normalize(images, {list(preprocessing.mean)}, {list(preprocessing.std)})
with torch.inference_mode():
    logits = head(create_feature_extractor(model, {{"{parts.features}": "features"}})(images)["features"]){temperature}
labels = open("labels.txt", encoding="utf-8").read().splitlines()
print(dict(zip(labels, {probabilities}[0].tolist())))
"""


def _constructor(layer: nn.Module) -> str:
    """Return Python code for a layer of a head: its `repr`, with the module if it is not in `torch.nn`."""
    kind = type(layer)
    if kind.__module__.startswith("torch.nn"):
        return f"torch.nn.{layer!r}"
    if kind.__module__.startswith("torchvision"):
        return f"{kind.__module__}.{layer!r}"
    if isinstance(layer, Standardize):
        return f"Standardize({len(layer.mean)})"
    return "torch.nn.Identity()"  # ClassToken: `Parts.features` names the class token itself


def _resize(preprocessing: Preprocessing) -> str:
    size, method = preprocessing.crop, f"Image.Resampling.{preprocessing.interpolation.upper()}"
    lines = ["image = Image.open(sys.argv[1])"]
    if least := preprocessing.least("none"):
        lines.append(f"image.draft(None, ({least}, {least}))  # a large JPEG at a fraction of its size")
    lines.append('image = ImageOps.exif_transpose(image).convert("RGB")')
    if preprocessing.pad:
        lines.append(f"image = ImageOps.pad(image, ({size}, {size}), {method}, {margin_colour(preprocessing)})")
    elif preprocessing.resize is None:
        lines.append(f"image = image.resize(({size}, {size}), {method})")
    else:
        lines += [
            "sides, shorter = image.size, min(image.size)",
            f"image = image.resize([{preprocessing.resize} * side // shorter for side in sides], {method})",
            f"left, top = (round((side - {size}) / 2) for side in image.size)",
            f"image = image.crop((left, top, left + {size}, top + {size}))",
        ]
    return "\n".join(lines)
