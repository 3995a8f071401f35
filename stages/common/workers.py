"""How many processes decode pictures."""

import os

# More decoders than this outrun any one network.
_MOST = 16


def resolve_workers(workers: int | str) -> int:
    """Turn `params.yaml`'s `workers` into a number; `auto` is one a usable core, at most 16."""
    if isinstance(workers, int):
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST)
