"""From examples to groups of token ids: `python -m pytest tests/test_data.py`. No network; two tests start processes.

Tests that count tokens use a tokenizer without merges: one token per character, and one for EOS (and for BOS).
"""

import os
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import ROOT, make_comparisons, make_tokenizer, refusal, write_jsonl
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

import minirm.data.prepare
import minirm.data.tokens
from minirm.data.chat import join, render, set_chat_template
from minirm.data.prepare import hold_out, prepare, prompt_key, read_texts
from minirm.data.tokens import common_prefix, encode, tokenise
from minirm.files import whole_folder
from minirm.model import load_config
from minirm.rows import collate

NINE, ELEVEN = "a b c d e", "a b c d e f"  # five and six words


@pytest.fixture(scope="module")
def characters():
    """A tokenizer without merges."""
    return make_tokenizer(texts=["x"])


def with_template(template, eos="</s>", bos="<s>", more=None):
    """A tokenizer without merges that itself adds BOS or EOS: template "<s> $A </s>"."""
    tokenizer = make_tokenizer(eos=eos, bos=None if bos == eos else bos, pad=more, texts=["x"])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in {eos, bos, more} - {None}}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos, bos_token=bos
    )


def read(source, keep="worth"):
    """(examples, report) of a file."""
    report = {}
    return list(read_texts(str(source), make_tokenizer(), "|", report, keep)), report


def test_a_missing_evaluation_file_is_refused_before_anything_is_tokenised(characters, tmp_path, monkeypatch):
    monkeypatch.setattr(minirm.data.prepare, "tokenise", lambda *_, **__: pytest.fail("tokenised"))
    train = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(10)))
    message = refusal(prepare, characters, [train], [str(tmp_path / "none.jsonl")], cache_dir=tmp_path)
    assert message.startswith(f"{tmp_path}/none.jsonl: No such file")


@pytest.mark.parametrize(
    "rows, why",
    [
        ([], "0 comparisons read; no rows"),
        ([{"chosen": NINE, "rejected": NINE}] * 2, "2 comparisons read; 2 dropped: identical answers"),
        ([{"chosen": "too few", "rejected": NINE}], "1 comparisons read; 1 dropped: answer under 5 words"),
        ([{"chosen": ELEVEN, "rejected": NINE, "margin": 0}], "1 comparisons read; 1 dropped: tie"),
        ([{"chosen": ELEVEN * 9, "rejected": NINE}], "1 comparisons read; 1 dropped: answer alone longer than --max_length"),
        ([{"prompt": "p", "chosen": ELEVEN, "rejected": NINE}], "1 comparisons read; 1 held out"),
    ],
)  # fmt: skip
def test_nothing_left_is_refused_with_the_reasons(characters, tmp_path, rows, why):
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    other = [] if "held out" in why else [str(write_jsonl(tmp_path / "y.jsonl", make_comparisons(2)))]
    for _ in range(2):  # the second time from the cache
        message = refusal(prepare, characters, [source], other, max_length=50, cache_dir=tmp_path)
        assert message == f"{source}: nothing left to train on: {why}"


def test_nothing_left_to_evaluate_on_is_refused(characters, tmp_path):
    train = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(5)))
    ties = str(write_jsonl(tmp_path / "y.jsonl", [{"chosen": "a", "rejected": "b", "margin": 0}] * 3))
    message = refusal(prepare, characters, [train], [ties], cache_dir=tmp_path)
    assert message == f"{ties}: nothing left to eval on: 3 comparisons read; 3 dropped: tie"


@pytest.mark.parametrize("fraction", [0, 1.0, float("nan")])
def test_impossible_shares_are_refused(characters, tmp_path, fraction):
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(5)))
    assert refusal(prepare, characters, [source], cache_dir=tmp_path, eval_fraction=fraction).startswith(
        "--eval_fraction must "
    )


# ---------------------------------------------------------------------------------------------------------------------
# Filters

FILTERED = [
    {"prompt": "p", "chosen": NINE, "rejected": ELEVEN},
    {"prompt": "p", "chosen": ELEVEN, "rejected": ELEVEN},
    {"prompt": "p", "chosen": "one two three four", "rejected": ELEVEN},
    {"prompt": "p", "chosen": NINE, "rejected": "  one\ttwo\nthree  four "},
    {"prompt": "p", "chosen": NINE, "rejected": "one two three four five", "margin": 0.5},
    {"prompt": "p", "chosen": NINE, "rejected": ELEVEN, "margin": 0},
    {"prompt": "p", "chosen": "", "rejected": "", "margin": 1},
]


def test_filters_leave_out_ties_identical_pairs_and_answers_under_five_words(tmp_path):
    found, report = read(write_jsonl(tmp_path / "x.jsonl", FILTERED))
    assert [(e["prompt"], e["texts"], e["chosen"], e["rejected"], e["margin"]) for e in found] == [
        ("p", [f"p|{NINE}", f"p|{ELEVEN}"], (0,), (1,), (0.0,)),
        ("p", [f"p|{NINE}", "p|one two three four five"], (0,), (1,), (0.5,)),
    ]
    assert report == {
        "schema": "texts in chosen and rejected",
        "columns": ["prompt", "chosen", "rejected"],
        "not used": [],
        "special tokens written out in the text": 0,
        "read": 7,
        "dropped: identical answers": 2,
        "dropped: answer under 5 words": 2,
        "dropped: tie": 1,
    }


def test_a_file_to_be_measured_on_is_taken_whole_but_for_ties(tmp_path):
    found, report = read(write_jsonl(tmp_path / "x.jsonl", FILTERED), keep="labelled")
    assert len(found) == 6 and (report["read"], report["dropped: tie"]) == (7, 1)
    assert len(read(tmp_path / "x.jsonl", keep="all")[0]) == 7


