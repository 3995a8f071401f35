"""A page on this machine to try the finished network."""

import argparse
from pathlib import Path

import torch

from stages.common.cli import require_packages, run
from stages.common.device import make_deterministic
from stages.deploy.classifier import TorchNetwork


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m stages.serve", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("data/checkpoints/finetuned.safetensors"))
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own is open to others"
    )
    arguments = parser.parse_args()
    require_packages("serve", "starlette", "uvicorn")
    from stages.deploy.app import make_app
    from stages.deploy.web import LOOPBACK, is_loopback, listen, serve

    make_deterministic(0)
    classifier = TorchNetwork(arguments.checkpoint, torch.device("cpu"), "float32")
    listening = listen(arguments.host, arguments.port)
    serve(make_app(classifier, LOOPBACK if is_loopback(arguments.host) else None), listening)
    print("stopped")


if __name__ == "__main__":
    run(main)
