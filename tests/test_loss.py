"""Losses and accuracy: `python -m pytest tests/test_loss.py`. Needs only torch.

Literals, with s(x) = -logsigmoid(x) = log(1 + exp(-x)):
    s(0) = log 2 = 0.693147   s(1) = 0.313262   s(-1) = 1.313262   s(2) = 0.126928   s(-2) = 2.126928   s(1e4) = 0
    s(-1e4) = 1e4
The reference restates the loop over pairs of CarperAI/trlx, examples/summarize_rlhf/reward_model/reward_model.py. It
sees padded texts and a reward at every position, and knows nothing about prefixes, layouts or vectorization.
"""

import pytest
import torch

from minirm.loss import centering_loss, divergence_index, divergence_loss, pairwise_accuracy, pairwise_loss
from minirm.rows import collate

EOS, PAD = 1, 0


def published_loss(chosen_ids, rejected_ids, chosen_rewards, rejected_rewards, pad):
    """The published loss, pair by pair, of lists of [T] ids and rewards padded to one length."""
    total = 0.0
    for c_ids, r_ids, c_rewards, r_rewards in zip(chosen_ids, rejected_ids, chosen_rewards, rejected_rewards):
        lengths = [ids.index(pad) if pad in ids else len(ids) for ids in (c_ids, r_ids)]
        end = max(lengths)
        divergence_ind = next(t for t in range(len(c_ids)) if c_ids[t] != r_ids[t])
        difference = c_rewards[divergence_ind:end] - r_rewards[divergence_ind:end]
        total = total - torch.log(torch.sigmoid(difference)).mean()
    return total / len(chosen_ids)


