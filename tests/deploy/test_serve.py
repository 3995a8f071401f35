"""`python -m stages.serve`: what a browser gets, and what it may not have."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import uvicorn
from conftest import ROOT, call_script
from PIL import Image
from small import save_random
from starlette.applications import Starlette

from stages import serve
from stages.deploy import web
from stages.deploy.app import make_app
from stages.deploy.classifier import TorchNetwork
from stages.images.preprocessing import Preprocessing, make_transform
from stages.network.checkpoint import load_checkpoint
from stages.network.network import Network
from stages.network.objective import probabilities
from stages.training.reference import Features

NAMES = ("cat", "dog", "owl", "fox", "<b>hen</b>", "cow")
PREPROCESSING, TEMPERATURE = Preprocessing(crop=64), 1.5
MAX_BYTES = 4_000_000


@contextmanager
def running(app: Starlette) -> Iterator[int]:
    """The port of a server."""
    listening = web.listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("served") / "network.safetensors", NAMES, TEMPERATURE)


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Network:
    return load_checkpoint(checkpoint)[0].eval()


@pytest.fixture(scope="module")
def port(checkpoint: Path) -> Iterator[int]:
    classifier = TorchNetwork(checkpoint, torch.device("cpu"), "float32")
    with running(make_app(classifier, ["127.0.0.1"], MAX_BYTES)) as port:
        yield port


@contextmanager
def started(folder: Path, script: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A page's process and its port; it is to be ended by whoever started it."""
    command = [sys.executable, "-m", f"stages.{script}", "--port", "0", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = re.match(r"http://127\.0\.0\.1:(\d+)/  \(Ctrl-C ends it\)\n", process.stdout.readline())
        assert address is not None
        yield process, int(address[1])


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Press Ctrl-C; the exit code, and what was printed."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def ask(port: int, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, content, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    return response.status, response.read()


def classify(port: int, content: Any) -> tuple[int, dict[str, Any]]:
    status, answer = ask(port, "POST", "/classify", content)
    return status, json.loads(answer)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def noise(seed: int, size: int = 90) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def expected(network: Network, image: Image.Image) -> dict[str, float]:
    images = make_transform(PREPROCESSING, "none")(image)[None]
    with torch.inference_mode():
        values = probabilities(network(images).double(), TEMPERATURE)[0].tolist()
    return dict(zip(NAMES, values, strict=True))


def assert_closed(port: int) -> None:
    """The page loads nothing from elsewhere, and no other page can frame it."""
    with urlopen(f"http://127.0.0.1:{port}/") as response:
        assert not re.search(rb"(src|href)=[\"'](?!data:)|https?://|@import|url\(", response.read())
        policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert policy.endswith("; frame-ancestors 'none'")


def test_an_image_gets_its_classes_the_most_probable_first_and_two_images(port: int, network: Network) -> None:
    assert_closed(port)
    status, answer = classify(port, encode(noise(1)))
    assert status == 200
    values = expected(network, noise(1))
    assert [one["name"] for one in answer["classes"]] == sorted(values, key=lambda name: -values[name])[:5]
    assert [one["probability"] for one in answer["classes"]] == pytest.approx(sorted(values.values())[:0:-1], abs=1e-6)
    assert answer["others"] == 1
    with torch.inference_mode():
        images = make_transform(PREPROCESSING, "none")(noise(1))[None]
        cosine = float(Features()(network.backbone(images))[0, :3].max())
    assert answer["unlike"] == pytest.approx((1 - cosine) / 0.5, abs=1e-4)
    for name in ("image", "heat"):
        content = base64.b64decode(answer[name].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(content)).size == (64, 64)


def test_ten_simultaneous_requests_get_their_own_answers(port: int, network: Network) -> None:
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda seed: classify(port, encode(noise(seed))), range(10)))
    for seed, (status, answer) in enumerate(answers):
        assert status == 200
        values = expected(network, noise(seed))
        assert answer["classes"][0]["name"] == max(values, key=lambda name: values[name])
        assert answer["classes"][0]["probability"] == pytest.approx(max(values.values()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_two_hundred_uploads_at_once_are_answered_in_bounded_memory(checkpoint: Path) -> None:
    with started(checkpoint.parent, "serve", "--checkpoint", checkpoint) as (process, port):
        content = encode(noise(0, 1300))
        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(lambda _: classify(port, content)[0], range(200)))
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        end(process)
    assert answers == [200] * 200
    assert peak is not None
    assert int(peak[1]) < 1_500_000


def test_a_file_that_is_not_an_image_is_refused_and_the_next_one_is_answered(port: int) -> None:
    for content, status, problem in (
        (b"no image", 422, "not an image in a known format"),
        (encode(noise(0))[:2000], 422, "damaged"),
        (encode(Image.new("1", (10_000, 9_000))), 422, "more than 89478485 pixels"),
        # Without a length that is known before.
        ((bytes(500_000) for _ in range(9)), 413, "larger than 4,000,000 bytes"),
    ):
        answered, answer = classify(port, content)
        assert (answered, problem in answer["problem"]) == (status, True)
        assert classify(port, encode(noise(2)))[0] == 200


def test_requests_for_another_host_are_refused(port: int) -> None:
    assert ask(port, "POST", "/classify", encode(noise(1)), Host="evil.example")[0] == 400
    assert ask(port, "GET", "/", Host="evil.example:8000")[0] == 400
    assert ask(port, "GET", "/", Host=f"127.0.0.1:{port}")[0] == 200
    assert ask(port, "GET", "/../params.yaml")[0] == 404
    assert [web.is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")] == [True] * 3 + [
        False
    ] * 2


def test_the_server_prints_its_address_and_ends_with_ctrl_c(checkpoint: Path) -> None:
    with started(checkpoint.parent, "serve", "--checkpoint", checkpoint) as (process, port):
        assert classify(port, encode(noise(3)))[0] == 200
        assert end(process) == (0, "stopped\n", "")
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["network.safetensors", "reference.safetensors"]


def test_a_bad_address_or_checkpoint_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"PK")

    def serve_with(path: Path, *arguments: object) -> str:
        assert call_script(serve, "--checkpoint", path, *arguments) == 1
        return capsys.readouterr().err.splitlines()[-1]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use; choose another" in serve_with(checkpoint, "--port", taken.getsockname()[1])
    assert "should be from 0 to 65535" in serve_with(checkpoint, "--port", 70000)
    assert "on 203.0.113.1: " in serve_with(checkpoint, "--host", "203.0.113.1")
    assert "no such checkpoint" in serve_with(tmp_path / "none.safetensors")
    assert "damaged checkpoint" in serve_with(tmp_path / "broken.safetensors")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve needs uvicorn: pip install" in serve_with(checkpoint)


