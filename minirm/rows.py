"""Collate groups of token ids into one batch: rows for the model, indices of each completion's rewards, and pairs.

    shared     [prefix | completion 1 | ... | completion K], every completion's positions continue from the prefix
    separate   [prefix | completion k], one row per completion

A completion's rewards are located by its length, never by searching for a pad or EOS id.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from minirm.data.tokens import common_prefix

Item, Made = TypeVar("Item"), TypeVar("Made")
PREFIX, PADDING = 0, -1  # in `segments`; the k-th completion of a row has k


@dataclass
class Batch:
    """R rows of L positions, K completions, P pairs; T = tokens of the longest completion."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64: position in the text, not in the row
    segments: Tensor  # [R, L] int32: PREFIX, index of the completion in its row, or PADDING
    visible: Tensor  # [R, L] bool: may be attended to; False for padding and for the pads of the published loss
    places: Tensor  # [K, T] int64: indices of each completion's rewards in rewards.flatten(), the last one repeated
    chosen: Tensor  # [P] int64: index of a completion
    rejected: Tensor  # [P] int64
    start: Tensor  # [P] int64: first index in the completions where the two differ
    end: Tensor  # [P] int64: one past the last index compared; both end rewards are at end - 1
    margin: Tensor  # [P] fp32
    weight: Tensor  # [P] fp32: each pair's weight in the loss
    group: list[int]  # [R] index of each row's group, ascending
    tokens: int  # real tokens computed, without padding
    separate_tokens: int  # the same if every completion had its own row
    cached: list[tuple[str, Tensor | None]] = field(default_factory=list)  # see TrunkCache.look_up

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device` without blocking."""
        return Batch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in vars(self).values()))

    def pinned(self, device: torch.device) -> "Batch":
        """Copy to page-locked memory, from which `to` does not block, if `device` is a GPU; else return the batch."""
        if device.type != "cuda":
            return self
        torch.cuda.set_device(device)  # the current device is a thread's own, and pinning needs it
        pinned = Batch(*(v.pin_memory() if isinstance(v, Tensor) else v for v in vars(self).values()))
        pinned.cached = [(name, None if states is None else states.pin_memory()) for name, states in self.cached]
        return pinned

    def pair_rewards(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """[R, L] rewards -> chosen [P, T], rejected [P, T], from the end of the prefix. The end reward is repeated."""
        per_completion = rewards.flatten()[self.places]
        return per_completion[self.chosen], per_completion[self.rejected]

    def end_rewards(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """[R, L] rewards -> chosen [P], rejected [P]: the rewards of the whole answers."""
        last = self.end - 1
        return tuple(rewards.flatten()[self.places[side, last]] for side in (self.chosen, self.rejected))


def collate(
    groups: list[dict], *, row_layout, pad_id: int, row_limit: int, trlx_eos_id: int | None = None, pair_weight="pair"
) -> Batch:
    """Collate groups (see prepare.py) into one batch. Groups without comparisons need only prefix and completions.

    Args:
        row_layout: "shared" or "separate".
        pad_id: id at padding positions; nothing attends to it.
        row_limit: longest shared row in tokens; a longer group is split over several rows, each with the prefix.
        trlx_eos_id: the EOS id for the published loss, else None. That loss treats EOS as padding: a text ends before
            its EOS, and a shorter text continues to the end of the longer one through pads (EOS ids), which nothing
            attends to but which have rewards.
        pair_weight: "pair" weighs all pairs equally; "prompt" divides by the number of pairs that their prompt has.
    """
    rows: list[list[list[int]]] = []  # [row][segment]: token ids; segment 0 is the prefix
    group_of: list[int] = []  # for each row
    located: list[tuple[int, int, int, int]] = []  # for each completion: row, offset in it, length, length with pads
    pairs = []  # (chosen, rejected, start, end, margin, weight)
    for g, group in enumerate(groups):
        base, prefix, tails = len(located), group["prefix"], group["completions"]
        length = [len(tail) for tail in tails]
        padded = list(length)
        weight = 1 / group["prompt_pairs"] if pair_weight == "prompt" else 1.0
        for c, r, margin in zip(*(group.get(name, ()) for name in ("chosen", "rejected", "margin"))):
            end = max(length[c], length[r])
            if trlx_eos_id is not None:
                end = max(end - 1, 1)
                padded[c], padded[r] = max(padded[c], end), max(padded[r], end)
            # Equal answers occur only in evaluation; comparing them at their end gives a tie.
            start = min(common_prefix([tails[c], tails[r]]), end - 1)
            pairs.append((base + c, base + r, start, end, margin, weight))
        for tail, real, whole in zip(tails, length, padded):
            if g not in group_of[-1:] or row_layout == "separate" or sum(map(len, rows[-1])) + whole > row_limit:
                rows.append([prefix])
                group_of.append(g)
            located.append((len(rows) - 1, sum(map(len, rows[-1])), real, whole))
            rows[-1].append(tail + [trlx_eos_id] * (whole - real))

    longest_text = max(len(row[0]) + max(map(len, row[1:])) for row in rows)
    shape = (len(rows), max(sum(map(len, row)) for row in rows))
    input_ids = torch.full(shape, pad_id)
    # Positions continue through the padding, but not past the longest text: the model may have no more of them.
    position_ids = torch.arange(shape[1]).clamp(max=longest_text - 1).repeat(shape[0], 1)
    segments = torch.full(shape, PADDING, dtype=torch.int32)
    visible = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(rows):
        place = 0
        for number, ids in enumerate(row):
            here = slice(place, place + len(ids))
            input_ids[r, here] = torch.tensor(ids, dtype=torch.int64)
            position_ids[r, here] = torch.arange(len(ids)) + (len(row[0]) if number else 0)
            segments[r, here] = number
            visible[r, here] = True
            place += len(ids)
    for r, first, real, whole in located:
        visible[r, first + real : first + whole] = False  # the pads of the published loss

    row_of, first, _, length = torch.tensor(located).unbind(1)
    places = (row_of * shape[1] + first)[:, None] + torch.minimum(torch.arange(int(length.max())), length[:, None] - 1)
    compared = torch.tensor([pair[:4] for pair in pairs], dtype=torch.int64).view(-1, 4).unbind(1)
    margin, weights = torch.tensor([pair[4:] for pair in pairs], dtype=torch.float32).view(-1, 2).unbind(1)
    tokens = sum(len(ids) for row in rows for ids in row)
    separate_tokens = sum(len(row[0]) + len(ids) for row in rows for ids in row[1:])
    tensors = (input_ids, position_ids, segments, visible, places, *compared, margin, weights)
    return Batch(*tensors, group_of, tokens, separate_tokens)


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
    """Yield (item, make(item)) in order. A thread makes the next one while the caller works on the current one.

    An error in `make` is raised here, at its item's turn. A caller that stops early waits for one item at most.
    """
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = ((item, thread.submit(make, item)) for item in items)
        for (item, made), _ in pairwise(chain(coming, [None])):  # pairwise submits the next item first
            yield item, made.result()
