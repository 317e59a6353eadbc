"""Feed broken data files to minirm: `python tests/bench/fuzz.py --files 2000`.

Every file starts as a good one (JSON lines, JSON, CSV, TSV or Parquet, one in four of them compressed) and is damaged in
up to three ways: broken UTF-8, nulls, wrong types, huge lines, control characters, no content, duplicate columns, flipped
bytes, truncation, before or after compression. `prepare` has to refuse it in one line that names the file, or to account
for every row.
"""

import argparse
import bz2
import collections
import csv
import gzip
import io
import json
import lzma
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import pyarrow
import pyarrow.parquet
from conftest import make_comparisons, make_tokenizer

from minirm.data.chat import set_chat_template
from minirm.data.prepare import prepare
from minirm.errors import InputError

ODD = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", " ", "\0", "\ud800", "\u2028", "\x1b[2J", "\r", "\n",
    "<|endoftext|>", "<|endoftext|>" * 3, "NaN", "null", [], [None], {}, {"": None}, [[[None]]], {"content": None},
    [{"role": "user", "content": None}], "x" * 100_000, "word " * 20_000, "\u0301" * 50, "\U0001f600" * 30, '"', ",", "\\",
]  # fmt: skip


def good_rows(rng: random.Random) -> list[dict]:
    """Rows of one of the schemas, with a comparison each."""
    rows = make_comparisons(rng.randint(2, 12), seed=rng.randrange(1 << 30), per_prompt=rng.choice([1, 1, 2]))
    for row in rows:
        if rng.random() < 0.3:
            row["margin"], row["subset"] = rng.choice([0, 1, 2.5]), rng.choice(["a", "b"])
    return [rng.choice(SHAPES)(row) for row in rows] if rng.random() < 0.02 else list(map(rng.choice(SHAPES), rows))


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def said(who: str, text: str) -> dict:
    return {"from": who, "value": text}


SHAPES = [
    dict,
    dict,
    lambda row: {side: [turn("user", row["prompt"]), turn("assistant", row[side])] for side in ("chosen", "rejected")},
    lambda row: {"chosen": TRANSCRIPT.format(*row.values()), "rejected": TRANSCRIPT.format(row["prompt"], row["rejected"])},
    lambda row: {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "scores": [1, row.get("margin", 0)]},
    lambda row: {
        "context": [turn("user", row["prompt"])], "response1": row["rejected"], "response2": row["chosen"],
        "overall_preference": row.get("margin", 1),
    },
    lambda row: {"history": row["prompt"], "human_ref_A": row["chosen"], "human_ref_B": row["rejected"], "labels": 1},
    lambda row: {
        "conversation_a": json.dumps([turn("user", row["prompt"]), turn("assistant", row["chosen"])]),
        "conversation_b": json.dumps([turn("user", row["prompt"]), turn("assistant", row["rejected"])]), "winner": "model_a",
    },
    lambda row: {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]},
    lambda row: {"instruction": row["prompt"], "input": "", "chosen": row["chosen"], "rejected": row["rejected"]},
    lambda row: {"id": "1", "prompt": row["prompt"], "chosen": [row["chosen"]], "rejected": [row["rejected"]], "num_correct": 1},
    lambda row: {"question": row["prompt"], "response_A": row["rejected"], "response_B": row["chosen"], "label": "B>A"},
    lambda row: {"input": row["prompt"], "output_1": row["rejected"], "output_2": row["chosen"], "label": 2},
    lambda row: {"conversations": [said("human", row["prompt"])]} | {side: said("gpt", row[side]) for side in SIDES},
    lambda row: {
        "messages": [turn("user", row["prompt"]), turn("assistant", row["chosen"])], "rejected_response": row["rejected"],
    },
    lambda row: {
        "input": {"messages": [turn("user", row["prompt"])]}, "preferred_output": [turn("assistant", row["chosen"])],
        "non_preferred_output": [turn("assistant", row["rejected"])],
    },
    lambda row: {
        "prompt": row["prompt"], "answers": [{"answer": row["chosen"], "rank": 1}, {"answer": row["rejected"], "rank": 2}],
    },
    lambda row: {
        "instruction": row["prompt"],
        "completions": [{"response": row[side], "overall_score": score} for side, score in zip(SIDES, (8.0, 3.5))],
    },
    lambda row: {
        "question": {"full_text": row["prompt"]}, "answer_0": row["rejected"], "answer_1": row["chosen"], "score_0": -0.5,
        "score_1": 0.5,
    },
    lambda row: {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["rejected"], "preference": "a"},
]  # fmt: skip
SIDES = ("chosen", "rejected")
TRANSCRIPT = "\n\nHuman: {}\n\nAssistant: {}"
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def change_rows(rows: list, rng: random.Random) -> None:
    """Damage one of the rows."""
    kind, place = rng.randrange(7), rng.randrange(len(rows))
    row = rows[place]
    if not isinstance(row, dict) or not row or kind == 0:
        rows[place] = rng.choice([None, [], "text", 3, {}, [row], {"row": row}])
    elif kind == 1:
        row[rng.choice([*row, "prompt", "margin", "subset", "other"])] = rng.choice(ODD)
    elif kind == 2:
        del row[rng.choice(list(row))]
    elif kind == 3:
        names = ("", "\n", "\x1b[2J", "x" * 5000)
        rows[place] = {rng.choice([key, key, key.upper(), key + " ", *names]): value for key, value in row.items()}
    elif kind == 4:
        row[rng.choice(list(row))] = row[rng.choice(list(row))]
    elif kind == 5:
        key = rng.choice(list(row))
        row[key] = f"{row[key]}{rng.choice([x for x in ODD if isinstance(x, str)])}"
    else:
        rows.append(row)


