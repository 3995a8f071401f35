"""A pipeline that fine-tunes a pretrained image classifier: each module here is one stage, `python -m stages.NAME`."""

import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

# torcheval 0.0.7 says it on import, of its own code.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)


def _exit_at_once(_: int, __: FrameType | None) -> NoReturn:
    os.write(sys.stderr.fileno(), b"error: interrupted; run the same command again\n")
    os._exit(128 + signal.SIGINT)


# `python -m` imports this package first. While the libraries load (seconds) there is nothing to clean up, and an
# exception would not get through: torch goes on where one of its own imports fails.
if sys.argv[0] == "-m":
    signal.signal(signal.SIGINT, _exit_at_once)
