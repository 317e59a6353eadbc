"""The plan of steps, micro-steps and ranks: `python -m pytest tests/test_plan.py`. Needs only torch, one process."""

import random

import pytest
import torch

from minirm.plan import WINDOW_STEPS, Step, make_plan, steps_per_epoch


def data(count, seed=0):
    """(lengths 10..500, pairs 1..4) of `count` groups."""
    rng = random.Random(seed)
    return [rng.randint(10, 500) for _ in range(count)], [rng.randint(1, 4) for _ in range(count)]


def groups_of(plan):
    return [g for step in plan for micro in step.micro_steps for groups in micro for g in groups]


SHAPES = [(1, 1, 1), (1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 4, 1), (2, 4, 4), (3, 2, 2), (8, 1, 4), (64, 1, 1)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 131, 333])
@pytest.mark.parametrize("world_size, batch_size, accumulation", SHAPES)
def test_every_group_is_planned_exactly_once(world_size, batch_size, accumulation, count, shuffle):
    lengths, pairs = data(count)
    shape = {"world_size": world_size, "batch_size": batch_size, "accumulation": accumulation}
    plan = make_plan(lengths, pairs, **shape, seed=3, epoch=1, shuffle=shuffle)
    assert sorted(groups_of(plan)) == list(range(count))
    per_step = world_size * batch_size * accumulation
    assert len(plan) == steps_per_epoch(count, **shape) == -(-count // per_step)
    for step in plan:
        own = [g for micro in step.micro_steps for groups in micro for g in groups]
        assert step.weight == sum(pairs[g] for g in own)
        assert len(step.micro_steps) <= accumulation
        for micro in step.micro_steps:
            sizes = [len(groups) for groups in micro]
            assert len(sizes) == world_size and max(sizes) <= batch_size
            assert max(sizes) - min(sizes) <= 1 and sum(sizes) > 0
    assert sum(len(s.micro_steps) < accumulation or len(groups_of([s])) < per_step for s in plan) <= 1  # the last one


def plan_by_lists(lengths, weights, world_size, batch_size, accumulation, seed, epoch, shuffle, micro_batch_tokens):
    """A slow reference for make_plan that computes all steps at once."""
    count, per_step = len(lengths), world_size * batch_size * accumulation
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator).tolist() if shuffle else list(range(count))
    window = per_step * WINDOW_STEPS if shuffle else max(1, count)
    steps = []
    for begin in range(0, count, window):
        groups = sorted(order[begin : begin + window], key=lambda g: (-lengths[g], g))
        for i in range(0, len(groups), per_step):
            left, micro_steps = groups[i : i + per_step], []
            weight = sum(weights[g] for g in left)
            while left:
                size = world_size * batch_size
                if micro_batch_tokens:
                    size = world_size * max(1, micro_batch_tokens // lengths[left[0]])
                there_and_back = 1 - 2 * (len(micro_steps) % 2)
                micro_steps.append([left[:size][rank::world_size] for rank in range(world_size)][::there_and_back])
                left = left[size:]
            steps.append(Step(micro_steps, weight))
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()] if shuffle else steps


@pytest.mark.parametrize("tokens", [0, 900])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 7, 131, 1000])
def test_lazily_computed_steps_equal_the_whole_plan(count, shuffle, tokens):
    lengths, pairs = data(count)
    weights = [n / 3 for n in pairs]
    for shape in SHAPES[:8]:
        names = ("world_size", "batch_size", "accumulation", "seed", "epoch", "shuffle", "micro_batch_tokens")
        options = dict(zip(names, (*shape, 3, 1, shuffle, tokens)))
        plan, wanted = make_plan(lengths, weights, **options), plan_by_lists(lengths, weights, **options)
        assert list(plan) == wanted and plan[-1] == wanted[-1] and plan[1:3] == wanted[1:3]
        with pytest.raises(IndexError):
            plan[len(wanted)]


def test_a_step_by_hand():
    """Six groups, 2 ranks x 1 x 2: sorted 5 2 4 0 | 3 1, dealt forward, then backward; pairs 6+3+5+1 = 15 and 4+2 = 6."""
    plan = make_plan(
        [30, 10, 50, 20, 40, 60], [1, 2, 3, 4, 5, 6], world_size=2, batch_size=1, accumulation=2, shuffle=False
    )
    assert [tuple(step) for step in plan] == [([[[5], [2]], [[0], [4]]], 15), ([[[3], [1]]], 6)]


@pytest.mark.parametrize("count", [64, 61])
def test_steps_do_not_depend_on_their_split_over_ranks_and_micro_steps(count):
    lengths, pairs = data(count)
    plans = [
        make_plan(lengths, pairs, world_size=w, batch_size=b, accumulation=a, seed=1, epoch=2)
        for w, b, a in [(1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2)]
    ]
    steps = [[(sorted(groups_of([step])), step.weight) for step in plan] for plan in plans]
    assert all(other == steps[0] for other in steps[1:])
    assert len({tuple(groups) for groups, _ in steps[0]}) == 16


def test_a_short_last_micro_step_is_spread_evenly_over_ranks():
    """19 groups, 4 ranks x 4: a step of 16 and a step of 3, in which three ranks get one each and the fourth none."""
    lengths, pairs = data(19)
    plan = make_plan(lengths, pairs, world_size=4, batch_size=4, seed=0)
    sizes = sorted([len(groups) for groups in micro] for step in plan for micro in step.micro_steps)
    assert sizes == [[1, 1, 1, 0], [4, 4, 4, 4]]
    # 5 groups, 2 ranks x 4 x 4 micro-steps: one micro-step, 3 and 2
    plan = make_plan(*data(5), world_size=2, batch_size=4, accumulation=4)
    assert [[len(groups) for groups in micro] for step in plan for micro in step.micro_steps] == [[3, 2]]


