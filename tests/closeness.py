"""How close two arrays are, as tests measure it."""

import numpy as np


def relative_error(got, expected) -> float:
    """The norm of the difference by that of what was expected."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def bfloat16_step(values, *, least: float = 2.0**-126) -> np.ndarray:
    """From one bfloat16 to the next at values of this size, or of `least` where they are smaller."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), least))) - 7)


def assert_bfloat16_close(got, expected):
    """One rounding at 99.9 %, two at all elements, counted in steps of a value of that size (1 at least)."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    steps = np.abs(got - expected) / bfloat16_step(expected, least=1.0)
    assert (steps <= 1).mean() >= 0.999
    assert steps.max() <= 2
