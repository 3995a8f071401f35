"""How many processes decode images."""

import os
import tempfile

from stages.common.cli import StageError

# More decoders than this outrun any one network.
_MOST = 16
# Decoding processes hand their images over through sockets in a folder below this one, and a socket's path has at
# most 103 bytes (macOS; Linux: 107). Where it is longer, torch's loader waits for ever.
_LONGEST_TEMPORARY_FOLDER = 103 - len("/pymp-12345678/listener-12345678")


def resolve_workers(workers: int | str) -> int:
    """Turn `params.yaml`'s `workers` into a number; `auto` is one a usable core, at most 16.

    Several processes of a training have their part of these.

    Raises:
        StageError: the folder for temporary files has too long a path for processes to talk through.
    """
    if workers == 0:
        return 0
    temporary = tempfile.gettempdir()
    if len(os.fsencode(temporary)) > _LONGEST_TEMPORARY_FOLDER:
        raise StageError(
            f"workers: the path of the folder for temporary files, {temporary}, is too long for several processes; "
            "set TMPDIR to a shorter one, or workers to 0"
        )
    if isinstance(workers, int):
        return workers
    # torchrun says how many processes share the machine (stages.common.ranks).
    return max(1, min(usable_cores(), _MOST) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
