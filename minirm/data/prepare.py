"""Turn files of comparisons into groups of token ids: filter, render, tokenise, group by prompt.

An *example* is a prompt, its completions and comparisons between them (schemas.py); most have one comparison of two
completions. A *group* holds all examples of one prompt:

    prefix       the token ids that all its completions begin with
    completions  the rest of each completion including its EOS; equal ones are kept once
    chosen, rejected, margin, subset, source   one entry per comparison; the first two are indices into completions

Prompt and answer are tokenised together, as one text, so that any other program gets the same ids. Examples and groups
are memory-mapped from disk; an example takes 24 bytes of memory.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
import torch
from datasets import List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from tqdm import tqdm

from minirm.data import schemas
from minirm.data.chat import join, render
from minirm.data.sources import fingerprint, left_out, read_rows
from minirm.data.tokens import tokenise, tokenizer_state
from minirm.data.workers import on_all_cores
from minirm.errors import InputError, one_line, printable
from minirm.files import whole_folder

MIN_WORDS = 5  # shorter answers are dropped, as in the published recipe
CHUNK = 512  # prompts tokenised at a time: enough for the tokenizer's threads, few enough for memory
INT, FLOAT, TEXT = Value("int32"), Value("float32"), Value("string")
COMPARED = {"chosen": List(INT), "rejected": List(INT), "margin": List(FLOAT)}  # per comparison; margin 0: none
TEXTS = datasets.Features(
    prompt=TEXT,  # messages: as JSON
    texts=List(TEXT),  # prompt and completion joined, one per completion
    chat=Value("bool"),  # rendered by the chat template, including special tokens
    **COMPARED,  # indices into texts
    subset=TEXT,
    id=TEXT,  # row id, if a benchmark needs it
    source=INT,  # index of the file
    where=TEXT,  # "file:line"
)
FEATURES = datasets.Features(
    prefix=List(INT),
    completions=List(List(INT)),
    **COMPARED,  # indices into completions
    subset=List(TEXT),
    source=List(INT),
    pairs=INT,
    prompt_pairs=INT,  # pairs of the whole prompt; more than `pairs` if its over-long ones form another group
    shared_tokens=INT,  # tokens with the prefix counted once
)


class Prepared(NamedTuple):
    """Tokenised groups, memory-mapped from disk, and statistics of their preparation."""

    train: datasets.Dataset
    eval: datasets.Dataset
    report: dict[str, list[dict]]  # for each part, counts per source: see report/lines.py
    sources: dict[str, list[str]]  # for each part, the fingerprints of its files


def read_texts(
    source: str, tokenizer, separator: str, report: dict, keep: str = "worth", columns: dict | None = None
) -> Iterator[dict]:
    """Yield the examples of a source as TEXTS without `source`. Raises InputError for a bad row.

    report: receives the schema, its columns, and the numbers of comparisons read and dropped, by reason.
    keep: "worth" drops comparisons that are not worth training on; "labelled" drops only ties, so that accuracy on an
    evaluation file is comparable with other programs; "all" also keeps examples without a comparison.
    """
    counts: Counter = Counter()
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    for where, example in read_examples(source, report, columns):
        prompt, completions, compared, ties, labelled, own_separator, subset, row_id, odd = example
        if keep == "all" and not labelled:
            compared = []
        chat = not isinstance(completions[0], str)
        answers = ["\n".join(map(said, turns)) for turns in completions] if chat else completions
        pairs = []
        for pair in compared:
            chosen, rejected = answers[pair[0]], answers[pair[1]]
            reason = odd or ("identical answers" if chosen == rejected else "")
            if any(len(side.split(None, MIN_WORDS)) < MIN_WORDS for side in (chosen, rejected)):
                reason = reason or f"answer under {MIN_WORDS} words"
            if keep == "worth" and reason:
                counts[f"dropped: {reason}"] += 1
            else:
                pairs.append(pair)
        counts["read"] += len(compared) + ties
        counts["dropped: tie"] += ties
        whole = "\n".join([*(map(said, prompt) if chat else [prompt]), *answers])
        counts["special tokens in the text"] += bool(special.search(whole))
        report.update(counts)
        if not pairs and keep != "all":
            continue
        between = separator if own_separator is None else own_separator
        texts = [render(tokenizer, prompt + c, where) if chat else join(prompt, c, between) for c in completions]
        chosen, rejected, margin = zip(*pairs) if pairs else ((), (), ())
        yield {
            "prompt": json.dumps(prompt) if chat else prompt, "texts": texts, "chat": chat, "chosen": chosen,
            "rejected": rejected, "margin": margin, "subset": subset, "id": row_id, "where": where,
        }  # fmt: skip


def read_examples(source: str, report: dict, columns: dict | None = None) -> Iterator[tuple[str, schemas.Example]]:
    """Yield (where, Example) for a source. Rows with one answer and its score are ranked by prompt, after the last one."""
    schema, scored = None, {}
    for where, row in read_rows(source):
        try:
            found, row = row, schemas.rename(row, columns) if columns else row
            if schema is None:
                schema = schemas.recognise(row)
                used, unused = schemas.used_columns(schema, row)
                renamed = ((name, path.partition(".")[0]) for name, path in (columns or {}).items())
                unused += [f"{name} of the file" for name, column in renamed if column != name and found.get(name)]
                report |= {"schema": schemas.describe(schema, row), "columns": used, "not used": unused}
            example = schemas.to_example(schema, row)
        except InputError as error:
            raise InputError(f"{where}: {one_line(error)}") from None
        if schema.read is schemas.point_wise:
            scored.setdefault(json.dumps([example.prompt, example.subset]), (where, []))[1].append(example)
        else:
            yield where, example
    for where, rows in scored.values():
        report["prompts with only one answer"] = report.get("prompts with only one answer", 0) + (len(rows) == 1)
        yield where, schemas.by_score(rows)


def said(message: dict) -> str:
    """All text of a message: its content and its tool calls."""
    return message["content"] + (json.dumps(message["tool_calls"]) if message.get("tool_calls") else "")


# -- Preparation of all data, once. -----------------------------------------------------------------------------------
class Texts(NamedTuple):
    rows: datasets.Dataset  # N rows of TEXTS
    keys: Tensor  # [N] int64: equal for examples of the same prompt
    sources: Tensor  # [N] int64: index of the file
    pairs: Tensor  # [N] int64: number of comparisons
    report: list[dict]  # one per source

    def note(self, what: str, chosen: Tensor) -> None:
        """Add to the report, as `what`, the number of comparisons of each source in the chosen ([N] bool) examples."""
        counts = self.sources[chosen].bincount(self.pairs[chosen], minlength=len(self.report)).long().tolist()
        for row, n in zip(self.report, counts):
            row[what] = n


def store(path: Path, sources: Sequence[str], tokenizer, separator: str, keep: str, columns: dict | None) -> Texts:
    """Write all examples of some sources to a file."""
    numbers, report = array("q"), [{"source": source, "read": 0, "not read": left_out(source)} for source in sources]
    with ArrowWriter(path=str(path), features=TEXTS, writer_batch_size=CHUNK) as writer:
        for number, source in enumerate(sources):
            examples = read_texts(source, tokenizer, separator, report[number], keep, columns)
            what = f"reading {printable(source)}"
            for example in tqdm(examples, what, unit=" prompts", leave=False, disable=None):
                numbers.extend((prompt_key(example), number, len(example["chosen"])))
                writer.write(example | {"source": number})
        writer.finalize()
    return Texts(datasets.Dataset.from_file(str(path)), *torch.tensor(numbers).long().view(-1, 3).unbind(1), report)


def prompt_key(example: dict) -> int:
    """A key that is equal for examples of the same prompt. Without a prompt, each set of answers has its own key."""
    alone = example["prompt"] in ("", "[]")
    text = "\0".join(["", *sorted(example["texts"])]) if alone else f"{example['chat']} {example['prompt']}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def chunks(texts: Texts, chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """CHUNK prompts at a time, in order of first occurrence: each one's number of chosen ([N] bool) examples, their rows."""
    rows = chosen.nonzero().flatten()
    _, prompt = texts.keys[rows].unique(return_inverse=True)
    place = torch.arange(len(rows))
    first = torch.full_like(place, len(rows)).scatter_reduce_(0, prompt, place, "amin")[prompt]
    first, order = first.sort(stable=True)
    sizes = first.unique_consecutive(return_counts=True)[1].split(CHUNK)
    return list(zip(sizes, rows[order].split([int(some.sum()) for some in sizes])))


