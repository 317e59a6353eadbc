"""Feed the loop: plan the steps, and read this rank's batches in a thread, one step ahead."""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice

import torch
from torch import Tensor

from minirm.data.prepare import numbers
from minirm.plan import Step, make_plan
from minirm.rows import Batch, ahead, collate
from minirm.shard import Processes
from minirm.start import Inputs
from minirm.trunk_cache import TrunkCache


class Feed:
    """This rank's batches. Create it after `run.begin`, which may change the number of micro-steps per step."""

    def __init__(self, args, inputs: Inputs, processes: Processes, epoch_steps: int) -> None:
        self.args, self.data, self.epoch_steps = args, inputs.data, epoch_steps
        self.rank, self.device = processes.rank, processes.device
        self.cache: TrunkCache | None = None  # assigned once weights are loaded
        # Both row layouts sort groups by unique tokens, so that both take the same steps.
        self.lengths = {part: numbers(getattr(self.data, part), "shared_tokens") for part in ("train", "eval")}
        self.pairs = {part: numbers(getattr(self.data, part), "pairs") for part in ("train", "eval")}
        self.plan = partial(
            make_plan, world_size=processes.world_size, batch_size=args.per_device_train_batch_size,
            micro_batch_tokens=args.micro_batch_tokens, seed=args.seed,
        )  # fmt: skip
        self.collate = partial(
            collate, row_layout=inputs.layout, pad_id=inputs.tokenizer.pad_token_id, row_limit=2 * args.max_length,
            trlx_eos_id=inputs.tokenizer.eos_token_id if args.loss == "trlx" else None, pair_weight=args.pair_weight,
        )  # fmt: skip

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Step, list[Batch]]]:
        """Yield steps start, ..., stop - 1: (number, plan of all ranks, this rank's batch of each micro-step)."""
        read = lambda planned: [self._read("train", groups[self.rank]) for groups in planned[1].micro_steps]
        for (number, step), batches in ahead(read, self._steps(start, stop)):
            yield number, step, batches

    def _steps(self, start: int, stop: int) -> Iterator[tuple[int, Step]]:
        weights = self.pairs["train"].double()
        if self.args.pair_weight == "prompt":  # a prompt counts once, even if its comparisons form several groups
            weights = weights / numbers(self.data.train, "prompt_pairs")
        for number in range(start, stop):
            epoch, place = divmod(number, self.epoch_steps)
            if place == 0 or number == start:
                accumulation = self.args.gradient_accumulation_steps
                plan = self.plan(self.lengths["train"], weights, accumulation=accumulation, epoch=epoch)
            yield number, plan[place]

    @cached_property
    def eval_micro_steps(self) -> list[list[list[int]]]:
        """[micro-step][rank]: the groups that an evaluation computes."""
        plan = self.plan(self.lengths["eval"], self.pairs["eval"], shuffle=False)
        return [micro_step for step in plan for micro_step in step.micro_steps]

    @cached_property
    def eval_pairs(self) -> tuple[Tensor, ...]:
        """For each held-out group, the indices of its pairs among all held-out pairs."""
        return torch.arange(int(self.pairs["eval"].sum())).split(self.pairs["eval"].tolist())

    def eval(self) -> Iterator[tuple[Tensor, Batch]]:
        """Yield (indices of the batch's pairs among all held-out pairs [P], batch) of each of the `eval_micro_steps`."""
        none = torch.empty(0, dtype=torch.int64)
        for micro_step, batch in ahead(lambda groups: self._read("eval", groups[self.rank]), self.eval_micro_steps):
            yield torch.cat([none, *(self.eval_pairs[g] for g in micro_step[self.rank])]), batch

    def sample(self) -> list[Batch]:
        """The first 64 batches of rank 0 in an epoch, to show what padding costs."""
        accumulation = self.args.gradient_accumulation_steps
        plan = self.plan(self.lengths["train"], self.pairs["train"], accumulation=accumulation)
        own = islice((groups[0] for step in plan for groups in step.micro_steps if groups[0]), 64)
        return [self.collate([self.data.train[g] for g in groups]) for groups in own]

    def _read(self, part: str, groups: list[int]) -> Batch:
        # A rank with no groups left still runs a forward pass, because every rank must enter every collective.
        batch = self.collate([getattr(self.data, part)[g] for g in groups] or [self.data.train[0] | {"chosen": []}])
        return (self.cache.look_up(batch) if self.cache else batch).pinned(self.device)
