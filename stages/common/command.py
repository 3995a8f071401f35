"""How a stage script starts and how it fails."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class StageError(Exception):
    """Something only the user can put right.

    The message is one line that names the key, file or picture and the way out.
    """


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage and exit: 0, or non-zero after one line on stderr.

    `StageError`, errors of the file system and Ctrl-C are answered with one line. Anything else is a bug, and keeps its
    traceback.
    """
    try:
        main()
    except StageError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again", INTERRUPTED)
    except OSError as error:
        _fail(describe(error))
    sys.exit(0)


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
