"""A web page to try the finished network, with probabilities and Grad-CAM. Nothing is written to disk."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from stages.deploy.classifier import TorchNetwork
from stages.deploy.web import answer, as_url, make_site
from stages.images.decode import ImageError, decode_with_facts
from stages.report.galleries import Pixels, as_pixels, lay_over
from stages.report.gradcam import enlarge, find_block, grad_cam
from stages.scores.metrics import predicted_labels

_MOST_SHOWN = 5
# Largest file; concurrent requests; seconds for an upload.
MOST_BYTES, _AT_ONCE, _PATIENCE = 2**26, 4, 60


def make_app(classifier: TorchNetwork, hosts: Sequence[str] | None, max_bytes: int = MOST_BYTES) -> Starlette:
    """Return the page for a network on the CPU, and `/classify`, which takes the bytes of a file.

    `hosts`: as in `make_site`.
    """
    preprocessing, crop = classifier.preprocessing, classifier.preprocessing.crop
    block = find_block(classifier.network, crop)

    def explain(content: bytes) -> Response:
        try:
            image = decode_with_facts(content, preprocessing.grey_max, preprocessing.least("none")).image
        except ImageError as error:
            return answer(422, problem=str(error))
        images = classifier.transform(image)[None]
        (values,), (unlike,) = classifier.predict(images)
        label = predicted_labels(values[None])
        (seen,) = as_pixels(images, preprocessing)
        heat = None
        if block is not None:
            maps = grad_cam(classifier.network, images, torch.from_numpy(label), block)
            heat = _draw(lay_over(seen, enlarge(maps, crop).numpy()[0]))
        order = sorted(range(len(values)), key=lambda other: (other != label[0], -values[other]))
        shown = [{"name": classifier.classes[n], "probability": float(values[n])} for n in order[:_MOST_SHOWN]]
        novelty, others = float(unlike) if classifier.tells_unlike else None, len(order) - len(shown)
        return answer(classes=shown, unlike=novelty, others=others, image=_draw(seen), heat=heat)

    # One image at a time, in one thread: glibc keeps the memory of each thread. A request without a slot is not read
    # yet.
    worker, slots = ThreadPoolExecutor(1), asyncio.Semaphore(_AT_ONCE)

    async def classify(request: Request) -> Response:
        async with slots:
            content = bytearray()
            try:
                async with asyncio.timeout(_PATIENCE):
                    async for chunk in request.stream():
                        content += chunk
                        if len(content) > max_bytes:
                            return answer(413, problem=f"larger than {max_bytes:,} bytes")
            except ClientDisconnect:
                return Response(status_code=400)
            except TimeoutError:
                return answer(408, problem=f"not here after {_PATIENCE} seconds")
            return await asyncio.get_running_loop().run_in_executor(worker, explain, bytes(content))

    return make_site("app.html", [Route("/classify", classify, methods=["POST"])], hosts)


def _draw(pixels: Pixels) -> str:
    return as_url(Image.fromarray((255 * pixels).round().astype(np.uint8)), "PNG")
