"""From files of comparisons to groups of token ids: filtering, rendering, tokenising, grouping by prompt.

An *example* is a prompt, its completions and comparisons between them (schemas.py); most are one comparison of two. A
*group* is all examples of one prompt:

    prefix       the token ids that all its completions begin with
    completions  the rest of each completion, its EOS included; equal ones are kept once
    chosen, rejected, margin, subset, source   one entry a comparison; the first two are indices into completions

Prompt and answer are tokenised together, as one text, so that the ids are those which any other program gets for it.
Examples and groups lie on disk and are memory-mapped: what is held in memory is 24 bytes an example.
"""

import gc
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from tqdm import tqdm

from minirm import schemas, sources
from minirm.sources import InputError, fingerprint, one_line, read_rows, refusing, whole_folder

MIN_WORDS = 5  # shorter answers are left out, as in the published recipe
CHUNK = 512  # prompts tokenised at a time: enough for the tokenizer's threads, little enough for memory

INT, FLOAT, TEXT = Value("int32"), Value("float32"), Value("string")
TEXTS = datasets.Features(
    prompt=TEXT,  # of messages: as JSON
    texts=List(TEXT),  # prompt and completion in one, for every completion
    chat=Value("bool"),  # rendered by the chat template, special tokens and all
    chosen=List(INT),  # one entry a comparison: index into texts
    rejected=List(INT),
    margin=List(FLOAT),  # 0: none
    subset=TEXT,
    source=INT,  # number of the file
    where=TEXT,  # "file:line"
)
FEATURES = datasets.Features(
    prefix=List(INT),
    completions=List(List(INT)),
    chosen=List(INT),
    rejected=List(INT),
    margin=List(FLOAT),
    subset=List(TEXT),
    source=List(INT),
    pairs=INT,
    prompt_pairs=INT,  # of the prompt; more than `pairs` where its over-long ones form another group
    shared_tokens=INT,  # prefix computed once
)


class Prepared(NamedTuple):
    """Tokenised groups, on disk and memory-mapped, and what happened on the way there."""

    train: datasets.Dataset
    eval: datasets.Dataset
    report: dict[str, list[dict]]  # of each part, counts for every source of it: see report.py
    sources: dict[str, list[str]]  # of each part, the fingerprints of its files


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def set_chat_template(tokenizer, path: str | None = None) -> None:
    """Gives a tokenizer the template in a file, and makes its template end where the reward is read.

    Many templates put a line break behind the token that ends a turn, some put no such token. Here a conversation ends
    with it, or with EOS, so that what `apply_chat_template` gives is what is scored, in any program that loads the
    exported tokenizer. Prompts for generation stay as they are.
    """
    flag = f"--chat_template {path}"
    if path:
        with refusing(f"{flag}: not a Jinja file that can be read", (OSError, UnicodeDecodeError)):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, template = tokenizer.apply_chat_template(turns, tokenize=False), tokenizer.get_chat_template()
    except Exception as error:  # noqa: BLE001 - whatever Jinja code can raise
        if not path:
            return  # an error where messages come up
        raise InputError(f"{flag}: cannot render a question and an answer ({one_line(error)})") from None
    ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    ends = bool(ids) and ids[-1] in special_ids(tokenizer)
    if ends and text == text.rstrip():
        return
    # The plus signs keep the whitespace that Jinja, as transformers sets it up, would take away beside a block. It does
    # so with the last line break of a template.
    tokenizer.chat_template = (
        "{% set minirm_text +%}" + template.removesuffix("\n") + "{%+ endset %}{{ minirm_text if add_generation_prompt "
        "else " + ("minirm_text.rstrip()" if ends else "minirm_text + eos_token") + " }}"
    )


def special_ids(tokenizer) -> set[int]:
    """Ids that can end a turn: EOS and all other special tokens."""
    return {tokenizer.eos_token_id} | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def render(tokenizer, messages: schemas.Messages, where: str) -> str:
    """Messages by the chat template. Raises InputError if there is none, or if it refuses them."""
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages, but the tokenizer has no chat template; give one with --chat_template FILE, or use a "
            "model that has been trained to chat"
        )
    with refusing(f"{where}: the chat template refuses these messages"):  # whatever Jinja code can raise
        return tokenizer.apply_chat_template(messages, tokenize=False)


