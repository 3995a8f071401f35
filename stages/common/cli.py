"""How a stage script starts and how it fails."""

import errno
import importlib.util
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
LOST = 3  # exit code of a rank that ends because another rank has failed
# Parts of torch's messages, in lower case: from CUDA and MPS, the CPU's allocator, sizes that overflow 64 bits, and
# oneDNN, which only says that it could not create something.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "storage size calculation overflowed",
    "could not create a memory",
    "could not create a primitive",
)

# Parts of torch.distributed's messages, in lower case, when another rank is gone.
_LOST_SIGNS = ("gloo", "nccl", "connection", "socket", "broken pipe", "store")


class StageError(Exception):
    """A problem that only the user can solve.

    The message is one line that names the key, file or image and the way out.
    """


class _Interrupt:
    seen = False


class _Others:
    are_there = False


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    _Interrupt.seen = True
    raise KeyboardInterrupt


def stop_if_interrupted() -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C was pressed since the stage started. For loops that may run for hours.

    The exception raised by the key press itself may be lost: it lands wherever the interpreter happens to be, and C
    code may drop it (https://github.com/python/cpython/issues/106033).
    """
    if _Interrupt.seen:
        raise KeyboardInterrupt


def end_with_the_others() -> None:
    """Let this rank exit quietly when another rank fails."""
    _Others.are_there = True


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage and exit: 0, or non-zero after one line on stderr.

    `StageError`, file system errors, lack of memory and Ctrl-C give one line. Anything else is a bug and keeps its
    traceback.
    """
    _Interrupt.seen = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # class and file names on an ASCII or Latin-1 terminal
    signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except StageError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again", INTERRUPTED)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (Python flushes it at its end)
    except Exception as error:
        if is_out_of_memory(error):
            _fail(
                f"not enough memory{_asked_for(error)}; lower batch_size, model.image_size or model.hidden, use fewer "
                "workers, or end other programs"
            )
        if _is_lost(error):
            first = str(error).partition("\n")[0]
            _fail(f"{first}; most likely another process of this training has ended, perhaps on another machine", LOST)
        if not isinstance(error, OSError):
            raise
        _fail(describe(error))
    sys.exit(0)


def require_packages(extra: str, *names: str) -> None:
    """Raise StageError if packages of an extra of `pyproject.toml` are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise StageError(
            f"{extra} needs {' and '.join(missing)}: pip install --constraint constraints.txt --editable '.[{extra}]'"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, or that a requested size overflows.

    On the CPU, torch raises a plain `RuntimeError` for it.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _OUT_OF_MEMORY)


def _is_lost(error: BaseException) -> bool:
    message = str(error).lower()
    return _Others.are_there and isinstance(error, RuntimeError) and any(sign in message for sign in _LOST_SIGNS)


def _asked_for(error: BaseException) -> str:
    size = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
    if size is None:
        return ""
    return f" for {size[2] or f'{int(size[1]) / 1e9:,.1f} GB'} at once"


def describe(error: OSError) -> str:
    """Return one line for a file system error: which file, what happened and, for a full disk, what to do."""
    line = error.strerror or str(error)
    if error.filename:
        line = f"{error.filename}: {line}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += "; free some space and run the same command again"
    elif error.errno == errno.ENOENT:
        line += "; run the stage that writes it (`dvc repro` does)"
    return line


def _fail(message: str, code: int = 1) -> NoReturn:
    line = " ".join(message.splitlines())
    # Under torchrun, the error goes to torchrun, which shows one of those of all ranks.
    if reply := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(reply).write_text(json.dumps({"message": line, "timestamp": time.time()}), encoding="utf-8")
    else:
        sys.stderr.write(f"error: {line}\n")
    if _Others.are_there:
        # At once: threads that still wait for the other ranks would abort a normal exit.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
