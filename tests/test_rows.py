"""Batches: `python -m pytest tests/test_rows.py`. Needs only torch.

A scorer that is easy to check replaces the model. In a causal model, a token's reward depends on the token, its position
and the visible tokens before it in its text. So the scorer gives each such triple its own number, in whatever row, layout
and place it occurs. The reference loops over the pairs and reads their texts token by token.
"""

import gc
import threading
import time

import pytest
import torch

from minirm.rows import PADDING, PREFIX, ahead, collate

EOS, PAD = 1, 0


class Scorer:
    """Gives each (token, position, visible tokens before it) its own number."""

    def __init__(self):
        self.numbers = {}

    def reward(self, token, position, before):
        return self.numbers.setdefault((token, position, tuple(before)), len(self.numbers) + 1)

    def of_batch(self, batch):
        """[R, L] numbers. At every position the scorer gets the tokens that a token there can attend to."""
        rewards = torch.zeros(batch.input_ids.shape)
        for r, (ids, positions, segments, visible) in enumerate(
            zip(*(x.tolist() for x in (batch.input_ids, batch.position_ids, batch.segments, batch.visible)))
        ):
            for place, segment in enumerate(segments):
                seen = [q for q in range(place) if visible[q] and segments[q] in (PREFIX, segment)]
                if segment == PADDING:
                    rewards[r, place] = torch.nan
                else:
                    rewards[r, place] = self.reward(ids[place], positions[place], [ids[q] for q in seen])
        return rewards

    def of_text(self, text, pads=0):
        """Numbers of a text, then of `pads` EOS ids that nothing attends to."""
        real = [self.reward(token, t, text[:t]) for t, token in enumerate(text)]
        return real + [self.reward(EOS, len(text) + i, text) for i in range(pads)]


def group(prefix, completions, pairs, margins=None):
    return {
        "prefix": prefix,
        "completions": completions,
        "chosen": [c for c, _ in pairs],
        "rejected": [r for _, r in pairs],
        "margin": margins or [0.0] * len(pairs),
    }


# A pair; a ranked list of four with all its pairs; a text that continues another one after its EOS; no prefix, and a
# completion that is EOS alone; two equal answers, which are one completion.
GROUPS = [
    group([9, 8, 7], [[4, 5, EOS], [6, EOS]], [(0, 1)]),
    group(
        [5, 5, 5, 5, 5, 5],
        [[2, 3, 4, 5, EOS], [2, 3, 9, EOS], [EOS], [7, 7, 7, 7, 7, 7, 7, EOS]],
        [(c, r) for c in range(4) for r in range(c + 1, 4)],
    ),
    group([3, 4], [[2, EOS], [2, EOS, 6, EOS]], [(0, 1), (1, 0)]),
    group([], [[2, 6, EOS], [2, 5, EOS], [EOS]], [(1, 0), (2, 1)]),
    group([9], [[4, 4, EOS]], [(0, 0)]),
]


def reference(scorer, groups, published):
    """For each pair: start, end, and the numbers of chosen and rejected from start to end."""
    for g in groups:
        for c, r in zip(g["chosen"], g["rejected"]):
            tails = g["completions"][c], g["completions"][r]
            longest = max(map(len, tails))
            end = max(longest - 1, 1) if published else longest
            start = next((t for t, (a, b) in enumerate(zip(*tails)) if a != b), min(map(len, tails)))
            start = min(start, end - 1)
            sides = []
            for tail in tails:
                text, first = g["prefix"] + tail, len(g["prefix"])
                numbers = scorer.of_text(text, pads=max(0, end - len(tail)) if published else 0)[first:]
                numbers += numbers[-1:] * (end - len(numbers))  # an ended completion keeps its end reward
                sides.append(numbers[start:end])
            yield start, end, *sides


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("row_limit", [1, 12, 1000])
@pytest.mark.parametrize("row_layout", ["shared", "separate"])
def test_every_pair_gets_the_rewards_of_its_two_texts(row_layout, row_limit, published):
    scorer = Scorer()
    batch = collate(
        GROUPS, row_layout=row_layout, pad_id=PAD, row_limit=row_limit, trlx_eos_id=EOS if published else None
    )
    chosen, rejected = batch.pair_rewards(scorer.of_batch(batch))
    assert chosen.shape == rejected.shape and len(chosen) == 12
    known = len(scorer.numbers)
    for p, (start, end, c, r) in enumerate(reference(scorer, GROUPS, published)):
        assert (batch.start[p].item(), batch.end[p].item()) == (start, end)
        assert chosen[p, start:end].tolist() == c
        assert rejected[p, start:end].tolist() == r
    assert len(scorer.numbers) == known  # the reference asked for no triple that the batch did not have


