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


def assert_requantized(got, expected, y):
    """Two results of quantizing y `[M, N]` in blocks of 128 x 128, each an `int8.Quantized`.

    Every value within half a code of y, give or take one rounding of y; the codes those of the same scale at 99.9 %.
    In a block whose largest value is rounded otherwise scale and codes are others, and as good. So is either code of a
    value in the middle between two: one kernel multiplies and rounds in one instruction, another in two. Both y and
    scale are bfloat16, so in a block of scale 9 / 8 every ninth value may be one.
    """
    y, codes, other_codes = np.asarray(y, np.float32), np.asarray(got.q, np.int32), np.asarray(expected.q, np.int32)
    m, n = y.shape
    scales = np.asarray(got.scale), np.asarray(expected.scale)  # of JAX arrays repeat makes another, which is strict
    np.testing.assert_allclose(*scales, rtol=1e-2)
    own, other = (np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:m, :n] for scale in scales)
    assert np.abs(codes - other_codes).max() <= 2
    half = np.where(codes == 127, 1.0, 0.5)  # 127 stands for the largest value, too, which would be 128
    assert (np.abs(codes * own - y) <= half * own * (1 + 1e-5) + bfloat16_step(y)).all()
    same_scale = own == other
    assert same_scale.mean() > 0.9
    middle = np.abs(np.abs(y) / own % 1 - 0.5) < 1e-5
    assert (codes == other_codes)[same_scale & ~middle].mean() > 0.999
