"""Attention for shared rows: one row holds a prompt once and all its completions.

    [prefix | completion 1 | ... | completion K | padding]

This module has the mask that separates the completions of a row, SDPA that leaves out the mask where a long row does not
need it, and SDPA for two families that transformers runs with eager attention only. probe.py tests whether an architecture
is exact with such rows.
"""

import types

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

# Queries that need no mask are computed in a call of their own from this number on. Below it, on a CPU, the second call
# costs what it saves (see `python tests/bench/rows.py`).
LONG = 512


def attention_mask(segments, positions, visible, config, dtype, device=None, long=LONG):
    """Make the `attention_mask=` of a transformers trunk, to be passed with `position_ids=positions`.

    segments [R, L] int: 0 = prefix, k >= 1 = k-th completion of the row, -1 = padding, at the end of the row only
    positions [R, L] int: each completion continues from the end of the prefix
    visible [R, L] bool: may be attended to as a key; False for padding
    config: the trunk's, after `use_sdpa`; dtype: the one attention computes in, so float16 under float16 autocast
    device: where the mask goes. Keep the first three on the CPU: reading them from a GPU would synchronize
    long: the least number of queries that are computed without the mask, see below

    Query q attends to key k iff k is visible, at or before q, and in the prefix or q's completion. A windowed layer
    also requires positions[q] - positions[k] < window, a chunked one that k is in q's chunk of positions. A query with
    no keys attends to itself, so that no softmax is empty; no other query attends to it, so it changes nothing.

    If every row is one completion, returns None, or `visible` as a 2-D mask if some of it is False: causal attention is
    equivalent and takes SDPA's fast path (positions must continue through the padding, since transformers takes a jump
    for packed sequences). Otherwise returns an additive mask [R, 1, L, L], 0 or the lowest number of `dtype`, a dict of
    them by layer type, or for GPT-Neo [R, 2, L, L], the second one windowed. Its attribute `causal` is the number of
    first queries, in every row, for which it equals causal attention: the prefix and the first completion.
    """
    real = segments >= 0
    order = torch.where(real, segments, 2)  # 0 0 0 1 1 1 2 2 if a row is one completion
    places = torch.arange(segments.shape[1], device=segments.device)
    one_each = (segments < 2).all() & (order.diff(dim=1) >= 0).all() & ((positions == places) | ~real).all()
    if one_each:
        return None if (visible == real).all() else visible.long().to(device or segments.device)

    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"cannot build a mask for shared rows with attn_implementation={config._attn_implementation!r}"
        )
    masked = ((segments > 1) | (real & ~visible)).any(dim=0)
    causal, longest = int(masked.int().argmax()), int(positions.max()) + 1
    segments, positions, visible = (x.to(device or x.device, non_blocking=True) for x in (segments, positions, visible))
    allowed = segments[:, :, None] == segments[:, None, :]  # [R, L, L]; updated in place: 64 MiB at L = 8192
    allowed |= (segments == 0)[:, None, :]
    allowed &= visible[:, None, :]
    allowed.tril_()

    def additive(**span):
        mask = _additive(allowed, positions, dtype, **span)
        unlimited = all(tokens is None or longest <= tokens for tokens in span.values())
        mask.causal = causal if unlimited and causal >= long else 0
        return mask

    layer_types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if layer_types:  # gemma2, qwen2, olmo3, ...: every layer looks up its mask in a dict
        chunk = getattr(config, "attention_chunk_size", None)
        near = {"full_attention": {}, "sliding_attention": {"window": window}, "chunked_attention": {"chunk": chunk}}
        if unknown := set(layer_types) - set(near):
            raise ValueError(f"cannot build a mask for shared rows in layers of type {', '.join(sorted(unknown))}")
        return {kind: additive(**near[kind]) for kind in set(layer_types)}
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's own window counts by index in the row
        return torch.cat([additive(window=w) for w in (None, config.window_size)], dim=1)
    return additive(window=window)  # mistral, phi3, mixtral: one window for all layers