@contextmanager
def open_browser() -> Iterator[Any]:
    """A page in a browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_file = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_file is None:
        pytest.skip("no Chromium")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=browser_file, args=["--no-sandbox"]) as browser,
    ):
        yield browser.new_page()


def test_the_page_shows_the_answers_in_a_browser(port: int, network: Network, tmp_path: Path) -> None:
    """Runs where playwright (not among the test's packages) and a Chromium are installed."""
    files = [tmp_path / f"{number} <i>.png" for number in range(10)]
    for number, file in enumerate(files):
        noise(number).save(file)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with open_browser() as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_input_files("#files", [tmp_path / "bad.jpg"])
        page.get_by_text("cannot be used: not an image in a known format").wait_for()
        page.set_input_files("#files", files)
        page.locator("article:nth-of-type(10) .row").first.wait_for()
        assert page.locator("article h2").all_inner_texts() == [*(file.name for file in files), "bad.jpg"]
        best = [max(expected(network, noise(number)).items(), key=lambda item: item[1]) for number in range(10)]
        for number, (name, value) in enumerate(best):
            row = page.locator("article").nth(number).locator(".row").first
            assert row.inner_text().split() == [name, f"{100 * value:.2f}%"]
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)
        if folder := os.environ.get("DVC_FINETUNE_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "serve.png", full_page=True)
