"""A page to try the finished network: images in, probabilities and Grad-CAM out. Nothing is written to disk."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from stages.deploy.classifier import TorchNetwork
from stages.deploy.web import answer, as_url, make_site, refuse
from stages.images.decode import ImageError, decode_with_facts
from stages.report.galleries import Pixels, as_pixels, lay_over
from stages.report.gradcam import enlarge, find_block, grad_cam
from stages.scores.metrics import predicted_labels

_MOST_SHOWN = 5
# Of a file; requests that are read or answered at one time; seconds for a file to arrive.
MOST_BYTES, _AT_ONCE, _PATIENCE = 2**26, 4, 60


def make_app(classifier: TorchNetwork, hosts: Sequence[str] | None, max_bytes: int = MOST_BYTES) -> Starlette:
    """Return the page for a network on the CPU, and `/classify`, which takes the bytes of a file, so many at most.

    `hosts`: as in `make_site`.
    """
    preprocessing, crop = classifier.preprocessing, classifier.preprocessing.crop
    block = find_block(classifier.network, crop)

    def explain(content: bytes) -> dict[str, Any]:
        image = decode_with_facts(content, preprocessing.grey_max, preprocessing.least("none")).image
        images = classifier.transform(image)[None]
        values, unlike = classifier.predict(images)
        label = predicted_labels(values)
        (seen,) = as_pixels(images, preprocessing)
        heat = None
        if block is not None:
            maps = grad_cam(classifier.network, images, torch.from_numpy(label), block)
            heat = _draw(lay_over(seen, enlarge(maps, crop).numpy()[0]))
        order = sorted(range(len(values[0])), key=lambda other: (other != label[0], -values[0, other]))
        shown = [{"name": classifier.classes[n], "probability": float(values[0, n])} for n in order[:_MOST_SHOWN]]
        others, novelty = max(len(order) - _MOST_SHOWN, 0), None if unlike is None else float(unlike[0])
        return {"classes": shown, "unlike": novelty, "others": others, "image": _draw(seen), "heat": heat}

    # One image at a time, in one thread: each thread of glibc's keeps the memory that it once had. Who has no slot yet
    # is not read.
    worker, slots = ThreadPoolExecutor(1), asyncio.Semaphore(_AT_ONCE)

    async def classify(request: Request) -> Response:
        async with slots:
            content = bytearray()
            try:
                async with asyncio.timeout(_PATIENCE):
                    async for chunk in request.stream():
                        content += chunk
                        if len(content) > max_bytes:
                            return refuse(f"larger than {max_bytes:,} bytes", 413)
            except ClientDisconnect:
                return Response(status_code=400)
            except TimeoutError:
                return refuse(f"not here after {_PATIENCE} seconds", 408)
            try:
                return answer(await asyncio.get_running_loop().run_in_executor(worker, explain, bytes(content)))
            except ImageError as error:
                return refuse(str(error), 422)

    return make_site("app.html", [Route("/classify", classify, methods=["POST"])], hosts)


def _draw(pixels: Pixels) -> str:
    return as_url(Image.fromarray((255 * pixels).round().astype(np.uint8)), "PNG")
