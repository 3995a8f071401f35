"""A page to go through suspected labels. The table of corrections is all that it keeps, so nothing can be lost."""

import secrets
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stages.common.cli import StageError, describe
from stages.common.files import read_csv, write_csv
from stages.deploy.web import LOOPBACK, answer, as_url, make_site, refuse
from stages.images.dataset import DROP, read_corrections
from stages.images.decode import ImageError, decode, read_image
from stages.scores.suspects import Suspect

_PAGE = Path(__file__).with_name("review.html")
_MOST_PIXELS = 1000  # a side, as shown


@dataclass(frozen=True)
class Progress:
    """How many suspects there are, what became of them, and the number of the first undecided one, from 0."""

    suspects: int
    kept: int
    corrected: int
    dropped: int
    next: int


def measure_progress(suspects: Sequence[Suspect], table: Path) -> Progress:
    """Look up which suspects are decided; raises what `read_corrections` does, but the table may be absent."""
    corrections = read_corrections(table) if table.exists() else {}
    decided = [one for one in suspects if one.path in corrections]
    dropped = sum(corrections[one.path] == DROP for one in decided)
    kept = sum(corrections[one.path] == one.label != DROP for one in decided)
    following = next((number for number, one in enumerate(suspects) if one.path not in corrections), len(suspects))
    return Progress(len(suspects), kept, len(decided) - kept - dropped, dropped, following)


def write_correction(table: Path, name: str, correction: str) -> None:
    """Correct one image in a table for `data.corrections`; its other rows and columns stay, and it may be absent."""
    header, rows = ["path", "correction"], list[list[str]]()
    if table.exists():
        read_corrections(table)
        header, rows = read_csv(table)
    path, place = header.index("path"), header.index("correction")
    if all(row[path] != name for row in rows):
        rows.append([name if column == path else "" for column in range(len(header))])
    for row in rows:
        if row[path] == name:
            row[place] = correction
    write_csv(table, header, rows)


def make_review(suspects: Sequence[Suspect], root: Path, grey_max: int | None, table: Path) -> Starlette:
    """Return the server's application: the page, and what it asks for by a suspect's number.

    Args:
        suspects: at least one.
        root: what their paths are relative to.
        grey_max: as in `decode`.
        table: of corrections, to write or extend.
    """
    # Pages from elsewhere cannot read it, and one of an earlier start, with other numbers, has another.
    token = secrets.token_hex()

    def report() -> Response:
        command = f"dvc exp run -S data.corrections={shlex.quote(str(table))}"
        return answer({**asdict(measure_progress(suspects, table)), "token": token, "command": command})

    async def show_progress(_: Request) -> Response:
        return report()

    def show(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(suspects):
            return refuse("no such number", 404)
        one = suspects[number]
        corrections = read_corrections(table) if table.exists() else {}
        return answer({**asdict(one), **_draw(root / one.path, grey_max), "correction": corrections.get(one.path)})

    # On the event loop: one decision at a time reads and writes the table.
    async def decide(request: Request) -> Response:
        if request.headers.get("x-token") != token:
            return refuse("the server has been started again since; reload this page", 403)
        number, decision = request.path_params["number"], request.path_params["decision"]
        if number >= len(suspects) or decision not in ("keep", "suggestion", "drop"):
            return refuse("no such number or decision", 404)
        one = suspects[number]
        write_correction(table, one.path, {"keep": one.label, "suggestion": one.suggestion, "drop": DROP}[decision])
        return report()

    def explain(_: Request, error: Exception) -> Response:
        return refuse(describe(error) if isinstance(error, OSError) else str(error), 500)

    routes = [
        Route("/progress", show_progress),
        Route("/suspects/{number:int}", show),
        Route("/suspects/{number:int}/{decision}", decide, methods=["POST"]),
    ]
    site = make_site(_PAGE, routes, LOOPBACK)
    for kind in (StageError, OSError):
        site.add_exception_handler(kind, explain)
    return site


def _draw(path: Path, grey_max: int | None) -> dict[str, str]:
    try:
        image = decode(read_image(path), grey_max, least=_MOST_PIXELS)
    except (OSError, ImageError) as error:
        return {"problem": (error.strerror if isinstance(error, OSError) else None) or str(error)}
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    # A tenth of a PNG's time; small images stay as good as they are.
    return {"image": as_url(image, "JPEG", quality=95, subsampling=0)}
