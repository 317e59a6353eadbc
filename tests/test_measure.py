"""Evaluation metrics: `python -m pytest tests/test_measure.py`. Needs only torch, one process, no model."""

import json
import math

import pytest
import torch

from minirm.report import measure
from minirm.report.lines import final_report, headline
from minirm.report.measure import (
    agreement,
    by_name,
    calibration,
    describe,
    file_names,
    histogram,
    interval,
    like,
    right_by_tenth,
    t_quantile,
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# -- Accuracy and its interval. ------------------------------------------------------------------------------------------


def test_a_tie_is_not_correct():
    got = agreement(numbers(1, 2, 3, 4), numbers(0, 2, 5, 1), torch.arange(4))
    assert (got["accuracy"], got["ties"], got["pairs"]) == (0.5, 1, 4)
    assert agreement(numbers(7, 7), numbers(7, 7), torch.arange(2))["accuracy"] == 0.0


def test_the_interval_by_hand_with_one_pair_a_prompt():
    """60 of 80 pairs correct, one per prompt: jackknife variance 0.75 * 0.25 / 79, so n = 79 and t(79) = 1.990450.

    t^2 / n = 0.0501505; centre 0.75 + 0.0250752 = 0.7750752; spread 1.990450 * sqrt(0.1875 / 79 + 0.0501505 / 79 / 4)
    = 1.990450 * sqrt(0.00237342 + 0.000158704) = 0.1001603; (0.7750752 -+ 0.1001603) / 1.0501505.
    """
    correct = torch.cat([torch.ones(60), torch.zeros(20)]).double()
    assert interval(correct, torch.arange(80)) == pytest.approx((0.6426841, 0.8334381), abs=1e-5)


def test_copies_of_a_pair_do_not_narrow_the_interval():
    """The interval of four equal pairs per prompt is that of one."""
    once = torch.cat([torch.ones(60), torch.zeros(20)]).double()
    low, high = interval(once, torch.arange(80))
    assert interval(once.repeat_interleave(4), torch.arange(80).repeat_interleave(4)) == pytest.approx((low, high))
    narrow = interval(once.repeat_interleave(4), torch.arange(320))  # as if they were independent
    assert narrow[1] - narrow[0] < 0.55 * (high - low)


def test_the_variance_is_the_jackknifes_over_prompts():
    """The slow reference computes the accuracy without each prompt in turn, then Wilson's interval with t."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 7, (30,), generator=generator)
    prompt = torch.arange(30).repeat_interleave(sizes)
    correct = (torch.rand(30, generator=generator)[prompt] < torch.rand(len(prompt), generator=generator)).double()
    p = correct.mean().item()
    without = [correct[prompt != k].mean().item() for k in range(30)]
    variance = 29 / 30 * sum((q - p) ** 2 for q in without)
    n = min(p * (1 - p) / variance, len(prompt))
    assert n < len(prompt)
    t = t_quantile(sizes.sum().item() ** 2 / (sizes**2).sum().item() - 1)
    # Wilson's limits are where (p - x)^2 = t^2 x (1 - x) / n.
    for x in interval(correct, prompt):
        assert (p - x) ** 2 == pytest.approx(t**2 * x * (1 - x) / n, rel=1e-9)
    order = torch.randperm(len(prompt), generator=generator)
    assert interval(correct[order], prompt[order] * 7 - 3) == pytest.approx(interval(correct, prompt), rel=1e-12)


@pytest.mark.parametrize("freedom, value", [(5, 2.5706), (10, 2.2281), (30, 2.0423), (100, 1.9840), (1e9, 1.9600)])
def test_students_t_from_a_table(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=3e-3 if freedom < 10 else 2e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_or_none_correct_still_has_an_interval(value):
    """50 prompts: Wilson with n = 50 and t(49) = 2.0096, t^2 / n = 0.080770: 1 / 1.080770 = 0.925266."""
    low, high = interval(torch.full((100,), value).double(), torch.arange(50).repeat(2))
    wanted = (0.925266, 1.0) if value else (0.0, 1 - 0.925266)
    assert (low, high) == pytest.approx(wanted, abs=1e-5)


def test_a_single_prompt_gives_the_widest_interval():
    assert interval(numbers(1, 0, 1), torch.zeros(3)) == (0.0, 1.0)
    low, high = interval(numbers(1, 0, 1), numbers(0, 0, 1))
    assert 0 <= low < 2 / 3 < high <= 1


@pytest.mark.parametrize("accuracy", [0.55, 0.7, 0.9])
@pytest.mark.parametrize(
    "prompts, even", [(60, True), (150, True), (300, True), (60, False), (150, False), (300, False)]
)
def test_intervals_cover_93_to_97_percent(prompts, even, accuracy):
    """2,000 evaluations of a model of known accuracy. Each prompt has its own accuracy, beta-distributed so that two of
    its pairs correlate by 0.2, and has six pairs or, if uneven, 1 to about 20, four on average (geometric).

    The standard error of the coverage is 0.5 %. Intervals for independent pairs cover only 75 to 85 %.
    """
    covered, naive, times, correlation = 0, 0, 2000, 0.2
    generator = torch.Generator().manual_seed(prompts)
    shape = (1 - correlation) / correlation
    torch.manual_seed(prompts)  # torch.distributions takes no generator
    q = torch.distributions.Beta(numbers(accuracy * shape), numbers((1 - accuracy) * shape)).sample((times, prompts))
    for own in q[:, :, 0]:
        sizes = torch.full((prompts,), 6) if even else torch.empty(prompts).geometric_(0.25, generator=generator).long()
        prompt = torch.arange(prompts).repeat_interleave(sizes)
        correct = (torch.rand(len(prompt), generator=generator) < own[prompt]).double()
        low, high = interval(correct, prompt)
        covered += low <= accuracy <= high
        p = correct.mean().item()
        naive += abs(p - accuracy) <= 1.96 * math.sqrt(p * (1 - p) / len(prompt))
    assert 0.93 <= covered / times <= 0.97, covered / times
    assert naive / times < 0.9


# -- Calibration. --------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Differences 0, 1, -1, 2. Their sizes 0, 1, 1, 2 have middle ranks 0.5, 2, 2, 3.5 of 4, so the first of two buckets
    holds the 0 and the second the rest. Predicted: 0.5; (2 * 0.731059 + 0.880797) / 3 = 0.780971. Observed: a half for the
    tie; 2 of 3. Error: (1 * 0 + 3 * 0.114305) / 4 = 0.085729.
    """
    got = calibration(numbers(0, 1, 0, 5), numbers(0, 0, 1, 3), buckets=2)
    assert got["calibration_error"] == pytest.approx(0.085729, abs=1e-6)
    assert [row["pairs"] for row in got["calibration"]] == [1, 3]
    assert [row["predicted"] for row in got["calibration"]] == pytest.approx([0.5, 0.780971], abs=1e-6)
    assert [row["observed"] for row in got["calibration"]] == pytest.approx([0.5, 2 / 3], abs=1e-12)


def test_calibration_distinguishes_calibrated_from_overconfident_models():
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    chosen_first = torch.rand(50_000, generator=generator) < truth.sigmoid()
    difference = torch.where(chosen_first, truth, -truth)
    zero = torch.zeros_like(difference)
    assert calibration(difference, zero)["calibration_error"] < 0.01
    overconfident = calibration(3 * difference, zero)
    assert overconfident["calibration_error"] > 0.1
    assert all(row["predicted"] > row["observed"] for row in overconfident["calibration"][2:])
    assert [row["pairs"] for row in overconfident["calibration"]] == [5000] * 10


def test_nan_rewards_are_left_out_of_calibration_and_histogram():
    chosen, rejected = numbers(math.nan, 1, math.inf), numbers(0, 0, 0)
    assert sum(row["pairs"] for row in calibration(chosen, rejected)["calibration"]) == 2
    assert calibration(chosen[:1], rejected[:1]) == {"calibration_error": 0.0, "calibration": []}
    assert (sum(histogram(chosen, rejected)["chosen"]), sum(histogram(chosen, rejected)["rejected"])) == (1, 3)
    assert histogram(chosen[:1], chosen[:1]) == {"edges": [], "chosen": [], "rejected": []}


# -- Buckets, positions, histogram. --------------------------------------------------------------------------------------


def test_buckets_hold_similar_values_and_never_split_equal_ones():
    assert [i.tolist() for i in like(numbers(5, 1, 4, 2, 3, 6), 3)] == [[1, 3], [2, 4], [0, 5]]
    assert [i.tolist() for i in like(numbers(0, 0, 0, 0, 0, 0, 9, 0, 0, -9), 5)] == [[9], [0, 1, 2, 3, 4, 5, 7, 8], [6]]
    assert [i.tolist() for i in like(torch.zeros(4), 5)] == [[0, 1, 2, 3]]


def test_names_of_subsets_and_files():
    names = [("chat", "a"), ("", "a"), ("chat", "b"), ("a", "b")]
    assert {k: v.tolist() for k, v in by_name(names).items()} == {"a": [0, 1, 3], "b": [2, 3], "chat": [0, 2]}
    assert by_name([("",), ("", "")]) == {}
    assert file_names(["some/a.jsonl", "b.csv"]) == ["a", "b"] and file_names(["a.jsonl"]) == [""]
    assert file_names(["x/a.jsonl", "b.csv", "y/a.jsonl"]) == ["x/a.jsonl", "b", "y/a.jsonl"]


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 11, 19, 20, 137])
def test_right_by_tenth_against_a_loop(n):
    generator = torch.Generator().manual_seed(n)
    pairs, width = 5, n + 6
    chosen, rejected = torch.randint(0, 3, (2, pairs, width), generator=generator).float()
    start = torch.randint(0, 7, (pairs,), generator=generator)
    got = right_by_tenth(chosen, rejected, start, start + n)
    for p in range(pairs):
        right = [float(chosen[p, t] > rejected[p, t]) for t in range(int(start[p]), int(start[p]) + n)]
        for k in range(10):
            tenth = right[k * n // 10 : max((k + 1) * n // 10, k * n // 10 + 1)]
            assert got[p, k].item() == pytest.approx(sum(tenth) / len(tenth))
    assert got.shape == (pairs, 10) and got.dtype == torch.float64


def test_right_by_tenth_ignores_rewards_outside_the_range():
    """20 positions from 3 on, correct from the seventh on, with garbage before and after."""
    chosen, rejected = torch.full((1, 30), math.nan), torch.zeros(1, 30)
    chosen[0, 3:9], chosen[0, 9:23], chosen[0, 23:] = -1, 1, -9
    got = right_by_tenth(chosen, rejected, torch.tensor([3]), torch.tensor([23]))
    assert got.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]]
    assert right_by_tenth(chosen[:0], rejected[:0], torch.tensor([]).long(), torch.tensor([]).long()).shape == (0, 10)


