"""`python -m stages.review`: what is decided is written, and nobody else decides."""

import base64
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Project, call_script
from PIL import Image
from test_serve import ask, assert_closed, end, open_browser, running, started

from stages import review
from stages.common.files import write_table
from stages.deploy.web import make_review
from stages.images.dataset import read_corrections
from stages.scores.suspects import Suspect

# A cat by its EXIF on its side, 16-bit grey, an image that is gone, two of a name that HTML and CSV would take apart.
PATHS = ("cat/turned.tif", "cat/deep.png", "dog/gone.png", 'dog/<i>,"é.png', "dog/last.png")
SUSPECTS = [
    Suspect(path, path[:3], 0.01 * number, "cat" if path[:3] == "dog" else "dog", 0.9)
    for number, path in enumerate(PATHS)
]


@pytest.fixture
def folder(project: Project) -> Path:
    """That of a project with suspects."""
    images = project.path("images")
    sideways = Image.new("RGB", (60, 30), "blue")
    sideways.paste("yellow", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(images / PATHS[0], exif=exif)
    Image.fromarray(np.full((2000, 1200), 2047, np.uint16)).save(images / PATHS[1])
    for path in PATHS[3:]:
        Image.effect_mandelbrot((40, 40), (-2, -1.5, 1, 1.5), 30).save(images / path)
    project.set("data.grey_max", 4095)
    write_table(project.path("metrics/suspects.csv"), Suspect, SUSPECTS)
    return project.folder


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    with running(make_review(SUSPECTS, folder / "images", 4095, folder / "corrections.csv")) as port:
        yield port


def get(port: int, path: str) -> dict[str, Any]:
    status, content = ask(port, "GET", path)
    assert status == 200
    return json.loads(content)


def decide(port: int, number: int, decision: str) -> dict[str, Any]:
    token = get(port, "/progress")["token"]
    status, content = ask(port, "POST", f"/suspects/{number}/{decision}", X_Token=token)
    assert status == 200
    return json.loads(content)


def counts(progress: dict[str, Any]) -> tuple[int, ...]:
    return tuple(progress[name] for name in ("kept", "corrected", "dropped", "next"))


def picture(shown: dict[str, Any]) -> Image.Image:
    content = base64.b64decode(shown["image"].removeprefix("data:image/jpeg;base64,"))
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_a_decision_is_written_before_the_answer(port: int, folder: Path) -> None:
    table = folder / "corrections.csv"
    assert counts(get(port, "/progress")) == (0, 0, 0, 0)
    assert not table.exists()
    assert counts(decide(port, 0, "keep")) == (1, 0, 0, 1)
    assert table.read_text() == "path,correction\ncat/turned.tif,cat\n"
    assert counts(decide(port, 1, "suggestion")) == (1, 1, 0, 2)
    assert counts(decide(port, 2, "drop")) == (1, 1, 1, 3)
    assert counts(decide(port, 3, "suggestion")) == (1, 2, 1, 4)
    assert read_corrections(table) == dict(zip(PATHS[:4], ("cat", "dog", "drop", "cat"), strict=True))
    assert counts(decide(port, 0, "drop")) == (0, 2, 2, 4), "decided again"
    assert read_corrections(table)[PATHS[0]] == "drop"
    assert get(port, "/suspects/0")["correction"] == "drop"
    assert get(port, "/progress")["command"] == f"dvc exp run -S data.corrections={table}"


def test_a_restart_begins_with_the_first_undecided_image_and_keeps_other_rows(folder: Path) -> None:
    table = folder / "corrections.csv"
    table.write_text('correction,path,why\ncat,"dog/a,b.png",fur\n,cat/deep.png,dark\ndog,cat/turned.tif,\n')
    for expected in ((0, 1, 0, 1), (0, 2, 0, 2)):
        with running(make_review(SUSPECTS, folder / "images", None, table)) as port:
            assert counts(get(port, "/progress")) == expected
            decide(port, expected[3], "suggestion")
    assert table.read_text() == (
        'correction,path,why\ncat,"dog/a,b.png",fur\ndog,cat/deep.png,dark\ndog,cat/turned.tif,\ncat,dog/gone.png,\n'
    )


def test_images_are_shown_as_the_network_sees_them(port: int) -> None:
    turned = picture(get(port, "/suspects/0"))
    assert turned.size == (30, 60)
    assert turned.getpixel((15, 10))[2] < 60, "yellow is above"  # type: ignore[index]
    assert turned.getpixel((15, 50))[2] > 200  # type: ignore[index]
    deep = picture(get(port, "/suspects/1"))
    assert deep.size == (600, 1000)
    assert deep.getpixel((9, 9)) == pytest.approx((127, 127, 127), abs=1), "half of grey_max"
    gone = get(port, "/suspects/2")
    assert (gone["problem"], gone["path"]) == ("No such file or directory", "dog/gone.png")
    shown = get(port, "/suspects/3")
    assert {**shown, "image": ""} == {**vars(SUSPECTS[3]), "image": ""}


def test_only_the_page_of_this_server_can_decide(port: int, folder: Path) -> None:
    refused = [
        ask(port, "POST", "/suspects/0/drop", Origin="http://evil.example"),
        ask(port, "POST", "/suspects/0/drop", "x-token=", Origin="null", Content_Type="text/plain"),
        ask(port, "POST", "/suspects/0/drop", X_Token="0" * 64),
    ]
    assert [status for status, _ in refused] == [403] * 3
    # A browser asks before it sends a header of their own from other pages.
    status, _ = ask(
        port, "OPTIONS", "/suspects/0/drop", Origin="http://evil.example", Access_Control_Request_Method="POST"
    )
    assert status == 405
    token = get(port, "/progress")["token"]
    assert ask(port, "POST", "/suspects/0/drop", X_Token=token, Host="evil.example")[0] == 400
    assert ask(port, "GET", "/progress", Host="evil.example")[0] == 400
    assert ask(port, "GET", "/suspects/0/drop", X_Token=token)[0] == 405
    assert not (folder / "corrections.csv").exists()
    with running(make_review(SUSPECTS, folder / "images", None, folder / "corrections.csv")) as other:
        assert ask(other, "POST", "/suspects/0/drop", X_Token=token)[0] == 403


def test_only_suspects_are_shown_or_decided(port: int, folder: Path) -> None:
    assert_closed(port)
    token = get(port, "/progress")["token"]
    for path in ("5", "-1", "..%2f..%2fparams.yaml", "../params.yaml", "cat/turned.tif", "99999999999"):
        assert ask(port, "GET", f"/suspects/{path}")[0] in (404, 405)
        assert ask(port, "POST", f"/suspects/{path}/drop", X_Token=token)[0] == 404
    assert ask(port, "POST", "/suspects/0/else", X_Token=token)[0] == 404
    assert not (folder / "corrections.csv").exists()


def test_a_table_that_cannot_be_written_is_reported_and_nothing_changes(port: int, folder: Path) -> None:
    table = folder / "corrections.csv"
    table.write_text("path,label\na,b\n")
    status, content = ask(port, "GET", "/progress")
    assert (status, "is no CSV with the columns path and correction" in json.loads(content)["problem"]) == (500, True)
    table.unlink()
    token = get(port, "/progress")["token"]
    table.write_text("path,label\na,b\n")
    assert ask(port, "POST", "/suspects/0/drop", X_Token=token)[0] == 500
    assert table.read_text() == "path,label\na,b\n"


def test_decisions_survive_kill_and_ctrl_c_and_split_uses_them(
    project: Project, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with started(folder, "review") as (process, port):
        decide(port, 0, "suggestion")
        process.kill()
    # The table in use is extended.
    (folder / "corrections.csv").rename(folder / "mine.csv")
    project.set("data.corrections", "mine.csv")
    with started(folder, "review") as (process, port):
        assert counts(get(port, "/progress")) == (0, 1, 0, 1)
        decide(port, 1, "keep")
        decide(port, 3, "drop")
        assert end(process) == (0, "of 5 images 1 kept, 1 corrected, 1 dropped\n", "")
    assert not (folder / "corrections.csv").exists()

    project.set("split.near_duplicates", "report")
    assert project.run("split") == 0
    classes = {entry.path: entry.class_name for part in project.parts().values() for entry in part}
    assert [classes.get(path) for path in PATHS] == ["dog", "cat", None, None, "dog"]
    assert "1 label corrected, 1 image dropped by mine.csv" in capsys.readouterr().out


def test_missing_suspects_are_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    def refused(*arguments: str) -> str:
        assert call_script(review, *arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "none.csv: No such file or directory; run the stage that writes it (`dvc repro` does)" in refused(
        "--suspects", "none.csv"
    )
    write_table(folder / "empty.csv", Suspect, [])
    assert "empty.csv: lists no image, so there is nothing to review" in refused("--suspects", "empty.csv")
    (folder / "other.csv").write_text("path,label\na,b\n")
    assert "other.csv: not what `evaluate` of this version writes" in refused("--suspects", "other.csv")
    assert "other.csv is no CSV with the columns path and correction" in refused("--output", "other.csv")
    monkeypatch.setitem(sys.modules, "starlette", None)
    assert "serve needs starlette: pip install" in refused()


def test_three_keys_decide_in_a_browser(port: int, folder: Path) -> None:
    """Runs where playwright (not among the test's packages) and a Chromium are installed."""
    table = folder / "corrections.csv"
    with open_browser() as page:
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_text("1 of 5, 0 corrected").wait_for()
        assert page.locator("#about").inner_text() == "cat/turned.tif: label cat (0.00%), suggested dog (90.00%)"
        assert page.locator("#image img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [30, 60]
        page.keyboard.press("s")
        page.get_by_text("2 of 5, 1 corrected").wait_for()
        page.keyboard.press("K")
        page.get_by_text("The image cannot be shown: No such file or directory.").wait_for()
        page.keyboard.press("d")
        page.get_by_text('dog/<i>,"é.png: label dog').wait_for()
        assert read_corrections(table) == dict(zip(PATHS[:3], ("dog", "cat", "drop"), strict=True))
        page.keyboard.press("Control+d")
        page.keyboard.press("b")
        page.get_by_text("decided so far: drop").wait_for()
        page.keyboard.press("ArrowLeft")
        page.get_by_text("2 of 5").wait_for()
        page.get_by_role("button", name="Change to dog").click()
        page.get_by_text("4 of 5, 2 corrected, 0 kept, 1 dropped; 3 decided").wait_for()
        if screenshots := os.environ.get("DVC_FINETUNE_SCREENSHOTS"):
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                page.screenshot(path=Path(screenshots) / f"review-{scheme}.png", full_page=True)
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        page.get_by_text("5 of 5").wait_for()
        page.keyboard.press("d")
        page.get_by_text(f"dvc exp run -S data.corrections={table}").wait_for()
        assert page.get_by_role("button", name="Keep").is_disabled()
    assert read_corrections(table) == dict(zip(PATHS, ("dog", "dog", "drop", "dog", "drop"), strict=True))
