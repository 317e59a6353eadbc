"""From files of comparisons to groups of token ids: reading, checking, filtering, tokenising.

A *comparison* is a prompt, a chosen and a rejected answer. A *group* is all comparisons of one prompt:

    prefix       the token ids that all its completions begin with
    completions  the rest of each completion, its EOS included; equal ones are kept once
    chosen, rejected, margin, subset   one entry a comparison; the first two are indices into completions

Prompt and answer are tokenised together, as one text, so that the ids are those which any other program gets for it.
"""

import csv
import hashlib
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

MIN_WORDS = 5  # shorter answers are left out, as in the published recipe
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
CHUNK = 512  # prompts tokenised at a time: enough for the tokenizer's threads, little enough for memory


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, where, what was expected, what to do."""


class Comparison(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    margin: float | None
    subset: str
    where: str = ""  # "file:line"


class Prepared(NamedTuple):
    """Tokenised groups, on disk and memory-mapped, and what happened on the way there."""

    train: datasets.Dataset
    eval: datasets.Dataset
    report: dict  # counts, by part: see report.py
    sources: list[str]  # fingerprints of the training data and, if it was given, of the evaluation data


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(source: str) -> Iterator[tuple[str, dict]]:
    """(where, row) for every row of a file or dataset; `where` is "file:line" for an error message.

    JSON and CSV are read line by line here, not by `datasets`, which infers one type for a column and so cannot tell
    in which line a wrong one stands, turns the CSV answer "NA" into nothing, and stumbles over columns not needed.
    """
    path = Path(source)
    if path.suffix in (".csv", ".json", ".jsonl"):
        reader = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json_lines}[path.suffix]
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                yield from reader(source, file)
            except UnicodeDecodeError as error:  # the place it names is one in a piece of the file
                line = _first_line_not_utf8(path)
                raise InputError(f"{source}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    else:
        rows, number = iter(_load(source)), 1
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # noqa: BLE001 - a damaged file shows itself when its rows are read
                raise InputError(f"{source}, row {number}: cannot be read ({one_line(error)})") from None
            if row is None:
                return
            yield f"{source}, row {number}", row
            number += 1


def _first_line_not_utf8(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} was changed while it was being read")


def _read_csv(source, file):
    csv.field_size_limit(1 << 30)  # the default, 128 KiB, is less than a long transcript
    reader = csv.DictReader(file, strict=True)
    try:
        if twice := [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]:
            raise InputError(f"{source}:1: the column {_shown(twice[0])} stands there twice; which one counts?")
        for row in reader:
            if None in row:  # a comma in a text without quotes: the text would end there without a word
                raise InputError(
                    f"{source}:{reader.line_num}: {len(row) - 1 + len(row[None])} fields under "
                    f"{len(reader.fieldnames)} column names; put texts with commas in double quotes"
                )
            yield f"{source}:{reader.line_num}", row
    except csv.Error as error:
        # Where the row begins: the line behind the last good row.
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
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{source}:{number}: not JSON ({one_line(error)}); expected one object a line"
                ) from None
            yield f"{source}:{number}", row


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object. The parser itself would let the last of two equal names win without a word."""
    if len(row := dict(pairs)) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{_shown(twice)} stands twice in one object")
    return row


def _load(source: str) -> datasets.Dataset:
    """A Parquet file, or a dataset by name or name:split."""
    name, _, split = source.partition(":")
    try:
        if Path(source).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=source, split="train")
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # noqa: BLE001 - the hub client's and pyarrow's own, many kinds; nothing of ours
        raise InputError(
            f"{source}: neither a {', '.join(FILE_TYPES)} file nor a dataset that can be loaded ({one_line(error)})"
        ) from None


