"""The one error of this package."""


class ReadError(ValueError):
    """A pretrained model cannot be read; the message names the file and the feature, tensor or field at fault."""
