"""Checks shapes and dtypes in annotations at every call."""

from beartype import beartype


def checked(function):
    """Returns a function that checks the arrays in its annotations; all else is left to the function's own errors."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if "jaxtyping" in repr(hint)}
    return beartype(function)
