"""Preparing data: filters, held-out prompts, several files, the cache. Run: pytest tests/test_prepare.py

No network; two tests start processes. Tests that count tokens use a tokenizer without merges: one token per character,
and one for EOS.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ELEVEN, NINE, ROOT, make_comparisons, make_tokenizer, refusal, with_template, write_jsonl

import minirm.data.prepare
import minirm.data.tokens
from minirm.data.prepare import hold_out, prepare, read_texts


def read(source, keep="worth"):
    """(examples, report) of a file."""
    report = {}
    return list(read_texts(str(source), make_tokenizer(), "|", report, keep)), report


def test_a_missing_evaluation_file_is_refused_before_tokenising(characters, tmp_path, monkeypatch):
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
def test_data_of_which_nothing_is_left_is_refused_with_the_reasons(characters, tmp_path, rows, why):
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    other = [] if "held out" in why else [str(write_jsonl(tmp_path / "y.jsonl", make_comparisons(2)))]
    for _ in range(2):  # the second call reads the cache
        message = refusal(prepare, characters, [source], other, max_length=50, cache_dir=tmp_path)
        assert message == f"{source}: nothing left to train on: {why}"


def test_nothing_left_to_evaluate_on_is_refused(characters, tmp_path):
    train = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(5)))
    ties = str(write_jsonl(tmp_path / "y.jsonl", [{"chosen": "a", "rejected": "b", "margin": 0}] * 3))
    message = refusal(prepare, characters, [train], [ties], cache_dir=tmp_path)
    assert message == f"{ties}: nothing left to evaluate on: 3 comparisons read; 3 dropped: tie"


@pytest.mark.parametrize("fraction", [0, 1.0, float("nan")])
def test_impossible_eval_fractions_are_refused(characters, tmp_path, fraction):
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


def test_filters_drop_ties_identical_pairs_and_answers_under_five_words(tmp_path):
    found, report = read(write_jsonl(tmp_path / "x.jsonl", FILTERED))
    assert [(e["prompt"], e["texts"], e["chosen"], e["rejected"], e["margin"]) for e in found] == [
        ("p", [f"p|{NINE}", f"p|{ELEVEN}"], (0,), (1,), (0.0,)),
        ("p", [f"p|{NINE}", "p|one two three four five"], (0,), (1,), (0.5,)),
    ]
    assert report == {
        "schema": "texts in chosen and rejected", "columns": ["prompt", "chosen", "rejected"], "not used": [],
        "special tokens in the text": 0, "read": 7,
        "dropped: identical answers": 2, "dropped: answer under 5 words": 2, "dropped: tie": 1,
    }  # fmt: skip


def test_evaluation_files_lose_only_their_ties(tmp_path):
    found, report = read(write_jsonl(tmp_path / "x.jsonl", FILTERED), keep="labelled")
    assert len(found) == 6 and (report["read"], report["dropped: tie"]) == (7, 1)
    assert len(read(tmp_path / "x.jsonl", keep="all")[0]) == 7


def test_every_comparison_is_kept_or_counted_as_dropped(characters, tmp_path):
    """With --max_length 40, an answer of over 60 characters is too long by itself, and a prompt of 60 is truncated."""
    rows = [
        *FILTERED,
        {"prompt": "q", "chosen": NINE, "rejected": "x y z v " + "w" * 60},
        {"prompt": "p" * 60, "chosen": NINE, "rejected": ELEVEN},
        {"prompt": "r", "chosen": NINE, "rejected": NINE + "<|endoftext|>"},  # different texts with equal tokens
        {"prompt": "p" * 60, "chosen": ELEVEN, "rejected": ELEVEN + "<|endoftext|>"},  # the same, but too long
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
        "kept, prompt truncated": 1,
        "kept, answer truncated": 0,
    }
    assert sum(n for k, n in report.items() if k.startswith("dropped")) + report["kept"] == report["read"]
    assert sum(data.train["pairs"]) == 3
    measured = data.report["eval"][0]
    assert (measured["read"], measured["kept"], measured["dropped: tie"]) == (11, 10, 1)
    assert (measured["kept, prompt truncated"], measured["kept, answer truncated"]) == (3, 1)
    assert measured["prompt also in the training data"] == 10  # 6 of "p", 2 of "ppp...", "q" and "r"
    assert max(len(g["prefix"]) + max(map(len, g["completions"])) for g in data.eval) == 40


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
# Held-out prompts


def prompts_of(part, tokenizer):
    return {tokenizer.decode(group["prefix"] + group["completions"][0]).split("|")[0] for group in part}


def test_whole_prompts_are_held_out_and_never_in_both_splits(characters, tmp_path):
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
    """Files a (texts for prompts p and q), b (HelpSteer for p and r, one tie) and c (a ranked list for r)."""
    strengths = [STRENGTH, STRENGTH | {"prompt": "r"}, STRENGTH | {"preference_strength": 0}]
    ranked = [{"prompt": "r", "completions": [ELEVEN, NINE, "too short"]}]
    files = {"a": [TEXTS, TEXTS | {"prompt": "q"}], "b": strengths, "c": ranked}
    return [str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items()]


def test_each_comparison_carries_the_number_of_its_file(characters, tmp_path):
    """A prompt in two files forms one group, which keeps an answer in both files once."""
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


def test_held_out_comparisons_are_counted_for_each_file(characters, tmp_path):
    rows = make_comparisons(40)
    files = [str(write_jsonl(tmp_path / f"{i}.jsonl", part)) for i, part in enumerate((rows[:10], rows[10:]))]
    data = prepare(characters, files, eval_fraction=0.2, cache_dir=tmp_path)
    moved = [row["held out"] for row in data.report["train"]]
    assert sum(moved) == 8 and [row["read"] for row in data.report["train"]] == [10, 30]
    assert [row["read"] for row in data.report["eval"]] == [row.get("kept", 0) for row in data.report["eval"]] == moved
    assert Counter(s for group in data.eval for s in group["source"]) == Counter(dict(enumerate(moved)))
    assert [row["source"] for row in data.report["eval"]] == files


def test_files_in_another_order_are_prepared_again(characters, tmp_path):
    a, b, _ = several(tmp_path)
    first, second = (prepare(characters, files, [a], cache_dir=tmp_path) for files in ([a, b], [b, a]))
    assert first.sources["train"] == second.sources["train"][::-1] and len(set(first.sources["train"])) == 2
    assert [group["source"] for group in second.train] == [[0, 1], [0], [1]]
    assert [row["source"] for row in second.report["train"]] == [b, a]


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture
def counting(monkeypatch):
    """A list that grows by one with every call of tokenise, one per part."""
    calls = []
    original = minirm.data.prepare.tokenise

    def tokenise(*arguments, **options):
        calls.append(1)
        yield from original(*arguments, **options)

    monkeypatch.setattr(minirm.data.prepare, "tokenise", tokenise)
    return calls


def test_a_second_call_gives_the_same_without_tokenising(counting, tmp_path):
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
def test_everything_that_changes_the_result_is_tokenised_again(counting, tmp_path, change):
    path = write_jsonl(tmp_path / "x.jsonl", make_comparisons(20))
    prepare(make_tokenizer(), [str(path)], cache_dir=tmp_path)
    options = dict(change)
    tokenizer = options.pop("tokenizer", None) or make_tokenizer()
    if options.pop("file", False):  # same size and time as before
        before = path.stat()
        path.write_text(path.read_text().replace("the", "THE"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    evaluation = [str(path)] if options.pop("eval", False) else []
    prepare(tokenizer, [str(path)], evaluation, cache_dir=tmp_path, **options)
    assert len(counting) == 4


def test_a_changed_folder_of_files_is_read_again(characters, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", make_comparisons(10))
    assert prepare(characters, [str(folder)], cache_dir=tmp_path).report["train"][0]["read"] == 10
    write_jsonl(folder / "train.jsonl", make_comparisons(12))
    assert prepare(characters, [str(folder)], cache_dir=tmp_path).report["train"][0]["read"] == 12


def test_an_interrupted_run_leaves_nothing_that_is_used(characters, tmp_path, monkeypatch):
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


def test_a_killed_run_leaves_nothing_that_is_used(characters, tmp_path):
    """A killed process cleans up nothing, and another one may get its id. In a container it nearly always does."""
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
    assert len(left) == 1 and "." in left[0].name  # it was unfinished
    assert len(prepare(characters, [source], cache_dir=tmp_path).train) == 19
    (left,) = (tmp_path / "minirm").iterdir()  # the killed process's folder is removed
    assert "." not in left.name


def test_two_concurrent_processes_end_with_the_same_data(tmp_path):
    """When the slower process renames its folder, it finds the other one in place."""
    source = str(write_jsonl(tmp_path / "x.jsonl", make_comparisons(20)))
    script = f"""
import os, sys, time, minirm.data.prepare
from pathlib import Path
from conftest import make_tokenizer
original, here = minirm.data.prepare.write_groups, Path({str(tmp_path)!r})
def together(*arguments):  # both processes have found no cache
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