def test_every_comparison_is_kept_or_counted_as_dropped(characters, tmp_path):
    """With --max_length 40, one answer of over 60 characters is too long by itself, and one prompt is truncated."""
    rows = [
        *FILTERED,
        {"prompt": "q", "chosen": NINE, "rejected": "x y z v " + "w" * 60},
        {"prompt": "p" * 60, "chosen": NINE, "rejected": ELEVEN},
        {"prompt": "r", "chosen": NINE, "rejected": NINE + "<|endoftext|>"},  # other texts, the same tokens
        {"prompt": "p" * 60, "chosen": ELEVEN, "rejected": ELEVEN + "<|endoftext|>"},  # the same, and too long
    ]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(characters, [source], [source], max_length=40, cache_dir=tmp_path)
    report = {k: v for k, v in data.report["train"][0].items() if k.startswith(("read", "dropped", "kept"))}
    assert report == {
        "read": 11,
        "dropped: tie": 1,
        "dropped: identical answers": 2,
        "dropped: answer under 5 words": 2,
        "dropped: same tokens": 2,
        "dropped: answer alone longer than --max_length": 1,
        "kept": 3,
        "kept, prompt cut": 1,
        "kept, answer cut": 0,
    }
    assert sum(n for k, n in report.items() if k.startswith("dropped")) + report["kept"] == report["read"]
    assert sum(data.train["pairs"]) == 3
    measured = data.report["eval"][0]
    assert (measured["read"], measured["kept"], measured["dropped: tie"]) == (11, 10, 1)
    assert (measured["kept, prompt cut"], measured["kept, answer cut"]) == (3, 1)
    assert measured["prompt also in the training data"] == 10  # 6 of "p", 2 of "ppp...", "q" and "r"
    assert max(len(g["prefix"]) + max(map(len, g["completions"])) for g in data.eval) == 40


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def tokenised(tokenizer, rows, separator="|", **options):
    """(groups, counts) of rows given as (prompt, chosen, rejected)."""
    about = {"chat": False, "chosen": [0], "rejected": [1], "margin": [0.0], "subset": "", "source": 0}
    prompts, counts = {}, [Counter()]
    for n, (prompt, *answers) in enumerate(rows, 1):
        texts = [join(prompt, answer, separator) for answer in answers]
        example = {"prompt": prompt, "texts": texts, "where": f"x:{n}", **about}
        prompts.setdefault(prompt_key(example), []).append(example)
    options = {"max_length": 1000, "overlong": "truncate", **options}
    return [group for group, _ in tokenise([*prompts.values()], tokenizer, counts, **options)], counts[0]


def texts_of(group, tokenizer):
    """[(chosen, rejected)] decoded."""
    texts = [tokenizer.decode(group["prefix"] + tail) for tail in group["completions"]]
    return [(texts[c], texts[r]) for c, r in zip(group["chosen"], group["rejected"])]


@pytest.mark.parametrize(
    "prompt, answer, text",
    [
        ("p", "a", "p|a"),
        ("p ", "a", "p a"),
        ("p\n", "a", "p\na"),
        ("p", " a", "p a"),
        ("p", "\ta", "p\ta"),
        ("p\u00a0", "a", "p\u00a0a"),
        ("", "a", "a"),
        ("p", "", "p"),
    ],
)
def test_the_separator_stands_between_unless_whitespace_does(prompt, answer, text):
    assert join(prompt, answer, "|") == text


@pytest.mark.parametrize("separator", ["\n", "", " ", "\n\nAssistant: "])
def test_ids_are_those_of_the_whole_text_and_eos(separator):
    """Real merges also cross the border between prompt and answer: nothing is tokenised in pieces."""
    tokenizer = make_tokenizer()
    rows = make_comparisons(40, per_prompt=2) + [{"prompt": "the go", "chosen": "od the bad", "rejected": "od answer"}]
    rows = [(r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    groups, _ = tokenised(tokenizer, rows, separator=separator)
    found = sorted(
        (group["prefix"] + group["completions"][c], group["prefix"] + group["completions"][r])
        for group in groups
        for c, r in zip(group["chosen"], group["rejected"])
    )
    ids = [[tokenizer(join(p, a, separator) + tokenizer.eos_token)["input_ids"] for a in (c, r)] for p, c, r in rows]
    assert found == sorted(map(tuple, ids))
    if separator == "":
        assert tokenizer("the good")["input_ids"] != tokenizer("the go")["input_ids"] + tokenizer("od")["input_ids"]


TEMPLATES = {
    "nothing": ("$A", "</s>", "<s>"),
    "bos": ("<s> $A", "</s>", "<s>"),
    "eos": ("$A </s>", "</s>", "<s>"),
    "both": ("<s> $A </s>", "</s>", "<s>"),
    "bos that is eos": ("</s> $A", "</s>", "</s>"),  # OPT
    "both, and the same": ("</s> $A </s>", "</s>", "</s>"),
}


@pytest.mark.parametrize("end", ["", "</s>", "</s></s>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_once_and_eos_once(name, end):
    template, eos, bos = TEMPLATES[name]
    tokenizer = with_template(template, eos, bos)
    a = tokenizer.convert_tokens_to_ids("a")
    start = [tokenizer.bos_token_id] if template.startswith(bos) else []
    for text, inner in (("aa", [a, a]), ("", [])):
        assert encode(tokenizer, [text + end]) == [start + inner + [tokenizer.eos_token_id]]
        assert encode(tokenizer, [text + end], eos=False) == [start + inner]


@pytest.mark.parametrize("name", ["bos", "both", "nothing"])
def test_a_bos_that_the_text_brings_along_is_not_doubled(name):
    """Chat templates write BOS into the text."""
    tokenizer = with_template(*TEMPLATES[name])
    a, bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "<s>", "</s>"))
    assert encode(tokenizer, ["<s>a"]) == [[bos, a, eos]]
    assert encode(tokenizer, ["<s>a</s>"]) == [[bos, a, eos]]
    assert encode(tokenizer, ["a<s><s>"]) == [([] if name == "nothing" else [bos]) + [a, bos, bos, eos]]


def test_an_eos_inside_of_a_text_stays():
    tokenizer = with_template("<s> $A")
    a, bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "<s>", "</s>"))
    assert encode(tokenizer, ["a</s>a</s>"]) == [[bos, a, eos, a, eos]]


