"""How close videos are."""

import math

import numpy as np
import pytest

from turbojax.media.quality import psnr


def test_psnr():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + np.uint8(255)) == 0
    assert psnr(black, black + np.uint8(1)) == pytest.approx(20 * math.log10(255))
    assert psnr(iter(black), black) == math.inf  # frames may come one by one
    with pytest.raises(ValueError, match="shorter"):
        psnr(black, black[:1])
