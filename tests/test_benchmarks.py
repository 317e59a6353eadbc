"""Scores of published benchmarks, by hand from small tables: `python -m pytest tests/test_benchmarks.py`. One tiny model."""

import json
import math

import pytest
from conftest import WORDS, write_jsonl

from minirm import score
from minirm.model import empty_model, load_config
from minirm.report.benchmarks import SECTIONS, best_of_n, reward_bench, reward_bench_2, rm_bench, ties
from minirm.weights import export, load_weights


def row(correct, wrong, subset="Math", id=""):
    return {"id": id, "subset": subset, "correct": correct, "wrong": wrong}


def test_the_best_of_n_shares_a_tie_at_the_top():
    assert best_of_n(row([2.0], [1.0, 0.0, -1.0])) == 1
    assert best_of_n(row([2.0], [2.0, 0.0, 2.0])) == pytest.approx(1 / 3)
    assert best_of_n(row([2.0, 2.0], [2.0])) == pytest.approx(2 / 3)
    assert best_of_n(row([1.0], [2.0])) == 0


def test_the_ties_subset_by_hand():
    """Prompt 1: margins 1 (tied) and 3 (ref), spread 0.5. Prompt 2: margins 0.2 and -1, spread 1. Prompt 3: tied only, wrong.

    tied right 2/3, ref right 1/2; margin over spread: 1 of 2, with the smaller margin 1 of 2;
    tanh(1/0.5 - 1) and tanh(-1/1 - 1).
    """
    rows = [
        row([2.0, 1.5], [0.5], id="tied:1"), row([4.0], [1.0, 0.0], id="ref:1"),
        row([1.0, 0.0], [-0.2], id="tied:2"), row([0.0], [1.0], id="ref:2"),
        row([1.0, 0.0], [0.5], id="tied:3"),
    ]  # fmt: skip
    gaps = (math.tanh(1) + math.tanh(-2)) / 2
    assert ties(rows) == pytest.approx(0.3 * 2 / 3 + 0.3 / 2 + 0.2 / 2 + 0.2 / 2 + 0.01 * gaps)
    with pytest.raises(ValueError, match="expected ref:N or tied:N"):
        ties([row([1.0], [0.0], id="7")])
    both = [row([1.0, 1.0], [0.0], id="tied:1"), row([1.0], [0.0], id="ref:1")]
    assert ties(both) == pytest.approx(1 + 0.01)  # no spread: the largest gap there is


def test_reward_bench_2_is_the_mean_of_its_subsets():
    rows = [row([1.0], [0.0]), row([0.0], [1.0]), row([1.0], [0.0], "Focus")]
    assert reward_bench_2(rows) == {"Math": 0.5, "Focus": 1.0, "mean": 0.75}


def test_rm_bench_by_style():
    """chosen 1 2 3 against rejected 0 1.5 2.5: right in 3 + 2 + ... of the matrix [[1,0,0],[1,1,0],[1,1,1]]."""
    wanted = {"easy": 1.0, "normal": 1.0, "hard": 0.0, "mean": pytest.approx(2 / 3)}
    assert rm_bench([row([1.0, 2.0, 3.0], [0.0, 1.5, 2.5])]) == wanted
    rows = [row([1.0, 2.0, 3.0], [0.0, 1.5, 2.5]), row([0.0, 0.0, 0.0], [1.0, -1.0, -1.0])]
    # second row, wherever the wrong one has style 0 it is beaten: [[0,1,1]] * 3
    assert rm_bench(rows) == {
        "easy": (0.5 + 0.5 + 1) / 3,
        "normal": pytest.approx((0.5 + 1 + 1) / 3),
        "hard": 0.5,
        "mean": pytest.approx((2 / 3 + 2.5 / 3 + 0.5) / 3),
    }


def test_reward_bench_weighs_its_subsets_and_needs_all_of_them():
    assert [sum(section.values()) for section in SECTIONS.values()] == [358, 456, 740, 1968]
    accuracy = {subset: 1.0 for section in SECTIONS.values() for subset in section} | {
        "math-prm": 0.0,
        "mt-bench-hard": 0.0,
    }
    assert reward_bench(accuracy) == {
        "Chat": 1.0, "Chat Hard": pytest.approx(419 / 456), "Safety": 1.0, "Reasoning": 0.5,
        "mean": pytest.approx((1 + 419 / 456 + 1 + 0.5) / 4),
    }  # fmt: skip
    assert reward_bench({"alpacaeval-easy": 1.0}) == {}


def test_score_adds_the_benchmarks_scores_to_its_figures(model_folder, tmp_path, capsys):
    """The expected values are computed from the scores in the file that --output writes."""
    config, tokenizer = load_config(str(model_folder("gpt2")))
    empty_model(config)
    weights = load_weights(str(model_folder("gpt2")), config, 0, published=True)
    export(weights, config, tokenizer, tmp_path / "model")
    text = lambda n: " ".join(WORDS[(n * k) % 16] for k in range(1, 5 + n % 3))
    rows = [
        {"id": f"{kind}:{n}", "prompt": f"q{n}", "subset": "Ties", "chosen": [text(10 * n + k) for k in range(1 + 2 * (kind == "tied"))],
         "rejected": [text(7 + n), text(9 + n)], "num_correct": 1}
        for n in range(3) for kind in ("ref", "tied")
    ] + [{"id": str(n), "prompt": "p", "subset": "Math", "chosen": [text(n)], "rejected": [text(n + 5), text(n + 6), text(n + 7)], "num_correct": 1} for n in range(4)]  # fmt: skip
    path = write_jsonl(tmp_path / "rb2.jsonl", rows)
    assert score.main(["--model", str(tmp_path / "model"), "--data", str(path)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert set(found["reward_bench_2"]) == {"Ties", "Math", "mean"} and "RewardBench 2: Math " in said.err
    assert found["best_of_n_accuracy"]["prompts"] == 10
    lists = [{"prompt": r["prompt"], "completions": r["chosen"] + r["rejected"]} for r in rows]
    again = write_jsonl(tmp_path / "lists.jsonl", lists)
    flags = ["--model", str(tmp_path / "model"), "--data", str(again), "--output", str(tmp_path / "o.jsonl")]
    assert score.main(flags) == 0
    capsys.readouterr()
    scores = [json.loads(line)["scores"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    wanted = [
        {"id": r["id"], "subset": r["subset"], "correct": s[: len(r["chosen"])], "wrong": s[len(r["chosen"]) :]}
        for r, s in zip(rows, scores)
    ]
    assert found["reward_bench_2"] == pytest.approx(reward_bench_2(wanted), abs=1e-6)