def test_what_a_tokenizer_was_saved_with_does_not_cut_or_pad(characters):
    """Many tokenizer.json files store the truncation and padding of the run that made them."""
    tokenizer = make_tokenizer(texts=["x"])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert encode(tokenizer, ["abcdefgh", "a"]) == encode(characters, ["abcdefgh", "a"])
    assert [len(ids) for ids in encode(tokenizer, ["abcdefgh", "a"])] == [9, 2]


@pytest.mark.parametrize(
    "rows, shared", [([[1, 2, 3], [1, 2, 4], [1, 2]], 2), ([[1], [2]], 0), ([[5, 6]], 2), ([[1, 9, 9], [1, 2], [1, 5, 5]], 1)]
)  # fmt: skip
def test_the_common_prefix(rows, shared):
    assert common_prefix(rows) == shared


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_comparisons_of_a_prompt_form_a_group_whose_completions_are_kept_once(characters):
    """Three comparisons with one reference answer give one prefix and four completions, with the reference once."""
    rows = [("p", "good x", "bad y"), ("q", "o", "n"), ("p", "good x", "worse"), ("p", "best", "good x")]
    groups, counts = tokenised(characters, rows)
    assert [texts_of(group, characters) for group in groups] == [
        [
            ("p|good x<|endoftext|>", "p|bad y<|endoftext|>"),
            ("p|good x<|endoftext|>", "p|worse<|endoftext|>"),
            ("p|best<|endoftext|>", "p|good x<|endoftext|>"),
        ],
        [("q|o<|endoftext|>", "q|n<|endoftext|>")],
    ]
    first = groups[0]
    assert characters.decode(first["prefix"]) == "p|"
    assert [characters.decode(ids) for ids in first["completions"]] == [
        f"{a}<|endoftext|>" for a in ("good x", "bad y", "worse", "best")
    ]
    assert (first["chosen"], first["rejected"], first["pairs"]) == ([0, 0, 3], [1, 2, 0], 3)
    # prefix 2; completions 7 + 6 + 6 + 5
    assert first["shared_tokens"] == 2 + 24
    # and q: prefix 2, completions 2 + 2
    assert (counts["shared tokens"], counts["separate tokens"]) == (2 + 24 + 2 + 4, 4 * 2 + 24 + 2 * 2 + 4)
    assert (counts["kept"], counts["prompts"]) == (4, 2)


def test_the_prefix_goes_as_far_as_all_completions_agree_but_leaves_each_its_end(characters):
    (group,), _ = tokenised(characters, [("p", "same start a", "same start b")])
    assert characters.decode(group["prefix"]) == "p|same start "
    (group,), _ = tokenised(characters, [("p", "yes", "yes indeed")])
    assert [characters.decode(ids) for ids in (group["prefix"], *group["completions"])] == [
        "p|yes",
        "<|endoftext|>",
        " indeed<|endoftext|>",
    ]
    (group,), _ = tokenised(characters, [("p", "yes", "yes<|endoftext|>no")])  # begins with all of the other, EOS too
    assert [characters.decode(ids) for ids in (group["prefix"], *group["completions"])] == [
        "p|yes",
        "<|endoftext|>",
        "<|endoftext|>no<|endoftext|>",
    ]


def test_without_a_prompt_each_pair_stands_for_itself(characters):
    groups, _ = tokenised(characters, [("", "aa", "ab"), ("", "cc", "cd"), ("", "ab", "aa"), ("", "aa", "cc")])
    assert [texts_of(group, characters) for group in groups] == [
        [("aa<|endoftext|>", "ab<|endoftext|>"), ("ab<|endoftext|>", "aa<|endoftext|>")],
        [("cc<|endoftext|>", "cd<|endoftext|>")],
        [("aa<|endoftext|>", "cc<|endoftext|>")],
    ]
    assert groups[2]["prefix"] == []


def test_an_identical_pair_that_is_measured_is_one_completion(characters):
    (group,), counts = tokenised(characters, [("p", "aa", "aa")], keep="labelled")
    assert (len(group["completions"]), group["chosen"], group["rejected"]) == (1, [0], [0])
    assert counts["kept"] == 1


def test_margins_and_subsets_reach_the_groups(characters, tmp_path):
    rows = [
        {"prompt": "p", "chosen": NINE, "rejected": ELEVEN, "margin": 1.5, "subset": "x"},
        {"prompt": "p", "chosen": ELEVEN, "rejected": NINE},
    ]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(characters, [source], [source], cache_dir=tmp_path)
    for part in (data.train, data.eval):
        assert (part[0]["margin"], part[0]["subset"]) == ([1.5, 0.0], ["x", ""])


# ---------------------------------------------------------------------------------------------------------------------
# Over-long comparisons


def test_the_prompt_is_cut_from_the_left_and_both_sides_alike():
    """0123456789|aaaa is BOS + 10 + 1 + 4 + EOS = 17 tokens; 14 leave the longer side BOS, 789 to 3456789, answer, EOS."""
    tokenizer = with_template("<s> $A")
    (group,), counts = tokenised(tokenizer, [("0123456789", "aaaa", "bb")], max_length=14)
    assert texts_of(group, tokenizer) == [("<s>3456789|aaaa</s>", "<s>3456789|bb</s>")]
    assert (counts["kept"], counts["kept, prompt cut"], counts["kept, answer cut"]) == (1, 1, 0)