def test_the_histogram_counts_every_reward_once():
    got = histogram(numbers(0, 1, 2, 10), numbers(-5, 0, 0, 3), bins=5)
    assert got == {"edges": [-5, -2, 1, 4, 7, 10], "chosen": [0, 1, 2, 0, 1], "rejected": [1, 2, 1, 0, 0]}
    same = histogram(numbers(2, 2), numbers(2, 2), bins=2)
    assert same == {"edges": [1.5, 2.0, 2.5], "chosen": [0, 2], "rejected": [0, 2]}


# -- All metrics. --------------------------------------------------------------------------------------------------------


def group(lengths, pairs, prompt_pairs, subset="", source=0):
    columns = {"chosen": [c for c, _ in pairs], "rejected": [r for _, r in pairs]}
    about = {"pairs": len(pairs), "prompt_pairs": prompt_pairs}
    about |= {"subset": [subset] * len(pairs), "source": [source] * len(pairs)}
    return {"completions": [[1] * n for n in lengths], **columns, **about}


def test_describe_by_hand():
    """The second prompt has two groups, of one and two pairs, so each of its three pairs weighs a third."""
    groups = [group([3, 5], [(0, 1)], 1, "x"), group([9, 2], [(1, 0)], 3)]
    groups += [group([4, 4, 7], [(0, 2), (1, 2)], 3, source=1)]
    known = describe(groups, ["some/a.jsonl", "b.csv"], by_prompt=True)
    assert known["prompt"].tolist() == [0, 1, 1, 1]
    assert known["tokens"].tolist() == [[3, 5], [2, 9], [4, 7], [4, 7]]
    assert known["weight"].tolist() == [1, 1 / 3, 1 / 3, 1 / 3]
    assert known["names"] == [("x", "a"), ("", "a"), ("", "b"), ("", "b")]
    alone = describe(groups[:2], ["a.jsonl"], by_prompt=False)
    assert alone["weight"].tolist() == [1, 1] and alone["names"] == [("x", ""), ("", "")]
    with pytest.raises(AssertionError, match="prompt 0 has more pairs"):
        describe([group([3, 5], [(0, 1)], 2), group([3, 5], [(0, 1), (1, 0)], 3)], ["a"], by_prompt=False)


