"""Which groups are computed in which step, micro-step and on which rank: a pure function, the same on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

# Groups are sorted by length within windows of so many steps: enough for rows of like length side by side, few enough
# for every epoch to be another order.
WINDOW_STEPS = 16


class Step(NamedTuple):
    """One optimizer step: micro_steps[m][rank] is a list of group indices, empty where there is nothing left to do."""

    micro_steps: list[list[list[int]]]
    weight: float  # of all its groups, on all ranks and micro-steps together: what its loss is divided by


def make_plan(
    lengths: Sequence[int],
    weights: Sequence[float],
    *,
    world_size: int,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    micro_batch_tokens: int = 0,
) -> list[Step]:
    """Every group exactly once, in steps of world_size x batch_size x accumulation groups, the last one maybe shorter.

    Args:
        lengths: tokens of each group; groups of like length come together in a micro-step, on all ranks.
        weights: of each group, as a sum over its comparisons: their number, if all weigh the same.
        world_size, batch_size, accumulation: ranks, groups per rank and micro-step, micro-steps per step.
        micro_batch_tokens: a micro-step has as many groups on each rank as fit into so many tokens, padding to the longest
            included, at least one; 0: batch_size of them. Which groups make up a step stays the same.
        seed, epoch: choose the order. shuffle=False: longest first, so that too little memory shows at once.
    Which groups make up a step depends on the product of the three alone, so 1 x 4, 2 x 2 and 4 x 1 give equal steps.
    """
    assert len(lengths) == len(weights), f"{len(lengths)} lengths for {len(weights)} groups"
    count, per_micro_step = len(lengths), world_size * batch_size
    per_step = per_micro_step * accumulation
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator).tolist() if shuffle else range(count)
    window = per_step * WINDOW_STEPS if shuffle else max(1, count)
    steps = []
    for begin in range(0, count, window):
        groups = sorted(order[begin : begin + window], key=lambda g: (-lengths[g], g))  # longest first
        for i in range(0, len(groups), per_step):
            step = groups[i : i + per_step]
            micro_steps = []
            while step_left := step[sum(map(len, micro_steps)) :]:
                fit = (
                    max(1, micro_batch_tokens // max(1, lengths[step_left[0]])) * world_size
                )  # the first is the longest
                micro_steps.append(step_left[: fit if micro_batch_tokens else per_micro_step])
            # Dealt out like cards: in a short micro-step no rank has two groups while another has none. There and back,
            # so that no rank gets the longest of every micro-step and the others wait for it.
            dealt = [[micro[rank::world_size] for rank in range(world_size)] for micro in micro_steps]
            dealt[1::2] = [of_rank[::-1] for of_rank in dealt[1::2]]
            steps.append(Step(dealt, sum(weights[g] for g in step)))
    if shuffle:
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]
    return steps


def steps_per_epoch(groups: int, world_size: int, batch_size: int, accumulation: int) -> int:
    """How many steps `make_plan` makes of so many groups."""
    return -(-groups // (world_size * batch_size * accumulation))