def unescaped(text: str) -> str:
    r"""A separator as it is typed on a command line, with \n and \t."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def join(prompt: str, answer: str, separator: str) -> str:
    """Prompt and answer as one text, the separator between them unless whitespace already stands there."""
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    return prompt + separator + answer


def read_texts(
    source: str, tokenizer, separator: str, report: dict, keep: str = "worth", number: int = 0
) -> Iterator[dict]:
    """The examples of a source as TEXTS. Raises InputError for a bad row.

    Args:
        report: gets the schema, the comparisons read, and why others were dropped.
        keep: "worth" leaves out comparisons not worth training on; "labelled" ties alone: a file to measure on is taken
            whole, its accuracy is then that of any other program on it; "all" also keeps examples without a comparison.
        number: of the source.
    """
    schema, counts = None, Counter()
    for where, row in read_rows(source):
        try:
            if schema is None:
                schema = schemas.recognise(row)
                report["schema"] = schemas.describe(schema, row)
            prompt, completions, compared, ties, labelled, own_separator, subset = schemas.to_example(schema, row)
        except InputError as error:
            raise InputError(f"{where}: {one_line(error)}") from None
        if keep == "all" and not labelled:
            compared = []
        chat = not isinstance(completions[0], str)
        answers = ["\n".join(m["content"] for m in turns) for turns in completions] if chat else completions
        pairs = []
        for pair in compared:
            chosen, rejected = answers[pair[0]], answers[pair[1]]
            if keep == "worth" and chosen == rejected:
                counts["dropped: identical answers"] += 1
            elif keep == "worth" and min(len(side.split(None, MIN_WORDS)) for side in (chosen, rejected)) < MIN_WORDS:
                counts[f"dropped: answer under {MIN_WORDS} words"] += 1
            else:
                pairs.append(pair)
        counts["read"] += len(compared) + ties
        counts["dropped: tie"] += ties
        report.update(counts)
        if not pairs and keep != "all":
            continue
        if chat:
            texts = [render(tokenizer, prompt + turns, where) for turns in completions]
        else:
            own_separator = separator if own_separator is None else own_separator
            texts = [join(prompt, answer, own_separator) for answer in completions]
        chosen, rejected, margin = zip(*pairs) if pairs else ((), (), ())
        yield {
            "prompt": json.dumps(prompt) if chat else prompt, "texts": texts, "chat": chat, "chosen": chosen,
            "rejected": rejected, "margin": margin, "subset": subset, "source": number, "where": where,
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def encode(tokenizer, texts: list[str], chat: bool = False, eos: bool = True) -> list[list[int]]:
    """Token ids: BOS once, even where the text brings along what the tokenizer adds, and once at the end EOS, or what
    ends a turn in the chat template."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # what a call does, less offsets and masks
        backend.no_truncation(), backend.no_padding()
        backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
        rows = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=not chat)]
    else:
        rows = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = special_ids(tokenizer) if chat else set()
    least = int(start == end and tokenizer("")["input_ids"][:1] == [end])  # an EOS that is BOS, too (OPT), stays
    for ids in rows:
        while not chat and len(ids) > least and ids[-1] == end:
            ids.pop()
        if len(ids) > 1 and ids[0] == ids[1] == start:
            del ids[0]
        if eos and not (ids and ids[-1] in ends):
            ids.append(end)
    return rows


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many leading ids all rows share."""
    low, high = min(rows), max(rows)  # all others lie between these two in dictionary order
    same, end = 0, min(len(low), len(high))
    while same < end:  # halved, since slices compare faster than one id after the other
        middle = (same + end + 1) // 2
        same, end = (middle, end) if low[same:middle] == high[same:middle] else (same, middle - 1)
    return same


def tokenise(
    prompts: list[list[dict]], tokenizer, counts: list[Counter], *, max_length: int, overlong: str, keep: str = "worth"
) -> Iterator[tuple[dict, list[tuple[dict, dict[int, int]]]]]:
    """Groups (see the top of this file) of prompts, each a list of its examples, as TEXTS.

    Yields a group, and for each of its examples where its completions are: {number in texts: index into completions}.
    `counts`, one for each source, get kept, cut, and why others were dropped. `keep`: see `read_texts`; with "all",
    what the chat template gives stays as it is.

    An over-long example loses the left end of its prompt (never BOS, the answers or EOS), as much as its longest answer
    needs, so that all of them still follow the same text. Other examples of the prompt keep theirs whole: they form a
    group of their own. An answer that is too long by itself is dropped with its comparisons, or, unless `keep` is
    "worth", cut before its EOS.
    """
    too_long = "dropped: " + ("answer alone " if overlong == "truncate" else "") + "longer than --max_length"
    ids_of = {}
    for chat in (False, True):
        texts = (text for examples in prompts for e in examples if e["chat"] == chat for text in e["texts"])
        if texts := list(dict.fromkeys(texts)):
            rows = encode(tokenizer, texts, chat, eos=keep != "all" or not chat)
            ids_of |= {(chat, text): ids for text, ids in zip(texts, rows)}
    for examples in prompts:
        by_cut: dict[int, list[tuple]] = {}
        for example in examples:
            ids = [ids_of[example["chat"], text] for text in example["texts"]]
            cut, ids, shortened = fit(ids, example, tokenizer, max_length, overlong, keep)
            own, pairs = counts[example["source"]], []
            for chosen, rejected, margin in zip(example["chosen"], example["rejected"], example["margin"]):
                if chosen not in ids or rejected not in ids:
                    own[too_long] += 1
                elif keep == "worth" and ids[chosen] == ids[rejected]:
                    own["dropped: same tokens"] += 1
                else:
                    pairs.append((chosen, rejected, margin))
                    own["kept, prompt cut"] += cut > 0
                    own["kept, answer cut"] += chosen in shortened or rejected in shortened
            if pairs or keep == "all":
                by_cut.setdefault(cut, []).append((example, ids, pairs))
        counts[examples[0]["source"]]["prompts"] += bool(by_cut)
        total = sum(len(pairs) for members in by_cut.values() for *_, pairs in members)
        for members in by_cut.values():
            group, places = to_group(members, counts, keep == "all")
            yield group | {"prompt_pairs": total}, places


def fit(sides: list[list[int]], example: dict, tokenizer, max_length: int, overlong: str, keep: str) -> tuple:
    """(tokens cut out of the prompt, {k: ids} of the texts that fit then, those of them whose answer is cut as well)."""
    ids, longest = dict(enumerate(sides)), max(map(len, sides))
    if longest <= max_length:
        return 0, ids, set()
    if overlong == "error":
        advice = "raise --max_length, or choose --overlong truncate or drop"
        raise InputError(f"{example['where']}: {longest} tokens, --max_length is {max_length}; {advice}")
    if overlong == "drop":
        return 0, {k: text for k, text in ids.items() if len(text) <= max_length}, set()
    # The prompt ends where the ids stop being those of the prompt alone.
    chat, prompt = example["chat"], example["prompt"]
    prompt = render(tokenizer, json.loads(prompt), example["where"]) if chat else prompt
    nothing, alone = encode(tokenizer, ["", prompt], chat, eos=False)
    # What the tokenizer puts before every text stays, BOS or more (GLM), and a BOS that the prompt brings along.
    same = common_prefix([alone, *sides])
    start = common_prefix([nothing, alone, *sides]) or int(same > 0 and alone[0] == tokenizer.bos_token_id)
    room = same - start
    if keep == "worth":
        ids = {k: text for k, text in ids.items() if len(text) - room <= max_length}
    cut = min(room, max([len(text) - max_length for text in ids.values()] + [0]))
    ids = {k: text[:start] + text[start + cut :] for k, text in ids.items()}
    shortened = {k for k, text in ids.items() if len(text) > max_length}
    return cut, ids | {k: ids[k][: max_length - 1] + ids[k][-1:] for k in shortened}, shortened


def to_group(members: list[tuple], counts: list[Counter], every: bool) -> tuple[dict, list]:
    """Members (example, {k: ids of its k-th text}, [(chosen, rejected, margin)]) of one prompt -> one row of FEATURES,
    and where each example's texts are in it (see `tokenise`). Texts that are not compared are left out unless `every`."""
    index: dict[tuple, int] = {}
    places, pairs = [], []
    for example, ids, compared in members:
        wanted = ids if every else sorted({k for pair in compared for k in pair[:2]})
        place = {k: index.setdefault(tuple(ids[k]), len(index)) for k in wanted}
        places.append((example, place))
        pairs += [(place[c], place[r], margin, example["subset"], example["source"]) for c, r, margin in compared]
    texts = [list(ids) for ids in index]
    # A text that is the beginning of another (its answer contains EOS), or equal, keeps its last token as completion.
    shared = min(common_prefix(texts), min(map(len, texts)) - 1)
    separate_tokens = sum(map(len, texts))
    shared_tokens = separate_tokens - shared * (len(texts) - 1)
    for chosen, rejected, *_, source in pairs:
        own, longer = counts[source], len(texts[chosen]) - len(texts[rejected])
        own["kept"] += 1
        own["longer answer chosen"] += longer > 0
        own["shorter answer chosen"] += longer < 0
    own = counts[members[0][0]["source"]]
    own["shared tokens"] += shared_tokens
    own["separate tokens"] += separate_tokens
    own["longest"] = max(own["longest"], *map(len, texts))
    names = ("chosen", "rejected", "margin", "subset", "source")
    group = {name: [pair[i] for pair in pairs] for i, name in enumerate(names)}
    group |= {"prefix": texts[0][:shared], "completions": [ids[shared:] for ids in texts]}
    own["largest id"] = max(own["largest id"], *group["prefix"], *map(max, group["completions"]))
    return group | {"pairs": len(pairs), "shared_tokens": shared_tokens}, places