def evaluated(chosen, rejected, tokens, **changes):
    n = len(chosen)
    known = {"prompt": torch.arange(n), "tokens": tokens, "weight": torch.ones(n), "names": [("",)] * n} | changes
    return measure.measure(chosen, rejected, torch.ones(n), torch.full((n, 10), 0.5), **known) | {"step": 3}


def test_all_metrics_by_hand():
    """Losses 1, 1, 1 and 5, of which the last weighs a third: (3 + 5 / 3) / (10 / 3) = 1.4. Differences 1, 2, -1, 0.

    Rewards 1 2 3 4 | 0 0 4 4: mean 2.25, squares 1 + 4 + 9 + 16 + 16 + 16 = 62 - 8 * 5.0625 = 21.5, / 7, root 1.752549.
    """
    tokens = torch.tensor([[5, 2], [5, 5], [1, 3], [2, 1]])
    names = [("x", ""), ("x", ""), ("y", ""), ("", "")]
    right = torch.tensor([0.0, 1, 0, 1]).repeat_interleave(10).view(4, 10)
    right[0, 9] = 1
    known = {"prompt": torch.tensor([0, 1, 1, 2]), "tokens": tokens, "names": names, "weight": numbers(1, 1, 1, 1 / 3)}
    got = measure.measure(numbers(1, 2, 3, 4), numbers(0, 0, 4, 4), numbers(1, 1, 1, 5), right, **known)
    assert got["eval_loss"] == pytest.approx(1.4)
    assert (got["eval_accuracy"], got["eval_ties"], got["eval_pairs"], got["eval_reward_margin"]) == (0.5, 1, 4, 0.5)
    assert 0 <= got["eval_accuracy_low"] < 0.5 < got["eval_accuracy_high"] <= 1
    assert (got["eval_reward_mean"], got["eval_reward_std"]) == (2.25, pytest.approx(1.752549, abs=1e-6))
    assert (got["eval_accuracy/x"], got["eval_accuracy/y"], got["eval_length_accuracy"]) == (1.0, 0.0, 0.5)
    assert got["eval_accuracy_by_position"] == [0.5] * 9 + [0.75]
    lengths = [(b["low"], b["high"], b["pairs"], b["accuracy"]) for b in got["eval_by_length"]]
    assert lengths == [(-2, -2, 1, 0.0), (0, 0, 1, 1.0), (1, 1, 1, 0.0), (3, 3, 1, 1.0)]
    assert sum(got["eval_histogram"]["chosen"]) == sum(got["eval_histogram"]["rejected"]) == 4
    assert len(got["eval_histogram"]["edges"]) == 31
    assert json.loads(json.dumps(got)) == got


