"""What the frozen prefix of a network makes of the pictures, computed once and kept.

It is in the user's cache, by content: a folder's name is a hash of the prefix, the preprocessing and the precision, and
in it a picture's row is found by the SHA-256 of its file. So a stale value cannot be read, and another rate, seed or
split reads what an earlier run wrote.
"""

import sys
import time
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from stages.common import ranks
from stages.images.batches import Order
from stages.images.index import Entry
from stages.training import cache
from stages.training.prefix import BATCH, FrozenPrefix, pad
from stages.training.store import FILE_OVERHEAD, ROW_OVERHEAD, Kept, Writer, find


def keep(
    prefix: FrozenPrefix, entries: list[Entry], max_gigabytes: float, also: Mapping[int, list[Entry]] | None = None
) -> Kept:
    """Find the activations of pictures in the cache; compute those that are not there, once, and keep them.

    As many are kept as there is room for. Where that is not all, a line says why. Several processes of one store
    compute a part each, and find all. Of pictures that are decoded for this the thumbnails are kept as well, which
    `evaluate` needs of all.

    Args:
        prefix: whose activations.
        entries: the pictures; the same in all processes of a store.
        max_gigabytes: of the whole cache.
        also: a number of blocks -> pictures. What enters the last so many blocks is kept in the same pass, of those
            of these pictures that go through it, for a later stage that trains the blocks.

    Returns:
        The activations, not necessarily of all pictures.

    Raises:
        StageError: a picture is gone or changed since the index was made.
    """
    kept, problem = _keep(prefix, entries, max_gigabytes, also or {})
    if missing := kept.missing(entries):
        left = "activations are" if not kept.rows else f"activations of {len(missing):,} pictures are"
        print(f"{left} not kept, but computed each time: {_explain(problem)}", flush=True)
    return kept