@pytest.mark.parametrize("template, kept", [("<s> $A", "<s>"), ("$A", "")])
def test_all_of_the_prompt_may_go_but_neither_bos_nor_separator_answer_or_eos(template, kept):
    tokenizer = with_template(template)
    (group,), counts = tokenised(tokenizer, [("0123", "aaaa", "b")], max_length=len(kept) // 3 + 6)
    assert texts_of(group, tokenizer) == [(f"{kept}|aaaa</s>", f"{kept}|b</s>")]
    assert counts["kept, prompt cut"] == 1


def test_whatever_a_tokenizer_puts_before_every_text_stays():
    """GLM has two tokens there, neither of them its BOS; a chat template may put BOS into the prompt."""
    tokenizer = with_template("<s> </s> $A", eos="<e>", bos="<s>", more="</s>")
    tokenizer.bos_token = None
    (group,), _ = tokenised(tokenizer, [("0123456789", "aaaa", "bb")], max_length=12)
    assert texts_of(group, tokenizer) == [("<s></s>6789|aaaa<e>", "<s></s>6789|bb<e>")]
    tokenizer = with_template("$A")
    (group,), _ = tokenised(tokenizer, [("<s>0123456789", "aaaa", "bb")], max_length=11)
    assert texts_of(group, tokenizer) == [("<s>6789|aaaa</s>", "<s>6789|bb</s>")]


def test_a_comparison_that_just_fits_is_not_cut(characters):
    (group,), counts = tokenised(characters, [("0123", "aaaa", "b")], max_length=10)
    assert texts_of(group, characters) == [("0123|aaaa<|endoftext|>", "0123|b<|endoftext|>")]
    assert counts["kept, prompt cut"] == 0


def test_other_comparisons_of_the_prompt_stay_whole(characters):
    rows = [("0123", "a", "b"), ("0123", "aaaa", "b"), ("0123", "a", "cccc"), ("0123", "c", "b")]
    groups, counts = tokenised(characters, rows, max_length=8)
    eos = "<|endoftext|>"
    assert [texts_of(group, characters) for group in groups] == [
        [(f"0123|a{eos}", f"0123|b{eos}"), (f"0123|c{eos}", f"0123|b{eos}")],
        [(f"23|aaaa{eos}", f"23|b{eos}"), (f"23|a{eos}", f"23|cccc{eos}")],
    ]
    assert (counts["kept"], counts["kept, prompt cut"], counts["prompts"]) == (4, 2, 1)


def test_an_answer_too_long_by_itself_is_dropped_in_training(characters):
    """|aaaa + EOS is 6 tokens; at 5 there is no prompt left to cut."""
    groups, counts = tokenised(
        characters, [("0123", "aaaa", "b"), ("", "aaaaa", "b"), ("0123", "a", "b")], max_length=5
    )
    assert [texts_of(group, characters) for group in groups] == [[("23|a<|endoftext|>", "23|b<|endoftext|>")]]
    assert counts["dropped: answer alone longer than --max_length"] == 2
    assert (counts["kept"], counts["kept, prompt cut"]) == (1, 1)


def test_an_answer_too_long_by_itself_is_cut_before_its_eos_where_it_is_measured():
    tokenizer = with_template("<s> $A")
    (group,), counts = tokenised(tokenizer, [("0123", "abcdef", "b")], max_length=6, keep="labelled")
    assert texts_of(group, tokenizer) == [("<s>|abc</s>", "<s>|b</s>")]
    assert (counts["kept"], counts["kept, prompt cut"], counts["kept, answer cut"]) == (1, 1, 1)
    (group,), counts = tokenised(tokenizer, [("", "abcdef", "abcdeg")], max_length=6, keep="labelled")
    assert texts_of(group, tokenizer) == [("<s>abcd</s>", "<s>abcd</s>")]  # a tie, which counts as wrong
    assert (counts["kept"], counts["kept, prompt cut"], counts["kept, answer cut"]) == (1, 0, 1)


def test_a_cut_ends_where_the_tokens_stop_being_those_of_the_prompt():
    """With real merges, the prompt's last token may merge with the answer; it then belongs to the answer."""
    tokenizer = make_tokenizer()
    whole = tokenizer("the good")["input_ids"]
    assert whole != tokenizer("the go")["input_ids"] + tokenizer("od")["input_ids"]
    for max_length in range(4, 12):
        groups, counts = tokenised(
            tokenizer, [("bad bad the go", "od clear", "od wrong")], separator="", max_length=max_length
        )
        for chosen, rejected in [pair for group in groups for pair in texts_of(group, tokenizer)]:
            assert chosen.endswith("od clear<|endoftext|>") and rejected.endswith("od wrong<|endoftext|>")
            assert chosen[: -len("clear<|endoftext|>")] == rejected[: -len("wrong<|endoftext|>")]
        assert counts["kept"] + counts["dropped: answer alone longer than --max_length"] == 1


@pytest.mark.parametrize("keep", ["worth", "labelled"])
@pytest.mark.parametrize("max_length", range(1, 40, 3))
def test_nothing_is_ever_longer_than_the_limit_and_everything_ends_in_one_eos(max_length, keep):
    tokenizer = with_template("<s> $A </s>")
    rows = [(r["prompt"][:20], r["chosen"][:15], r["rejected"][:15]) for r in make_comparisons(30, per_prompt=3)]
    groups, counts = tokenised(tokenizer, rows, max_length=max_length, keep=keep)
    texts = [group["prefix"] + tail for group in groups for tail in group["completions"]]
    assert all(len(ids) <= max_length and ids[-1] == tokenizer.eos_token_id for ids in texts)
    assert all(ids.count(tokenizer.eos_token_id) == 1 for ids in texts)
    assert all(ids[0] == tokenizer.bos_token_id for ids in texts if max_length > 1)
    dropped = sum(n for why, n in counts.items() if why.startswith("dropped"))
    assert counts["kept"] + dropped == 30 and (dropped == 0 or keep == "worth")
    assert sum(group["pairs"] for group in groups) == counts["kept"]


def test_overlong_drop_leaves_them_out_and_counts_them(characters):
    rows = [("0123", "aaaa", "b"), ("0123", "a", "b"), ("0123", "b", "aaaa")]
    groups, counts = tokenised(characters, rows, max_length=9, overlong="drop")
    assert [texts_of(group, characters) for group in groups] == [[("0123|a<|endoftext|>", "0123|b<|endoftext|>")]]
    assert (counts["kept"], counts["dropped: longer than --max_length"]) == (1, 2)


def test_overlong_error_names_file_and_line(characters, tmp_path):
    rows = [
        {"prompt": "0123", "chosen": NINE, "rejected": ELEVEN},
        {"prompt": "01234", "chosen": NINE, "rejected": ELEVEN},
    ]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    message = refusal(prepare, characters, [source], [source], max_length=17, overlong="error", cache_dir=tmp_path)
    wanted = "18 tokens, --max_length is 17; raise --max_length, or choose --overlong truncate or drop"
    assert message == f"{source}:2: {wanted}"
    data = prepare(characters, [source], [source], max_length=18, overlong="error", cache_dir=tmp_path)
    assert data.report["train"][0]["kept"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates, in the shapes that published models have


class Chat(NamedTuple):
    template: str
    end: str  # the token at which the reward of an answer is read
    rendered: str  # a question "hi" and an answer "yo"
    bos: int = 0  # how often BOS stands in it


CHATS = {
    "ChatML": Chat(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "ChatML with a system prompt of its own, over several lines": Chat(
        "{%- if messages[0].role != 'system' %}\n    {{- '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "<|im_end|>",
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "Llama 3": Chat(
        "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        "<s><|start|>user<|stop|>\n\nhi<|eot_id|><|start|>assistant<|stop|>\n\nyo<|eot_id|>",
        bos=1,
    ),
    "Llama 2": Chat(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>[INST] hi [/INST] yo </s>",
        bos=1,
    ),
    "Zephyr": Chat(
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\\n' + m.content + eos_token }}\n"
        "{% else %}\n{{ '<|' + m.role + '|>\\n'  + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
        "<|user|>\nhi</s>\n<|assistant|>\nyo</s>",
    ),
    "Gemma, which refuses a system role and two questions in a row": Chat(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
        "alternate') }}{% endif %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>",
        bos=1,
    ),
    "EOS behind the last end of a turn": Chat(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "</s>",
        "<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n</s>",
    ),
    "no end of a turn": Chat(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}\n",
        "</s>",
        "user: hi\nassistant: yo\n</s>",
    ),
    "line breaks at both ends": Chat(
        "\n{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n\n{% if add_generation_prompt %}\nme:\n{% endif %}  \n",
        "</s>",
        "\nuser: hi\nassistant: yo\n\n  </s>",
    ),
    "blocks that eat the whitespace around them": Chat(
        "{%- for m in messages -%}\n  {{- '<|im_start|>' ~ m.role ~ '\\n' -}}\n  {{- m.content -}}\n  {{- '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n{%- if add_generation_prompt -%}\n  {{- '<|im_start|>assistant\\n' -}}\n{%- endif -%}\n",
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "macros and a namespace": Chat(
        "{% macro turn(m, n) %}{{ '<|im_start|>' + m.role + n | string + '\\n' + m.content + '<|im_end|>' }}{% endmacro %}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m, ns.n) }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + ns.n | string }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user1\nhi<|im_end|>\n\n<|im_start|>assistant2\nyo<|im_end|>",
    ),
    "what is generated in a block": Chat(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}\n<|im_start|>{% endif %}",
        "<|im_end|>",
        "<|im_start|>hi<|im_end|>\nyo<|im_end|>",
    ),
}  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
LONG = [*TALK, {"role": "user", "content": "and\nthen? "}, {"role": "assistant", "content": "nothing more"}]


def chat_tokenizer(name, template="<s> $A"):
    """A tokenizer without merges that itself adds BOS, with one of the templates above."""
    tokenizer = with_template(template)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.chat_template = CHATS[name].template
    return tokenizer


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_ends_at_the_token_that_is_scored_and_has_bos_once(name, tmp_path):
    chat, tokenizer = CHATS[name], chat_tokenizer(name)
    set_chat_template(tokenizer)
    end = tokenizer.convert_tokens_to_ids(chat.end)
    assert render(tokenizer, TALK, "x:1") == chat.rendered
    for messages in (TALK, LONG):
        (ids,) = encode(tokenizer, [render(tokenizer, messages, "x:1")], chat=True)
        assert ids[-1] == end != ids[-2] and ids.count(tokenizer.bos_token_id) == chat.bos
        assert ids[:1] == [tokenizer.bos_token_id] or not chat.bos
        assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
        tokenizer.save_pretrained(tmp_path)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert saved.apply_chat_template(messages, return_dict=False) == ids
        set_chat_template(saved)
        assert saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", CHATS)
def test_prompts_for_generation_stay_as_they_are(name):
    before, after = chat_tokenizer(name), chat_tokenizer(name)
    set_chat_template(after)
    once = after.chat_template
    for messages in (TALK[:1], LONG[:3]):
        options = {"tokenize": False, "add_generation_prompt": True}
        assert after.apply_chat_template(messages, **options) == before.apply_chat_template(messages, **options)
    set_chat_template(after)
    assert after.chat_template == once


def test_a_template_that_already_ends_where_it_should_is_left_alone():
    for name, kept in (("Llama 2", True), ("Llama 3", True), ("ChatML", False), ("no end of a turn", False)):
        tokenizer = chat_tokenizer(name)
        set_chat_template(tokenizer)
        assert (tokenizer.chat_template == CHATS[name].template) == kept


@pytest.mark.parametrize("name", CHATS)
def test_an_over_long_conversation_loses_its_left_end_but_neither_bos_nor_anything_of_the_answer(name, tmp_path):
    """From one token up to the whole question "hello" is cut; what remains is BOS and the end of the text."""
    chat, tokenizer = CHATS[name], chat_tokenizer(name)
    set_chat_template(tokenizer)
    ask = [{"role": "user", "content": "hello"}]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (NINE, ELEVEN))
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": ask, "chosen": chosen, "rejected": rejected}]))
    whole = [encode(tokenizer, [render(tokenizer, ask + side, "")], chat=True)[0] for side in (chosen, rejected)]
    longest, bos = max(map(len, whole)), [tokenizer.bos_token_id] * chat.bos
    for too_much in (-3, 0, 1, 5):
        data = prepare(tokenizer, [path], [path], max_length=longest - too_much, cache_dir=tmp_path)
        cut = max(0, too_much)
        (group,) = data.train
        found = [group["prefix"] + ids for ids in group["completions"]]
        assert found == [bos + ids[len(bos) + cut :] for ids in whole]
        assert data.report["train"][0]["kept, prompt cut"] == (cut > 0)
        assert tokenizer.decode(found[0]).endswith(NINE + tokenizer.decode(whole[0]).split(NINE)[1])


def test_messages_without_a_template_are_refused_with_what_to_do(characters, tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": TALK, "chosen": NINE, "rejected": ELEVEN}]))
    assert refusal(prepare, characters, [path], cache_dir=tmp_path) == (
        f"{path}:1: messages, but the tokenizer has no chat template; give one with --chat_template FILE, or use a model "
        "that has been trained to chat"
    )


def test_messages_that_the_template_refuses_are_named(tmp_path):
    name = "Gemma, which refuses a system role and two questions in a row"
    tokenizer = chat_tokenizer(name)
    set_chat_template(tokenizer)
    system, twice = [{"role": "system", "content": "Be nice."}, *TALK], [TALK[0], *TALK]
    answer = [{"role": "assistant", "content": f"not {NINE}"}]
    for messages, why in ((system, "no system role"), (twice, "roles must alternate")):
        rows = [{"chosen": sides, "rejected": sides[:-1] + answer} for sides in (LONG, messages)]
        rows[0]["chosen"] = [*LONG[:3], {"role": "assistant", "content": NINE}]
        rows[1]["chosen"] = [*messages[:-1], {"role": "assistant", "content": NINE}]
        path = str(write_jsonl(tmp_path / "x.jsonl", rows))
        message = refusal(read_texts, path, tokenizer, "\n", {})
        assert message == f"{path}:2: the chat template refuses these messages ({why})"


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "not a Jinja file that can be read (No such file or directory"),
        (b"\xff", "not a Jinja file that can be read ('utf-8' codec can't decode"),
        (b"{% for m in messages %}", "cannot render a question and an answer (Unexpected end of template"),
        (b"{{ messages[5].content }}", "cannot render a question and an answer ("),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(characters, tmp_path, content, why):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    tokenizer = make_tokenizer(texts=["x"])
    assert refusal(set_chat_template, tokenizer, str(path)).startswith(f"--chat_template {path}: {why}")


# What the tokenizer adds by itself, its EOS, BOS and pad token, and its padding side
SORTS = {
    "adds nothing": ("$A", "</s>", "<s>", None, "right"),
    "adds BOS": ("<s> $A", "</s>", "<s>", None, "right"),
    "adds BOS and EOS": ("<s> $A </s>", "</s>", "<s>", None, "right"),
    "BOS is EOS": ("</s> $A", "</s>", "</s>", None, "right"),
    "pad is EOS": ("<s> $A", "</s>", "<s>", "</s>", "right"),
    "pads on the left": ("<s> $A", "</s>", "<s>", "<p>", "left"),
}


@pytest.mark.parametrize("kind", ["strings", "ChatML", "Llama 3", "Llama 2", "no end of a turn"])
@pytest.mark.parametrize("sort", SORTS)
def test_the_scored_token_is_the_end_of_the_answer_whatever_the_tokenizer_and_the_length(sort, kind, tmp_path):
    """Texts are short, exactly --max_length long, or cut, with EOS in prompt and answer. Checked by id in the batch."""
    template, eos, bos, pad, side = SORTS[sort]
    tokenizer = make_tokenizer(eos=eos, bos=None if bos == eos else bos, pad=None if pad == eos else pad, texts=["x"])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {eos, bos}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos, bos_token=bos, pad_token=pad, padding_side=side
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    config.save_pretrained(tmp_path / "model")
    if kind != "strings":
        tokenizer.chat_template = CHATS[kind].template
    tokenizer.save_pretrained(tmp_path / "model")
    _, tokenizer = load_config(str(tmp_path / "model"))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)

    prompt, chosen, rejected = "because </s> so?", NINE, f"a b </s> c d f{' g' * 20}"
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if kind != "strings":
        row["prompt"] = [{"role": "user", "content": prompt}]
    path = str(write_jsonl(tmp_path / "x.jsonl", [row]))
    end = tokenizer.convert_tokens_to_ids("</s>" if kind == "strings" else CHATS[kind].end)
    longest = None
    for cut in (-100, 0, 4):
        data = prepare(tokenizer, [path], [path], max_length=(longest or 900) - cut, cache_dir=tmp_path)
        longest = longest or data.report["train"][0]["longest"]
        batch = collate([data.train[0]], row_layout="separate", pad_id=tokenizer.pad_token_id, row_limit=9999)
        assert data.report["train"][0]["kept, prompt cut"] == (cut > 0)
        for row_of, answer, scored in zip(batch.input_ids, (chosen, rejected), batch.places[:, -1]):
            place = int(scored) % batch.input_ids.shape[1]
            assert row_of[place] == end and (row_of[place + 1 :] == tokenizer.pad_token_id).all()
            text = row_of[: place + 1].tolist()
            assert tokenizer.decode(text[:-1]).rstrip().endswith(answer)
            assert text[-2] != end
            adds = template.startswith(bos) if kind == "strings" else CHATS[kind].bos
            assert not adds or text[0] == tokenizer.bos_token_id != text[1]


# ---------------------------------------------------------------------------------------------------------------------
# Held-out prompts


def prompts_of(part, tokenizer):
    return {tokenizer.decode(group["prefix"] + group["completions"][0]).split("|")[0] for group in part}


def test_whole_prompts_are_held_out_and_never_stand_on_both_sides(characters, tmp_path):
    rows = make_comparisons(200, per_prompt=4)  # 50 prompts
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    splits = []
    for seed in (0, 0, 1):
        data = prepare(characters, [source], eval_fraction=0.1, seed=seed, separator="|", cache_dir=tmp_path)
        train, held_out = (prompts_of(part, characters) for part in (data.train, data.eval))
        assert (len(train), len(held_out)) == (45, 5)
        assert not train & held_out
        assert (sum(data.train["pairs"]), sum(data.eval["pairs"])) == (180, 20)
        assert (data.report["train"][0]["read"], data.report["train"][0]["held out"]) == (200, 20)
        assert data.report["eval"][0]["read"] == 20
        splits.append(held_out)
    assert splits[0] == splits[1] != splits[2]


def test_held_out_prompts_do_not_depend_on_the_order_of_the_file():
    keys = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    first = hold_out(keys.repeat(2), 0.05, seed=0)
    assert len(keys.repeat(2)[first].unique()) == 5 and first.sum() == 10
    again = hold_out(keys.flip(0), 0.05, seed=0)
    assert set(keys.flip(0)[again].tolist()) == set(keys.repeat(2)[first].tolist())


@pytest.mark.parametrize(
    "count, fraction, held_out", [(2, 0.05, 1), (9, 0.05, 1), (100, 0.05, 5), (30, 0.1, 3), (1000, 0.001, 1)]
)
def test_at_least_one_prompt_is_held_out(count, fraction, held_out):
    assert hold_out(torch.arange(count), fraction, seed=0).sum() == held_out


def test_pairs_without_a_prompt_are_held_out_one_by_one_with_their_reverse(characters, tmp_path):
    rows = [{"chosen": f"{i} {NINE}", "rejected": f"{i} {ELEVEN}"} for i in range(20)]
    rows += [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(characters, [source], eval_fraction=0.1, cache_dir=tmp_path)
    assert (len(data.train), len(data.eval)) == (18, 2)
    assert data.train["pairs"] == [2] * 18 and data.eval["pairs"] == [2] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Several files

TEXTS = {"prompt": "p", "chosen": NINE, "rejected": ELEVEN}
STRENGTH = {"prompt": "p", "response_1": NINE, "response_2": "e d c b a", "preference_strength": -2}


def several(tmp_path):
    """Files a (prompts p, q; texts), b (prompts p, r; HelpSteer, one tie) and c (a ranked list of r)."""
    strengths = [STRENGTH, STRENGTH | {"prompt": "r"}, STRENGTH | {"preference_strength": 0}]
    ranked = [{"prompt": "r", "completions": [ELEVEN, NINE, "too short"]}]
    files = {"a": [TEXTS, TEXTS | {"prompt": "q"}], "b": strengths, "c": ranked}
    return [str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()]


def test_each_comparison_of_several_files_carries_the_number_of_its_own(characters, tmp_path):
    """A prompt in two files forms one group, and an answer in both is kept once."""
    a, b, c = several(tmp_path)
    data = prepare(characters, [a, b], [c, a], separator="|", cache_dir=tmp_path)
    assert [group["source"] for group in data.train] == [[0, 1], [0], [1]]
    assert [group["margin"] for group in data.train] == [[0.0, 2.0], [0.0], [2.0]]
    assert [len(group["completions"]) for group in data.train] == [3, 2, 2]
    assert [group["source"] for group in data.eval] == [[0, 0, 0], [1], [1]]
    counts = [
        {k: row.get(k, 0) for k in ("source", "schema", "read", "kept", "dropped: tie", "prompts")}
        for part in ("train", "eval")
        for row in data.report[part]
    ]
    assert [tuple(row.values()) for row in counts] == [
        (a, "texts in chosen and rejected", 2, 2, 0, 2),
        (b, "HelpSteer", 3, 2, 1, 1),
        (c, "ranked completions", 3, 3, 0, 1),
        (a, "texts in chosen and rejected", 2, 2, 0, 2),
    ]
    assert [row["prompt also in the training data"] for row in data.report["eval"]] == [3, 2]
    assert minirm.data.prepare.totals(data.report["train"])["kept"] == 4 == sum(data.train["pairs"])


def test_held_out_comparisons_of_several_files_are_counted_for_each(characters, tmp_path):
    rows = make_comparisons(40)
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate((rows[:10], rows[10:]))]
    data = prepare(characters, files, eval_fraction=0.2, cache_dir=tmp_path)
    moved = [row["held out"] for row in data.report["train"]]
    assert sum(moved) == 8 and [row["read"] for row in data.report["train"]] == [10, 30]
    assert [row["read"] for row in data.report["eval"]] == [row.get("kept", 0) for row in data.report["eval"]] == moved
    assert Counter(s for group in data.eval for s in group["source"]) == Counter(dict(enumerate(moved)))
    assert [row["source"] for row in data.report["eval"]] == files


def test_the_order_of_files_is_part_of_what_was_prepared(characters, tmp_path):
    a, b, _ = several(tmp_path)
    first, second = (prepare(characters, files, [a], cache_dir=tmp_path) for files in ([a, b], [b, a]))
    assert first.sources["train"] == second.sources["train"][::-1] and len(set(first.sources["train"])) == 2
    assert [group["source"] for group in second.train] == [[0, 1], [0], [1]]
    assert [row["source"] for row in second.report["train"]] == [b, a]


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def counting(monkeypatch):
    """A list that grows by one for every part that is tokenised."""
    calls = []
    original = minirm.data.prepare.tokenise

    def tokenise(*arguments, **options):
        calls.append(1)
        yield from original(*arguments, **options)

    monkeypatch.setattr(minirm.data.prepare, "tokenise", tokenise)
    return calls


def test_a_second_call_does_not_tokenise_again_and_gives_the_same(counting, tmp_path):
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(20)))
    first = prepare(make_tokenizer(), [source], cache_dir=tmp_path)
    assert len(counting) == 2
    second = prepare(make_tokenizer(), [source], cache_dir=tmp_path)
    assert len(counting) == 2
    assert first.report == second.report
    assert [first.train[:], first.eval[:]] == [second.train[:], second.eval[:]]


