"""Rows out of files and datasets, each with the place where it stands, and errors that name it."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from minirm.errors import InputError, one_line, refusing, shown
from minirm.files import file_digest

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
A_FILE = f"a {', '.join(FILE_TYPES)} file"


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(where, row) for every row of a file or dataset; `where` is "file:line" for an error message. Raises InputError.

    JSON and CSV are read line by line here, not by `datasets`, which infers one type for a column and so cannot tell
    in which line a wrong one stands, turns the CSV answer "NA" into nothing, and stumbles over columns not needed.
    """
    for where, row in _rows(source):
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object with the columns chosen and rejected, got {shown(row)}")
        yield where, row


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    reader = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json_lines}.get(Path(source).suffix)
    if reader:
        with open(source, encoding="utf-8-sig", newline="") as file:
            try:
                yield from reader(source, file)
            except UnicodeDecodeError as error:  # the place it names is one in a piece of the file
                with open(source, "rb") as raw:
                    line = next(n for n, line in enumerate(raw, 1) if line.decode(errors="ignore").encode() != line)
                raise InputError(f"{source}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    else:
        rows, number = _load(source), 0
        try:
            for number, row in enumerate(rows, 1):
                yield f"{source}, row {number}", row
        except Exception as error:  # noqa: BLE001 - a damaged file shows itself when its rows are read
            raise InputError(f"{source}, row {number + 1}: cannot be read ({one_line(error)})") from None


def _read_csv(source, file):
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than a long transcript
    reader = csv.DictReader(file, strict=True)
    try:
        if twice := [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]:
            raise InputError(f"{source}:1: the column {shown(twice[0])} stands there twice; which one counts?")
        for row in reader:
            if None in row:  # a comma in a text without quotes: the text would end there without a word
                raise InputError(
                    f"{source}:{reader.line_num}: {len(row) - 1 + len(row[None])} fields under "
                    f"{len(reader.fieldnames)} column names; put texts with commas in double quotes"
                )
            yield f"{source}:{reader.line_num}", row
    except csv.Error as error:  # where the row begins: the line behind the last good row
        raise InputError(f"{source}:{reader.line_num + 1}: not CSV ({error})") from None


def _read_json(source, file):
    while (character := file.read(1)).isspace():
        pass
    file.seek(0)
    if character != "[":  # many .json files hold one object a line
        yield from _read_json_lines(source, file)
        return
    text = file.read()
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number of over 4,300 digits
        raise InputError(f"{source}:{getattr(error, 'lineno', 1)}: not JSON ({one_line(error)})") from None
    yield from ((f"{source}, row {i}", row) for i, row in enumerate(rows, 1))


def _read_json_lines(source, file):
    decode = json.JSONDecoder(object_pairs_hook=_object).decode  # loads would make one for every line
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = decode(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}:{number}: not JSON ({one_line(error)}); expected one object a line") from None
        yield f"{source}:{number}", row


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object. The parser itself would let the last of two equal names win without a word."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return row


def _load(source: str) -> datasets.Dataset:
    """A Parquet file, or a dataset by name or name:split."""
    name, _, split = source.partition(":")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes with the exception
    with refusing(f"{source}: neither {A_FILE} nor a dataset that can be loaded"):  # the hub client's errors, pyarrow's
        if Path(source).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=source, split="train")
        return datasets.load_dataset(name, split=split or "train")


def fingerprint(source: str) -> str:
    """Changes when the data does. Raises InputError if there is no such file or dataset."""
    if Path(source).suffix not in FILE_TYPES:
        return _load(source)._fingerprint
    try:
        return file_digest(Path(source))
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}; expected {A_FILE}") from None
