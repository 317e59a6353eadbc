"""Rows out of files, and what is said of files that are not in order: `python -m pytest tests/test_sources.py`."""

import csv
import json
import logging

import datasets
import pytest
from conftest import refusal, write_jsonl

from minirm.data.sources import fingerprint, read_rows

NINE, ELEVEN = "a b c d e", "a b c d e f"
GOOD = json.dumps({"prompt": "p", "chosen": NINE, "rejected": ELEVEN})


def rows_of(source):
    return [row for _, row in read_rows(str(source))]


ROWS = [
    {"prompt": "What?", "chosen": NINE, "rejected": ELEVEN, "margin": 1.5, "subset": "chat"},
    {"prompt": 'A "quoted", comma\nand a line', "chosen": "NA null 1 2 3", "rejected": "ünï côdé 語 🙂 x", "margin": 2.0, "subset": ""},
    {"prompt": "", "chosen": " leading and trailing space kept ", "rejected": ELEVEN, "margin": 3.0, "subset": "chat"},
]  # fmt: skip


def write_csv(path, rows, encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_as(kind, folder, rows):
    if kind == "jsonl":
        return write_jsonl(folder / "x.jsonl", rows)
    if kind == "json lines":
        return write_jsonl(folder / "x.json", rows)
    if kind == "json array":
        (folder / "x.json").write_text(json.dumps(rows, indent=1))
        return folder / "x.json"
    if kind == "csv":
        return write_csv(folder / "x.csv", rows)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(folder / "x.parquet")
        return folder / "x.parquet"
    (folder / "set").mkdir()
    if kind == "folder of parquet":
        datasets.Dataset.from_list(rows).to_parquet(folder / "set" / "train.parquet")
    else:
        write_jsonl(folder / "set" / "train.jsonl", rows)
    return folder / "set"


KINDS = ["jsonl", "json lines", "json array", "csv", "parquet", "folder of parquet", "folder of jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind, tmp_path):
    found = rows_of(write_as(kind, tmp_path, ROWS))
    assert [{**row, "margin": float(row["margin"])} for row in found] == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path, encoding):
    rows = [{"chosen": NINE, "rejected": ELEVEN}]
    for path in (tmp_path / "x.jsonl", tmp_path / "x.json"):
        path.write_text(json.dumps(rows[0]) + "\n", encoding=encoding)
        assert rows_of(path) == rows
    (tmp_path / "x.json").write_text(f"  \n{json.dumps(rows)}", encoding=encoding)
    assert rows_of(tmp_path / "x.json") == rows
    assert rows_of(write_csv(tmp_path / "x.csv", rows, encoding)) == rows


def test_a_split_of_a_dataset_is_named_behind_a_colon(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        write_jsonl(tmp_path / f"{split}.jsonl", ROWS[:count])
    assert [len(rows_of(f"{tmp_path}{split}")) for split in ("", ":train", ":test")] == [3, 3, 1]
    message = refusal(read_rows, f"{tmp_path}:validation")
    assert message.startswith(f"{tmp_path}:validation: ") and "validation" in message


def test_blank_lines_and_windows_line_ends_are_nothing(tmp_path):
    line = json.dumps({"chosen": NINE, "rejected": ELEVEN})
    (tmp_path / "x.jsonl").write_bytes(f"\r\n{line}\r\n  \r\n\n{line}".encode())
    assert [where for where, _ in read_rows(str(tmp_path / "x.jsonl"))] == [f"{tmp_path}/x.jsonl:{n}" for n in (2, 5)]


def test_a_very_long_csv_field_is_read(tmp_path):
    rows = [{"chosen": "a " * 100_000, "rejected": ELEVEN}]
    assert rows_of(write_csv(tmp_path / "x.csv", rows)) == rows


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.csv", "none.parquet"])
def test_a_missing_file_is_refused(tmp_path, name):
    message = refusal(fingerprint, str(tmp_path / name))
    assert message == f"{tmp_path}/{name}: No such file or directory; expected a .jsonl, .json, .csv, .parquet file"


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    assert "Is a directory" in refusal(fingerprint, str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("name", ["no-such-dataset", "no/such-dataset", "no/such-dataset:train", "x.txt"])
def test_an_unknown_dataset_is_refused(name):
    message = refusal(fingerprint, name)
    assert message.startswith(
        f"{name}: neither a .jsonl, .json, .csv, .parquet file nor a dataset that can be loaded ("
    )


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("not json", "not JSON (Expecting value: line 1 column 1 (char 0)); expected one object a line"),
        (GOOD[:-5], "not JSON (Invalid control character at: line 1 column 61"),
        (GOOD + GOOD, "not JSON (Extra data"),
        ("[" * 100_000, "not JSON (maximum recursion depth"),
        ('{"margin": ' + "9" * 5000 + "}", "not JSON (Exceeds the limit (4300 digits)"),
        ("[1, 2]", "expected an object with the columns chosen and rejected, got list [1, 2]"),
        ("null", "expected an object with the columns chosen and rejected, got NoneType null"),
        ('"chosen"', 'expected an object with the columns chosen and rejected, got str "chosen"'),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named_with_its_number(tmp_path, line, wanted):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    message = refusal(read_rows, str(path))
    assert message.startswith(f"{path}:3: {wanted}")
    assert len(message) < 500 + len(str(path))


def test_an_array_that_is_not_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(f"[\n{GOOD},\n{GOOD}\n{GOOD}\n]")
    assert refusal(read_rows, str(path)).startswith(f"{path}:4: not JSON (Expecting ',' delimiter")
    path.write_text('[{"margin": ' + "9" * 5000 + "}]")
    assert refusal(read_rows, str(path)).startswith(f"{path}:1: not JSON (Exceeds the limit")


def test_a_comma_without_quotes_does_not_cut_an_answer_short(tmp_path):
    (tmp_path / "x.csv").write_text(f"prompt,chosen,rejected\np,{NINE},{ELEVEN}\np,{NINE},well, {ELEVEN}\n")
    message = refusal(read_rows, f"{tmp_path}/x.csv")
    assert message == f"{tmp_path}/x.csv:3: 4 fields under 3 column names; put texts with commas in double quotes"


def test_a_csv_with_a_quote_that_never_ends_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text(f'prompt,chosen,rejected\np,"{NINE},{ELEVEN}\np,a,b\n')
    message = refusal(read_rows, f"{tmp_path}/x.csv")
    assert message == f"{tmp_path}/x.csv:2: not CSV (unexpected end of data)"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    start = "prompt,chosen,rejected" if suffix == "csv" else GOOD
    good = f"p,{NINE},{ELEVEN}" if suffix == "csv" else GOOD
    lines = [start] + [good] * 500 + ["caf\xe9"] + [good] * 3
    path.write_bytes("\n".join(lines).encode("latin-1"))
    message = refusal(read_rows, str(path))
    assert message == f"{path}:502: not UTF-8 (invalid continuation byte); save the file as UTF-8"


def test_bytes_that_are_not_utf8_in_an_array_are_named_with_their_line(tmp_path):
    (tmp_path / "x.json").write_bytes(f"[{GOOD},\n{GOOD},\n".encode() + b'{"chosen": "\xff"}]')
    assert refusal(read_rows, f"{tmp_path}/x.json").startswith(f"{tmp_path}/x.json:3: not UTF-8 (invalid start byte)")


def test_a_damaged_parquet_file_is_refused_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)  # so that caplog sees what it says by itself
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    message = refusal(read_rows, f"{tmp_path}/x.parquet")
    assert message.startswith(f"{tmp_path}/x.parquet: neither a ") and caplog.text == ""
