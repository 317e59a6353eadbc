"""Turn texts into groups of token ids: encode, truncate to --max_length, group by prompt."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from minirm.data.chat import render, special_ids
from minirm.errors import InputError


def encode(tokenizer, texts: list[str], chat: bool = False, eos: bool = True) -> list[list[int]]:
    """Token ids of texts. They begin with the tokenizer's BOS once, even if a text already contains it, and end with
    one EOS, or with the chat template's end-of-turn token."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # the same as a call, but without offsets and masks
        backend.no_truncation(), backend.no_padding()
        backend.encode_special_tokens = getattr(tokenizer, "split_special_tokens", False)
        rows = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=not chat)]
    else:
        rows = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = special_ids(tokenizer) if chat else set()
    least = int(start == end and tokenizer("")["input_ids"][:1] == [end])  # keep an EOS that is also BOS (OPT)
    for ids in rows:
        while not chat and len(ids) > least and ids[-1] == end:
            ids.pop()
        if len(ids) > 1 and ids[0] == ids[1] == start:
            del ids[0]
        if eos and not (ids and ids[-1] in ends):
            ids.append(end)
    return rows


def common_prefix(rows: Sequence[list[int]]) -> int:
    """Number of leading ids that all rows share."""
    low, high = min(rows), max(rows)  # in lexicographic order, all other rows lie between these two
    same, end = 0, min(len(low), len(high))
    while same < end:  # binary search, because comparing slices is faster than comparing ids one by one
        middle = (same + end + 1) // 2
        same, end = (middle, end) if low[same:middle] == high[same:middle] else (same, middle - 1)
    return same


def tokenise(
    prompts: list[list[dict]], tokenizer, counts: list[Counter], *, max_length: int, overlong: str, keep: str = "worth"
) -> Iterator[tuple[dict, list[tuple[dict, dict[int, int]]]]]:
    """Turn prompts, each a list of its examples as TEXTS, into groups (see prepare.py).

    Yields a group, and for each of its examples the places of its completions: {index into texts: index into
    completions}. `counts`, one per source, receive the numbers kept, truncated, and dropped by reason. `keep`: see
    `read_texts`; "all" leaves the chat template's output unchanged.

    An over-long example loses the beginning of its prompt (never BOS, the answers or EOS), as much as its longest
    answer requires, so that all its answers still follow the same text. The prompt's other examples stay untruncated
    and form another group. An answer that is too long by itself is dropped with its comparisons, or, unless `keep` is
    "worth", truncated before its EOS.
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
                    own["kept, prompt truncated"] += cut > 0
                    own["kept, answer truncated"] += chosen in shortened or rejected in shortened
            if pairs or keep == "all":
                by_cut.setdefault(cut, []).append((example, ids, pairs))
        counts[examples[0]["source"]]["prompts"] += bool(by_cut)
        total = sum(len(pairs) for members in by_cut.values() for *_, pairs in members)
        for members in by_cut.values():
            group, places = to_group(members, counts, keep == "all")
            yield group | {"prompt_pairs": total}, places


def fit(sides: list[list[int]], example: dict, tokenizer, max_length: int, overlong: str, keep: str) -> tuple:
    """(tokens cut from the prompt, {k: ids} of the texts that then fit, the k whose answer is truncated as well)."""
    ids, longest = dict(enumerate(sides)), max(map(len, sides))
    if longest <= max_length:
        return 0, ids, set()
    if overlong == "error":
        advice = "raise --max_length, or use --overlong truncate or drop"
        raise InputError(f"{example['where']}: {longest} tokens exceed --max_length {max_length}; {advice}")
    if overlong == "drop":
        return 0, {k: text for k, text in ids.items() if len(text) <= max_length}, set()
    # The prompt ends where the ids first differ from those of the prompt alone.
    chat, prompt = example["chat"], example["prompt"]
    prompt = render(tokenizer, json.loads(prompt), example["where"]) if chat else prompt
    nothing, alone = encode(tokenizer, ["", prompt], chat, eos=False)
    # Keep what the tokenizer puts before every text (BOS, for GLM more), and a BOS that the prompt itself contains.
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
    """Make one row of FEATURES from the examples of a prompt, without texts that are not compared unless `every`.

    members: (example, {k: ids of its k-th text}, [(chosen, rejected, margin)]). Also returns the places of each
    example's texts in the row (see `tokenise`).
    """
    index: dict[tuple, int] = {}
    places, pairs = [], []
    for example, ids, compared in members:
        wanted = ids if every else sorted({k for pair in compared for k in pair[:2]})
        place = {k: index.setdefault(tuple(ids[k]), len(index)) for k in wanted}
        places.append((example, place))
        pairs += [(place[c], place[r], margin, example["subset"], example["source"]) for c, r, margin in compared]
    texts = [list(ids) for ids in index]
    # If a text equals another or is its prefix (an answer may contain EOS), its last token remains as its completion.
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


def tokenizer_state(tokenizer) -> str:
    """Everything that determines the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = backend.to_str() if backend else f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())}"
    return f"{rules} {tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.chat_template}"
