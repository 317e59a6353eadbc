"""Read rows from files and datasets, each with its location for error messages.

A source is an argument of --train_data: a file, a glob, a folder, a URL, or a dataset name. A colon may add a split
(`name:test`) or a configuration and a split (`name:config:split`). A suffix selects part of it: `@1000` the first 1,000
rows, `@0.5` every second row.
"""

import csv
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow
import pyarrow.parquet

from minirm.errors import InputError, one_line, refusing, shown
from minirm.files import file_digest

FILE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zX": ".xz", b"(\xb5/\xfd": ".zst", b"PAR1": ".parquet"}
A_FILE = f"a {', '.join(FILE_TYPES[:-1])} or {FILE_TYPES[-1]} file"
SPLITS = "train|test|validation|valid|val|dev|eval"
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # errors of a damaged compressed file


class Source(NamedTuple):
    """A parsed source."""

    typed: str
    place: str  # path, glob, URL or name
    parts: list[str]  # the parts after colons: [], [split] or [config, split]
    rows: int | None  # maximum number of rows
    share: float  # share of the rows


def parse(source: str) -> Source:
    """Parse a source. Raises InputError for an invalid amount."""
    place, rows, share, parts = source, None, 1.0, []
    if (amount := re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", source)) and not Path(source).exists():
        place, number = amount.groups()
        rows, share = (None, float(number)) if "." in number else (int(number), 1.0)
        if rows == 0 or not 0 < share <= 1:
            expected = "a number of rows, as in @1000, or a share up to 1, as in @0.5"
            raise InputError(f"{source}: @{number} must be {expected}")
    # A colon may also be part of a file name or a URL.
    while not Path(place).exists() and len(parts) < 2 and re.search(r":(?!//)[^:/\\]*$", place):
        place, _, part = place.rpartition(":")
        parts.insert(0, part)
    return Source(source, place, parts, rows, share)


def kind_of(path: str) -> str:
    """A file's suffix without compression, such as ".jsonl" for x.jsonl.gz; "" if it is not in FILE_TYPES."""
    path = path.partition("?")[0]
    suffix = Path(path).suffix
    suffix = Path(path.removesuffix(suffix)).suffix if suffix in COMPRESSED else suffix
    return suffix if suffix in FILE_TYPES else ""


def files_of(source: Source) -> list[str] | None:
    """A source's files in order; None for a dataset that `datasets` must load. Raises InputError if there are none."""
    place, local = source.place, "://" not in source.place
    if re.search(r"[*?[]", place.partition("?")[0] if "://" in place else place) and not Path(place).exists():
        fs, pattern = fsspec.core.url_to_fs(place)
        paths = filter(kind_of, sorted(fs.glob(pattern)))
        found = [fs.unstrip_protocol(path).removeprefix("file://") for path in paths]
    elif local and Path(place).is_dir() and not kind_of(place):
        folder = Path(place)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            return None
        if len(source.parts) == 2 and (folder / source.parts[0]).is_dir():  # a data folder such as harmless-base
            folder = folder / source.parts[0]
        found = of_split(source, _files_in(folder), folder)
    elif kind_of(place):
        return [place]
    else:
        return None
    if not found:
        raise InputError(f"{source.typed}: found no {A_FILE[2:]}, compressed or not")
    return found


def left_out(source: str) -> list[str]:
    """A folder's data files that are skipped: they belong to another split, or to none while other files name one."""
    parsed = parse(source)
    if "://" in parsed.place or not Path(parsed.place).is_dir():
        return []
    read = files_of(parsed)
    found = [] if read is None else {*_files_in(Path(parsed.place))} - {*read}
    return [Path(file).relative_to(parsed.place).as_posix() for file in sorted(found)]


def _files_in(folder: Path) -> list[str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and kind_of(path.name))
    return [str(path) for path in files if not re.search(r"(^|/)\.", path.relative_to(folder).as_posix())]


def of_split(source: Source, files: list[str], folder: Path) -> list[str]:
    """The files whose names contain the requested split, or else train; all files if no name contains a split."""
    found = {}
    for file in files:
        name = Path(file).relative_to(folder).as_posix()
        if match := re.search(rf"(?:^|[-_./])({SPLITS})(?:[-_./\d]|$)", name):
            found[file] = match[1]
    wanted, splits = source.parts[-1] if source.parts else "train", {*found.values()}
    if not splits and not source.parts:
        return files
    if wanted not in splits:
        advice = f"found {', '.join(sorted(splits))}; use {source.place}:{min(splits)}" if splits else "omit the split"
        raise InputError(f"{source.typed}: no file name contains the split {wanted}; {advice}")
    return [file for file, split in found.items() if split == wanted]


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every row that is used; `where` is "file:line", for error messages. Raises InputError.

    JSON and CSV are read line by line here, because `datasets` infers one type per column: it cannot name the line of a
    wrong value, turns the CSV answer "NA" into None, and fails on columns that are not needed.
    """
    parsed = parse(source)
    for number, (where, row) in enumerate(_all_rows(parsed)):
        if number == parsed.rows:
            return
        if int((number + 1) * parsed.share) == int(number * parsed.share):
            continue
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with the columns chosen and rejected, got {shown(row)}")
        yield where, row


def _all_rows(source: Source) -> Iterator[tuple[str, Any]]:
    files = files_of(source)
    if files is None:
        yield from _numbered(source.typed, _load(source))
    for file in files or ():
        if kind_of(file) != ".json":
            _no_splits(source, file)
        if kind_of(file) == ".parquet":
            yield from _numbered(file, _read_parquet(file))
        else:
            yield from _read_text(file, source)


def _numbered(name: str, rows) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", row
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file fails only when its rows are read
        raise InputError(f"{name}, row {number + 1}: cannot be read ({one_line(error)})") from None


@contextmanager
def _reachable(file: str) -> Iterator[None]:
    """Turn the errors of a file system, or that its package is missing, into an InputError."""
    try:
        yield
    except ImportError as error:  # s3fs or similar
        raise InputError(f"{file}: {one_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - each file system has its own errors
        raise InputError(f"{file}: {getattr(error, 'strerror', None) or one_line(error)}; expected {A_FILE}") from None


def _open(file: str, **text):
    """Open a file or URL, decompressed: as binary, or as text with encoding=... . Raises InputError if that fails."""
    if Path(file.partition("?")[0]).suffix == ".zst" and "zstd" not in fsspec.available_compressions():
        raise InputError(f"{file}: zstandard is not installed; run: pip install zstandard")
    with _reachable(file):
        return fsspec.open(file, "rt" if text else "rb", compression="infer", **text).open()


def _read_parquet(file: str) -> Iterator[dict]:
    with _open(file) as opened:
        compressed = Path(file).suffix in COMPRESSED
        with refusing(f"{file}: cannot be read", advice="; is the file complete?"):
            table = pyarrow.parquet.ParquetFile(io.BytesIO(opened.read()) if compressed else opened)
        for batch in table.iter_batches(batch_size=512):
            yield from batch.to_pylist()


def _read_text(file: str, source: Source) -> Iterator[tuple[str, Any]]:
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".json": _read_json, ".jsonl": _read_json_lines}
    try:
        with _open(file, encoding="utf-8-sig", newline="") as opened:
            yield from readers[kind_of(file)](file, opened, source)
    except UnicodeDecodeError as error:  # its position is relative to a chunk of the file
        with _open(file) as raw:
            start = raw.read(4)
            if suffix := next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), None):
                raise InputError(f"{file}: this is a {suffix} file; rename it to {file}{suffix}") from None
            raw.seek(0)
            line = next(n for n, line in enumerate(raw, 1) if line.decode(errors="ignore").encode() != line)
        raise InputError(f"{file}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except DAMAGED as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); is the file complete?") from None


def _read_csv(file: str, opened, _) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is too small for a long transcript
    tabs = kind_of(file) == ".tsv"
    reader = csv.DictReader(opened, strict=True, delimiter="\t" if tabs else ",")
    try:
        if twice := [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]:
            raise InputError(f"{file}:1: two columns have the name {shown(twice[0])}; rename one of them")
        other = re.search(r"[;|\t]", (reader.fieldnames or [""])[0])
        if other and len(reader.fieldnames) == 1:
            advice = f"separate columns by commas in .csv and by tabs in .tsv, not by {json.dumps(other[0])}"
            raise InputError(f"{file}:1: only one column, {shown(reader.fieldnames[0])}; {advice}")
        for row in reader:
            if None in row:  # an unquoted comma would silently truncate the text
                fields = f"{len(row) - 1 + len(row[None])} fields for {len(reader.fieldnames)} columns"
                advice = f"put texts that contain {'tabs' if tabs else 'commas'} in double quotes"
                raise InputError(f"{file}:{reader.line_num}: {fields}; {advice}")
            yield f"{file}:{reader.line_num}", row
    except csv.Error as error:  # the row begins on the line after the last good row
        why = f"not {'TSV' if tabs else 'CSV'} ({error!s:.200})".replace("\t", r"\t")
        raise InputError(f"{file}:{reader.line_num + 1}: {why}") from None


def _read_json(file: str, opened, source: Source) -> Iterator[tuple[str, Any]]:
    head: list[str] = []  # up to the first non-blank line; a .zst file cannot be read twice
    while (not head or head[-1].isspace()) and (line := opened.readline()):
        head.append(line)
    first = head[-1].lstrip() if head else ""
    one_a_line = not first.startswith("[")
    if first.startswith("{"):  # either JSON lines, common in .json files, or one multi-line object with all splits
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            one_a_line = False
    if one_a_line:
        yield from _read_json_lines(file, chain(head, opened), source)
        return
    text = "".join(head) + opened.read()
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number with over 4,300 digits
        raise InputError(f"{file}:{getattr(error, 'lineno', 1)}: not JSON ({one_line(error)})") from None
    if isinstance(rows, list):
        _no_splits(source, file)
    rows = _split_of(rows, file, source) if isinstance(rows, dict) else rows
    yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))


def _no_splits(source: Source, file: str) -> None:
    if source.parts and kind_of(source.place):  # for a folder, the parts select files
        raise InputError(f"{source.typed}: the file has no splits; use {file}")


def _split_of(whole: dict, file: str, source: Source) -> list:
    """The rows of {"data": [...]}, or of one split of {"train": [...], "test": [...]}; any other object is one row."""
    lists = {name: of for name, of in whole.items() if isinstance(of, list) and of and isinstance(of[0], dict)}
    if len(lists) < len(whole):  # one row's messages and answers are lists of objects too
        known = re.compile(rf"(data|rows|examples|{SPLITS})([-_].*)?")
        lists = {name: rows for name, rows in lists.items() if known.fullmatch(name) or name in source.parts}
    if {"chosen", "rejected"} & whole.keys() or not lists:
        _no_splits(source, file)
        return [whole]
    wanted = source.parts[-1] if source.parts else "train" if "train" in lists and len(lists) > 1 else min(lists)
    if wanted not in lists or (not source.parts and len(lists) > 1 and wanted != "train"):
        raise InputError(f"{file}: contains {', '.join(sorted(lists))}; choose one, as in {file}:{min(lists)}")
    return lists[wanted]


def _read_json_lines(file: str, opened, source: Source) -> Iterator[tuple[str, Any]]:
    decode = json.JSONDecoder(object_pairs_hook=_object).decode  # json.loads would make a decoder per line
    for number, line in enumerate(opened, 1):
        if line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{number}: not JSON ({one_line(error)}); expected one object per line") from None
        if number == 1 and kind_of(file) == ".json" and isinstance(row, dict):
            rows = _split_of(row, file, source)
            if rows != [row]:
                yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows, 1))
                continue
        yield f"{file}:{number}", row


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object without duplicate keys. By default, the parser silently keeps the last one."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"duplicate key {shown(twice)} in one object")
    return row


def _load(source: Source) -> datasets.Dataset:
    """Load a dataset by name, name:split or name:config:split, or a folder written by `save_to_disk`."""
    config, split = ([None, "train"] if not source.parts else [None, *source.parts])[-2:]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exception repeats its messages
    if Path(source.place).is_dir():
        with refusing(f"{source.typed}: a folder written by save_to_disk, but it cannot be loaded"):
            loaded = datasets.load_from_disk(source.place)
        if isinstance(loaded, datasets.Dataset):
            if source.parts:
                raise InputError(f"{source.typed}: the folder contains one dataset without splits; use {source.place}")
            return loaded
        if split not in loaded:
            advice = f"found {', '.join(loaded)}; use {source.place}:{min(loaded)}"
            raise InputError(f"{source.typed}: no split {split}; {advice}")
        return loaded[split]
    with refusing(f"{source.typed}: neither {A_FILE} nor a dataset that can be loaded"):  # the hub client's errors
        try:
            return datasets.load_dataset(source.place, config, split=split)
        except ValueError as error:
            if config is None or "BuilderConfig" not in str(error):
                raise
            return datasets.load_dataset(source.place, data_dir=config, split=split)  # harmless-base of hh-rlhf


def fingerprint(source: str) -> str:
    """A hash that changes when the data does. Raises InputError if there is no such file or dataset."""
    parsed = parse(source)
    files = files_of(parsed)
    if files is None:
        return _load(parsed)._fingerprint
    prints = []
    for file in files:
        with _reachable(file):
            fs, path = fsspec.core.url_to_fs(file)
            prints.append(str(fs.ukey(path)) if "://" in file else file_digest(Path(file)))
    return " ".join(prints)