def fingerprint(source: str) -> str:
    """Changes when the data does. Raises InputError if there is no such file or dataset."""
    if Path(source).suffix not in FILE_TYPES:
        return _load(source)._fingerprint
    try:
        return file_digest(Path(source))
    except OSError as error:
        raise InputError(f"{source}: {error.strerror or error}; expected a {', '.join(FILE_TYPES)} file") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file. hashlib has this from Python 3.11 on."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def one_line(error: Exception | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def to_comparison(row: dict, where: str) -> Comparison:
    """Checks one row. Raises InputError naming the row, the column, what stands there and what was expected."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with the columns chosen and rejected, got {_shown(row)}")
    for column in ("chosen", "rejected"):
        if column not in row:
            found = one_line(", ".join(str(name) for name in row) or "none")
            raise InputError(
                f"{where}: no column '{column}'; expected prompt (optional), chosen, rejected; found {found}"
            )
    texts = []
    for column in ("prompt", "chosen", "rejected", "subset"):
        text = row.get(column)
        if column in ("prompt", "subset") and text is None:
            text = ""
        if column == "subset":
            text = str(text)
        if not isinstance(text, str):
            raise InputError(f"{where}: '{column}' must be a string, got {_shown(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
            raise InputError(f"{where}: '{column}' is not valid Unicode ({one_line(error)})") from None
        texts.append(text)
    prompt, chosen, rejected, subset = texts
    margin = None if row.get("margin") == "" else row.get("margin")
    if margin is not None:
        try:
            if isinstance(margin, bool):
                raise TypeError
            margin = float(margin)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{where}: 'margin' must be a number, got {_shown(row['margin'])}") from None
        if not 0 <= margin < math.inf:
            raise InputError(f"{where}: 'margin' must be finite and not negative, got {margin}; swap the two answers")
    return Comparison(prompt, chosen, rejected, margin, subset, where)


def _shown(value) -> str:
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def read_comparisons(source: str, counts: Counter, measured: bool = False) -> Iterator[Comparison]:
    """The comparisons of a source that are worth training on. `counts` gets: read, and why the others were left out.

    A file to be `measured` on is taken whole, but for ties: its accuracy is then that of any other program on it.
    """
    for where, row in read_rows(source):
        comparison = to_comparison(row, where)
        counts["read"] += 1
        if comparison.margin == 0:
            counts["dropped: tie (margin 0)"] += 1
        elif measured:
            yield comparison
        elif comparison.chosen == comparison.rejected:
            counts["dropped: identical answers"] += 1
        elif min(len(comparison.chosen.split()), len(comparison.rejected.split())) < MIN_WORDS:
            counts[f"dropped: answer under {MIN_WORDS} words"] += 1
        else:
            yield comparison


def hold_out(prompts: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The prompts to evaluate on: `fraction` of the distinct ones, at least one. The same on every rank."""
    distinct = sorted(set(prompts))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(distinct), generator=generator).tolist()
    return {distinct[i] for i in order[: max(1, round(fraction * len(distinct)))]}


def prompt_key(comparison: Comparison) -> str:
    """What makes two comparisons of the same prompt. Without a prompt each pair of answers stands for itself."""
    return comparison.prompt or "\0".join(["", *sorted([comparison.chosen, comparison.rejected])])


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def join(prompt: str, answer: str, separator: str) -> str:
    """Prompt and answer as one text, the separator between them unless whitespace already stands there."""
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    return prompt + separator + answer


def encode(tokenizer, texts: list[str], eos: bool = True) -> list[list[int]]:
    """Token ids: the tokenizer's own BOS once, even where the text brings it along, and EOS once at the end."""
    rows = tokenizer(texts, verbose=False, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    for ids in rows:
        while ids and ids[-1] == tokenizer.eos_token_id and not (len(ids) == 1 and _adds_bos(tokenizer, ids)):
            ids.pop()
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            del ids[0]
        if eos:
            ids.append(tokenizer.eos_token_id)
    return rows


def _adds_bos(tokenizer, ids: list[int]) -> bool:
    return ids[0] == tokenizer.bos_token_id and tokenizer("")["input_ids"][:1] == ids[:1]


def common_prefix(rows: list[list[int]]) -> int:
    """How many leading ids all rows share."""
    low, high = min(rows), max(rows)  # all others lie between these two in dictionary order
    return next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))


