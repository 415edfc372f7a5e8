"""Big files, cut into parts that are carried in several goes, and put together again on the other side.

A go is a folder `go-1`, `go-2`, ... of parts that travel together; each also holds `carry.json`, which says of every
part and of every whole how long it is and what its SHA-256 is, so that whatever arrives can be judged.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

MAX_PART_BYTES = 20 << 20
MANIFEST = "carry.json"
_BLOCK_BYTES = 1 << 20


class CarryError(Exception):
    """What was to be carried, or was carried, is not what it should be; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a whole. `go` is the number of the go it belongs to."""

    file: str
    go: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A file, and its parts in order."""

    name: str
    bytes: int
    sha256: str
    parts: tuple[Part, ...]


def go_folder(out: Path, go: int) -> Path:
    """Return the folder of one go."""
    return out / f"go-{go}"


def plan(sizes: Mapping[str, int], go_bytes: int) -> dict[str, list[tuple[int, int]]]:
    """Cut files and share the parts among as few goes as first fit, largest first, finds; ties go by the files' order.

    Args:
        sizes: bytes of each file.
        go_bytes: what one go can hold.

    Returns:
        (bytes, go) of each file's parts, in the order of the file.
    """
    if go_bytes < _BLOCK_BYTES:
        raise CarryError(f"{go_bytes} bytes are left for the parts of a go: at least {_BLOCK_BYTES} are needed")
    # Whole parts fill a go. In whole blocks: a checkout that grew a little has its parts cut as they were.
    part_bytes = go_bytes // math.ceil(go_bytes / MAX_PART_BYTES) // _BLOCK_BYTES * _BLOCK_BYTES
    pieces = [
        (name, start, min(part_bytes, size - start))
        for name, size in sizes.items()
        for start in range(0, max(size, 1), part_bytes)
    ]
    room: list[int] = []
    planned: dict[str, list[tuple[int, int, int]]] = {name: [] for name in sizes}
    for name, start, size in sorted(pieces, key=lambda piece: -piece[2]):
        go = next((index for index, left in enumerate(room) if left >= size), len(room))
        if go == len(room):
            room.append(go_bytes)
        room[go] -= size
        planned[name].append((start, size, go + 1))
    return {name: [(size, go) for _, size, go in sorted(parts)] for name, parts in planned.items()}


def cut(files: list[Path], out: Path, go_bytes: int) -> tuple[Whole, ...]:
    """Write the parts of files into the folders of their goes; a part that lies there already is kept.

    What lies in those folders from another cut is removed.
    """
    planned = plan({file.name: file.stat().st_size for file in files}, go_bytes)
    wholes = tuple(_cut_one(file, out, planned[file.name]) for file in files)
    wanted = {go_folder(out, part.go) / part.file for whole in wholes for part in whole.parts}
    for stale in set(out.glob("go-*/*")) - wanted:
        stale.unlink()
    content = json.dumps([asdict(whole) for whole in wholes], indent=1)
    for folder in {path.parent for path in wanted}:
        (folder / MANIFEST).write_text(content, "utf-8")
    for folder in out.glob("go-*"):
        if not any(folder.iterdir()):
            folder.rmdir()
    return wholes


def _cut_one(file: Path, out: Path, sizes: list[tuple[int, int]]) -> Whole:
    parts, whole = [], hashlib.sha256()
    with file.open("rb") as source:
        for index, (size, go) in enumerate(sizes):
            content = source.read(size)
            whole.update(content)
            part = Part(
                file=f"{file.name}.part{index:02}", go=go, bytes=size, sha256=hashlib.sha256(content).hexdigest()
            )
            path = go_folder(out, go) / part.file
            if _fault(path, part) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            parts.append(part)
    return Whole(name=file.name, bytes=file.stat().st_size, sha256=whole.hexdigest(), parts=tuple(parts))


def join(carried: Path, out: Path) -> list[Path]:
    """Put the files together from the goes that lie in `carried`, all of them or none.

    A file that lies in `out` already, and is right, is kept.

    Raises:
        CarryError: parts are missing or damaged; the message names each of them, and its go.
    """
    manifests = {path.read_text("utf-8") for path in carried.glob(f"go-*/{MANIFEST}")}
    if len(manifests) != 1:
        raise CarryError(f"{carried} holds goes of {len(manifests)} cuts, must be one: carry all goes of one again")
    wholes = [
        Whole(**{**whole, "parts": tuple(Part(**part) for part in whole["parts"])})
        for whole in json.loads(manifests.pop())
    ]
    out.mkdir(parents=True, exist_ok=True)
    wanting = [whole for whole in wholes if _sha256_of(out / whole.name) != whole.sha256]
    found = [
        (part, fault)
        for whole in wanting
        for part in whole.parts
        if (fault := _fault(go_folder(carried, part.go) / part.file, part)) is not None
    ]
    if found:
        lines = [f"go-{part.go}/{part.file} {fault}" for part, fault in found]
        goes = ", ".join(f"go-{go}" for go in sorted({part.go for part, _ in found}))
        raise CarryError("\n".join([*lines, f"carry {goes} again"]))
    for whole in wanting:
        path = out / whole.name
        with path.open("wb") as target:
            for part in whole.parts:
                target.write((go_folder(carried, part.go) / part.file).read_bytes())
        if _sha256_of(path) != whole.sha256:
            path.unlink()
            raise CarryError(f"{whole.name}: the parts are right and their whole is not: cut it again")
    return [out / whole.name for whole in wholes]


def _fault(path: Path, part: Part) -> str | None:
    """Return what is wrong with a part that should lie somewhere, if anything is."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != part.bytes:
        return f"has {path.stat().st_size} bytes, must have {part.bytes}"
    if _sha256_of(path) != part.sha256:
        return f"is damaged: its SHA-256 is not {part.sha256}"
    return None


def _sha256_of(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None without one."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block
