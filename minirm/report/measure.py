"""Metrics of a reward model on held-out pairs: plain functions of tensors that need only torch, no model and no ranks.

P = pairs; end rewards `chosen`, `rejected` [P]; `prompt` [P] integers, equal for pairs of the same prompt. Everything is
computed on the CPU in fp64, in the order of the pairs, so that it does not depend on which rank computed which reward.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TENTHS = 10  # parts of an answer


def agreement(chosen: Tensor, rejected: Tensor, prompt: Tensor) -> dict:
    """How far the rewards agree with human preferences: accuracy, accuracy_low, accuracy_high, ties, pairs.

    A tie counts as wrong, so a constant scorer has accuracy 0. Low and high: see `interval`.
    """
    correct = (chosen > rejected).double()
    low, high = interval(correct, prompt)
    counts = {"ties": int((chosen == rejected).sum()), "pairs": len(correct)}
    return {"accuracy": correct.mean().item(), "accuracy_low": low, "accuracy_high": high, **counts}


def interval(correct: Tensor, prompt: Tensor) -> tuple[float, float]:
    """95 % interval of the mean of 0/1 values [P], for prompts drawn at random, each with all its pairs.

    Pairs of a prompt are not independent, so the variance comes from a jackknife that leaves out one prompt at a time.
    It gives the number of independent pairs with the same uncertainty. Wilson's interval is computed for that number,
    with Student's t for the effective number of prompts (Kish: as if all had equally many pairs). The number of
    independent pairs is at most P, in case the jackknife variance is too small by chance. If nothing varies (all
    correct), it is the effective number of prompts. The interval covers the mean in 93 to 97 % of cases for 60 to 300
    prompts (tests/test_measure.py), and in 92 % for 60 uneven prompts at an accuracy of 0.9 if most prompts are all
    right or all wrong.
    """
    _, number = prompt.unique(return_inverse=True)
    sizes = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add_(0, number, torch.ones_like(correct))
    right = torch.zeros_like(sizes).index_add_(0, number, correct)
    n, prompts, p = len(correct), len(sizes), correct.mean().item()
    if prompts == 1:
        return 0.0, 1.0  # one prompt says nothing about others
    like_prompts = n**2 / sizes.square().sum().item()
    variance = (prompts - 1) / prompts * ((right - p * sizes) / (n - sizes)).square().sum().item()
    independent = min(p * (1 - p) / variance, n) if variance else like_prompts
    t = t_quantile(like_prompts - 1)
    centre, spread = p + t**2 / (2 * independent), t * math.sqrt(p * (1 - p) / independent + (t / independent) ** 2 / 4)
    low, high = ((centre + sign * spread) / (1 + t**2 / independent) for sign in (-1, 1))
    return max(low, 0.0), min(high, 1.0)


def t_quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t: Abramowitz & Stegun 26.7.5, accurate to 0.003 from 5 degrees of freedom on."""
    z = 1.959963984540054
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))


def calibration(chosen: Tensor, rejected: Tensor, buckets: int = 10) -> dict:
    """Compare sigmoid(|chosen - rejected|) with the share of correct pairs: calibration_error and calibration.

    `calibration`: {"predicted", "observed", "pairs"} per bucket, means over pairs with similar differences; buckets
    have similar sizes. `calibration_error`: mean over pairs of their bucket's |predicted - observed| (Guo et al., arXiv
    1706.04599); about 0.06 by chance for 300 pairs. A tie predicts 0.5 and counts as half right; nan is left out.
    """
    difference = (chosen - rejected).double()
    difference = difference[~difference.isnan()]
    predicted, observed = difference.abs().sigmoid(), (difference.sign() + 1) / 2
    mean = lambda values: values.mean().item()
    groups = like(difference.abs(), buckets)
    table = [{"predicted": mean(predicted[i]), "observed": mean(observed[i]), "pairs": len(i)} for i in groups]
    error = sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in table)
    return {"calibration_error": error / max(1, len(difference)), "calibration": table}


def like(values: Tensor, count: int) -> list[Tensor]:
    """Indices [P] in up to `count` buckets of similar values and size, ascending. Equal values share a bucket."""
    ordered = values.sort().values
    middle = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)) / 2  # its rank
    number = (middle.double() * count / max(1, len(values))).long()
    return [(number == k).nonzero().flatten() for k in number.unique()]


def by_name(names: Iterable[Iterable[str]]) -> dict[str, Tensor]:
    """{name: indices of its pairs}, sorted by name; names: the names of each pair; "" is ignored."""
    found: dict[str, dict[int, None]] = {}
    for i, of_pair in enumerate(names):
        for name in of_pair:
            found.setdefault(name, {})[i] = None
    return {name: torch.tensor(list(found[name])) for name in sorted(found.keys() - {""})}


