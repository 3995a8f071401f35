"""How a stage script starts and how it fails."""

import errno
import gc
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
# In messages of torch's, in lower case: of CUDA and MPS, of the CPU's allocator, of sizes above what 64 bits count; of
# oneDNN, which says no more than that it could not make something.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "overflow",
    "could not create a memory",
    "could not create a primitive",
)


class StageError(Exception):
    """Something only the user can put right.

    The message is one line that names the key, file or picture and the way out.
    """


class _Interrupt:
    seen = False


def _interrupt(_: int, __: FrameType | None) -> NoReturn:
    _Interrupt.seen = True
    raise KeyboardInterrupt


def stop_if_interrupted() -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C was pressed since the stage started. For loops that may run for hours.

    The exception that the key press raised may have been lost, and training went on: it lands wherever the interpreter
    happens to be, and C code may drop it (https://github.com/python/cpython/issues/106033).
    """
    if _Interrupt.seen:
        raise KeyboardInterrupt


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage and exit: 0, or non-zero after one line on stderr.

    `StageError`, errors of the file system, lack of memory and Ctrl-C are answered with one line. Anything else is a
    bug, and keeps its traceback.
    """
    _Interrupt.seen = False
    signal.signal(signal.SIGINT, _interrupt)
    if not gc.isenabled():  # while the libraries were loading; they stay to the end, and need not be looked through
        gc.freeze()
        gc.enable()
    try:
        main()
    except StageError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again", INTERRUPTED)
    except Exception as error:
        if is_out_of_memory(error):
            _fail(
                f"not enough memory{_asked_for(error)}; lower batch_size, model.image_size or model.hidden, use fewer "
                "workers, or end other programs"
            )
        if not isinstance(error, OSError):
            raise
        _fail(describe(error))
    sys.exit(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, or that what was asked for cannot be counted in bytes.

    torch has no error type for it on the CPU: it raises a `RuntimeError`.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _OUT_OF_MEMORY)


def _asked_for(error: BaseException) -> str:
    size = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
    if size is None:
        return ""
    return f" for {size[2] or f'{int(size[1]) / 1e9:,.1f} GB'} at once"


def describe(error: OSError) -> str:
    """One line for an error of the file system: which file, what happened and, for a full disk, what to do."""
    line = error.strerror or str(error)
    if error.filename:
        line = f"{error.filename}: {line}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        line += "; free some space and run the same command again"
    elif error.errno == errno.ENOENT:
        line += "; run the stage that writes it (`dvc repro` does)"
    return line


def _fail(message: str, code: int = 1) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.splitlines())}\n")
    sys.exit(code)
