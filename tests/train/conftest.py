"""What tests of whole training steps share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs that run for a moment need not be fast."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