# ---------------------------------------------------------------------------------------------------------------------
# All of it, once


class Texts(NamedTuple):
    rows: datasets.Dataset  # N of TEXTS
    keys: Tensor  # [N] int64: equal for examples of the same prompt
    sources: Tensor  # [N] int64: number of the file
    pairs: Tensor  # [N] int64: how many comparisons
    report: list[dict]  # of each source

    def note(self, what: str, chosen: Tensor) -> None:
        """[N] bool, which examples: how many comparisons they hold goes into the report of each source."""
        counts = self.sources[chosen].bincount(self.pairs[chosen], minlength=len(self.report)).long().tolist()
        for row, n in zip(self.report, counts):
            row[what] = n


def store(path: Path, sources: Sequence[str], tokenizer, separator: str, keep: str) -> Texts:
    """All examples of some sources, in a file."""
    columns, report = array("q"), [{"source": source, "read": 0} for source in sources]
    with ArrowWriter(path=str(path), features=TEXTS, writer_batch_size=CHUNK) as writer:
        for number, source in enumerate(sources):
            examples = read_texts(source, tokenizer, separator, report[number], keep, number)
            for example in tqdm(examples, desc=f"reading {source}", unit=" prompts", leave=False, disable=None):
                columns.extend((prompt_key(example), number, len(example["chosen"])))
                writer.write(example)
        writer.finalize()
    return Texts(datasets.Dataset.from_file(str(path)), *torch.tensor(columns).long().view(-1, 3).unbind(1), report)


