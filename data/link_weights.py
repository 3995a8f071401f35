"""Make a link to the weight file that `model.weights` names, so that DVC sees its bytes change.

`model.weights` may also be a name or null, and DVC has no dependency that may be absent: then a line of text stands
there instead of the link.
"""

import argparse
from pathlib import Path

from stages.common.files import write_text
from stages.common.params import load_params
from stages.common.stage import StageError, run
from stages.network.weight_file import weight_file


def main() -> None:
    """Make the link, or the file that stands for none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--link", type=Path, required=True)
    arguments = parser.parse_args()
    file = weight_file(load_params(arguments.params).model.weights)
    if file is not None and not file.is_file():
        raise StageError(
            f"model.weights: {file}: no such file; give a .pth or .safetensors file, a name of torchvision's "
            "such as DEFAULT, or null"
        )
    arguments.link.unlink(missing_ok=True)
    if file is None:
        write_text(arguments.link, "model.weights is not a file\n")
    else:
        arguments.link.symlink_to(file.resolve())


if __name__ == "__main__":
    run(main)
