"""Checks shapes and dtypes in annotations at every call."""

from typing import Any

from beartype import beartype


def checked(function):
    """Returns a function that checks its annotations; names of options are left to the function's own errors."""
    hints = function.__annotations__
    function.__annotations__ = {name: Any if "Literal[" in str(hint) else hint for name, hint in hints.items()}
    return beartype(function)
