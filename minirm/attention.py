"""Attention for shared rows: one row holds a prompt once and all its completions.

    [prefix | completion 1 | ... | completion K | padding]

Here are the mask that keeps the completions of a row apart, a probe that finds out whether an architecture is exact
with such rows, and SDPA for two families that transformers runs with eager attention only.
"""

import copy
import math
import re
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AutoModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.utils import logging

from minirm.rows import collate
from minirm.sources import one_line


def attention_mask(segments, positions, visible, config, dtype, device=None):
    """What to pass as `attention_mask=` to a transformers trunk, together with `position_ids=positions`.

    segments [R, L] int: 0 = prefix, k >= 1 = k-th completion of the row, -1 = padding, at the end of the row only
    positions [R, L] int: each completion goes on from the end of the prefix
    visible [R, L] bool: may be seen as a key; False for padding
    config: of the trunk, after `use_sdpa`; dtype: what attention computes in, so float16 under float16 autocast
    device: where the mask goes. The first three are best on the CPU: a GPU would have to wait for what is looked up here

    Key k is seen by query q iff k is visible, stands at or before q, belongs to the prefix or to q's completion and,
    in a layer with a window, positions[q] - positions[k] < window. A query that would see nothing sees itself, so that
    no softmax is empty; it is no key to others, so it changes nothing.

    Returns, if every row is one completion, None or, where some of it is invisible, `visible` as a 2-D mask: causal
    attention does the same, on SDPA's fast path (positions have to count on through the padding: transformers takes any
    jump for packed sequences). Else an additive mask [R, 1, L, L], 0 or the lowest number of `dtype`, a dict of them by
    layer type, or for GPT-Neo [R, 2, L, L], the second one windowed.
    """
    real = segments >= 0
    order = torch.where(real, segments, 2)  # 0 0 0 1 1 1 2 2 where a row is one completion
    places = torch.arange(segments.shape[1], device=segments.device)
    one_each = (segments < 2).all() & (order.diff(dim=1) >= 0).all() & ((positions == places) | ~real).all()
    if one_each:
        return None if (visible == real).all() else visible.long().to(device or segments.device)

    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(f"no mask for shared rows under attn_implementation={config._attn_implementation!r}")
    segments, positions, visible = (x.to(device or x.device, non_blocking=True) for x in (segments, positions, visible))
    allowed = segments[:, :, None] == segments[:, None, :]  # [R, L, L]; in place below, it is 64 MiB at L = 8192
    allowed |= (segments == 0)[:, None, :]
    allowed &= visible[:, None, :]
    allowed.tril_()

    layer_types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if layer_types:  # gemma2, qwen2, olmo3, ...: every layer takes its mask out of a dict
        windows = {"full_attention": None, "sliding_attention": window}
        if unknown := set(layer_types) - set(windows):
            raise ValueError(f"no mask for shared rows in layers of type {', '.join(sorted(unknown))}")
        return {kind: _additive(allowed, positions, windows[kind], dtype) for kind in set(layer_types)}
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo, whose own attention counts by place in the row
        return torch.cat([_additive(allowed, positions, w, dtype) for w in (None, config.window_size)], dim=1)
    return _additive(allowed, positions, window, dtype)  # mistral, phi3, mixtral: one window for all layers


