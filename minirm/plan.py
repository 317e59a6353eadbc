"""Which groups are computed in which step, micro-step and on which rank: a pure function, the same on every rank."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

# Groups are sorted by length within windows of so many steps: enough for rows of like length side by side, few enough
# for every epoch to be another order.
WINDOW_STEPS = 16


class Step(NamedTuple):
    """One optimizer step: micro_steps[m][rank] is a list of group indices, empty where there is nothing left to do."""

    micro_steps: list[list[list[int]]]
    weight: float  # of all its groups, on all ranks and micro-steps together: what its loss is divided by


class Plan(Sequence[Step]):
    """The steps of an epoch. Each is worked out when it is asked for: millions of groups cost 12 bytes each."""

    def __init__(
        self, lengths: Tensor, weights: Tensor, order: Tensor, step_order: Tensor | None, shape: tuple
    ) -> None:
        self.lengths, self.weights = lengths, weights  # [G] int32, [G] fp64
        self.order = order  # [G] int32: groups as windows take them; longest first where step_order is None
        self.step_order = step_order  # [steps] int64: shuffled
        self.world_size, self.per_micro_step, self.per_step, self.micro_batch_tokens = shape

    def __len__(self) -> int:
        return (len(self.order) + self.per_step - 1) // self.per_step

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> list[Step]: ...
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
        """A step of these groups, of which the longest is the first."""
        step, lengths = groups.tolist(), self.lengths[groups].tolist()
        micro_steps, begin = [], 0
        while begin < len(step):
            size = self.per_micro_step
            if self.micro_batch_tokens:
                size = max(1, self.micro_batch_tokens // max(1, lengths[begin])) * self.world_size
            micro_steps.append(step[begin : begin + size])
            begin += size
        # Dealt out like cards: in a short micro-step no rank has two groups while another has none. There and back, so
        # that no rank gets the longest of every micro-step and the others wait for it.
        dealt = [[micro[rank :: self.world_size] for rank in range(self.world_size)] for micro in micro_steps]
        dealt[1::2] = [of_rank[::-1] for of_rank in dealt[1::2]]
        return Step(dealt, sum(self.weights[groups].tolist()))


def longest_first(lengths: Tensor) -> Tensor:
    """The order by descending length; groups of equal length stay as they are."""
    return lengths.sort(descending=True, stable=True).indices


def make_plan(
    lengths: Sequence[int] | Tensor,
    weights: Sequence[float] | Tensor,
    *,
    world_size: int,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    micro_batch_tokens: int = 0,
) -> Plan:
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
    lengths, weights = torch.as_tensor(lengths, dtype=torch.int32), torch.as_tensor(weights, dtype=torch.float64)
    per_micro_step = world_size * batch_size
    shape = (world_size, per_micro_step, per_micro_step * accumulation, micro_batch_tokens)
    if not shuffle:
        return Plan(lengths, weights, longest_first(lengths).int(), None, shape)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).int()
    step_order = torch.randperm(
        steps_per_epoch(len(lengths), world_size, batch_size, accumulation), generator=generator
    )
    return Plan(lengths, weights, order, step_order, shape)


def steps_per_epoch(groups: int, world_size: int, batch_size: int, accumulation: int) -> int:
    """How many steps `make_plan` makes of so many groups."""
    return -(-groups // (world_size * batch_size * accumulation))
