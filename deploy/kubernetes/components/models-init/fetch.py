"""Fetches an archive of bundles, checks its SHA-256, and only then unpacks it: `python fetch.py DIRECTORY`.

Reads BUNDLES_URL and BUNDLES_SHA256 from the environment. Standard library only: it runs in the serving image.
"""

import hashlib
import os
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path

PIECE = 1 << 20  # bytes


def main(directory: Path) -> None:
    """Fill a directory with bundles.

    Raises:
        SystemExit: the archive is not the one that is wanted.
        OSError: it cannot be had.
    """
    url, wanted = os.environ["BUNDLES_URL"], os.environ["BUNDLES_SHA256"]
    archive = directory / ".archive"
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response, archive.open("wb") as file:
        while piece := response.read(PIECE):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != wanted:
        archive.unlink()
        sys.exit(f"{url} has the SHA-256 {digest.hexdigest()}; BUNDLES_SHA256 is {wanted}")
    for left in directory.iterdir():  # by an earlier try
        if left.is_dir():
            shutil.rmtree(left)
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    archive.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
