"""What tests of the application share."""

import pytest

from turbojax.app import generate


@pytest.fixture
def loads(demo_pipe, monkeypatch):
    """The demo's pipeline in the place of a loaded one; a list of what was loaded."""
    loads = []
    monkeypatch.setattr(generate, "load_pipeline", lambda options, prepare: loads.append(options) or demo_pipe)
    return loads