def prompt_key(example: dict) -> int:
    """What makes two examples of the same prompt. Without a prompt each set of answers stands for itself."""
    alone = example["prompt"] in ("", "[]")
    text = "\0".join(["", *sorted(example["texts"])]) if alone else f"{example['chat']} {example['prompt']}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def by_prompt(texts: Texts, chosen: Tensor) -> Iterator[list[list[dict]]]:
    """Some prompts at a time, each a list of its chosen ([N] bool) examples; in the order in which prompts first occur."""
    rows = chosen.nonzero().flatten()
    _, prompt = texts.keys[rows].unique(return_inverse=True)
    place = torch.arange(len(rows))
    first = torch.full_like(place, len(rows)).scatter_reduce_(0, prompt, place, "amin")[prompt]
    first, order = first.sort(stable=True)
    sizes = first.unique_consecutive(return_counts=True)[1].split(CHUNK)
    with tqdm(total=sum(map(len, sizes)), desc="tokenising", unit=" prompts", leave=False, disable=None) as bar:
        for some, here in zip(sizes, rows[order].split([int(some.sum()) for some in sizes])):
            columns = texts.rows[here.tolist()]
            examples = (dict(zip(columns, values)) for values in zip(*columns.values()))
            yield [list(islice(examples, n)) for n in some.tolist()]
            bar.update(len(some))


