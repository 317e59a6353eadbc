"""Token ids, groups of comparisons, over-long texts: `python -m pytest tests/test_tokens.py`. No network.

The tokenizer has no merges: one token per character, and one for EOS (and for BOS).
"""

from collections import Counter

import pytest
from conftest import ELEVEN, NINE, make_comparisons, make_tokenizer, refusal, with_template, write_jsonl

from minirm.data.chat import join
from minirm.data.prepare import prepare, prompt_key
from minirm.data.tokens import common_prefix, encode, tokenise


def tokenised(tokenizer, rows, separator="|", **options):
    """(groups, counts) of rows (prompt, chosen, rejected)."""
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


@pytest.mark.parametrize("separator", ["\n", "", " ", "\n\nAssistant: "])
def test_ids_are_those_of_the_whole_text_and_eos(separator):
    """Real merges cross the boundary between prompt and answer, so texts must be tokenised as a whole."""
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
def test_a_bos_in_the_text_is_not_doubled(name):
    """Chat templates write BOS into the text."""
    tokenizer = with_template(*TEMPLATES[name])
    a, bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "<s>", "</s>"))
    assert encode(tokenizer, ["<s>a"]) == [[bos, a, eos]]
    assert encode(tokenizer, ["<s>a</s>"]) == [[bos, a, eos]]
    assert encode(tokenizer, ["a<s><s>"]) == [([] if name == "nothing" else [bos]) + [a, bos, bos, eos]]


def test_an_eos_inside_a_text_is_kept():
    tokenizer = with_template("<s> $A")
    a, bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "<s>", "</s>"))
    assert encode(tokenizer, ["a</s>a</s>"]) == [[bos, a, eos, a, eos]]


def test_a_tokenizers_saved_truncation_and_padding_are_ignored(characters):
    """Many tokenizer.json files store the truncation and padding of their training run."""
    tokenizer = make_tokenizer(texts=["x"])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert encode(tokenizer, ["abcdefgh", "a"]) == encode(characters, ["abcdefgh", "a"])
    assert [len(ids) for ids in encode(tokenizer, ["abcdefgh", "a"])] == [9, 2]


@pytest.mark.parametrize(
    "rows, shared", [([[1, 2, 3], [1, 2, 4], [1, 2]], 2), ([[1], [2]], 0), ([[5, 6]], 2), ([[1, 9, 9], [1, 2], [1, 5, 5]], 1)]
)  # fmt: skip
def test_common_prefix(rows, shared):
    assert common_prefix(rows) == shared


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def test_comparisons_of_a_prompt_form_a_group_with_distinct_completions(characters):
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


def test_the_prefix_is_the_common_part_without_the_last_token(characters):
    (group,), _ = tokenised(characters, [("p", "same start a", "same start b")])
    assert characters.decode(group["prefix"]) == "p|same start "
    (group,), _ = tokenised(characters, [("p", "yes", "yes indeed")])
    assert [characters.decode(ids) for ids in (group["prefix"], *group["completions"])] == [
        "p|yes",
        "<|endoftext|>",
        " indeed<|endoftext|>",
    ]
    (group,), _ = tokenised(characters, [("p", "yes", "yes<|endoftext|>no")])  # continues the other text after its EOS
    assert [characters.decode(ids) for ids in (group["prefix"], *group["completions"])] == [
        "p|yes",
        "<|endoftext|>",
        "<|endoftext|>no<|endoftext|>",
    ]


def test_without_a_prompt_each_pair_is_its_own_group(characters):
    groups, _ = tokenised(characters, [("", "aa", "ab"), ("", "cc", "cd"), ("", "ab", "aa"), ("", "aa", "cc")])
    assert [texts_of(group, characters) for group in groups] == [
        [("aa<|endoftext|>", "ab<|endoftext|>"), ("ab<|endoftext|>", "aa<|endoftext|>")],
        [("cc<|endoftext|>", "cd<|endoftext|>")],
        [("aa<|endoftext|>", "cc<|endoftext|>")],
    ]
    assert groups[2]["prefix"] == []


