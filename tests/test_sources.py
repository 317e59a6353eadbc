"""Reading rows from files, and the messages about invalid files: `python -m pytest tests/test_sources.py`."""

import bz2
import csv
import gzip
import json
import logging
import lzma

import datasets
import fsspec
import pytest
from conftest import ELEVEN, NINE, refusal, write_jsonl

from minirm.data.sources import COMPRESSED, fingerprint, left_out, read_rows

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


def test_a_split_is_given_after_a_colon(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        write_jsonl(tmp_path / f"{split}.jsonl", ROWS[:count])
    assert [len(rows_of(f"{tmp_path}{split}")) for split in ("", ":train", ":test")] == [3, 3, 1]
    message = refusal(read_rows, f"{tmp_path}:validation")
    assert message.startswith(f"{tmp_path}:validation: ") and "validation" in message


def test_blank_lines_and_windows_line_endings_are_ignored(tmp_path):
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
    wanted = f"{tmp_path}/{name}: No such file or directory; expected a .jsonl, .json, .csv, .tsv or .parquet file"
    assert refusal(fingerprint, str(tmp_path / name)) == wanted


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    assert "Is a directory" in refusal(fingerprint, str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("name", ["no-such-dataset", "no/such-dataset", "no/such-dataset:train", "x.txt"])
def test_an_unknown_dataset_is_refused(name):
    wanted = f"{name}: neither a .jsonl, .json, .csv, .tsv or .parquet file nor a dataset that can be loaded ("
    assert refusal(fingerprint, name).startswith(wanted)


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("not json", "not JSON (Expecting value: line 1 column 1 (char 0)); expected one object per line"),
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
def test_a_line_that_is_not_an_object_is_named_with_its_number(tmp_path, line, wanted):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    message = refusal(read_rows, str(path))
    assert message.startswith(f"{path}:3: {wanted}")
    assert len(message) < 500 + len(str(path))


HEAD, NUMBER = "prompt,chosen,rejected\n", '[{"margin": ' + "9" * 5000 + "}]"


@pytest.mark.parametrize(
    "suffix, content, wanted",
    [
        ("json", f"[\n{GOOD},\n{GOOD}\n{GOOD}\n]", "4: not JSON (Expecting ',' delimiter"),
        ("json", NUMBER, "1: not JSON (Exceeds the limit"),
        ("json", f"{GOOD}\n{GOOD}\n{{broken\n{GOOD}\n", "3: not JSON ("),  # JSON lines in a .json file
        ("json", f"[{GOOD},\n{GOOD},\n".encode() + b'{"chosen": "\xff"}]', "3: not UTF-8 (invalid start byte)"),
        ("csv", f"{HEAD}p,{NINE},{ELEVEN}\np,{NINE},well, {ELEVEN}\n",
         "3: 4 fields for 3 columns; put texts that contain commas in double quotes"),
        ("csv", f'{HEAD}p,"{NINE},{ELEVEN}\np,a,b\n', "2: not CSV (unexpected end of data)"),
    ],
    ids=["array", "number", "lines", "bytes", "comma", "quote"],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_line(tmp_path, suffix, content, wanted):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(read_rows, str(path)).startswith(f"{path}:{wanted}")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    start = "prompt,chosen,rejected" if suffix == "csv" else GOOD
    good = f"p,{NINE},{ELEVEN}" if suffix == "csv" else GOOD
    lines = [start] + [good] * 500 + ["caf\xe9"] + [good] * 3
    path.write_bytes("\n".join(lines).encode("latin-1"))
    message = refusal(read_rows, str(path))
    assert message == f"{path}:502: not UTF-8 (invalid continuation byte); save the file as UTF-8"


def test_a_damaged_parquet_file_is_refused_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        logging.getLogger("datasets"), "propagate", True
    )  # so that caplog sees the library's own messages
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    message = refusal(read_rows, f"{tmp_path}/x.parquet")
    assert message.startswith(f"{tmp_path}/x.parquet: cannot be read (") and caplog.text == ""


# ---------------------------------------------------------------------------------------------------------------------
# Locations and compression


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        return pytest.importorskip("zstandard").compress(data)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kind", ["jsonl", "json array", "csv", "parquet"])
def test_compressed_files_give_the_same_rows(kind, suffix, tmp_path):
    path = write_as(kind, tmp_path, ROWS)
    target = path.with_name(path.name + suffix)
    target.write_bytes(packed(path.read_bytes(), suffix))
    assert [{**row, "margin": float(row["margin"])} for row in rows_of(target)] == ROWS
    if suffix != ".zst":
        target.write_bytes(target.read_bytes()[:-9])
        message = refusal(read_rows, str(target))
        assert message.startswith(f"{target}: cannot be read (") and message.endswith("; is the file complete?")


def test_zstd_without_its_package_is_refused_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr(fsspec, "available_compressions", lambda: [None, "gzip"])
    assert refusal(read_rows, f"{tmp_path}/x.jsonl.zst").endswith("pip install zstandard")


def test_tabs_globs_folders_of_shards_and_urls(tmp_path):
    (tmp_path / "x.tsv").write_text(f"prompt\tchosen\trejected\np, q\t{NINE}\t{ELEVEN}\n")
    assert rows_of(tmp_path / "x.tsv") == [{"prompt": "p, q", "chosen": NINE, "rejected": ELEVEN}]
    (tmp_path / "shards" / "deep").mkdir(parents=True)
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0]), ("deep/c.jsonl", ROWS[2])):
        write_jsonl(tmp_path / "shards" / name, [row])
    (tmp_path / "shards" / "README.txt").write_text("no data")
    assert rows_of(tmp_path / "shards") == ROWS
    assert rows_of(tmp_path / "shards" / "*.jsonl") == ROWS[:2]
    assert rows_of(tmp_path / "shards" / "**" / "c.jsonl") == ROWS[2:]
    assert next(where for where, _ in read_rows(f"{tmp_path}/shards/*.jsonl")) == f"{tmp_path}/shards/a.jsonl:1"
    before = fingerprint(f"{tmp_path}/shards/*.jsonl")
    write_jsonl(tmp_path / "shards" / "b.jsonl", ROWS)
    assert fingerprint(f"{tmp_path}/shards/*.jsonl") != before
    assert "no .jsonl, .json" in refusal(read_rows, f"{tmp_path}/*.jsonl")
    assert "no .jsonl" in refusal(fingerprint, f"{tmp_path}/*.csv")
    with fsspec.open("memory://set/x.jsonl.gz", "wb", compression="gzip") as file:
        file.write((json.dumps(ROWS[0]) + "\n").encode())
    assert rows_of("memory://set/x.jsonl.gz") == rows_of("memory://set/*.gz") == ROWS[:1]
    assert rows_of(f"file://{tmp_path}/shards/a.jsonl") == ROWS[:1] and fingerprint("memory://set/x.jsonl.gz")
    assert "nowhere://x.jsonl" in refusal(fingerprint, "nowhere://x.jsonl")