def random_texts(seed, pairs=8):
    """Pairs (chosen, rejected) of texts of ids 2..6 without EOS. In 2 of every 8 pairs, one side is a prefix of the other."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, 7, (count,), generator=generator).tolist()

    texts = []
    while len(texts) < pairs:
        shared = ids(1, 6)
        chosen, rejected = shared + ids(1, 9), shared + ids(1, 9)
        if len(texts) % 4 == 2:  # either side may be the prefix
            rejected = chosen[: len(shared)] if len(texts) % 8 == 2 else rejected
            chosen = rejected[: len(shared) + 1] if len(texts) % 8 == 6 else chosen
        if chosen != rejected:
            texts.append((chosen, rejected))
    return texts


def as_groups(texts):
    """Each pair as a group, split where its two texts first differ, EOS included."""
    groups = []
    for chosen, rejected in texts:
        shared = next((t for t, (c, r) in enumerate(zip(chosen, rejected)) if c != r), min(len(chosen), len(rejected)))
        groups.append(
            {
                "prefix": chosen[:shared],
                "completions": [chosen[shared:] + [EOS], rejected[shared:] + [EOS]],
                "chosen": [0],
                "rejected": [1],
                "margin": [0.0],
            }
        )
    return groups


class Scorer:
    """Gives each text its row of numbers, wherever a layout puts the text. The row also covers the pads after the text."""

    def __init__(self, texts, seed, width=40):
        self.row = {tuple(text): i for i, text in enumerate(t for pair in texts for t in pair)}
        generator = torch.Generator().manual_seed(seed)
        self.table = (3 * torch.randn(len(self.row), width, generator=generator, dtype=torch.float64)).requires_grad_()

    def of_text(self, text, length):
        return self.table[self.row[tuple(text)], :length]

    def of_batch(self, batch, texts):
        """[R, L] rewards of separate rows: row 2i is the chosen text of pair i, row 2i + 1 the rejected one."""
        rows = [self.row[tuple(text)] for pair in texts for text in pair]
        return self.table[torch.tensor(rows), : batch.input_ids.shape[1]]


def ours(kind, batch, rewards):
    if kind == "last":
        return pairwise_loss(*batch.end_rewards(rewards), batch.margin)
    return divergence_loss(*batch.pair_rewards(rewards), batch.start, batch.end)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["divergence", "last", "trlx"])
def test_losses_and_gradients_agree_with_the_published_loop(kind, seed):
    texts = random_texts(seed)
    scorer = Scorer(texts, seed)
    batch = collate(
        as_groups(texts), row_layout="separate", pad_id=PAD, row_limit=1000, trlx_eos_id=EOS if kind == "trlx" else None
    )
    value = ours(kind, batch, scorer.of_batch(batch, texts))
    (gradient,) = torch.autograd.grad(value, scorer.table)

    width = 30
    if kind == "trlx":  # as published: EOS is the pad, so a text ends before it
        ids = [[text + [EOS] * (width - len(text)) for text in side] for side in zip(*texts)]
        rewards = [[scorer.of_text(text, width) for text in side] for side in zip(*texts)]
        expected = published_loss(*ids, *rewards, pad=EOS)
    else:  # EOS is a token of the text, and a text that has ended keeps its end reward
        ids = [[text + [EOS] + [PAD] * (width - len(text) - 1) for text in side] for side in zip(*texts)]
        rewards = []
        for side in zip(*texts):
            own = [scorer.of_text(text, len(text) + 1) for text in side]
            rewards.append([torch.cat([r, r[-1:].expand(width - len(r))]) for r in own])
        if kind == "divergence":
            expected = published_loss(*ids, *rewards, pad=PAD)
        else:
            expected = sum(-torch.log(torch.sigmoid(c[-1] - r[-1])) for c, r in zip(*rewards)) / len(texts)
    (expected_gradient,) = torch.autograd.grad(expected, scorer.table)

    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert (gradient - expected_gradient).abs().max() < 1e-7
    assert gradient.abs().max() > 1e-3


def test_published_end_rewards_are_read_at_the_end_of_the_longer_text():
    """Texts [2, 3] and [2, 4, 5, 6]: the longer one ends at position 3, so both texts are scored there."""
    (group,) = as_groups([([2, 3], [2, 4, 5, 6])])
    batch = collate([group], row_layout="separate", pad_id=PAD, row_limit=99, trlx_eos_id=EOS)
    rewards = torch.arange(10.0).view(2, 5)  # chosen: places 0..3 and padding; rejected: 0..3 and EOS
    chosen, rejected = batch.pair_rewards(rewards)
    assert (batch.start.tolist(), batch.end.tolist()) == ([0], [3])
    assert chosen[0, :3].tolist() == [1.0, 2.0, 3.0]
    assert rejected[0, :3].tolist() == [6.0, 7.0, 8.0]
    assert [side.tolist() for side in batch.end_rewards(rewards)] == [[3.0], [8.0]]


def test_divergence_index_is_the_first_difference():
    chosen = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [9, 6, 9, 8]])
    rejected = torch.tensor([[9, 6, 7, 8], [5, 6, 9, 9], [5, 6, 7, 9], [5, 6, 7, 8]])
    index = divergence_index(chosen, rejected)
    assert index.tolist() == [0, 2, 3, 0]
    assert index.dtype == torch.int64
    assert divergence_index(chosen.int(), rejected).tolist() == [0, 2, 3, 0]


def test_divergence_index_names_equal_rows():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    other = torch.tensor([[1, 2], [3, 5], [5, 6]])
    with pytest.raises(ValueError, match=r"equal in rows \[0, 2\]"):
        divergence_index(ids, other)


def test_divergence_loss_by_hand():
    """Pair 1, t = 1..2: differences 1 and -2, (0.313262 + 2.126928) / 2 = 1.220095. Pair 2, t = 2: s(0) = 0.693147.

    Their mean is 0.956621. Gradients for chosen: -(1 - sigmoid(d)) / count / 2 pairs: d = 1: -0.268941 / 4 = -0.067235,
    d = -2: -0.880797 / 4 = -0.220199, d = 0: -0.5 / 2 = -0.25.
    """
    chosen = torch.tensor([[9.0, 1.0, 0.0, 9.0], [9.0, 9.0, 3.0, 9.0]], requires_grad=True)
    rejected = torch.tensor([[0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 0.0]], requires_grad=True)
    loss = divergence_loss(chosen, rejected, torch.tensor([1, 2]), torch.tensor([3, 3]))
    loss.backward()
    assert loss.item() == pytest.approx(0.956621, abs=1e-6)
    expected = torch.tensor([[0.0, -0.067235, -0.220199, 0.0], [0.0, 0.0, -0.25, 0.0]])
    assert torch.allclose(chosen.grad, expected, atol=1e-6)
    assert torch.allclose(rejected.grad, -expected, atol=1e-6)


def test_pairs_weigh_the_same_regardless_of_their_length():
    """Ten tokens with difference 1 and one token with difference -1: (0.313262 + 1.313262) / 2 = 0.813262."""
    chosen = torch.cat([torch.ones(1, 10), -torch.ones(1, 10)])
    loss = divergence_loss(chosen, torch.zeros(2, 10), torch.tensor([0, 9]), torch.tensor([10, 10]))
    assert loss.item() == pytest.approx(0.813262, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("difference, value, slope", [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)])
def test_differences_of_1e4_stay_finite(dtype, difference, value, slope):
    rewards = torch.tensor([[difference, difference]], dtype=dtype, requires_grad=True)
    loss = divergence_loss(rewards, torch.zeros(1, 2, dtype=dtype), torch.tensor([0]), torch.tensor([2]))
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-2)  # 1e4 is 9984 in bf16
    assert rewards.grad.tolist() == [[slope / 2, slope / 2]]
    rewards = torch.tensor([difference], dtype=dtype, requires_grad=True)
    loss = pairwise_loss(rewards, torch.zeros(1, dtype=dtype))
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-2)
    assert rewards.grad.tolist() == [slope]


@pytest.mark.parametrize("garbage", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_rewards_outside_the_range_have_no_influence(garbage):
    """t = 1, difference 1: loss 0.313262, gradient -0.268941 there and zero before and after."""
    chosen = torch.tensor([[garbage, 1.0, garbage]], requires_grad=True)
    rejected = torch.tensor([[-garbage, 0.0, garbage]], requires_grad=True)
    loss = divergence_loss(chosen, rejected, torch.tensor([1]), torch.tensor([2]))
    loss.backward()
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert torch.allclose(chosen.grad, torch.tensor([[0.0, -0.268941, 0.0]]), atol=1e-6)
    assert torch.allclose(rejected.grad, torch.tensor([[0.0, 0.268941, 0.0]]), atol=1e-6)


def test_nan_inside_the_range_is_not_hidden():
    chosen = torch.tensor([[1.0, float("nan")]])
    assert divergence_loss(chosen, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2])).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_give_an_fp32_loss(dtype):
    """s(-20) = 20 in fp32. In fp16 sigmoid(-20) is 0 and its logarithm -inf."""
    chosen, rejected = torch.full((1, 1), -20, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    loss = divergence_loss(chosen, rejected, torch.tensor([0]), torch.tensor([1]))
    assert (loss.dtype, loss.item()) == (torch.float32, pytest.approx(20.0, abs=1e-6))
    for margin in (None, torch.zeros(1, dtype=dtype), torch.zeros(1, dtype=torch.float64)):
        loss = pairwise_loss(chosen[0], rejected[0], margin)
        assert (loss.dtype, loss.item()) == (torch.float32, pytest.approx(20.0, abs=1e-6))
    assert pairwise_loss(chosen[0].double(), rejected[0].double()).dtype == torch.float64


def test_half_precision_losses_stay_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        loss = pairwise_loss(torch.tensor([-20.03125]), torch.tensor([0.0]))
    assert (loss.dtype, loss.item()) == (torch.float32, pytest.approx(20.03125, abs=1e-6))


def test_pairwise_loss_by_hand():
    """Differences 1, -1, 2, 0: (0.313262 + 1.313262 + 0.126928 + 0.693147) / 4 = 0.611650."""
    loss = pairwise_loss(torch.tensor([2.0, 0.0, 5.0, 7.0]), torch.tensor([1.0, 1.0, 3.0, 7.0]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.611650, abs=1e-6)


def test_margin_is_subtracted_from_the_difference():
    """Differences 2 and 2 minus margins 1 and 4: (s(1) + s(-2)) / 2 = (0.313262 + 2.126928) / 2 = 1.220095."""
    loss = pairwise_loss(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]))
    assert loss.item() == pytest.approx(1.220095, abs=1e-6)
    loss = pairwise_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.126928, abs=1e-6)


def test_margin_is_subtracted_at_every_position():
    """Pair 1, t = 1..2: 3 - 2 = 1 and 0 - 2 = -2: (0.313262 + 2.126928) / 2 = 1.220095. Pair 2, t = 0: 0.5 - 0.5 = 0:
    0.693147. Mean 0.956621. Gradients for chosen: -0.268941 / 4, -0.880797 / 4, -0.5 / 2, and zero outside.
    """
    chosen = torch.tensor([[9.0, 3.0, 0.0], [0.5, 9.0, 9.0]], requires_grad=True)
    start, end, margin = torch.tensor([1, 0]), torch.tensor([3, 1]), torch.tensor([2.0, 0.5], dtype=torch.float64)
    loss = divergence_loss(chosen, torch.zeros(2, 3), start, end, margin=margin)
    loss.backward()
    assert (loss.item(), loss.dtype) == (pytest.approx(0.956621, abs=1e-6), torch.float32)
    expected = torch.tensor([[0.0, -0.067235, -0.220199], [-0.25, 0.0, 0.0]])
    assert torch.allclose(chosen.grad, expected, atol=1e-6)
    without = divergence_loss(chosen, torch.zeros(2, 3), start, end)
    assert divergence_loss(chosen, torch.zeros(2, 3), start, end, margin=0 * margin).item() == without.item()


def test_centering_by_hand():
    """(1 + 2)^2 = 9 and (-1 - 3)^2 = 16: 12.5; gradients 2 (c + r) / 2 pairs, the same for both sides: 3 and -4."""
    chosen, rejected = torch.tensor([1.0, -1.0], requires_grad=True), torch.tensor([2.0, -3.0], requires_grad=True)
    loss = centering_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == 12.5
    assert chosen.grad.tolist() == rejected.grad.tolist() == [3.0, -4.0]
    assert centering_loss(torch.tensor([300.0]).half(), torch.tensor([0.0]).half()).item() == 90000.0  # no inf in fp16


LOSSES = {
    "divergence": lambda c, r, **options: divergence_loss(
        c[:, None], r[:, None], torch.zeros(len(c)).long(), torch.ones(len(c)).long(), **options
    ),
    "pairwise": pairwise_loss,
    "centering": centering_loss,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_weights_give_a_weighted_mean(kind):
    """Differences 1, -1, 2 with weights 1/2, 1/2 (two comparisons of a prompt) and 1 (the only one of another):

    (0.313262 / 2 + 1.313262 / 2 + 0.126928) / 2 = 0.470095; slopes -(1 - sigmoid(d)) w / 2: -0.268941 / 4 = -0.067235,
    -0.731059 / 4 = -0.182765, -0.119203 / 2 = -0.059601. Centering, sums 1, -1, 2: (1 / 2 + 1 / 2 + 4) / 2 = 2.5; slopes
    2 (c + r) w / 2: 0.5, -0.5, 2.
    """
    chosen, weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True), torch.tensor([0.5, 0.5, 1.0])
    loss = LOSSES[kind](chosen, torch.zeros(3), weight=weight)
    loss.backward()
    if kind == "centering":
        assert loss.item() == 2.5 and chosen.grad.tolist() == [0.5, -0.5, 2.0]
    else:
        assert loss.item() == pytest.approx(0.470095, abs=1e-6)
        assert chosen.grad.tolist() == pytest.approx([-0.067235, -0.182765, -0.059601], abs=1e-6)
    assert LOSSES[kind](chosen, torch.zeros(3), weight=2 * weight).item() == pytest.approx(loss.item(), rel=1e-6)
    equal, without = (LOSSES[kind](chosen, torch.zeros(3), weight=w).item() for w in (torch.full((3,), 7.0), None))
    assert equal == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_without_reduction_each_pair_has_its_own_loss(kind):
    """s(1), s(-1), s(2); squares 1, 1, 4; both times the weights, if given."""
    chosen, expected = torch.tensor([1.0, -1.0, 2.0]), [0.313262, 1.313262, 0.126928]
    expected = [1.0, 1.0, 4.0] if kind == "centering" else expected
    each = LOSSES[kind](chosen, torch.zeros(3), reduction="none")
    assert each.tolist() == pytest.approx(expected, abs=1e-6)
    weighted = LOSSES[kind](chosen, torch.zeros(3), weight=torch.tensor([2.0, 0.0, 1.0]), reduction="none")
    assert weighted.tolist() == pytest.approx([2 * expected[0], 0.0, expected[2]], abs=1e-6)
    with pytest.raises(ValueError, match="'mean' or 'none', got 'sum'"):
        LOSSES[kind](chosen, torch.zeros(3), reduction="sum")


def test_accuracy_counts_ties_as_wrong():
    accuracy = pairwise_accuracy(torch.tensor([1.0, 2.0, 3.0, -1.0]), torch.tensor([0.0, 2.0, 4.0, -2.0]))
    assert (accuracy.item(), accuracy.dtype, accuracy.shape) == (0.5, torch.float32, ())


@pytest.mark.parametrize("constant", [0.0, 1.5, -65504.0, float("nan")])
def test_a_constant_scorer_has_accuracy_0(constant):
    rewards = torch.full((7,), constant)
    assert pairwise_accuracy(rewards, rewards.clone()).item() == 0.0
    assert pairwise_accuracy(rewards.half(), rewards.half()).item() == 0.0


RANGE = torch.zeros(2).long(), torch.ones(2).long()


def rewards(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda: divergence_index(torch.zeros(3).long(), torch.ones(3).long()),
        lambda: divergence_index(torch.zeros(2, 3).long(), torch.ones(1, 3).long()),
        lambda: divergence_index(torch.zeros(2, 3).long(), torch.ones(2, 4).long()),
        lambda: divergence_index(torch.zeros(0, 3).long(), torch.ones(0, 3).long()),
        lambda: divergence_index(torch.zeros(2, 0).long(), torch.ones(2, 0).long()),
        lambda: divergence_loss(rewards(2, 3, 1), rewards(2, 3, 1), torch.zeros(2).long(), torch.ones(2).long()),
        lambda: divergence_loss(rewards(2, 3), rewards(1, 3), torch.zeros(2).long(), torch.ones(2).long()),
        lambda: divergence_loss(rewards(3), rewards(3), torch.zeros(3).long(), torch.ones(3).long()),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), torch.zeros(2, 1).long(), torch.ones(2, 1).long()),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), torch.zeros(1).long(), torch.ones(1).long()),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), torch.zeros(2).long(), torch.ones(1).long()),
        lambda: divergence_loss(rewards(0, 3), rewards(0, 3), torch.zeros(0).long(), torch.ones(0).long()),
        lambda: pairwise_loss(rewards(2, 1), rewards(2, 1)),
        lambda: pairwise_loss(rewards(2), rewards(1)),
        lambda: pairwise_loss(rewards(()), rewards(())),
        lambda: pairwise_loss(rewards(0), rewards(0)),
        lambda: pairwise_loss(rewards(2), rewards(2), rewards(2, 1)),
        lambda: pairwise_loss(rewards(2), rewards(2), rewards(1)),
        lambda: pairwise_loss(rewards(2), rewards(2), rewards(())),
        lambda: pairwise_loss(rewards(2), rewards(2), weight=rewards(2, 1)),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), *RANGE, margin=rewards(2, 1)),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), *RANGE, margin=rewards(1)),
        lambda: divergence_loss(rewards(2, 3), rewards(2, 3), *RANGE, weight=rewards(2, 3)),
        lambda: centering_loss(rewards(2, 1), rewards(2, 1)),
        lambda: centering_loss(rewards(2), rewards(2), weight=rewards(1)),
        lambda: pairwise_accuracy(rewards(2, 1), rewards(2, 1)),
        lambda: pairwise_accuracy(rewards(2), rewards(2, 1)),
        lambda: pairwise_accuracy(rewards(0), rewards(0)),
    ],
)
def test_wrong_shapes_are_refused(call):
    with pytest.raises(ValueError, match=r"must both be|for 2 pairs|at least one pair"):
        call()


@pytest.mark.parametrize("start, end", [(1, 1), (2, 1), (0, 4), (-1, 2)])
def test_an_empty_or_impossible_range_is_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start < end <= 3"):
        divergence_loss(rewards(1, 3), rewards(1, 3), torch.tensor([start]), torch.tensor([end]))
