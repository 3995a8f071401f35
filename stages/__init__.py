"""A pipeline that fine-tunes a pretrained image classifier: each module here is one stage, `python -m stages.NAME`."""

import sys
import warnings
from types import TracebackType


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("error: interrupted; run the same command again\n")
    else:
        sys.__excepthook__(kind, error, trace)


# torcheval 0.0.7 says it on import, of its own code.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

# `python -m` imports this package first. Ctrl-C while the libraries load (seconds, the first time) is answered like any
# other: one line and a non-zero exit.
if sys.argv[0] == "-m":
    sys.excepthook = _end_quietly
