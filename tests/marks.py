"""Marks of single cases."""

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Returns a case of a parametrized test that is left out unless asked for, see `markers` in pyproject.toml."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)