def test_a_model_that_only_measures_length_is_reported():
    """The chosen answer is always the longer one, and the reward is its length."""
    generator = torch.Generator().manual_seed(0)
    rejected = torch.randint(5, 40, (200,), generator=generator)
    chosen = rejected + torch.randint(1, 30, (200,), generator=generator)
    row = evaluated(chosen / 10.0, rejected / 10.0, torch.stack([chosen, rejected], dim=1))
    assert (row["eval_accuracy"], row["eval_length_accuracy"]) == (1.0, 1.0)
    assert len(row["eval_by_length"]) == 5 and all(bucket["low"] > 0 for bucket in row["eval_by_length"])
    text = final_report(row)
    assert "Length alone does as well as this model: always choosing the longer answer gets 100.0% right." in text
    swapped = final_report(evaluated(chosen / 10.0, rejected / 10.0, torch.stack([rejected, chosen], dim=1)))
    assert "Length alone does as well as this model: always choosing the shorter answer gets 100.0% right." in swapped


def test_a_model_better_than_length_gets_no_length_warning():
    """180 of 200 pairs are right. The longer answer is chosen in 90 and the shorter one in 90; 20 have equal lengths."""
    tokens = torch.tensor([[9, 5]] * 90 + [[5, 5]] * 20 + [[5, 9]] * 90)
    chosen = torch.where(torch.arange(200) % 10 == 0, -1.0, 1.0)
    row = evaluated(chosen, torch.zeros(200), tokens)
    text = final_report(row)
    assert "Length alone" not in text and "always choosing the longer answer: 45.0%" in text
    assert "90.0% (85" in text and "-4: 0.90 (90), +0: 0.90 (20), +4: 0.90 (90)" in text
    assert headline(row).startswith("step 3: held-out accuracy 0.9000 (0.85") and "(200 pairs, 0 ties)" in headline(row)
    assert "\n" not in headline(row)


def test_nan_rewards_are_measured_without_an_error():
    row = evaluated(torch.full((6,), math.nan), torch.full((6,), math.nan), torch.ones(6, 2))
    assert (row["eval_accuracy"], row["eval_ties"]) == (0.0, 0) and math.isnan(row["eval_reward_margin"])
    assert "gets 0.0% right" in final_report(row) and headline(row)