@pytest.mark.parametrize(
    "change",
    [
        {"separator": " "},
        {"max_length": 40},
        {"overlong": "drop"},
        {"seed": 1},
        {"eval_fraction": 0.2},
        {"eval": True},
        {"tokenizer": make_tokenizer(texts=["other words"])},
        {"tokenizer": make_tokenizer(bos="<s>")},
        {"tokenizer": with_template("<s> $A")},
        {"tokenizer": with_template("$A")},
        {"file": True},
    ],
    ids=str,
)
def test_what_changes_the_result_is_tokenised_anew(counting, tmp_path, change):
    path = write_jsonl(tmp_path / "x.jsonl", make_comparisons(20))
    prepare(make_tokenizer(), [str(path)], cache_dir=tmp_path)
    options = dict(change)
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    if options.pop("file", False):  # as long as before, and as old
        before = path.stat()
        path.write_text(path.read_text().replace("the", "THE"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    evaluation = [str(path)] if options.pop("eval", False) else []
    prepare(tokenizer, [str(path)], evaluation, cache_dir=tmp_path, **options)
    assert len(counting) == 4


def test_a_changed_folder_of_files_is_read_anew(characters, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", make_comparisons(10))
    assert prepare(characters, [str(folder)], cache_dir=tmp_path).report["train"][0]["read"] == 10
    write_jsonl(folder / "train.jsonl", make_comparisons(12))
    assert prepare(characters, [str(folder)], cache_dir=tmp_path).report["train"][0]["read"] == 12


def test_a_run_that_stops_half_way_leaves_nothing_that_is_used(characters, tmp_path, monkeypatch):
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(20)))
    original, calls = minirm.data.tokens.to_group, []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(minirm.data.tokens, "to_group", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(characters, [source], cache_dir=tmp_path)
    assert list((tmp_path / "minirm").iterdir()) == []
    monkeypatch.setattr(minirm.data.tokens, "to_group", original)
    assert len(prepare(characters, [source], cache_dir=tmp_path).train) == 19


def test_a_run_that_is_killed_half_way_leaves_nothing_that_is_used(characters, tmp_path):
    """A killed process cleans up nothing, and another may get its process id, in a container nearly always."""
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(20)))
    script = f"""
import os, signal, minirm.data.prepare, minirm.data.tokens
from conftest import make_tokenizer
original, own = minirm.data.tokens.to_group, os.getpid()
def stops(members, counts, every):
    if counts[0]["kept"] == 10:
        os.kill(own, signal.SIGKILL)
    return original(members, counts, every)
minirm.data.tokens.to_group = stops
os.getpid = lambda: {os.getpid()}
minirm.data.prepare.prepare(make_tokenizer(texts=["x"]), [{source!r}], cache_dir={str(tmp_path)!r})
"""
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == -9
    left = list((tmp_path / "minirm").iterdir())
    assert len(left) == 1 and "." in left[0].name  # it was on its way
    assert len(prepare(characters, [source], cache_dir=tmp_path).train) == 19
    (left,) = (tmp_path / "minirm").iterdir()  # what the killed process left is swept
    assert "." not in left.name


