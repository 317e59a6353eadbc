"""Pairwise losses and accuracy: stateless functions of tensors that need only torch.

Losses are computed in fp32 (fp64 for fp64 rewards). In fp16, `log(sigmoid(x))` is -inf below about -17, and different
rewards can tie by rounding. B = pairs, T = tokens, counted from any origin that the two texts of a pair share.

`margin` [B], in units of reward, is the lead that the chosen answer must have (Llama 2, arXiv 2307.09288, eq. 2).
`weight` [B] turns the mean over pairs into a weighted mean. With 1 / (comparisons of the pair's prompt), every prompt
counts once (InstructGPT, arXiv 2203.02155, section 3.5). reduction="none" returns each pair's loss [B], times its
weight, instead of the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence_index(chosen_ids: Tensor, rejected_ids: Tensor) -> Tensor:
    """The first position at which the two token sequences of each pair differ.

    Args: chosen_ids, rejected_ids: [B, T] integers, padded the same way. Returns: [B] int64.
    Raises ValueError for other shapes, and for a pair whose two sides are equal.
    """
    _check_shapes(chosen_ids=chosen_ids, rejected_ids=rejected_ids, dims=2)
    differs = chosen_ids != rejected_ids
    same = ~differs.any(dim=1)
    if same.any():
        rows = same.nonzero().flatten().tolist()
        raise ValueError(f"chosen_ids and rejected_ids are equal in rows {rows}; remove identical pairs")
    return differs.int().argmax(dim=1)  # argmax returns the first of equal maxima


def divergence_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over pairs of the mean over start <= t < end of -logsigmoid(c_t - r_t - margin).

    This is the loss of CarperAI/trlx, examples/summarize_rlhf/reward_model/reward_model.py, without its loop over
    pairs. Rewards outside [start, end) have no influence, even if they are infinite or nan.

    Args: chosen_rewards, rejected_rewards: [B, T] floats; start, end: [B] integers, 0 <= start < end <= T; margin,
        weight, reduction: see above.
    Returns: scalar. Raises ValueError for other shapes and for an empty range. On a GPU ranges are not checked, because
    that would synchronize every step; an empty range gives nan.
    """
    _check_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, dims=2)
    _check_shapes(start=start, end=end, dims=1)
    if len(start) != len(chosen_rewards):
        raise ValueError(f"start has {len(start)} entries for {len(chosen_rewards)} pairs of rewards")
    if start.device.type == "cpu" and not ((0 <= start) & (start < end) & (end <= chosen_rewards.shape[1])).all():
        got = f"got start={start.tolist()} end={end.tolist()}"
        raise ValueError(f"expected 0 <= start < end <= {chosen_rewards.shape[1]} for every pair, {got}")
    t = torch.arange(chosen_rewards.shape[1], device=chosen_rewards.device)
    inside = (t >= start[:, None]) & (t < end[:, None])  # [B, T]
    # Mask before the logsigmoid, because 0 * nan is nan, in the gradient too.
    difference = (_at_least_fp32(chosen_rewards) - _at_least_fp32(rejected_rewards)).where(inside, 0.0)
    if margin is not None:
        _check_shapes(end=end, margin=margin, dims=1)
        difference = difference - margin[:, None].to(difference.dtype)
    per_token = -F.logsigmoid(difference).where(inside, 0.0)
    return _reduced(per_token.sum(dim=1) / (end - start), weight, reduction)


def pairwise_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Bradley-Terry: mean over pairs of -logsigmoid(chosen - rejected - margin).

    Args: chosen_rewards, rejected_rewards: [B] floats; margin, weight, reduction: see above. Returns: scalar.
    Raises ValueError for other shapes, including a [B, 1] margin, which would broadcast to [B, B].
    """
    _check_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, dims=1)
    difference = _at_least_fp32(chosen_rewards) - _at_least_fp32(rejected_rewards)
    if margin is not None:
        _check_shapes(chosen_rewards=chosen_rewards, margin=margin, dims=1)
        difference = difference - margin.to(difference.dtype)
    return _reduced(-F.logsigmoid(difference), weight, reduction)


def centering_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Mean over pairs of (chosen + rejected)^2. It centers rewards at zero; pairwise losses do not fix their offset.

    Eisenstein et al., arXiv 2312.09244, add it with a small coefficient, 0.01. Args and errors: as in `pairwise_loss`.
    """
    _check_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, dims=1)
    return _reduced((_at_least_fp32(chosen_rewards) + _at_least_fp32(rejected_rewards)) ** 2, weight, reduction)


def pairwise_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Share of pairs whose chosen reward is greater. A tie counts as wrong, so a constant scorer has accuracy 0.

    Args: chosen_rewards, rejected_rewards: [B] floats. Returns: scalar in 0..1, fp32. Raises ValueError for other shapes.
    """
    _check_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, dims=1)
    return (chosen_rewards > rejected_rewards).float().mean()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reduced(losses: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """[B] -> [] or, with reduction "none", [B]."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if weight is None:
        return losses if reduction == "none" else losses.mean()
    _check_shapes(losses=losses, weight=weight, dims=1)
    weight = weight.to(losses.dtype)
    return losses * weight if reduction == "none" else (losses * weight).sum() / weight.sum()


def _check_shapes(*, dims: int, **tensors: Tensor) -> None:
    (name_a, a), (name_b, b) = tensors.items()
    if a.dim() != dims or a.shape != b.shape:
        wanted = "[B, T]" if dims == 2 else "[B]"
        raise ValueError(f"{name_a} and {name_b} must both be {wanted}, got {list(a.shape)} and {list(b.shape)}")
    if a.numel() == 0:
        raise ValueError(f"{name_a} and {name_b} are empty, {list(a.shape)}; expected at least one pair")
