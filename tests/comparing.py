"""How alike two images are to be.

Equal bits are promised for the same weights in one process, and for one stored model in any process
of one environment. Shared forwards, and weights that lie elsewhere in memory, may round otherwise.
"""

import numpy as np


def same_image(one, other):
    """True if two images, or arrays of levels, are at most one level of 8 bits apart.

    Arrays of floats are taken as values from 0 to 1 (or -1 to 1, for audio).
    """
    one, other = np.asarray(one), np.asarray(other)
    level = 1 if one.dtype.kind in "ui" else 1 / 255
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return one.shape == other.shape and bool((difference <= level).all())
