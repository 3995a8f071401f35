"""A page on this machine to try the finished network."""

import argparse
import ipaddress
import socket
from pathlib import Path

from stages.common.cli import StageError, run
from stages.common.seeds import make_deterministic
from stages.network.checkpoint import load_checkpoint
from stages.training.reference import read_reference


def main() -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m stages.serve", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("data/checkpoints/finetuned.safetensors"))
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own is open to others"
    )
    arguments = parser.parse_args()
    try:
        import uvicorn

        from stages.deploy.app import make_app
    except ImportError as error:
        raise StageError(
            f"the page needs {error.name}: pip install --constraint constraints.txt --editable '.[serve]'"
        ) from error

    network, description = load_checkpoint(arguments.checkpoint)
    make_deterministic(0)
    listening = listen(arguments.host, arguments.port)
    port = listening.getsockname()[1]
    hosts = ["127.0.0.1", "localhost", "[::1]"] if is_loopback(arguments.host) else None
    app = make_app(network, description, read_reference(arguments.checkpoint), hosts)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"http://{name}:{port}/  (Ctrl-C ends it)", flush=True)
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        print("stopped")


def listen(host: str, port: int) -> socket.socket:
    """Open a socket to listen on.

    Raises:
        StageError: the port is in use, or the address is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise StageError(f"--port: should be from 0 to 65535, is {port}")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise StageError(
            f"--host {host}, --port {port}: {reason}; choose another (--port 0 takes a free one)"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run(main)
