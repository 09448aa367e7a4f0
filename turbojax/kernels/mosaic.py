"""What the Pallas Mosaic GPU kernels share."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def load(ref: Any, *, layout: Any = None) -> jax.Array:
    """An array in registers, in the layout given or in that of whatever it meets."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # jax 0.11 warns of one, 0.10 wants it
    return plgpu.load(ref, *index, layout=layout, optimized=False)
