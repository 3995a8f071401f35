"""ONNX files: the finished network, without this project or torch.

A file takes uint8 RGB images (n, 3, size, size), already resized, and returns probabilities (n, classes), float32,
and, if known, how unlike the training images they are, (n,). Normalization, the network, its temperature and
sigmoid or softmax are inside.
"""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.common.cli import StageError, require_packages
from stages.common.compiler import load_compiler
from stages.common.files import write_bytes
from stages.images.preprocessing import Preprocessing, make_framing, margin_colour
from stages.network.checkpoint import Description
from stages.network.network import Network
from stages.network.objective import probabilities
from stages.training.reference import Features, Unlike

# Probabilities, (n, classes), and how unlike the training images, (n,), NaN if unknown.
Answer = tuple[NDArray[np.float64], NDArray[np.float64]]
_PROJECT = "dvc-finetune"
# The oldest with all needed operators, for compatibility with old runtimes.
_OPSET = 18
# protobuf's limit for one message.
_MOST_BYTES = 2**31 - 1


class _FromBytes(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, description: Description, unlike: Unlike | None) -> None:
        super().__init__()
        preprocessing, self.temperature = description.preprocessing, description.temperature
        self.network, self.features, self.unlike = network, Features(), unlike
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        activations = self.network.backbone((images.float() / 255 - self.mean) / self.std)
        values = probabilities(self.network.classifier(activations), self.temperature)
        return (values,) if self.unlike is None else (values, self.unlike(self.features(activations)))


def write_onnx(
    path: Path, network: Network, description: Description, checkpoint_sha256: str, unlike: Unlike | None = None
) -> None:
    """Write a network, on the CPU, as ONNX, whole or not at all; the same network gives the same bytes.

    The metadata and the SHA-256 of its checkpoint are included; `unlike` is a second output.

    Raises:
        StageError: the network is too large for one file.
    """
    preprocessing = description.preprocessing
    size = preprocessing.crop
    if (needed := sum(tensor.nbytes for tensor in network.state_dict().values())) > _MOST_BYTES:
        raise StageError(f"{path}: the network has {needed / 1e9:.1f} GB, an ONNX file at most 2.1; use a smaller one")
    model = _FromBytes(network, description, unlike).eval()
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    load_compiler()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings by torch's own code
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["probabilities", "unlike"][: 1 + (unlike is not None)],
            verbose=False,
        )
    assert program is not None
    exported = program.model_proto
    graph = exported.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        # Source positions, with this machine's paths.
        del part.metadata_props[:]
        part.ClearField("doc_string")
    del exported.metadata_props[:]
    metadata = {
        "project": _PROJECT,
        "arch": description.arch,
        "classes": json.dumps(description.classes, ensure_ascii=False),
        "size": str(size),
        "resize": describe_resize(preprocessing),
        "preprocessing": json.dumps(preprocessing.to_json()),
        "checkpoint_sha256": checkpoint_sha256,
    }
    for key, value in metadata.items():
        exported.metadata_props.add(key=key, value=value)
    write_bytes(path, exported.SerializeToString(deterministic=True))


def describe_resize(preprocessing: Preprocessing) -> str:
    """Describe how an image becomes a square."""
    size, method = preprocessing.crop, preprocessing.interpolation
    if preprocessing.pad:
        colour = ", ".join(map(str, margin_colour(preprocessing)))
        return f"the whole image into {size} x {size} pixels ({method}, antialiased), margins of RGB ({colour})"
    if preprocessing.resize is None:
        return f"the whole image to {size} x {size} pixels ({method}, antialiased), out of proportion"
    return (
        f"the shorter side to {preprocessing.resize} pixels ({method}, antialiased), "
        f"then {size} x {size} from the middle"
    )


class OnnxNetwork:
    """A network in an ONNX file by `write_onnx`; raises StageError if it cannot be used."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StageError(f"{path}: no such file; `python -m stages.export` writes exported/model.onnx")
        require_packages("export", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Spinning threads would slow the decoding processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            about = self._session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime's errors have no common type
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise StageError(f"{path}: damaged, or not an ONNX file ({reason})") from error
        if about.get("project") != _PROJECT:
            raise StageError(f"{path}: not an ONNX file of this project; `python -m stages.export` writes one")
        self.tells_unlike = len(self._session.get_outputs()) > 1
        try:
            self.classes: tuple[str, ...] = tuple(json.loads(about["classes"]))
            self.preprocessing = Preprocessing.from_json(json.loads(about["preprocessing"]))
        except (ValueError, TypeError, KeyError) as error:
            raise StageError(f"{path}: of another version of this project; export it again") from error

        self.transform = make_framing(self.preprocessing)

    def predict(self, images: Tensor) -> Answer:
        """Return the `Answer` for images, (n, 3, size, size), by `transform`."""
        outputs = self._session.run(None, {"images": images.numpy()})
        values, unlike, *_ = (np.asarray(one, np.float64) for one in (*outputs, np.full(len(images), np.nan)))
        return values, unlike
