"""Errors that are meant for the person at the keyboard."""

import reprlib
from typing import Any

MOST_QUOTED = 60  # characters of a value in an error

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = MOST_QUOTED
_short.maxlevel = 2
_short.maxlist = _short.maxtuple = _short.maxdict = 4


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one clear sentence that names the value and the way out. Scripts print it without a traceback
    and exit with code 2.
    """


class CheckpointError(UserError):
    """A checkpoint file is damaged, foreign, unsafe or does not fit the model."""


def quoted(value: Any) -> str:
    """Shows a value as errors do: in Python's notation, on one line, at most some MOST_QUOTED characters."""
    text = _short.repr(value)
    return text if len(text) <= MOST_QUOTED + 4 else f"{text[:MOST_QUOTED]}..."
