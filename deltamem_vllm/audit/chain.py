"""A chain of audit entries: JSON lines, each with the hash of the one before. Pure, but for reading files.

    {"seq": 7, "time": 1700000000.123456, "event": "commit", …, "prev": "<64 hex digits>", "hash": "<64 hex digits>"}

``hash`` is BLAKE2b-256 (person ``deltamem-audit``) of the line's other fields in canonical JSON, ``prev`` included, so
that every hash vouches for all entries before it. The first entry's ``prev`` is `ROOT`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = "0" * 64
Event = Literal[
    "create",
    "commit",
    "export",
    "inspect",
    "import",
    "rollback",
    "reset",
    "fork",
    "delete",
    "facts",
    "metadata",
    "expire",
    "repair",
]
MAX_LINE = 16 << 10


def digest(fields: Mapping[str, Any]) -> str:
    """The hash of an entry: of all its fields but ``hash``."""
    content = {name: value for name, value in fields.items() if name != "hash"}
    return hashlib.blake2b(canonical(content), digest_size=32, person=b"deltamem-audit").hexdigest()


def canonical(fields: Mapping[str, Any]) -> bytes:
    """JSON with one form only: sorted names, no blanks, ASCII."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def line(fields: Mapping[str, Any], seq: int, prev: str) -> tuple[bytes, str]:
    """An entry as a line of the file, and its hash."""
    entry: dict[str, Any] = {**fields, "seq": seq, "prev": prev}
    entry["hash"] = digest(entry)
    return canonical(entry) + b"\n", entry["hash"]


@dataclass(frozen=True, slots=True)
class Head:
    """The end of a chain: what the next entry follows."""

    seq: int = 0
    hash: str = ROOT


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong at a line of a file.

    Attributes:
        line: from 1.
    """

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


def parse(raw: bytes) -> dict[str, Any]:
    """A line's entry.

    Raises:
        ValueError: says what is wrong with it by itself: no entry, or not what its hash says.
    """
    try:
        entry = json.loads(raw)
    except ValueError:
        raise ValueError("is no JSON") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("hash"), str) or not isinstance(entry.get("prev"), str):
        raise ValueError("is no audit entry")
    if type(entry.get("seq")) is not int:
        raise ValueError("has no number")
    if canonical(entry) != raw.rstrip(b"\n"):
        raise ValueError("is not written as the server writes")
    if digest(entry) != entry["hash"]:
        raise ValueError("was edited: its hash is another one")
    return entry


def segments(path: Path) -> list[Path]:
    """The files of one chain, oldest first: those rotated away (``PATH.000001`` …), then ``PATH`` itself."""
    old = [
        p
        for p in path.parent.glob(f"{path.name}.*")
        if (tail := p.name[len(path.name) + 1 :]).isdigit() and len(tail) == 6
    ]
    return [*sorted(old), *([path] if path.exists() else [])]


def verify(path: Path, head: str | None = None) -> tuple[Head, list[Fault]]:
    """Check a chain, all its files.

    Args:
        head: a hash that the chain must have reached; the only way to see that its end was cut off.

    Returns:
        where it ends, and what is wrong. After a fault the chain is taken up again from what the line says, so that
        one edit is one or two faults.
    """
    end, faults, reached = Head(), [], head is None or head == ROOT
    files = segments(path)
    for file in files:
        number = 0
        for number, raw in enumerate(_lines(file), 1):
            try:
                if not raw.endswith(b"\n"):
                    raise ValueError(
                        "is cut off: repaired when the server starts again" if file == path else "is cut off"
                    )
                entry = parse(raw)
            except ValueError as error:
                faults.append(Fault(file.name, number, str(error)))
                continue
            if entry["seq"] != end.seq + 1:
                faults.append(Fault(file.name, number, f"entry {entry['seq']} follows entry {end.seq}"))
            elif entry["prev"] != end.hash:
                faults.append(Fault(file.name, number, f"entry {entry['seq']} does not follow the entry before it"))
            end = Head(entry["seq"], entry["hash"])
            reached = reached or entry["hash"] == head
    if not files:
        faults.append(Fault(path.name, 0, "there is no such file"))
    elif not reached:
        faults.append(
            Fault(path.name, 0, "the given head is not in the chain: its end was cut off, or it is another chain")
        )
    return end, faults


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        yield from _split(iter(lambda: opened.read(1 << 16), b""))


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (one + b"\n" for one in whole)
    if rest:
        yield rest