def _additive(allowed, positions, dtype, window=None, chunk=None):
    """[R, L, L] bool, [R, L] -> [R, 1, L, L] of `dtype`: 0 where allowed and inside the window, or in the same chunk.

    It is additive and has the queries' dtype, so that all layers share one tensor. SDPA copies any other mask in every
    layer and keeps the copy for backward; on CUDA also a mask whose rows are not aligned to multiples of 8.
    """
    if window is not None:
        allowed = allowed & (positions[:, None, :] > positions[:, :, None] - window)
    if chunk is not None:
        chunks = positions // chunk
        allowed = allowed & (chunks[:, None, :] == chunks[:, :, None])
    rows, length, _ = allowed.shape
    mask = allowed.new_full((rows, 1, length, -(-length // 8) * 8), torch.finfo(dtype).min, dtype=dtype)
    mask = mask[..., :length].masked_fill_(allowed[:, None], 0)
    mask[:, 0].diagonal(dim1=1, dim2=2).masked_fill_(~allowed.any(dim=-1), 0)
    return mask


def use_sdpa(trunk):
    """Replace eager-only attention (GPT-Neo, and GPT-J if it has its own `_attn`) by SDPA, in place.

    In families that call transformers' SDPA, and in GPT-J, long shared rows are then computed in two parts.

    This also changes the config, so that transformers makes no mask where SDPA needs none; do not build a second model
    from that object. Under float16 autocast SDPA is also safer: eager code casts queries and keys to float32 against
    overflow and autocast casts them back, while SDPA sums and scales in float32. No dropout, no key-value cache.
    """
    AttentionInterface.register("sdpa", _sdpa)  # the same function for masks that are not ours
    for module in trunk.modules():
        if isinstance(module, (GPTJAttention, GPTNeoSelfAttention)) and hasattr(module, "_attn"):
            module._attn = types.MethodType(_sdpa_attn, module)
            trunk.config._attn_implementation = "sdpa"  # not saved


def _sdpa_attn(self, query, key, value, mask=None):
    """Replace `_attn`: three [R, heads, L, head_dim] -> one, and None. Mask: None = causal, bool or additive."""
    local = getattr(self, "attention_type", None) == "local"  # GPT-Neo has such layers
    if mask is not None and mask.shape[1] == 2:  # two masks from `attention_mask`: full, windowed
        mask = mask[:, int(local), None]
    elif local:  # rows of one completion: the module's own window, by index in the row
        near = self.bias[:, :, : key.shape[-2], : key.shape[-2]]
        never = False if mask is None or mask.dtype == torch.bool else torch.finfo(value.dtype).min
        mask = near if mask is None else mask.masked_fill(~near, never)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(value.dtype)
    scale = 1 / getattr(self, "scale_attn", 1.0)  # GPT-Neo: 1
    attend = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, is_causal=m is None, scale=scale)
    return _in_two_parts(attend, query.to(value.dtype), key.to(value.dtype), value, mask, dim=2), None


def _sdpa(module, query, key, value, attention_mask, **kwargs):
    """Replace transformers' function: three [R, heads, L, head_dim] -> [R, L, heads, head_dim], and None."""
    if not getattr(attention_mask, "causal", 0) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = lambda *inputs: sdpa_attention_forward(module, *inputs, **kwargs | {"is_causal": True})[0]
    return _in_two_parts(attend, query, key, value, attention_mask, dim=1), None


def _in_two_parts(attend, query, key, value, mask, dim):
    """Compute the first `mask.causal` queries without the mask: half the work and, on a GPU, a faster kernel.

    A mask that a family has changed is another tensor, without the attribute, and is used for all queries.
    """
    if not (first := getattr(mask, "causal", 0)):
        return attend(query, key, value, mask)
    begin = attend(query[:, :, :first], key[:, :, :first], value[:, :, :first], None)
    return torch.cat([begin, attend(query[:, :, first:], key, value, mask[:, :, first:])], dim=dim)
