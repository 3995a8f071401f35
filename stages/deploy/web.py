"""Web pages on this machine: socket, server, host check and headers; and the page to review labels."""

import base64
import io
import ipaddress
import json
import secrets
import shlex
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
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

from stages.common.cli import StageError, describe
from stages.common.files import read_csv, write_csv
from stages.images.dataset import DROP, read_corrections
from stages.images.decode import ImageError, decode, read_image
from stages.scores.suspects import Suspect

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# The page loads nothing from elsewhere, sends nothing elsewhere, and cannot be framed.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_MOST_PIXELS = 1000  # pixels per side of a shown suspect


def make_site(page: str, routes: Sequence[Route], hosts: Sequence[str] | None) -> Starlette:
    """Return an application with a page, an HTML file beside this one, at `/`, and its routes.

    `hosts`: allowed host names, `None`: any. They prevent DNS rebinding, where a foreign page's name resolves to this
    machine.
    """

    async def show_page(_: Request) -> Response:
        return HTMLResponse(Path(__file__).with_name(page).read_text(encoding="utf-8"), headers=_HEADERS)

    middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=[Route("/", show_page), *routes], middleware=middleware)


def answer(status: int = 200, **content: Any) -> Response:  # noqa: ANN401 (any JSON value)
    """Answer in ASCII JSON, for file names that are not UTF-8; `problem`: an error message."""
    return Response(json.dumps(content, allow_nan=False), status, _HEADERS, "application/json")


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
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(site, log_level="warning", access_log=False)).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Open a socket; raises StageError if the port is in use or the address is not this machine's."""
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


def measure_progress(suspects: Sequence[Suspect], table: Path) -> dict[str, int]:
    """Return the number of suspects, the decisions, and the index of the `next` undecided one.

    Raises what `read_corrections` does; the table may be missing.
    """
    given = read_corrections(table) if table.exists() else {}
    decisions = [given.get(one.path) for one in suspects]
    kept = sum(decision == one.label != DROP for decision, one in zip(decisions, suspects, strict=True))
    dropped, total = decisions.count(DROP), len(suspects)
    counts = {"kept": kept, "corrected": total - decisions.count(None) - kept - dropped, "dropped": dropped}
    return {"suspects": total, **counts, "next": [*decisions, None].index(None)}


def write_correction(table: Path, name: str, correction: str) -> None:
    """Correct one image in a table for `data.corrections`, which may be missing; other rows and columns are kept."""
    header, rows = ["path", "correction"], list[list[str]]()
    if table.exists():
        read_corrections(table)
        header, rows = read_csv(table)
    path, place = header.index("path"), header.index("correction")
    if not (own := [row for row in rows if row[path] == name]):
        own = [[name if column == path else "" for column in range(len(header))]]
        rows += own
    for row in own:
        row[place] = correction
    write_csv(table, header, rows)


def make_review(suspects: Sequence[Suspect], root: Path, grey_max: int | None, table: Path) -> Starlette:
    """Return the page to review one or more suspects; its only state is the `table` of corrections.

    Paths are relative to `root`; `grey_max` is as in `decode`.
    """
    # Foreign pages cannot read it, and pages from an earlier start have another one.
    token = secrets.token_hex()

    async def show_progress(_: Request) -> Response:
        command = f"dvc exp run -S data.corrections={shlex.quote(str(table))}"
        return answer(**measure_progress(suspects, table), token=token, command=command)

    def show(request: Request) -> Response:
        if (number := request.path_params["number"]) >= len(suspects):
            return answer(404, problem="no such number")
        one = suspects[number]
        correction = (read_corrections(table) if table.exists() else {}).get(one.path)
        return answer(**asdict(one) | {"correction": correction}, **_draw(root / one.path, grey_max))

    # On the event loop, so only one decision at a time accesses the table.
    async def decide(request: Request) -> Response:
        if request.headers.get("x-token") != token:
            return answer(403, problem="the server has been started again since; reload this page")
        number, decision = request.path_params["number"], request.path_params["decision"]
        if number >= len(suspects) or decision not in ("keep", "suggestion", "drop"):
            return answer(404, problem="no such number or decision")
        one = suspects[number]
        write_correction(table, one.path, {"keep": one.label, "suggestion": one.suggestion, "drop": DROP}[decision])
        return await show_progress(request)

    def explain(_: Request, error: Exception) -> Response:
        return answer(500, problem=describe(error) if isinstance(error, OSError) else str(error))

    routes = [
        Route("/progress", show_progress),
        Route("/suspects/{number:int}", show),
        Route("/suspects/{number:int}/{decision}", decide, methods=["POST"]),
    ]
    site = make_site("review.html", routes, LOOPBACK)
    for kind in (StageError, OSError):
        site.add_exception_handler(kind, explain)
    return site


def _draw(path: Path, grey_max: int | None) -> dict[str, Any]:
    try:
        image = decode(read_image(path), grey_max, least=_MOST_PIXELS)
    except (OSError, ImageError) as error:
        return {"problem": (error.strerror if isinstance(error, OSError) else None) or str(error)}
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    # A tenth of a PNG's time; small images keep their quality.
    return {"image": as_url(image, "JPEG", quality=95, subsampling=0)}
