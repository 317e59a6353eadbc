"""Atomic writes: files and folders are either complete or absent. Also their digests."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from minirm.errors import Stop, disk_is_full, one_line

PARTIAL = ".partial"  # suffix of incomplete files and folders, which are safe to remove


def put(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file atomically, even if other processes write it too or are killed; with `sync`, even if power fails."""
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
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, size: int = 0, earlier: str = "") -> Iterator[None]:
    """Turn file-system errors into a Stop that names the path, the bytes needed and the bytes free.

    size: bytes needed, 0 if unknown; earlier: what is still safe.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        place = next(place for place in (path, *path.absolute().parents) if place.is_dir())
        needed = f"needs {size:,} bytes, " if size else ""
        room = f"{needed}{shutil.disk_usage(place).free:,} bytes are free{f'; {earlier}' if earlier else ''}"
        advice = f"{'free some space' if disk_is_full(error) else 'fix this'} and run the same command again"
        raise Stop(f"{path}: could not be written ({one_line(error)}): {room}; {advice}", 3) from None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder and move it into place at the end, so a killed process leaves nothing that looks complete.

    If several processes make the same folder at once, the first to finish wins; all would have written the same files.
    Removes what dead processes left behind. Raises Stop if the disk is full.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f"*{PARTIAL}"):
            if (lock := _locked(leftover)) is not None:
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)
        while True:  # another process may remove the folder as a leftover before it is locked; then try again
            scratch = Path(tempfile.mkdtemp(PARTIAL, f"{folder.name}.", folder.parent))
            if (lock := _locked(scratch)) is not None and scratch.exists():
                break
        try:
            new = scratch / folder.name
            new.mkdir()
            yield new
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Lock a folder. Returns the descriptor that holds the lock until it is closed, or None if another holds it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError:
            os.close(descriptor)
    return None


def as_json(value: dict) -> str:
    """JSON on one line. nan and inf, which are not valid JSON, become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))