def fit(prefix: FrozenPrefix, blocks: int, rows: int, max_gigabytes: float) -> FrozenPrefix:
    """Return a prefix that keeps what enters its last blocks, if there is no room for what leaves them.

    In float32 the values are the same bytes. Going through some blocks again takes longer than reading what was
    kept, but a fraction of going through all: of MobileNetV3-Large, what leaves the last three blocks has six times
    the bytes.

    Args:
        prefix: before all that may be kept.
        blocks: the last ones of it that may be gone through each time.
        rows: how many there are to keep.
        max_gigabytes: of the whole cache.
    """
    count = len(prefix.blocks) - blocks
    if not 0 <= count < len(prefix.blocks):
        return prefix
    before, after = (size + ROW_OVERHEAD for size in prefix.row_sizes([count, len(prefix.blocks)]))
    room = ranks.agree(_find_room(max_gigabytes))
    if min(rows, room // before) <= min(rows, room // after):
        return prefix
    print(f"kept before the last {blocks} blocks: {before:,} bytes a picture; {after:,} behind them have no room")
    return replace(prefix, blocks=prefix.blocks[:count], behind=prefix.blocks[count:])


def _keep(
    prefix: FrozenPrefix,
    entries: list[Entry],
    max_gigabytes: float,
    also: Mapping[int, list[Entry]],
) -> tuple[Kept, OSError | None]:
    """Return what can be kept, and why not all if anything was in the way."""
    count = len(prefix.blocks)
    folders = _folders(prefix)
    kept = Kept()
    kept.hold(folders[count])
    kept.add(find(folders[count], {entry.sha256 for entry in entries}))
    if kept.missing(entries):
        # So that rows of pictures which nobody asks for any more may go. What was found stays readable.
        kept.release()
    if not any(ranks.gather(bool(kept.missing(entries)))):
        return kept, None
    later = {
        folders[count + len(prefix.behind) - blocks]: {entry.sha256 for entry in pictures}
        for blocks, pictures in also.items()
        if len(prefix.behind) < blocks <= count + len(prefix.behind)
    }
    cuts = [count, *map(folders.index, later)]
    rows = _Rows(prefix, cuts, [folders[cut] for cut in cuts])
    if rows.thumbnails is not None:
        later[rows.thumbnails] = {entry.sha256 for entry in entries}
    with ExitStack() as stack:

        def plan() -> _Plan:
            waiting = "waiting for another process that computes the same activations"
            stack.enter_context(cache.one_at_a_time(folders[count], waiting))
            kept.add(find(folders[count], kept.missing(entries).keys()))
            return _make_plan(entries, kept, later, rows.sizes(), max_gigabytes)

        planned = _ask_leader(prefix, plan)
        problem = planned.problem
        try:
            _compute(rows, entries, planned.wanted)
        except OSError as error:
            problem = error
        problems = ranks.gather(problem)
    kept.hold(folders[count])
    kept.add(find(folders[count], kept.missing(entries).keys()))
    return kept, next((problems[rank] for rank in prefix.share.team if problems[rank] is not None), None)


def _ask_leader(prefix: FrozenPrefix, plan: Callable[[], "_Plan"]) -> "_Plan":
    """Let the first process of this store make the plan for all of them."""
    planned = _Plan([], None)
    if prefix.share.leads:
        try:
            planned = plan()
        except OSError as error:
            planned = _Plan([], error)
    return ranks.gather(planned)[prefix.share.team[0]]


def _find_room(max_gigabytes: float) -> int:
    try:
        room = cache.find_room([cache.activations_folder()], max_gigabytes)
    except OSError:
        return 0
    return max(0, min(room.limit, room.disk))


def _explain(problem: OSError | None) -> str:
    return "another process removed them" if problem is None else cache.explain(problem)


def _folders(prefix: FrozenPrefix) -> list[Path]:
    return [cache.activations_folder() / name for name in prefix.names()]


@dataclass(frozen=True)
class _Rows:
    """What is made of a picture once it is decoded: what leaves some numbers of blocks, and its thumbnail.

    `own` is where the former are kept, for each of `cuts`.
    """

    prefix: FrozenPrefix
    cuts: list[int]
    own: list[Path]

    @cached_property
    def thumbnails(self) -> Path | None:
        """The folder of the thumbnails; `None` where these rows are they."""
        folder = _folders(self.prefix.thumbnails)[1]
        return None if folder in self.own else folder

    def folders(self) -> list[Path]:
        """Return where the rows are kept, in the order of `forward`."""
        return self.own + ([] if self.thumbnails is None else [self.thumbnails])

    def sizes(self) -> list[int]:
        """Return the bytes that they take on disk."""
        sizes = self.prefix.row_sizes(self.cuts)
        if self.thumbnails is not None:
            sizes += self.prefix.thumbnails.row_sizes([1])
        return [size + ROW_OVERHEAD for size in sizes]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the rows of `BATCH` pictures."""
        images = pad(images)
        small = [] if self.thumbnails is None else self.prefix.thumbnails.forward(images, [1])
        return [*self.prefix.forward(images, self.cuts), *small]


@dataclass(frozen=True)
class _Plan:
    """What to compute: for each cut, positions of pictures whose rows are kept; and why that is not all.

    The first cut is the one that is needed: only of pictures that it has can there be others.
    """

    wanted: list[list[int]]
    problem: OSError | None


def _make_plan(
    entries: list[Entry],
    kept: Kept,
    later: Mapping[Path, Set[str]],
    sizes: list[int],
    max_gigabytes: float,
) -> _Plan:
    """Choose what there is room for, and make that room.

    What is kept for `later` (a folder -> the pictures it is wanted of) comes second: a stage of its own can compute
    that.

    Args:
        entries: the pictures that are needed.
        kept: what is there of them.
        later: as above.
        sizes: bytes of a row, of what is needed and for each of `later`.
        max_gigabytes: of the whole cache.

    Raises:
        OSError: the cache cannot be written.
    """
    positions = {entry.sha256: position for position, entry in enumerate(entries)}
    missing = list(kept.missing(entries))
    if not missing:
        return _Plan([], None)
    parts, spare = [cache.activations_folder()], set(kept.paths)
    room = cache.find_room(parts, max_gigabytes, spare)
    problem = room.why_not(len(missing) * sizes[0] + FILE_OVERHEAD)
    left = max(0, min(room.limit, room.disk) - len(sizes) * FILE_OVERHEAD)
    needed = missing[: left // sizes[0]]
    if not needed:
        return _Plan([], problem)
    wanted = [needed]
    left -= len(needed) * sizes[0]
    for (folder, own), size in zip(later.items(), sizes[1:], strict=True):
        present = find(folder, own & set(needed))
        spare |= present.paths
        absent = (sha256 for sha256 in needed if sha256 in own and sha256 not in present.rows)
        wanted.append(list(islice(absent, left // size)))
        left -= len(wanted[-1]) * size
    total = sum(len(own) * size for own, size in zip(wanted, sizes, strict=True))
    cache.make_room(total, parts, max_gigabytes, spare)
    return _Plan([[positions[sha256] for sha256 in own] for own in wanted], problem)


def _compute(rows: _Rows, entries: list[Entry], wanted: list[list[int]]) -> None:
    """Compute this process's part of what is planned, and write it.

    Args:
        rows: what of each picture.
        entries: the pictures.
        wanted: as in `_Plan`.

    Raises:
        OSError: it cannot be written.
    """
    needed = [entries[position] for position in rows.prefix.share.of_team(wanted[0] if wanted else [])]
    if not needed:
        return
    started = time.monotonic()
    with ExitStack() as stack, tqdm(total=len(needed), desc="activations", unit=" pictures", disable=None) as progress:
        writers = [
            Writer(folder, {entries[position].sha256 for position in own})
            for folder, own in zip(rows.folders(), wanted, strict=True)
        ]
        for writer in writers:
            stack.callback(writer.close)
        position = 0
        for images, _ in rows.prefix.read(needed, BATCH, "none", Order(len(needed))):
            count = len(images)
            batch = [entry.sha256 for entry in needed[position : position + count]]
            for writer, activations in zip(writers, rows.forward(images), strict=True):
                writer.add(batch, activations[:count].cpu())
            position += count
            progress.update(count)
        for writer in writers:
            writer.flush()
    if not sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"activations: {len(wanted[0]):,} pictures, {len(wanted[0]) / seconds:.0f} pictures/s", flush=True)
