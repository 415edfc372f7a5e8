"""The one error of this room that a caller expects."""


class ExportRefused(Exception):
    """No bundle was written; the message says what is wrong and, for a check, by how much."""
