"""JSON files with clear errors."""

import json
from pathlib import Path
from typing import Any

from models.readers.errors import ReadError


def read_json(path: Path, *, kind: type = dict) -> Any:
    """Return the object in a JSON file, or the list if `kind` says so.

    Raises:
        ReadError: the file is missing, malformed, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReadError(f"{path.name} is missing") from error
    except json.JSONDecodeError as error:
        raise ReadError(f"{path.name} is malformed: {error}") from error
    if not isinstance(document, kind):
        raise ReadError(f"{path.name} holds no {'object' if kind is dict else kind.__name__}")
    return document
