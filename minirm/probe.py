"""Try an architecture on a small random model, before loading any weights, to find out what it computes exactly."""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from transformers import AutoModel
from transformers.utils import logging

from minirm.attention import LONG, attention_mask, use_sdpa
from minirm.errors import InputError, one_line
from minirm.rows import collate

# Lengths of the probe's texts in tokens: (prefix, completions). One shared text has 17 tokens, all others fewer than 15.
PROBE_ROWS = {"shared": [(9, [2, 8, 5]), (4, [7, 3])], "separate": [(9, [2, 5]), (4, [7, 3])]}
PROBE_WINDOW, PROBE_SWITCH = 5, 15  # shorter than every text; between the longest text and the others
PROBE_VOCABULARY = 64
PROBE_TRIES = 8  # new weights and ids each time: if attention selects by content, one try may miss a difference
TOLERANCE = 1e-4  # relative to the largest value; exact results differ by 2e-6 (unscaled GPT-Neo 3e-5)


def choose_layout(config, model_name: str, layout: str, max_length=math.inf) -> tuple[str, str | None]:
    """(row layout to use, why "shared" was refused if it was asked for). See `probe_shared_rows`.

    Raises InputError if results depend on the padding behind a text, as in CPM-Ant, which expects padding on the left,
    and in Doge beyond the number of keys that it keeps. An architecture that cannot be made small passes, because a
    causal decoder is exact unless it does something unusual.
    """
    not_shared = probe_shared_rows(config, max_length) if layout == "shared" else None
    if layout == "shared" and not not_shared:
        return "shared", None
    reason = None
    with suppress(Exception):
        reason = _inexact(config, "separate", max_length)
    if reason:
        what = "padding changes its results, so it cannot be trained in batches"
        raise InputError(f"--model {model_name}: {what} ({reason})")
    return "separate", not_shared


def probe_shared_rows(config, max_length=math.inf) -> str | None:
    """None if this architecture computes the same in shared rows as in separate ones, else the reason in one line.

    Compares hidden states and gradients of a small random model on the CPU, in a second or two.

    config: as loaded, before `use_sdpa`; max_length: tokens of the longest text to expect. It matters if rotary
    frequencies change with a batch's longest text (dynamic, longrope): exact up to that length, refused beyond it.
    """
    try:
        return _inexact(config, "shared", max_length)
    except Exception as error:  # noqa: BLE001, any failure is a reason to refuse
        return f"{config.model_type}: the model fails on shared rows ({type(error).__name__}: {one_line(error)[:200]})"


def _inexact(config, layout: str, max_length: float) -> str | None:
    with trying():
        model = small_model(config, max_length)
        differences = _largest_differences(model, layout, PROBE_TRIES)
        if max(differences) > TOLERANCE:  # rounding alone can do that: Gemma 3n's gradients, 5e-4; Dory's, 8e-2
            differences = _largest_differences(model.double(), layout, 2)
    for what, difference in zip(("hidden states", "gradients"), differences):
        if not difference <= TOLERANCE:  # written this way, NaN is refused
            rows = "shared and separate" if layout == "shared" else "padded and unpadded"
            return f"{config.model_type}: {what} of {rows} rows differ by {difference:.2g} of the largest"
    return None


