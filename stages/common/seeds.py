"""Streams of random numbers that hang on several numbers at once."""

import numpy as np
from torch import Generator


def generator_for(*numbers: int) -> Generator:
    """Return a CPU generator for a seed and what else it should depend on, such as the epoch.

    Not by a sum, which takes seed 1, epoch 2 for seed 2, epoch 1; nor by a shift, since torch's CPU generator looks at
    the lower 32 bits of its seed only (`at::mt19937`). numpy's SeedSequence mixes them
    (https://numpy.org/doc/stable/reference/random/bit_generators/generated/numpy.random.SeedSequence.html).

    Args:
        numbers: each 0 or more.
    """
    return Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
