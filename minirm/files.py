"""Files that are whole or not there: digests, atomic writes, folders that appear complete."""

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # what is not complete ends so, and whatever ends so may be removed


def put(path: Path, content: bytes, sync: bool = True) -> None:
    """The whole content or nothing, whoever else writes that file or is killed; with `sync` even if the power fails."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        if sync:
            to_disk(partial)
        os.replace(partial, path)
        if sync:
            to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, made beside its place and put there at the end: who is killed leaves nothing that looks complete.
    Where several processes make the same one at once, that of the first stays; those of the others are as good."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = {"prefix": f"{folder.name}.", "dir": folder.parent, "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**beside) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        yield new
        try:
            new.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def as_json(value: dict) -> str:
    """On one line. What is not finite becomes null: nan and inf are not JSON."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))
