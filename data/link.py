"""Make a link to the file that a parameter names, so that DVC sees its bytes change.

The parameter may also be null, or a name of torchvision's weights, and DVC has no dependency that may be absent: then a
line of text stands there instead of the link.
"""

import argparse
from pathlib import Path

from stages.common.cli import StageError, run
from stages.common.files import write_text
from stages.common.params import Params, load_params, weight_file

# Made by a stage, perhaps after this one.
_SAMPLE = Path("data/digits/images")


def named_file(key: str, params: Params) -> Path | None:
    """Return the file that a parameter names, `None` where it names none.

    Raises:
        StageError: the file is not there, or the folder of the data set, which DVC would only call `[Errno 2]`.
    """
    root = Path(params.data.path)
    if key == "data.labels" and not root.exists() and root != _SAMPLE:
        raise StageError(f"data.path: {root} does not exist; give a folder that holds one folder of images per class")
    if key != "model.weights":
        name = params.data.labels if key == "data.labels" else params.data.corrections
        file = None if name is None else Path(name)
        wanted = f"give a table of paths and {key.removeprefix('data.')} (CSV), or null"
    else:
        file = weight_file(params.model.weights)
        wanted = "give a .pth or .safetensors file, a name of torchvision's such as DEFAULT, or null"
    if file is not None and not file.is_file():
        raise StageError(f"{key}: {file}: no such file; {wanted}")
    return file


def main() -> None:
    """Make the link, or the file that stands for none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--key", choices=["model.weights", "data.labels", "data.corrections"], required=True)
    parser.add_argument("--link", type=Path, required=True)
    arguments = parser.parse_args()
    file = named_file(arguments.key, load_params(arguments.params))
    if arguments.link.is_dir() and not arguments.link.is_symlink():
        raise StageError(f"{arguments.link}: a folder, where the pipeline makes a link to {arguments.key}; rename it")
    arguments.link.unlink(missing_ok=True)
    if file is None:
        write_text(arguments.link, f"{arguments.key} is not a file\n")
    else:
        arguments.link.symlink_to(file.resolve())


if __name__ == "__main__":
    run(main)