ODD_BYTES = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b"\x1a", b"\r", b"\n", b'"', b"}", b"\x85"]
ODD_FILES = [b"\n\n\n", b" ", b"[]", b"{}", b"null", b"[null]", b"\xef\xbb\xbf", b"[" * 100_000]
ODD_FILES += [b'{"a":' * 100_000, b"9" * 5000]


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of the file."""
    kind, place = rng.randrange(9), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.choice(ODD_BYTES) + data[place:]
    if kind == 2:
        return b""
    if kind == 3:
        return rng.choice(ODD_FILES)
    if kind == 4:
        utf_16, marked = data.decode("latin1").encode("utf-16"), b"\xef\xbb\xbf" + data
        return rng.choice([utf_16, marked, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r")])
    if kind == 5:
        return data.replace(
            rng.choice([b"chosen", b"rejected", b"prompt"]),
            rng.choice([b"prompt", b"chosen", b"rejected", b"", b'chosen": "a b c d e f", "chosen', b"chosen,chosen"]),
            rng.choice([1, -1]),
        )
    if kind == 6:
        return data + data[: rng.randrange(len(data) + 1)]
    if kind == 7:
        return data[:place] + data[place + rng.randint(1, 30) :]
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


DELIMITERS = {".csv": ",", ".tsv": "\t"}
COMPRESSIONS = {".gz": gzip, ".bz2": bz2, ".xz": lzma}


def write(rows: list, suffix: str, rng: random.Random) -> bytes | None:
    """The rows as a file; None if the format cannot hold them."""
    try:
        if suffix == ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode()
        if suffix == ".json":
            whole = {rng.choice(["data", "train"]): rows} if rng.random() < 0.2 else rows
            return json.dumps(whole, indent=rng.choice([None, 1])).encode()
        if suffix in DELIMITERS:
            text = io.StringIO(newline="")
            names = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(text, names, delimiter=DELIMITERS[suffix])
            writer.writeheader()
            writer.writerows(rows)
            return text.getvalue().encode()
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    except (UnicodeEncodeError, AttributeError, TypeError, ValueError, OverflowError, pyarrow.ArrowException):
        return None


def make_file(folder: Path, seed: int) -> Path:
    """Write the broken file of this seed."""
    rng = random.Random(seed)
    suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
    packed = rng.choice(list(COMPRESSIONS)) if rng.random() < 0.25 else ""
    while True:
        rows = good_rows(rng)
        for _ in range(rng.randint(0, 2)):
            change_rows(rows, rng)
        data = write(rows, suffix, rng)
        if data is not None:
            break
    packed_first = rng.random() < 0.5
    if packed and packed_first:
        data = COMPRESSIONS[packed].compress(data)
    for _ in range(rng.randint(0 if rng.random() < 0.5 else 1, 1)):
        data = change_bytes(data, rng)
    if packed and not packed_first:
        data = COMPRESSIONS[packed].compress(data)
    path = folder / f"{seed}{suffix}{packed}"
    path.write_bytes(data)
    return path


def unpacked(path: Path) -> tuple[str, bytes]:
    """(suffix, bytes) of a file without its compression."""
    data = path.read_bytes()
    if path.suffix in COMPRESSIONS:
        return path.with_suffix("").suffix, COMPRESSIONS[path.suffix].decompress(data)
    return path.suffix, data


def rows_in(path: Path) -> int:
    """The number of rows in the file, counted independently of minirm."""
    suffix, data = unpacked(path)
    if suffix == ".parquet":
        return pyarrow.parquet.read_metadata(io.BytesIO(data)).num_rows
    text = data.decode("utf-8-sig")
    if suffix in DELIMITERS:
        return sum(1 for row in csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[suffix]) if row) - 1
    try:
        rows = json.loads(text)
        if isinstance(rows, dict) and suffix == ".json" and not {"chosen", "rejected"} & rows.keys():
            rows = next((rows[name] for name in ("data", "train") if isinstance(rows.get(name), list)), rows)
        return len(rows) if isinstance(rows, list) else 1
    except ValueError:
        return len([line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()])


def twice(path: Path) -> bool:
    """Whether a name occurs twice in an object or in a header."""
    suffix, data = unpacked(path)
    if suffix == ".parquet":
        return False  # pyarrow refuses those itself
    text = data.decode("utf-8-sig")
    if suffix in DELIMITERS:
        names = next(csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[suffix]), [])
        return len(set(names)) < len(names)
    found = []
    for part in [text] if suffix == ".json" else text.splitlines():
        try:
            json.loads(part, object_pairs_hook=lambda pairs: found.append(len(dict(pairs)) < len(pairs)))
        except ValueError:
            pass
    return any(found)


def make_chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    set_chat_template(tokenizer)
    return tokenizer


def try_file(path: Path, tokenizer, cache: Path, seconds: int = 30) -> str:
    """The outcome, "refused" or "trained on". Raises AssertionError if a row is lost, and any other error."""

    def hang(*_):
        raise TimeoutError(f"{path}: still busy after {seconds} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        data = prepare(tokenizer, [str(path)], max_length=64, eval_fraction=0.3, cache_dir=cache)
    except InputError as error:
        message = str(error)
        assert str(path) in message, f"names no file: {message}"
        one_line = "\n" not in message and "\r" not in message and len(message) < 1000
        assert one_line, f"more than a line: {message[:2000]!r}"
        assert message.isprintable() or all(c.isprintable() for c in message), f"control characters: {message!r}"
        return "refused"
    finally:
        signal.alarm(0)
    assert not twice(path), f"{path}: one of two columns of a name was taken"
    (counts,) = data.report["train"]
    accounted = sum(n for why, n in counts.items() if why.startswith("dropped") or why in ("kept", "held out"))
    assert counts["read"] == accounted, f"{path}: {counts}"
    assert counts["read"] == rows_in(path), f"{path}: {counts['read']} read of {rows_in(path)}"
    assert counts["kept"] == sum(data.train["pairs"]), f"{path}: {counts}"
    return "trained on"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer, results, wrong = make_chat_tokenizer(), collections.Counter(), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + args.files):
            path = make_file(Path(folder), seed)
            try:
                results[f"{''.join(path.suffixes)} {try_file(path, tokenizer, Path(folder) / 'cache')}"] += 1
            except Exception as error:  # noqa: BLE001 - the program looks for any error
                wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}")
    print(f"{args.files} files, {time.monotonic() - start:.0f} s")
    for name, count in sorted(results.items()):
        print(f"  {name:<22} {count:>6}")
    print(f"  {'wrong':<22} {len(wrong):>6}", *wrong[:40], sep="\n")


if __name__ == "__main__":
    main()