def test_shared_and_separate_rows_give_each_pair_the_same_rewards():
    scorer = Scorer()
    batches = [collate(GROUPS, row_layout=layout, pad_id=PAD, row_limit=1000) for layout in ("shared", "separate")]
    shared, separate = ([side for side in b.pair_rewards(scorer.of_batch(b))] for b in batches)
    assert torch.equal(shared[0], separate[0]) and torch.equal(shared[1], separate[1])
    assert torch.equal(batches[0].start, batches[1].start) and torch.equal(batches[0].end, batches[1].end)


def test_a_shared_row_by_hand():
    """Prefix 9 8, completions 4 5 EOS and 6 EOS, padded to the 8 places of the other row. The longest text has 7 tokens."""
    groups = [group([9, 8], [[4, 5, EOS], [6, EOS]], [(0, 1)]), group([7, 7, 7, 7, 7], [[2, EOS], [EOS]], [(1, 0)])]
    batch = collate(groups, row_layout="shared", pad_id=PAD, row_limit=99)
    assert batch.input_ids.tolist() == [[9, 8, 4, 5, EOS, 6, EOS, PAD], [7, 7, 7, 7, 7, 2, EOS, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6, 5]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2, 2, PADDING], [0, 0, 0, 0, 0, 1, 1, 2]]
    assert batch.visible.tolist() == [[True] * 7 + [False], [True] * 8]
    assert batch.places.tolist() == [[2, 3, 4], [5, 6, 6], [13, 14, 14], [15, 15, 15]]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 3], [1, 2])
    assert (batch.start.tolist(), batch.end.tolist()) == ([0, 0], [3, 2])
    assert (batch.tokens, batch.separate_tokens) == (15, 5 + 4 + 7 + 6)


def test_separate_rows_by_hand():
    groups = [group([9, 8], [[4, 5, EOS], [6, EOS]], [(0, 1)])]
    batch = collate(groups, row_layout="separate", pad_id=PAD, row_limit=99)
    assert batch.input_ids.tolist() == [[9, 8, 4, 5, EOS], [9, 8, 6, EOS, PAD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, PADDING]]
    assert batch.places.tolist() == [[2, 3, 4], [7, 8, 8]]
    assert (batch.tokens, batch.separate_tokens) == (9, 9)


def test_pads_of_the_published_loss_by_hand():
    """Texts 9 4 EOS and 9 2 3 5 EOS are compared over 3 positions, so 4 EOS gets one more EOS, which is invisible."""
    groups = [group([9], [[4, EOS], [2, 3, 5, EOS]], [(1, 0)])]
    batch = collate(groups, row_layout="shared", pad_id=PAD, row_limit=99, trlx_eos_id=EOS)
    assert batch.input_ids.tolist() == [[9, 4, EOS, EOS, 2, 3, 5, EOS]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 3, 4]]
    assert batch.segments.tolist() == [[0, 1, 1, 1, 2, 2, 2, 2]]
    assert batch.visible.tolist() == [[True, True, True, False, True, True, True, True]]
    assert batch.places.tolist() == [[1, 2, 3, 3], [4, 5, 6, 7]]
    assert (batch.start.tolist(), batch.end.tolist()) == ([0], [3])


def test_padding_is_never_attended_to_and_never_scored():
    """The scorer returns nan for padding, and no pair gets a nan."""
    for published in (None, EOS):
        for row_layout in ("shared", "separate"):
            batch = collate(GROUPS, row_layout=row_layout, pad_id=PAD, row_limit=12, trlx_eos_id=published)
            assert (batch.segments == PADDING).any()
            assert not batch.visible[batch.segments == PADDING].any()
            chosen, rejected = batch.pair_rewards(Scorer().of_batch(batch))
            assert chosen.isfinite().all() and rejected.isfinite().all()


def test_a_group_too_long_for_a_row_repeats_its_prefix():
    """Prefix of 4, five completions of 3 tokens: a row of 10 tokens holds two, so the rows hold two, two and one."""
    tails = [[k, k, EOS] for k in range(3, 8)]
    batch = collate([group([2] * 4, tails, [(0, 4), (3, 1)])], row_layout="shared", pad_id=PAD, row_limit=10)
    assert batch.input_ids.tolist() == [
        [2, 2, 2, 2, 3, 3, EOS, 4, 4, EOS],
        [2, 2, 2, 2, 5, 5, EOS, 6, 6, EOS],
        [2, 2, 2, 2, 7, 7, EOS, PAD, PAD, PAD],
    ]
    chosen, rejected = batch.pair_rewards(batch.input_ids.float())
    assert chosen.tolist() == [[3, 3, EOS], [6, 6, EOS]]
    assert rejected.tolist() == [[7, 7, EOS], [4, 4, EOS]]