def tokenise(
    comparisons: list[Comparison],
    tokenizer,
    counts: Counter,
    *,
    separator: str,
    max_length: int,
    overlong: str,
    measured: bool = False,
) -> Iterator[dict]:
    """Groups (see the top of this file), prompt by prompt. `counts` gets kept, cut, and why others were dropped.

    An over-long comparison loses the left end of its prompt (never BOS, the answers or EOS), as much as its longer
    answer needs, so that both sides still follow the same text. Other comparisons of the prompt keep theirs whole:
    they form a group of their own. An answer that is too long by itself is dropped, or, where every pair is to be
    `measured`, cut before its EOS.
    """
    by_prompt: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_prompt.setdefault(prompt_key(comparison), []).append(comparison)
    keys = list(by_prompt)
    for first in tqdm(range(0, len(keys), CHUNK), desc="tokenising", unit=f"x{CHUNK} prompts", leave=False):
        chunk = [by_prompt[key] for key in keys[first : first + CHUNK]]
        texts = sorted({join(c.prompt, a, separator) for group in chunk for c in group for a in (c.chosen, c.rejected)})
        ids_of = dict(zip(texts, encode(tokenizer, texts)))
        for group in chunk:
            by_cut: dict[int, list[tuple]] = {}
            for comparison in group:
                sides = [
                    ids_of[join(comparison.prompt, a, separator)] for a in (comparison.chosen, comparison.rejected)
                ]
                if sides[0] == sides[1] and not measured:
                    counts["dropped: same tokens"] += 1
                    continue
                cut, sides = fit(sides, comparison, tokenizer, counts, max_length, overlong, measured)
                if sides:
                    by_cut.setdefault(cut, []).append((comparison, sides))
            counts["prompts"] += bool(by_cut)
            for members in by_cut.values():
                yield to_group(members, counts)


def fit(sides, comparison, tokenizer, counts, max_length, overlong, measured) -> tuple[int, list[list[int]]]:
    """(tokens cut out of the prompt, the two texts of a comparison), the latter empty if it is dropped."""
    longest = max(map(len, sides))
    cut = longest - max_length
    if cut <= 0:
        return 0, sides
    if overlong == "error":
        raise InputError(
            f"{comparison.where}: {longest} tokens, --max_length is {max_length}; raise --max_length, or choose --overlong "
            "truncate or drop"
        )
    if overlong == "drop":
        counts["dropped: longer than --max_length"] += 1
        return 0, []
    # The prompt ends where the ids stop being those of the prompt alone.
    nothing, alone = encode(tokenizer, ["", comparison.prompt], eos=False)
    # What the tokenizer puts before every text stays, BOS or more (GLM), and a BOS that the prompt brings along.
    keep = common_prefix([nothing, alone, *sides]) or int(
        alone[:1] == [tokenizer.bos_token_id] and sides[0][:1] == alone[:1]
    )
    room = common_prefix([alone, *sides]) - keep
    if cut > room and not measured:
        counts["dropped: answer alone longer than --max_length"] += 1
        return 0, []
    counts["kept, prompt cut"] += room > 0
    counts["kept, answer cut"] += cut > room
    cut = min(cut, room)
    sides = [ids[:keep] + ids[keep + cut :] for ids in sides]
    return cut, [ids if len(ids) <= max_length else ids[: max_length - 1] + ids[-1:] for ids in sides]


def to_group(members: list[tuple[Comparison, list[list[int]]]], counts: Counter) -> dict:
    """The comparisons of one prompt, each with the ids of its two texts -> one row of FEATURES."""
    index: dict[tuple, int] = {}
    pairs = [[index.setdefault(tuple(ids), len(index)) for ids in sides] for _, sides in members]
    texts = [list(ids) for ids in index]
    # A text that is the beginning of another (its answer contains EOS), or equal, keeps its last token as completion.
    shared = min(common_prefix(texts), min(map(len, texts)) - 1)
    separate_tokens = sum(map(len, texts))
    shared_tokens = separate_tokens - shared * (len(texts) - 1)
    lengths = [(len(texts[c]), len(texts[r])) for c, r in pairs]
    counts["kept"] += len(members)
    counts["shared tokens"] += shared_tokens
    counts["separate tokens"] += separate_tokens
    counts["longer answer chosen"] += sum(c > r for c, r in lengths)
    counts["shorter answer chosen"] += sum(c < r for c, r in lengths)
    counts["longest"] = max(counts["longest"], *map(len, texts))
    counts["largest id"] = max(counts["largest id"], *map(max, texts))
    return {
        "prefix": texts[0][:shared],
        "completions": [ids[shared:] for ids in texts],
        "chosen": [c for c, _ in pairs],
        "rejected": [r for _, r in pairs],
        "margin": [comparison.margin or 0.0 for comparison, _ in members],
        "subset": [comparison.subset for comparison, _ in members],
        "pairs": len(members),
        "shared_tokens": shared_tokens,
        "separate_tokens": separate_tokens,
    }