def test_what_a_living_process_is_making_is_not_swept(tmp_path):
    with whole_folder(tmp_path / "a") as mine:
        with whole_folder(tmp_path / "b"):
            assert mine.is_dir() and len(list(tmp_path.glob("*.partial"))) == 2
        (mine / "x").touch()
    assert (tmp_path / "a" / "x").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_two_processes_at_once_end_with_the_same(tmp_path):
    """The slower process finds the folder in place when it tries to rename its own."""
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(20)))
    script = f"""
import os, sys, time, minirm.data.prepare
from pathlib import Path
from conftest import make_tokenizer
original, here = minirm.data.prepare.write_groups, Path({str(tmp_path)!r})
def together(*arguments):  # both have looked for the cache and found none
    (here / sys.argv[1]).touch()
    while not ((here / "a").exists() and (here / "b").exists()):
        time.sleep(0.01)
    return original(*arguments)
minirm.data.prepare.write_groups = together
data = minirm.data.prepare.prepare(make_tokenizer(texts=["x"]), [{source!r}], cache_dir=here)
print(len(data.train), len(data.eval), sum(map(sum, data.train["prefix"])), data.report["train"][0]["kept"])
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, name],
            cwd=ROOT / "tests",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    out = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert out[0] == out[1] and out[0].split()[:2] == ["19", "1"]
    (folder,) = (tmp_path / "minirm").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["eval.arrow", "report.json", "train.arrow"]
