"""Assign groups to steps, micro-steps and ranks: a pure function that returns the same plan on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Groups are sorted by length within windows of this many steps: large enough to batch rows of similar length, small
# enough to give every epoch a different order.
WINDOW_STEPS = 16


class Step(NamedTuple):
    """One optimizer step: micro_steps[m][rank] is a list of group indices, empty if the rank has none left."""

    micro_steps: list[list[list[int]]]
    weight: float  # total weight of its groups over all ranks and micro-steps; the divisor of its loss


class Plan(Sequence[Step]):
    """The steps of an epoch, each computed on access, so that a group costs only 12 bytes of memory."""

    def __init__(self, lengths: Tensor, weights: Tensor, order: Tensor, step_order: Tensor | None, shape: tuple):
        self.lengths, self.weights = lengths, weights  # [G] int32, [G] fp64
        self.order = order  # [G] int32: groups in window order; longest first if step_order is None
        self.step_order = step_order  # [steps] int64: shuffled
        self.world_size, self.per_micro_step, self.per_step, self.micro_batch_tokens = shape

    def __len__(self) -> int:
        return (len(self.order) + self.per_step - 1) // self.per_step

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        step = range(len(self))[place]  # IndexError past the end
        groups = self.order
        if self.step_order is not None:
            window, step = divmod(int(self.step_order[step]), WINDOW_STEPS)
            groups = groups[window * WINDOW_STEPS * self.per_step :][: WINDOW_STEPS * self.per_step].sort().values
            groups = groups[longest_first(self.lengths[groups.long()])]
        return self.deal(groups[step * self.per_step :][: self.per_step].long())

    def deal(self, groups: Tensor) -> Step:
        """Make a step of these groups, sorted longest first."""
        step, lengths = groups.tolist(), self.lengths[groups].tolist()
        micro_steps, begin = [], 0
        while begin < len(step):
            size = self.per_micro_step
            if self.micro_batch_tokens:
                size = max(1, self.micro_batch_tokens // max(1, lengths[begin])) * self.world_size
            micro_steps.append(step[begin : begin + size])
            begin += size
        # Deal the groups round-robin: in a short micro-step no rank has two groups while another has none. Reverse the
        # order in every other micro-step, or one rank would get the longest group each time while the others wait.
        dealt = [[micro[rank :: self.world_size] for rank in range(self.world_size)] for micro in micro_steps]
        dealt[1::2] = [of_rank[::-1] for of_rank in dealt[1::2]]
        return Step(dealt, sum(self.weights[groups].tolist()))


def longest_first(lengths: Tensor) -> Tensor:
    """Indices that sort by descending length; groups of equal length keep their order."""
    return lengths.sort(descending=True, stable=True).indices


def make_plan(
    lengths, weights, *, world_size, batch_size, accumulation=1, seed=0, epoch=0, shuffle=True, micro_batch_tokens=0
) -> Plan:
    """Plan every group once, in steps of world_size x batch_size x accumulation groups; the last one may be shorter.

    Args:
        lengths [G]: tokens of each group; groups of similar length share a micro-step, on all ranks.
        weights [G]: weight of each group, summed over its comparisons; their number if all weigh the same.
        world_size, batch_size, accumulation: ranks, groups per rank and micro-step, micro-steps per step.
        micro_batch_tokens: token budget of a micro-step on each rank, padding included; it holds as many groups as fit,
            at least one. 0: batch_size groups. The groups of a step stay the same.
        seed, epoch: determine the order. shuffle=False: longest first, so that a lack of memory shows at once.
    The groups of a step depend only on the product of the three, so 1 x 4, 2 x 2 and 4 x 1 give equal steps.
    """
    assert len(lengths) == len(weights), f"{len(lengths)} lengths for {len(weights)} groups"
    lengths, weights = torch.as_tensor(lengths, dtype=torch.int32), torch.as_tensor(weights, dtype=torch.float64)
    per_micro_step = world_size * batch_size
    shape = (world_size, per_micro_step, per_micro_step * accumulation, micro_batch_tokens)
    if not shuffle:
        return Plan(lengths, weights, longest_first(lengths).int(), None, shape)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).int()
    steps = steps_per_epoch(len(lengths), world_size, batch_size, accumulation)
    step_order = torch.randperm(steps, generator=generator)
    return Plan(lengths, weights, order, step_order, shape)


def steps_per_epoch(groups: int, world_size: int, batch_size: int, accumulation: int) -> int:
    """Number of steps in `make_plan`'s plan for this many groups."""
    return -(-groups // (world_size * batch_size * accumulation))
