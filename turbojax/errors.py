"""Errors that are meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one clear sentence that names the value and the way out. Scripts print it without a traceback
    and exit with code 2.
    """


class CheckpointError(UserError):
    """A checkpoint file is damaged, foreign, unsafe or does not fit the model."""