def read_prompts(texts: Texts, sizes: Tensor, rows: Tensor) -> list[list[dict]]:
    """The examples of the prompts in one item of `chunks`."""
    columns = texts.rows[rows.tolist()]
    examples = (dict(zip(columns, values)) for values in zip(*columns.values()))
    return [list(islice(examples, n)) for n in sizes.tolist()]


def hold_out(keys: Tensor, fraction: float, seed: int) -> Tensor:
    """[N] prompt keys -> [N] bool: `fraction` of the distinct keys, at least one. The same on every rank."""
    distinct = keys.unique()
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    return torch.isin(keys, distinct[order[: max(1, round(fraction * len(distinct)))]])


def prepare(
    tokenizer,
    train_data: Sequence[str],
    eval_data: Sequence[str] = (),
    *,
    eval_fraction: float = 0.05,
    separator: str = "\n",
    max_length: int = 550,
    overlong: str = "truncate",
    seed: int = 0,
    columns: dict[str, str] | None = None,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Read, filter, tokenise and group the data. The result is cached under a hash of everything it depends on.

    Without `eval_data`, `eval_fraction` of the prompts is held out, each with all its comparisons.
    Raises InputError for bad data, and if nothing is left to train or evaluate on.
    """
    if not eval_data and not 0 < eval_fraction < 1:
        raise InputError(f"--eval_fraction must lie between 0 and 1, got {eval_fraction}")
    rules = {"max_length": max_length, "overlong": overlong}
    prints = {"train": [*map(fingerprint, train_data)], "eval": [*map(fingerprint, eval_data)]}
    code = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]
    split = None if eval_data else [eval_fraction, seed]
    state = [code, tokenizer_state(tokenizer), rules, separator, split, prints, [*train_data], [*eval_data], columns]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minirm" / key
    if not folder.is_dir():
        with whole_folder(folder) as new:
            more = (eval_fraction, separator, seed, rules, columns)
            report = write_groups(new, tokenizer, train_data, eval_data, *more)
            (new / "report.json").write_text(json.dumps(report))
            for path in new.glob("*.texts"):
                path.unlink()
    report = json.loads((folder / "report.json").read_text())
    for part, named in (("train", train_data), ("eval", eval_data or train_data)):
        total = totals(report[part])
        if not total["kept"]:
            lost = (f"{n:,} {why}" for why, n in total.items() if n and why.startswith(("dropped", "held out")))
            found = f"{total['read']:,} comparisons read; {', '.join(lost) or 'no rows'}"
            task = "train" if part == "train" else "evaluate"
            raise InputError(f"{', '.join(named)}: nothing left to {task} on: {found}")
    parts = [datasets.Dataset.from_file(str(folder / f"{part}.arrow")) for part in ("train", "eval")]
    return Prepared(*parts, report, prints)


def numbers(groups: datasets.Dataset, column: str) -> Tensor:
    """[G] int32: a column that has one number per group."""
    return torch.tensor(groups.data.column(column).to_numpy())


def write_groups(folder, tokenizer, train_data, eval_data, eval_fraction, separator, seed, rules, columns) -> dict:
    """Write train.arrow and eval.arrow to a folder and return the report."""
    train = store(folder / "train.texts", train_data, tokenizer, separator, "worth", columns)
    if eval_data:
        held_out = store(folder / "eval.texts", eval_data, tokenizer, separator, "labelled", columns)
        parts = {"train": (train, train.pairs > 0, "worth"), "eval": (held_out, held_out.pairs > 0, "labelled")}
        held_out.note("prompt also in the training data", torch.isin(held_out.keys, train.keys))
    else:
        out = hold_out(train.keys, eval_fraction, seed)
        train.note("held out", out)
        read = [{"source": row["source"], "read": row["held out"]} for row in train.report]
        parts = {"train": (train, ~out, "worth"), "eval": (train._replace(report=read), out, "worth")}
    report = {}
    for part, (texts, picked, keep) in parts.items():
        todo, job = chunks(texts, picked), partial(groups_of, texts, tokenizer, keep, rules)
        counts: list[dict] = [{} for _ in texts.report]
        with (
            ArrowWriter(path=str(folder / f"{part}.arrow"), features=FEATURES) as writer,
            tqdm(total=sum(len(sizes) for sizes, _ in todo), desc="tokenising", unit=" prompts", leave=False, disable=None) as bar,
        ):  # fmt: skip
            for groups, own in on_all_cores(job, todo):
                writer.write_table(groups)
                counts = [totals(both) for both in zip(counts, own)]
                bar.update(CHUNK)
            writer.finalize()
        report[part] = [row | dict(own) for row, own in zip(texts.report, counts)]
    return report


def groups_of(texts: Texts, tokenizer, keep: str, rules: dict, sizes: Tensor, rows: Tensor) -> tuple:
    """(pyarrow.Table of the groups of one item of `chunks`, [each source's counts]). See `tokenise`."""
    counts = [Counter() for _ in texts.report]
    groups = [group for group, _ in tokenise(read_prompts(texts, sizes, rows), tokenizer, counts, keep=keep, **rules)]
    return pyarrow.Table.from_pylist(groups, FEATURES.arrow_schema), counts


def totals(report: Iterable[Mapping]) -> Counter:
    """Total counts over all sources of a part."""
    total: Counter = Counter()
    for name, value in (item for row in report for item in row.items()):
        if name in ("longest", "largest id"):
            total[name] = max(total[name], value)
        elif isinstance(value, int):
            total[name] += value
    return total