def hold_out(keys: Tensor, fraction: float, seed: int) -> Tensor:
    """[N] keys of prompts -> [N] bool: `fraction` of the distinct ones, at least one. The same on every rank."""
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
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Reads, filters, tokenises and groups; the result is cached under what it depends on, whole or not at all.

    Without `eval_data`, `eval_fraction` of the prompts is held out, each with all its comparisons.
    Raises InputError for bad data, and if nothing is left to train or to evaluate on.
    """
    if not eval_data and not 0 < eval_fraction < 1:
        raise InputError(f"--eval_fraction must lie between 0 and 1, got {eval_fraction}")
    rules = {"max_length": max_length, "overlong": overlong}
    prints = {"train": [*map(fingerprint, train_data)], "eval": [*map(fingerprint, eval_data)]}
    code = [Path(module).read_text() for module in (__file__, schemas.__file__, sources.__file__)]
    split = None if eval_data else [eval_fraction, seed]
    state = [code, tokenizer_state(tokenizer), rules, separator, split, prints, [*train_data], [*eval_data]]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "minirm" / key
    if not folder.is_dir():
        gc.freeze()  # or all that was imported would be searched for garbage again and again: a fifth of the time
        try:
            with whole_folder(folder) as new:
                report = write_groups(new, tokenizer, train_data, eval_data, eval_fraction, separator, seed, rules)
                (new / "report.json").write_text(json.dumps(report))
                for path in new.glob("*.texts"):
                    path.unlink()
        finally:
            gc.unfreeze()
    report = json.loads((folder / "report.json").read_text())
    for part, named in (("train", train_data), ("eval", eval_data or train_data)):
        total = totals(report[part])
        if not total["kept"]:
            left_out = (f"{n:,} {why}" for why, n in total.items() if n and why.startswith(("dropped", "held out")))
            found = f"{total['read']:,} comparisons read; {', '.join(left_out) or 'no rows'}"
            raise InputError(f"{', '.join(named)}: nothing left to {part} on: {found}")
    parts = [datasets.Dataset.from_file(str(folder / f"{part}.arrow")) for part in ("train", "eval")]
    return Prepared(*parts, report, prints)


def write_groups(folder, tokenizer, train_data, eval_data, eval_fraction, separator, seed, rules) -> dict[str, list]:
    """train.arrow and eval.arrow in a folder; returns the report."""
    train = store(folder / "train.texts", train_data, tokenizer, separator, "worth")
    if eval_data:
        held_out = store(folder / "eval.texts", eval_data, tokenizer, separator, "labelled")
        parts = {"train": (train, train.pairs > 0, "worth"), "eval": (held_out, held_out.pairs > 0, "labelled")}
        held_out.note("prompt also in the training data", torch.isin(held_out.keys, train.keys))
    else:
        out = hold_out(train.keys, eval_fraction, seed)
        train.note("held out", out)
        read = [{"source": row["source"], "read": row["held out"]} for row in train.report]
        parts = {"train": (train, ~out, "worth"), "eval": (train._replace(report=read), out, "worth")}
    report = {}
    for part, (texts, picked, keep) in parts.items():
        counts = [Counter() for _ in texts.report]
        with ArrowWriter(path=str(folder / f"{part}.arrow"), features=FEATURES, writer_batch_size=CHUNK) as writer:
            for prompts in by_prompt(texts, picked):
                for group, _ in tokenise(prompts, tokenizer, counts, keep=keep, **rules):
                    writer.write(group)
            writer.finalize()
        report[part] = [row | own for row, own in zip(texts.report, counts)]
    return report


def totals(report: Iterable[dict]) -> Counter:
    """The counts of all sources of a part in one."""
    total: Counter = Counter()
    for name, value in (item for row in report for item in row.items()):
        if name in ("longest", "largest id"):
            total[name] = max(total[name], value)
        elif isinstance(value, int):
            total[name] += value
    return total


def tokenizer_state(tokenizer) -> str:
    """All that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = backend.to_str() if backend else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    return f"{rules} {tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.chat_template}"
