import pytest

from tests.weights.checkpoints import turbo


@pytest.fixture(scope="session")
def tensors():
    """A small transformer in TurboDiffusion's names."""
    return turbo()
