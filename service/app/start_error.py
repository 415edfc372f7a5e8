"""The one error of this package."""


class StartError(Exception):
    """The server cannot start; the message says why."""