def test_an_identical_evaluation_pair_is_one_completion(characters):
    (group,), counts = tokenised(characters, [("p", "aa", "aa")], keep="labelled")
    assert (len(group["completions"]), group["chosen"], group["rejected"]) == (1, [0], [0])
    assert counts["kept"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Over-long comparisons


def test_both_sides_lose_the_same_left_part_of_the_prompt():
    """0123456789|aaaa is BOS + 10 + 1 + 4 + EOS = 17 tokens. A limit of 14 cuts three tokens of the prompt on both sides."""
    tokenizer = with_template("<s> $A")
    (group,), counts = tokenised(tokenizer, [("0123456789", "aaaa", "bb")], max_length=14)
    assert texts_of(group, tokenizer) == [("<s>3456789|aaaa</s>", "<s>3456789|bb</s>")]
    assert (counts["kept"], counts["kept, prompt truncated"], counts["kept, answer truncated"]) == (1, 1, 0)


@pytest.mark.parametrize("template, kept", [("<s> $A", "<s>"), ("$A", "")])
def test_bos_separator_answer_and_eos_are_never_cut(template, kept):
    tokenizer = with_template(template)
    (group,), counts = tokenised(tokenizer, [("0123", "aaaa", "b")], max_length=len(kept) // 3 + 6)
    assert texts_of(group, tokenizer) == [(f"{kept}|aaaa</s>", f"{kept}|b</s>")]
    assert counts["kept, prompt truncated"] == 1


def test_tokens_that_start_every_text_are_never_cut():
    """GLM starts with two tokens, neither of which is its BOS. A chat template may write BOS into the prompt."""
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
    assert counts["kept, prompt truncated"] == 0


def test_shorter_comparisons_of_the_same_prompt_are_not_cut(characters):
    rows = [("0123", "a", "b"), ("0123", "aaaa", "b"), ("0123", "a", "cccc"), ("0123", "c", "b")]
    groups, counts = tokenised(characters, rows, max_length=8)
    eos = "<|endoftext|>"
    assert [texts_of(group, characters) for group in groups] == [
        [(f"0123|a{eos}", f"0123|b{eos}"), (f"0123|c{eos}", f"0123|b{eos}")],
        [(f"23|aaaa{eos}", f"23|b{eos}"), (f"23|a{eos}", f"23|cccc{eos}")],
    ]
    assert (counts["kept"], counts["kept, prompt truncated"], counts["prompts"]) == (4, 2, 1)


def test_an_answer_too_long_by_itself_is_dropped_in_training(characters):
    """|aaaa + EOS is 6 tokens, more than the limit of 5 even without the prompt."""
    groups, counts = tokenised(
        characters, [("0123", "aaaa", "b"), ("", "aaaaa", "b"), ("0123", "a", "b")], max_length=5
    )
    assert [texts_of(group, characters) for group in groups] == [[("23|a<|endoftext|>", "23|b<|endoftext|>")]]
    assert counts["dropped: answer alone longer than --max_length"] == 2
    assert (counts["kept"], counts["kept, prompt truncated"]) == (1, 1)


def test_an_evaluation_answer_too_long_by_itself_is_cut_before_its_eos():
    tokenizer = with_template("<s> $A")
    (group,), counts = tokenised(tokenizer, [("0123", "abcdef", "b")], max_length=6, keep="labelled")
    assert texts_of(group, tokenizer) == [("<s>|abc</s>", "<s>|b</s>")]
    assert (counts["kept"], counts["kept, prompt truncated"], counts["kept, answer truncated"]) == (1, 1, 1)
    (group,), counts = tokenised(tokenizer, [("", "abcdef", "abcdeg")], max_length=6, keep="labelled")
    assert texts_of(group, tokenizer) == [("<s>abcd</s>", "<s>abcd</s>")]  # a tie, which counts as wrong
    assert (counts["kept"], counts["kept, prompt truncated"], counts["kept, answer truncated"]) == (1, 0, 1)


def test_only_tokens_of_the_prompt_are_cut():
    """With real merges, the prompt's last token may merge with the answer and then belongs to the answer."""
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
def test_no_text_exceeds_the_limit_and_every_text_ends_in_one_eos(max_length, keep):
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


def test_overlong_drop_drops_and_counts(characters):
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
    wanted = "18 tokens exceed --max_length 17; raise --max_length, or use --overlong truncate or drop"
    assert message == f"{source}:2: {wanted}"
    data = prepare(characters, [source], [source], max_length=18, overlong="error", cache_dir=tmp_path)
    assert data.report["train"][0]["kept"] == 2