def test_a_row_limit_counts_the_pads_of_the_published_loss():
    """EOS alone beside a completion of 4 is padded to 3 positions: prefix 2 + 3 + 4 fits into 9, not into 8."""
    groups = [group([2, 2], [[EOS], [3, 4, 5, EOS]], [(0, 1)])]
    shapes = [
        tuple(collate(groups, row_layout="shared", pad_id=PAD, row_limit=n, trlx_eos_id=EOS).input_ids.shape)
        for n in (8, 9)
    ]
    assert shapes == [(2, 6), (1, 9)]


@pytest.mark.parametrize("published", [None, EOS])
def test_an_identical_pair_is_a_tie(published):
    (g,) = GROUPS[4:]
    batch = collate([g], row_layout="shared", pad_id=PAD, row_limit=99, trlx_eos_id=published)
    chosen, rejected = batch.pair_rewards(torch.randn(batch.input_ids.shape))
    assert torch.equal(chosen, rejected)
    end = 2 if published else 3  # EOS is a pad of the published loss
    assert (batch.start.tolist(), batch.end.tolist()) == ([end - 1], [end])


def test_rows_without_pairs_can_be_computed():
    """A rank with no rows left gets such a batch, because every rank must enter the forward pass."""
    batch = collate([group([9], [[4, EOS], [EOS]], [])], row_layout="shared", pad_id=PAD, row_limit=99)
    chosen, rejected = batch.pair_rewards(torch.zeros(batch.input_ids.shape))
    assert batch.input_ids.tolist() == [[9, 4, EOS, EOS]]
    assert chosen.shape == rejected.shape == (0, 2)
    assert batch.start.shape == batch.end.shape == batch.margin.shape == (0,)


def test_margins_stay_with_their_pairs():
    groups = [
        group([2], [[3, EOS], [4, EOS]], [(0, 1), (1, 0)], [1.5, 0.0]),
        group([2], [[5, EOS], [6, EOS]], [(1, 0)], [3.0]),
    ]
    batch = collate(groups, row_layout="separate", pad_id=PAD, row_limit=99)
    assert batch.margin.tolist() == [1.5, 0.0, 3.0] and batch.margin.dtype == torch.float32
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 1, 3], [1, 0, 2])


def test_positions_never_exceed_the_longest_text():
    """A shared row is much longer than its texts, here 3 + 5 * 4, and the model may not have that many positions."""
    tails = [[k, k, k, EOS] for k in range(3, 8)]
    batch = collate([group([2] * 3, tails, [(0, 1)]), GROUPS[0]], row_layout="shared", pad_id=PAD, row_limit=99)
    assert batch.input_ids.shape == (2, 23)
    assert batch.position_ids.max() == 6


def test_to_copies_every_tensor():
    batch = collate(GROUPS, row_layout="shared", pad_id=PAD, row_limit=99)
    moved = batch.to(torch.device("meta"))
    tensors = [name for name, value in vars(moved).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10 and all(getattr(moved, name).is_meta for name in tensors)
    assert moved.group == batch.group and moved.tokens == batch.tokens


def test_the_next_item_is_made_while_the_caller_uses_this_one():
    made, threads = [], set()

    def make(item):
        made.append(item)
        threads.add(threading.current_thread().name)
        return item * item

    seen = []
    for item, square in ahead(make, range(5)):
        while len(made) < min(item + 2, 5):  # hangs if nothing makes the next one
            time.sleep(0.001)
        assert square == item * item and len(made) <= item + 2
        seen.append(item)
    assert seen == made == [0, 1, 2, 3, 4] and threading.current_thread().name not in threads
    assert list(ahead(make, [])) == []


def test_an_error_ahead_is_raised_in_place_of_its_item():
    def make(item):
        if item == 2:
            raise OSError(28, "No space left on device")
        return item

    seen = []
    with pytest.raises(OSError, match="No space"):
        for item, _ in ahead(make, range(5)):
            seen.append(item)
    assert seen == [0, 1]


def test_stopping_early_leaves_no_thread_behind():
    for item, _ in ahead(lambda item: item, range(1000)):
        if item == 3:
            break
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
