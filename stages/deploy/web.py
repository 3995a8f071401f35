"""What the pages on this machine share: socket, server, host check and headers."""

import base64
import io
import ipaddress
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from stages.common.cli import StageError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# Nothing from elsewhere can be loaded, nothing can be sent elsewhere, and no page from elsewhere can frame this one.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


def make_site(page: Path, routes: Sequence[Route], hosts: Sequence[str] | None) -> Starlette:
    """Return an application with a page at `/`.

    Args:
        page: its HTML.
        routes: what it asks for.
        hosts: names by which it may be called; `None`: any. A page from elsewhere whose name is made to lead to this
            machine (DNS rebinding) calls it by another.
    """

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page.read_text(encoding="utf-8"), headers=_HEADERS)

    middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=[Route("/", show_page), *routes], middleware=middleware)


def answer(content: dict[str, Any], status: int = 200) -> Response:
    """Answer with JSON in ASCII, which also has names of files that are not UTF-8."""
    return Response(json.dumps(content, allow_nan=False), status, _HEADERS, "application/json")


def refuse(problem: str, status: int) -> Response:
    """Answer with what is wrong, in words."""
    return answer({"problem": problem}, status)


def as_url(image: Image.Image, kind: str, **options: int) -> str:
    """Return an image as a `data:` URL, in a format of Pillow's with its options."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def serve(site: Starlette, listening: socket.socket) -> None:
    """Print the address, and serve until Ctrl-C."""
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}/  (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(site, log_level="warning", access_log=False)).run(sockets=[listening])
    except KeyboardInterrupt:
        return


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
        raise StageError(f"--port {port} on {host}: {reason}; choose another (--port 0 takes a free one)") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