def test_more_ranks_than_groups():
    plan = make_plan([5, 9, 7], [1, 2, 3], world_size=8, batch_size=2, accumulation=4, shuffle=False)
    assert [tuple(step) for step in plan] == [([[[1], [2], [0], [], [], [], [], []]], 6)]


def test_nothing_to_plan():
    assert len(make_plan([], [], world_size=2, batch_size=1)) == 0
    assert steps_per_epoch(0, 2, 1, 4) == 0


def test_the_plan_is_the_same_on_every_rank():
    """The same arguments give the same plan, regardless of the state of torch's global generator."""
    lengths, pairs = data(100)
    arguments = {"world_size": 2, "batch_size": 2, "accumulation": 2, "seed": 5, "epoch": 3}
    before = torch.get_rng_state()
    first = list(make_plan(lengths, pairs, **arguments))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234), torch.rand(7)
    assert list(make_plan(lengths, pairs, **arguments)) == first


def test_every_epoch_and_every_seed_has_its_own_order():
    lengths, pairs = data(100)
    orders = [
        groups_of(make_plan(lengths, pairs, world_size=1, batch_size=1, accumulation=4, seed=seed, epoch=epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 9
    # The steps also combine other groups: they are not the same steps in another order.
    steps = [{frozenset(order[i : i + 4]) for i in range(0, 100, 4)} for order in orders]
    assert all(len(a & b) < 13 for i, a in enumerate(steps) for b in steps[:i])


@pytest.mark.parametrize("seed", [0, 2**40, 2**63, -1])
def test_any_seed_that_torch_accepts_works(seed):
    plan = make_plan(*data(10), world_size=1, batch_size=1, seed=seed, epoch=1)
    assert sorted(groups_of(plan)) == list(range(10))


def test_long_groups_do_not_all_come_first():
    """Steps are shuffled over the whole epoch: the longest group of 640 is not always in the first step."""
    lengths, pairs = data(640)
    first = [groups_of(make_plan(lengths, pairs, world_size=1, batch_size=4, epoch=e)[:1]) for e in range(8)]
    assert any(max(lengths[g] for g in groups) < 250 for groups in first)


def test_without_shuffling_the_longest_come_first():
    lengths, pairs = data(50)
    order = groups_of(make_plan(lengths, pairs, world_size=1, batch_size=1, shuffle=False))
    assert [lengths[g] for g in order] == sorted(lengths, reverse=True)


def padding_share(plan, lengths):
    """Share of padding if every rank pads a micro-step to its longest group on any rank."""
    places = tokens = 0
    for step in plan:
        for micro in step.micro_steps:
            here = [lengths[g] for groups in micro for g in groups]
            places += max(here) * len(here)
            tokens += sum(here)
    return 1 - tokens / places


def test_groups_of_similar_length_share_a_micro_step():
    """Lengths uniform in 10..500, micro-steps of 8. Unsorted, 1 - 255 / (10 + 490 * 8/9) = 0.43 is padding.

    Sorted in windows of 16 x 16 = 256 groups, a micro-step spans 8 / 256 of the lengths: about 8 of 255 tokens, 0.03.
    """
    lengths, pairs = data(1024)
    sorted_share = padding_share(make_plan(lengths, pairs, world_size=4, batch_size=2, accumulation=2), lengths)
    as_they_come = [Step([[list(range(i, i + 8))]], 8) for i in range(0, 1024, 8)]
    unsorted_share = padding_share(as_they_come, lengths)
    assert WINDOW_STEPS == 16
    assert sorted_share < 0.04
    assert 0.38 < unsorted_share < 0.48


def test_no_rank_waits_long_for_another_within_a_step():
    """Realistic lengths, 8 ranks, 4 micro-steps: the busiest rank's work over the mean, averaged over steps.

    If all micro-steps were dealt in the same order, rank 0 would get the longest group of all four: 1.0135 here.
    """
    lengths = (300 * torch.exp(0.5 * torch.randn(8192, generator=torch.Generator().manual_seed(0)))).clamp(max=550)
    plan = make_plan(lengths.tolist(), [1] * 8192, world_size=8, batch_size=1, accumulation=4)
    work = torch.stack([lengths[torch.tensor(step.micro_steps)[:, :, 0]].sum(dim=0) for step in plan])  # [steps, ranks]
    assert len(work) == 256
    assert (work.amax(dim=1) / work.mean(dim=1)).mean() < 1.005


@pytest.mark.parametrize("world_size, tokens", [(1, 100), (2, 100), (2, 37), (3, 1000)])
def test_micro_steps_by_tokens_fit_their_budget_and_form_the_same_steps(world_size, tokens):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 60, (101,), generator=generator).tolist()
    shape = {"world_size": world_size, "batch_size": 2, "accumulation": 5}
    by_count, by_tokens = (make_plan(lengths, [1] * 101, micro_batch_tokens=n, **shape) for n in (0, tokens))
    for old, new in zip(by_count, by_tokens, strict=True):
        groups = lambda step: sorted(g for micro in step.micro_steps for of_rank in micro for g in of_rank)
        assert groups(old) == groups(new) and old.weight == new.weight
        for micro in new.micro_steps:
            assert len(micro) == world_size
            longest = max(lengths[g] for of_rank in micro for g in of_rank)
            most = max(map(len, micro))
            assert most == 1 or most * longest <= tokens
            assert most - min(map(len, micro)) <= 1
        # Greedy: every micro-step but the last is full.
        for first, following in zip(new.micro_steps, new.micro_steps[1:]):
            fit = max(1, tokens // max(lengths[g] for of_rank in first for g in of_rank))
            assert sum(map(len, first)) == fit * world_size and following