def file_names(files: list[str]) -> list[str]:
    """Names that distinguish files: stems, or paths if stems repeat (helpful/test.jsonl, harmless/test.jsonl)."""
    stems = [Path(file).stem if len(files) > 1 else "" for file in files]
    return [stem if stems.count(stem) == 1 else file for stem, file in zip(stems, files)]


def right_by_tenth(chosen: Tensor, rejected: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Share of positions with c_t > r_t in each tenth of start <= t < end: [P, T], [P, T], [P], [P] -> [P, 10] fp64.

    Tenth k is start + k n // 10 <= t < start + (k + 1) n // 10, where n = end - start, and includes at least its first
    position. With n < 10, some positions belong to several tenths.
    """
    upto = F.pad((chosen > rejected).double().cumsum(dim=1), (1, 0))  # [P, T + 1]: right places before t
    k = torch.arange(TENTHS + 1, device=start.device)
    edges = start[:, None] + k * (end - start)[:, None] // TENTHS  # [P, 11]
    low, high = edges[:, :-1], torch.maximum(edges[:, 1:], edges[:, :-1] + 1)
    return (upto.gather(1, high) - upto.gather(1, low)) / (high - low)


def histogram(chosen: Tensor, rejected: Tensor, bins: int = 30) -> dict:
    """{"edges" [bins + 1], "chosen" [bins], "rejected" [bins]}: counts of finite rewards; all empty without any."""
    sides = [side[side.isfinite()].double() for side in (chosen, rejected)]
    both = torch.cat(sides)
    if not len(both):
        return {"edges": [], "chosen": [], "rejected": []}
    edges = torch.histogram(both, bins).bin_edges  # from minimum to maximum; +- 0.5 if all are equal
    counts = [torch.histogram(side, edges).hist.long().tolist() for side in sides]
    return {"edges": edges.tolist(), "chosen": counts[0], "rejected": counts[1]}


def describe(groups: Iterable[dict], files: list[str], by_prompt: bool) -> dict:
    """What is known about the pairs of groups (see prepare.py) before scoring: `measure`'s keyword arguments.

    Args: files: the data's files; several get distinct names. by_prompt: a pair weighs 1 / (pairs of its prompt).
    """
    of_file = file_names(files)
    prompt, tokens, weight, names, number, left = [], [], [], [], -1, 0
    for row in groups:
        if not left:  # a prompt's groups are consecutive; it has several if some of its pairs are truncated
            number, left = number + 1, row["prompt_pairs"]
        left -= row["pairs"]
        assert left >= 0, f"prompt {number} has more pairs than its prompt_pairs says"
        lengths = [len(ids) for ids in row["completions"]]
        tokens += [(lengths[c], lengths[r]) for c, r in zip(row["chosen"], row["rejected"])]
        prompt += [number] * row["pairs"]
        weight += [1 / row["prompt_pairs"] if by_prompt else 1.0] * row["pairs"]
        names += [(subset, of_file[source]) for subset, source in zip(row["subset"], row["source"])]
    columns = {"prompt": prompt, "tokens": tokens, "weight": weight}
    return {"names": names} | {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def measure(chosen, rejected, loss, right, *, prompt, tokens, weight, names: list[tuple[str, ...]]) -> dict:
    """All metrics of an evaluation, named as in metrics.jsonl and JSON-serializable.

    Args: tensors chosen, rejected, loss, prompt: [P]; right: [P, 10] from `right_by_tenth`; tokens: [P, 2], of the
    chosen and rejected answer; weight: [P], for the weighted mean of the loss; names: each pair's subset and file.
    """
    correct, both = (chosen > rejected).double(), torch.cat([chosen, rejected])
    longer = tokens[:, 0] - tokens[:, 1]
    figures = {"loss": ((loss * weight).sum() / weight.sum()).item(), **agreement(chosen, rejected, prompt)}
    figures |= calibration(chosen, rejected) | {
        "reward_margin": (chosen - rejected).mean().item(),
        "reward_mean": both.mean().item(),
        "reward_std": both.std().item(),
        "histogram": histogram(chosen, rejected),
        "length_accuracy": (longer > 0).double().mean().item(),
        "by_length": [
            {"low": int(longer[i].min()), "high": int(longer[i].max()), "pairs": len(i), "accuracy": correct[i].mean().item()}
            for bucket in like(longer, 5)
            for sign in (-1, 0, 1)  # longer and shorter chosen answers never share a bucket
            if len(i := bucket[longer[bucket].sign() == sign])
        ],
        "accuracy_by_position": right.mean(dim=0).tolist(),
    }  # fmt: skip
    figures |= {f"accuracy/{name}": correct[i].mean().item() for name, i in by_name(names).items()}
    return {f"eval_{name}": value for name, value in figures.items()}