@contextmanager
def trying() -> Iterator[None]:
    """Run a small random model silently, with the same random numbers every time, and restore the global state."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    try:
        logging.set_verbosity(logging.CRITICAL)
        torch.set_num_threads(1)  # on a busy machine threads wait for each other: 25 s measured, not 0.3
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)  # torch.manual_seed would also seed the GPUs
            yield
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)


def small_model(config, max_length=math.inf):
    """A small random fp32 trunk of the architecture in `config`, patched by `use_sdpa` like the real one."""
    options = {"dtype": torch.float32, "trust_remote_code": False}  # False: never prompt on the terminal
    small = shrunk(config, max_length)
    with torch.device("meta"):  # shapes without memory, also for the full size
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
    """Randomize the weights in place: a fresh model is too tame, with zero biases and nearly uniform attention."""
    for p in model.parameters():
        p.data = torch.randn_like(p) * p.shape[-1] ** -0.5 if p.dim() > 1 else p.data + 0.1 * torch.randn_like(p)


def small_batch(texts, row_layout):
    """A batch of (prefix, [completion, ...]) in token ids, without comparisons."""
    groups = [{"prefix": prefix, "completions": completions} for prefix, completions in texts]
    return collate(groups, row_layout=row_layout, pad_id=0, row_limit=99)


def small_states(model, batch, long=LONG):
    """The last hidden states [R, L, H] of a batch."""
    mask = attention_mask(batch.segments, batch.position_ids, batch.visible, model.config, model.dtype, long=long)
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids}
    return model(**inputs, use_cache=False).last_hidden_state


def _kinds(model):
    """Module classes and their switches: {(class, attribute, value)}, where value is a string, a bool or None.

    Layers of different kinds differ here (is_sliding, attention_type, ...), which reveals a kind lost by shrinking.
    """
    return {
        (type(module).__name__, key, value)
        for module in model.modules()
        for key, value in [("", ""), *vars(module).items()]
        if value is None or isinstance(value, (str, bool))
    }


def shrunk(config, max_length=math.inf):
    """A copy of the config with few layers, few heads and small tables, but the same kind of attention.

    The head size stays: rotary dimensions, scaling factors and norms depend on it.
    """
    small, fields = copy.deepcopy(config), config.to_dict()
    layers = config.num_hidden_layers
    heads = getattr(config, "num_attention_heads", None) or max(1, config.hidden_size // 64)  # Mamba has none
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    few_kv = min(kv_heads, 2)
    few = few_kv * min(heads // kv_heads, 2)
    width = few * (fields.get("head_dim") or config.hidden_size // heads)

    # Keep the first layer of each combination of per-layer settings, and at least two layers.
    said = _said_of_layers(fields, layers)
    kinds = [str([values[i] for values in said.values()]) for i in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds} | set(range(min(2, layers))))
    for key, values in said.items():
        few_values = [values[i] for i in kept]
        if _are_layers(key, fields[key], layers):
            setattr(small, key, [i for i, among in enumerate(few_values) if among])
        elif key == "num_kv_shared_layers":
            small.num_kv_shared_layers = few_values.count("shared")
        else:
            setattr(small, key, few_values)

    # Limit the attention span if the real texts exceed it, what sparse attention keeps, and inner widths.
    most = {"window|chunk|local_att|distance|extent": PROBE_WINDOW, "block|topk": 2}
    most |= {"intermediate|ffn|inner|d_ff": 64, "first_k_dense": 1}  # DeepSeek has layers without experts
    for key, value in small.to_dict().items():
        limits = [limit for names, limit in most.items() if re.search(names, key)]
        if limits == [PROBE_WINDOW] and type(value) is int and value >= 2 * max_length:  # row_limit
            continue
        if limits and isinstance(value, list) and all(type(v) is int for v in value):
            setattr(small, key, [min(v, limits[0]) for v in value])
        if type(value) is not int:  # excludes bool
            continue
        if limits:
            setattr(small, key, min(value, limits[0]))
        elif "vocab_size" in key:
            setattr(small, key, min(value, PROBE_VOCABULARY))
        elif key.endswith("token_id") and value >= PROBE_VOCABULARY:
            setattr(small, key, 0)
        elif key in ("num_key_value_heads", "num_kv_heads"):
            setattr(small, key, few_kv)
        elif value == config.hidden_size and "position" not in key:  # the width under other names, as in OPT
            setattr(small, key, width)
    small.num_hidden_layers, small.num_attention_heads, small.hidden_size = len(kept), few, width
    small.vocab_size = PROBE_VOCABULARY

    # Lengths at which rotary frequencies may change: the small texts reach them if the real ones do.
    rope = getattr(small, "rope_parameters", None)
    if rope is not None:
        for place in (vars(small), rope, *(value for value in rope.values() if isinstance(value, dict))):
            for key in ("max_position_embeddings", "original_max_position_embeddings"):
                if place.get(key) is not None and place[key] < max_length:
                    place[key] = PROBE_SWITCH
    return small


def _said_of_layers(fields: dict, layers: int) -> dict[str, list]:
    """{field: [value of layer 0, 1, ...]} for the config's lists with one entry per layer and its lists of layers."""
    said = {}
    for key, value in fields.items():
        if _are_layers(key, value, layers):
            said[key] = [i in value for i in range(layers)]
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            said[key] = list(value)
    # The last layers may reuse the keys and values of the last layer of their type that has its own.
    if "num_kv_shared_layers" in fields:
        types, own = fields["layer_types"], layers - fields["num_kv_shared_layers"]
        lenders = {max(i for i in range(own) if types[i] == kind) for kind in types[:own]}
        said["num_kv_shared_layers"] = ["shared" if i >= own else i in lenders for i in range(layers)]
    return said


def _are_layers(key: str, value, layers: int) -> bool:
    """Whether a config field lists the layers of some kind, such as `attn_layer_indices` [9, 18, 27]."""
    if not re.search("layer|idx|indices", key) or not isinstance(value, (list, tuple)):
        return False
    return all(type(i) is int for i in value) and list(value) == sorted({*value} & {*range(layers)})


def _largest_differences(model, layout: str, tries: int) -> list[float]:
    """Every second time with attention as in long rows."""
    return torch.tensor([_differences(model, layout, (1, LONG)[i % 2]) for i in range(tries)]).amax(dim=0).tolist()


def _differences(model, layout: str, long: int) -> list[float]:
    """Largest difference between a padded batch and lone texts over the largest value: [hidden states, gradients]."""
    shake(model)
    ids = lambda length: torch.randint(1, PROBE_VOCABULARY, (length,)).tolist()
    texts = [(ids(prefix), [ids(tail) for tail in tails]) for prefix, tails in PROBE_ROWS[layout]]
    batch = small_batch(texts, layout)
    batched = small_states(model, batch, long)[batch.segments > 0]
    alone = [(len(prefix), torch.tensor([prefix + tail])) for prefix, tails in texts for tail in tails]
    lone = [model(input_ids=text, use_cache=False).last_hidden_state[0, behind:] for behind, text in alone]
    hidden = torch.cat(lone), batched
    weights, embeddings = torch.randn_like(hidden[0]), model.get_input_embeddings().weight
    gradients = [torch.autograd.grad((h * weights).sum(), embeddings)[0] for h in hidden]
    return [((a - b).abs().max() / a.abs().max()).item() for a, b in (hidden, gradients)]