def test_splits_in_one_file_and_saved_to_disk(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert rows_of(tmp_path / "x.json") == ROWS
    (tmp_path / "y.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1))
    assert rows_of(tmp_path / "y.json") == rows_of(f"{tmp_path}/y.json:train") == ROWS
    assert rows_of(f"{tmp_path}/y.json:test") == ROWS[:1]
    (tmp_path / "z.json").write_text(json.dumps({"easy": ROWS, "hard": ROWS[:1]}))
    assert refusal(read_rows, f"{tmp_path}/z.json").endswith(f"choose one, as in {tmp_path}/z.json:easy")
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in (("train", ROWS), ("test", ROWS[:1]))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == ROWS and rows_of(f"{tmp_path}/saved:test") == ROWS[:1]
    assert "found train, test" in refusal(read_rows, f"{tmp_path}/saved:dev")
    (tmp_path / "hub" / "harmless").mkdir(parents=True)
    write_jsonl(tmp_path / "hub" / "harmless" / "test.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "hub" / "train.jsonl", ROWS)
    assert rows_of(f"{tmp_path}/hub:harmless:test") == ROWS[:2]


def test_an_amount_takes_the_first_rows_or_a_share_of_all(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"n": n} for n in range(10)])
    with open(path, "a") as file:
        file.write("not json\n")
    numbers = lambda source: [row["n"] for row in rows_of(source)]
    assert numbers(f"{path}@3") == [0, 1, 2]
    assert "not JSON" in refusal(read_rows, f"{path}@0.5")  # a share needs all rows
    write_jsonl(path, [{"n": n} for n in range(10)])
    assert numbers(f"{path}@0.5") == [1, 3, 5, 7, 9] and numbers(f"{path}@0.3") == [3, 6, 9]
    assert len(numbers(f"{path}@1.0")) == 10
    for wrong in ("@0", "@0.0", "@1.5"):
        assert "a share up to 1, as in @0.5" in refusal(read_rows, f"{path}{wrong}")
    write_jsonl(tmp_path / "odd.jsonl@2", ROWS)  # an existing file keeps its name, whose type is unknown
    assert "neither a .jsonl" in refusal(fingerprint, f"{tmp_path}/odd.jsonl@2")


def test_a_split_of_a_file_without_splits_is_refused(tmp_path):
    for kind in ("jsonl", "json lines", "json array", "csv", "parquet"):
        path = write_as(kind, tmp_path, ROWS)
        assert refusal(rows_of, f"{path}:test") == f"{path}:test: the file has no splits; use {path}"
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert "without splits" in refusal(rows_of, f"{tmp_path}/saved:test")


def test_hidden_files_of_a_folder_are_not_data(tmp_path):
    for name in ("a.jsonl", ".b.jsonl", ".cache/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, ROWS)
    assert len(rows_of(tmp_path)) == 3


def test_an_object_whose_messages_are_a_list_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}], "rejected_response": "b"}
    (tmp_path / "x.json").write_text(json.dumps(row, indent=1))
    assert rows_of(tmp_path / "x.json") == [row]
    (tmp_path / "x.json").write_text(json.dumps({"data": [row], "version": 1}))
    assert rows_of(tmp_path / "x.json") == [row]


