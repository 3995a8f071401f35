"""A pipeline that fine-tunes a pretrained image classifier: each module here is one stage, `python -m stages.NAME`."""

import importlib.util
import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

from stages.common.compiler import postpone_compiler

# Before torch loads its OpenMP. By default libgomp's threads spin while they wait for each other, and with more threads
# than cores, they take that time from the thread they wait for: two trainings at once on two cores took six times as
# long as one after the other (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# torcheval 0.0.7 triggers this by its own code, on import.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)


def _exit_at_once(_: int, __: FrameType | None) -> NoReturn:
    os.write(sys.stderr.fileno(), b"error: interrupted; run the same command again\n")
    os._exit(128 + signal.SIGINT)


# `python -m` imports this package first. While the libraries load, for seconds, there is nothing to clean up, and an
# exception might be lost: torch continues if one of its own imports fails.
if sys.argv[0] == "-m":
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"error: {sys.executable} has no torch; activate the environment: source .venv/bin/activate")
    signal.signal(signal.SIGINT, _exit_at_once)
    postpone_compiler()
