"""A page to try the finished network: images in, probabilities and Grad-CAM out. Nothing is written to disk."""

import asyncio
import base64
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from stages.images.decode import ImageError, decode_with_facts
from stages.images.preprocessing import make_transform
from stages.network.checkpoint import Description
from stages.network.network import Network
from stages.network.objective import probabilities
from stages.report.galleries import Pixels, as_pixels, lay_over
from stages.report.gradcam import enlarge, find_block, grad_cam
from stages.scores.metrics import predicted_labels
from stages.training.reference import Features, Unlike

_PAGE = Path(__file__).with_name("app.html")
_MOST_SHOWN = 5
# Of a file; requests that are read or answered at one time; seconds for a file to arrive.
MOST_BYTES, _AT_ONCE, _PATIENCE = 2**26, 4, 60
# Nothing from elsewhere can be loaded, and nothing can be sent elsewhere.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
}


def make_app(
    network: Network,
    description: Description,
    unlike: Unlike | None,
    hosts: list[str] | None,
    max_bytes: int = MOST_BYTES,
) -> Starlette:
    """Return the server's application: the page at `/`, and `/classify`, which takes the bytes of an image's file.

    Args:
        network: on the CPU.
        description: of its checkpoint.
        unlike: of its checkpoint, if it is known.
        hosts: names by which it may be called; `None`: any. A page from elsewhere whose name is made to lead to this
            machine (DNS rebinding) calls it by another.
        max_bytes: of a file.
    """
    explain = _make_explain(network, description, unlike)
    # One image at a time, in one thread: Grad-CAM hangs a hook into the network, and each thread of glibc's keeps the
    # memory that it once had. Who has no slot yet is not read.
    worker, slots = ThreadPoolExecutor(1), asyncio.Semaphore(_AT_ONCE)

    async def show_page(_: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_HEADERS)

    async def classify(request: Request) -> Response:
        async with slots:
            content = bytearray()
            try:
                async with asyncio.timeout(_PATIENCE):
                    async for chunk in request.stream():
                        content += chunk
                        if len(content) > max_bytes:
                            return _refusal(f"larger than {max_bytes:,} bytes", 413)
            except ClientDisconnect:
                return Response(status_code=400)
            except TimeoutError:
                return _refusal(f"not here after {_PATIENCE} seconds", 408)
            try:
                answer = await asyncio.get_running_loop().run_in_executor(worker, explain, bytes(content))
            except ImageError as error:
                return _refusal(str(error), 422)
            return JSONResponse(answer, headers=_HEADERS)

    routes = [Route("/", show_page), Route("/classify", classify, methods=["POST"])]
    middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware)


def _refusal(problem: str, status: int) -> Response:
    return JSONResponse({"problem": problem}, status, headers=_HEADERS)


def _make_explain(
    network: Network, description: Description, unlike: Unlike | None
) -> Callable[[bytes], dict[str, Any]]:
    """Return the function from a file's bytes to what the page shows."""
    preprocessing = description.preprocessing
    transform, features = make_transform(preprocessing, "none"), Features()
    network.eval()
    block = find_block(network, preprocessing.crop)

    def explain(content: bytes) -> dict[str, Any]:
        images = transform(decode_with_facts(content, preprocessing.grey_max, preprocessing.least("none")).image)[None]
        with torch.inference_mode():
            activations = network.backbone(images)
            novelty = None if unlike is None else float(unlike(features(activations)))
            values = probabilities(network.classifier(activations).double(), description.temperature).numpy()
        label = predicted_labels(values)
        heat = None
        if block is not None:
            maps = grad_cam(network, images, torch.from_numpy(label), block)
            heat = enlarge(maps, images.shape[-1]).numpy()[0]
        order = sorted(range(len(values[0])), key=lambda other: (other != label[0], -values[0, other]))
        (seen,) = as_pixels(images, preprocessing)
        return {
            "classes": [
                {"name": description.classes[other], "probability": float(values[0, other])}
                for other in order[:_MOST_SHOWN]
            ],
            "unlike": novelty,
            "others": max(len(order) - _MOST_SHOWN, 0),
            "image": _as_url(seen),
            "heat": None if heat is None else _as_url(lay_over(seen, heat)),
        }

    return explain


def _as_url(pixels: Pixels) -> str:
    content = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