FEATURES = datasets.Features(
    {
        "prefix": datasets.List(datasets.Value("int32")),
        "completions": datasets.List(datasets.List(datasets.Value("int32"))),
        "chosen": datasets.List(datasets.Value("int32")),
        "rejected": datasets.List(datasets.Value("int32")),
        "margin": datasets.List(datasets.Value("float32")),
        "subset": datasets.List(datasets.Value("string")),
        "pairs": datasets.Value("int32"),
        "shared_tokens": datasets.Value("int32"),  # prefix computed once
        "separate_tokens": datasets.Value("int32"),  # prefix computed with every completion
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# All of it, once


def prepare(
    tokenizer,
    train_data: str,
    eval_data: str | None = None,
    *,
    eval_fraction: float = 0.05,
    separator: str = "\n",
    max_length: int = 550,
    overlong: str = "truncate",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Reads, filters, tokenises and groups; the result is cached under what it depends on, whole or not at all.

    Without `eval_data`, `eval_fraction` of the prompts is held out, each with all its comparisons.
    Raises InputError for bad data, and if nothing is left to train or to evaluate on.
    """
    if overlong not in ("truncate", "drop", "error"):
        raise InputError(f"--overlong must be truncate, drop or error, got {overlong!r}")
    if not eval_data and not 0 < eval_fraction < 1:
        raise InputError(f"--eval_fraction must lie between 0 and 1, got {eval_fraction}")
    if not 0 < max_length:
        raise InputError(f"--max_length must be positive, got {max_length}")
    rules = {"separator": separator, "max_length": max_length, "overlong": overlong}
    arguments = [rules, *([] if eval_data else [eval_fraction, seed])]
    sources = [fingerprint(source) for source in (train_data, eval_data) if source]
    state = [Path(__file__).read_text(), tokenizer_state(tokenizer), arguments, sources]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minirm" / key
    if not folder.is_dir():
        temporary = folder.with_name(f"{key}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
        try:
            counts = {"train": Counter(), "eval": Counter()}
            parts = read_parts(train_data, eval_data, eval_fraction, seed, counts)
            for part, comparisons in parts.items():
                measured = part == "eval" and bool(eval_data)
                groups = tokenise(comparisons, tokenizer, counts[part], measured=measured, **rules)
                with ArrowWriter(path=str(temporary / f"{part}.arrow"), features=FEATURES) as writer:
                    for group in groups:
                        writer.write(group)
                    writer.finalize()
            (temporary / "report.json").write_text(json.dumps(counts))
            os.replace(temporary, folder)  # a killed run leaves no half cache behind
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    report = json.loads((folder / "report.json").read_text())
    for part, source in (("train", train_data), ("eval", eval_data or train_data)):
        if not report[part].get("kept"):
            left_out = ((n, why) for why, n in report[part].items() if why.startswith(("dropped", "held out")))
            why = ", ".join(f"{n:,} {why}" for n, why in left_out if n) or "no rows"
            raise InputError(
                f"{source}: nothing left to {part} on: {report[part].get('read', 0):,} comparisons read; {why}"
            )
    parts = [datasets.Dataset.from_file(str(folder / f"{part}.arrow")) for part in ("train", "eval")]
    return Prepared(*parts, report, sources)


def read_parts(train_data, eval_data, eval_fraction, seed, counts) -> dict[str, list[Comparison]]:
    """The comparisons to train and to evaluate on; `counts["train"]`, `counts["eval"]` as `read_comparisons` does."""
    train = list(
        tqdm(read_comparisons(train_data, counts["train"]), f"reading {train_data}", unit=" pairs", leave=False)
    )
    if eval_data:
        held_out = list(read_comparisons(eval_data, counts["eval"], measured=True))
        seen = {prompt_key(comparison) for comparison in train}
        counts["eval"]["prompt also in the training data"] = sum(prompt_key(c) in seen for c in held_out)
        return {"train": train, "eval": held_out}
    prompts = hold_out(map(prompt_key, train), eval_fraction, seed)
    held_out = [comparison for comparison in train if prompt_key(comparison) in prompts]
    counts["train"]["held out"] = counts["eval"]["read"] = len(held_out)
    return {"train": [c for c in train if prompt_key(c) not in prompts], "eval": held_out}


def tokenizer_state(tokenizer) -> str:
    """All that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    return f"{rules} {tokenizer.bos_token} {tokenizer.eos_token}"