def test_unread_files_of_a_folder_are_named(tmp_path):
    """Beside files with a split in their name, a file without one may not be wanted."""
    for name in ("train-0.jsonl", "test.jsonl", "more/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "README.md").write_text("")
    assert len(rows_of(tmp_path)) == 1
    assert left_out(str(tmp_path)) == ["more/a.jsonl", "test.jsonl"]
    assert left_out(f"{tmp_path}:test@1") == ["more/a.jsonl", "train-0.jsonl"]
    assert left_out(str(tmp_path / "test.jsonl")) == [] and left_out("org/name") == []


@pytest.mark.parametrize("pack, suffix", [(gzip, ".gz"), (bz2, ".bz2"), (lzma, ".xz")])
def test_a_compressed_file_with_the_suffix_of_a_plain_one_is_refused_by_name(tmp_path, pack, suffix):
    path = tmp_path / "x.jsonl"
    path.write_bytes(pack.compress(GOOD.encode()))
    assert refusal(read_rows, str(path)).endswith(f"this is a {suffix} file; rename it to {path}{suffix}")


@pytest.mark.parametrize("mark", [";", "|", "\t"])
def test_a_csv_file_with_other_separators_is_refused(tmp_path, mark):
    (tmp_path / "x.csv").write_text(f"chosen{mark}rejected\n{NINE}{mark}{ELEVEN}\n")
    assert f"not by {json.dumps(mark)}" in refusal(read_rows, str(tmp_path / "x.csv"))