def _additive(allowed, positions, window, dtype):
    """[R, L, L] bool, [R, L], int or None -> [R, 1, L, L] of `dtype`: 0 where allowed and inside the window.

    Additive and of the queries' dtype, so that all layers share one tensor: of any other SDPA makes a copy in every
    layer and keeps it for backward. So it does on CUDA where rows of memory are not aligned to eights.
    """
    if window is not None:
        allowed = allowed & (positions[:, None, :] > positions[:, :, None] - window)
    rows, length, _ = allowed.shape
    mask = allowed.new_full((rows, 1, length, -(-length // 8) * 8), torch.finfo(dtype).min, dtype=dtype)
    mask = mask[..., :length].masked_fill_(allowed[:, None], 0)
    mask[:, 0].diagonal(dim1=1, dim2=2).masked_fill_(~allowed.any(dim=-1), 0)
    return mask


# The probe's texts in tokens, a row each: (prefix, completions). One text has 17, all others fewer than 15.
PROBE_ROWS = [(9, [2, 8, 5]), (4, [7, 3])]
PROBE_WINDOW, PROBE_SWITCH = 5, 15  # shorter than the texts; between the longest text and the others
PROBE_VOCABULARY = 64
PROBE_TRIES = 8  # with other weights and ids each time: where attention chooses by content, one try may see nothing
TOLERANCE = 1e-4  # of the largest number: exact is 2e-6 (unscaled GPT-Neo 3e-5), a wrong mask 1e-2 and more


def probe_shared_rows(config, max_length=math.inf):
    """None if this architecture computes the same in shared rows as in separate ones, else the reason in one line.

    config: as loaded, before `use_sdpa`; max_length: tokens of the longest text that will come. It counts where rotary
    frequencies change with the longest text of a batch (dynamic, longrope): exact up to there, refused beyond.

    Decides by trying, in a second or less: hidden states and gradients of a small random model, in fp32 on the CPU.
    """
    try:
        with trying():
            model = small_model(config, max_length)
            differences = torch.tensor([_differences(model) for _ in range(PROBE_TRIES)]).amax(dim=0).tolist()
    except Exception as error:  # noqa: BLE001, any failure at all is a reason to refuse
        return f"{config.model_type}: shared rows fail ({type(error).__name__}: {one_line(error)[:200]})"
    for what, difference in zip(("hidden states", "gradients"), differences):
        if not difference <= TOLERANCE:  # this way round NaN is a no
            return f"{config.model_type}: {what} of shared and separate rows differ by {difference:.2g} of the largest"
    return None


@contextmanager
def trying() -> Iterator[None]:
    """To run a small random model silently, with the same numbers every time, leaving no trace."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    try:
        logging.set_verbosity(logging.CRITICAL)
        torch.set_num_threads(1)  # on a busy machine threads wait for each other: measured 25 s instead of 0.3
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would reach the GPUs
            yield
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)


def small_model(config, max_length=math.inf):
    """A random fp32 trunk of the kind that `config` describes, patched by `use_sdpa` as the real one is."""
    options = {"dtype": torch.float32, "trust_remote_code": False}  # False: else it asks on the terminal
    small = _shrunk(config, max_length)
    with torch.device("meta"):  # shapes without memory, the full size included
        whole, sketch = (AutoModel.from_config(copy.deepcopy(c), **options) for c in (config, small))
    if missing := _kinds(whole) - _kinds(sketch):
        raise ValueError(f"cannot try, the small model lacks {min(map(str, missing))}")
    if (size := sum(p.numel() for p in sketch.parameters())) > 1e8:
        raise ValueError(f"cannot try, the small model still has {size / 1e6:.0f} million parameters")
    model = AutoModel.from_config(small, **options).eval()
    use_sdpa(model)
    shake(model)
    return model


def shake(model):
    """Other random weights, in place: a fresh model is too tame, its biases 0 and its attention nearly even."""
    for p in model.parameters():
        p.data = torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else p.data + 0.1 * torch.randn_like(p)


def small_batch(texts, row_layout):
    """A batch of (prefix, [completion, ...]) in token ids, with nothing to compare."""
    groups = [{"prefix": prefix, "completions": completions} for prefix, completions in texts]
    return collate(groups, row_layout=row_layout, pad_id=0, row_limit=99)


def small_states(model, batch):
    """The last hidden states [R, L, H] of a batch."""
    mask = attention_mask(batch.segments, batch.position_ids, batch.visible, model.config, torch.float32)
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}
    return model(**inputs, use_cache=False).last_hidden_state


def _kinds(model):
    """What the modules are and how they are switched: {(class, attribute, value)}, value a string, a bool or None.

    Layers of different kinds differ here (is_sliding, attention_type, ...), so a kind lost by shrinking is noticed.
    """
    return {
        (type(module).__name__, key, value)
        for module in model.modules()
        for key, value in [("", ""), *vars(module).items()]
        if value is None or isinstance(value, (str, bool))
    }


def _shrunk(config, max_length):
    """A copy of the config with few layers, few heads and small tables; attention is of the same kind.

    The size of a head stays: rotary dimensions, scaling factors and norms hang on it.
    """
    small, fields = copy.deepcopy(config), config.to_dict()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    few_kv = min(kv_heads, 2)
    few = few_kv * min(heads // kv_heads, 2)
    width = few * (getattr(config, "head_dim", None) or config.hidden_size // heads)

    # Lists with an entry per layer, like layer_types: keep the first layer of each combination, and at least two.
    lists = {key: value for key, value in fields.items() if isinstance(value, (list, tuple)) and len(value) == layers}
    kinds = [str([value[i] for value in lists.values()]) for i in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, layers))))
    for key, value in lists.items():
        setattr(small, key, [value[i] for i in kept])

    # How far attention looks, how much of it sparse attention keeps, and inner widths.
    most = {"window|chunk|local_att|distance|extent": PROBE_WINDOW, "block|topk": 2, "intermediate|ffn|inner|d_ff": 64}
    for key, value in fields.items():
        if type(value) is not int:  # a bool is none
            continue
        if limits := [limit for names, limit in most.items() if re.search(names, key)]:
            setattr(small, key, min(value, limits[0]))
        elif key.endswith("token_id") and value >= PROBE_VOCABULARY:
            setattr(small, key, 0)
        elif key in ("num_key_value_heads", "num_kv_heads"):
            setattr(small, key, few_kv)
        elif value == config.hidden_size and "position" not in key:  # the width by other names, as OPT's
            setattr(small, key, width)
    small.num_hidden_layers, small.num_attention_heads, small.hidden_size = len(kept), few, width
    small.vocab_size = PROBE_VOCABULARY

    # Lengths at which rotary frequencies may change: in reach of the small texts if in reach of the real ones.
    rope = getattr(small, "rope_parameters", None)
    if rope is not None:
        for place in (vars(small), rope, *(value for value in rope.values() if isinstance(value, dict))):
            for key in ("max_position_embeddings", "original_max_position_embeddings"):
                if place.get(key) is not None and place[key] < max_length:
                    place[key] = PROBE_SWITCH
    return small


def _differences(model):
    """Largest difference between shared and separate rows over the largest value: [hidden states, gradients]."""
    shake(model)
    ids = lambda length: torch.randint(1, PROBE_VOCABULARY, (length,)).tolist()
    texts = [(ids(prefix), [ids(tail) for tail in tails]) for prefix, tails in PROBE_ROWS]
    batch = small_batch(texts, "shared")
    shared = small_states(model, batch)[batch.segments > 0]
    alone = [(len(prefix), torch.tensor([prefix + tail])) for prefix, tails in texts for tail in tails]
    separate = [model(input_ids=text, use_cache=False).last_hidden_state[0, behind:] for behind, text in alone]
    hidden = torch.cat(separate), shared
    weights, embeddings = torch.randn_like(hidden[0]), model.get_input_embeddings().weight
    gradients = [torch.autograd.grad((h * weights).sum(), embeddings)[0] for h in hidden]
    return [((a - b).abs().max() / a.abs().max()).item() for a, b in (hidden, gradients)]


def use_sdpa(trunk):
    """Sends the attention of GPT-J and GPT-Neo, eager only in transformers, through SDPA. Others stay as they are.

    In place, the config too, so that transformers makes no mask where SDPA needs none; no second model can be made from
    that object. Under float16 autocast this is the safer way: the original turns queries and keys to float32 against
    overflow, autocast turns them back; SDPA sums and scales in float32 inside. Without dropout and key-value cache.
    """
    for module in trunk.modules():
        if type(module) in (GPTJAttention, GPTNeoSelfAttention):
            module._attn = types.MethodType(_sdpa_attn, module)
            trunk.config._attn_implementation = "sdpa"  # not saved


def _sdpa_attn(self, query, key, value, mask=None):
    """In place of `_attn`: three [R, heads, L, head_dim] -> one, and None. Mask: None = causal, bool or additive."""
    local = getattr(self, "attention_type", None) == "local"  # GPT-Neo has such layers
    if mask is not None and mask.shape[1] == 2:  # both masks of `attention_mask`: full, windowed
        mask = mask[:, int(local), None]
    elif local:  # rows of one completion: the window by place that the module keeps
        near = self.bias[:, :, : key.shape[-2], : key.shape[-2]]
        never = False if mask is None or mask.dtype == torch.bool else torch.finfo(value.dtype).min
        mask = near if mask is None else mask.masked_fill(~near, never)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(value.dtype)
    query, key, scale = query.to(value.dtype), key.to(value.dtype), 1 / getattr(self, "scale_attn", 1.0)  # GPT-Neo: 1
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale), None
