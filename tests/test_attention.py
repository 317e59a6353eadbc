"""Shared rows against one sequence per completion, and SDPA for GPT-J and GPT-Neo: pytest tests/test_attention.py

Needs no GPU and no network. The slow reference computes every completion after its own copy of the prefix, as a sequence
[1, n] without padding or mask, in the unmodified model.
"""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel

from minirm.attention import attention_mask, use_sdpa

WINDOW = 5  # shorter than nearly all texts below

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}

LLAMA = dict(**SIZES, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)

NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

GEMMA = LLAMA | {"head_dim": 8}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

# name: (model type, values of its config). Every config understands common names like hidden_size.
FAMILIES = {
    "gpt2": ("gpt2", SIZES),
    "gptj": ("gptj", SIZES | {"rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", NEO | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    "gpt_neox": ("gpt_neox", SIZES | {"intermediate_size": 48}),
    "opt": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "llama": ("llama", LLAMA),
    "llama, yarn": ("llama", LLAMA | {"rope_parameters": YARN}),
    "mistral": ("mistral", LLAMA | {"sliding_window": None}),
    "mistral, window": ("mistral", LLAMA | {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 8}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", GEMMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": MIXED}),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": MIXED}),
    "phi": ("phi", SIZES | {"intermediate_size": 48}),
    "phi3, window": ("phi3", LLAMA | {"sliding_window": WINDOW}),
    "stablelm": ("stablelm", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", LLAMA | {"sliding_window": WINDOW, "layer_types": MIXED}),
    "gpt_oss": ("gpt_oss", GEMMA | {"sliding_window": WINDOW, "num_local_experts": 4, "layer_types": MIXED}),
    "falcon": ("falcon", SIZES),
}

REFUSED = {
    "bloom": ("bloom", SIZES),
    "mpt": ("mpt", SIZES),
    "falcon, alibi": ("falcon", SIZES | {"alibi": True}),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}),
    "recurrent_gemma": ("recurrent_gemma", LLAMA),
    "gemma3, both ways": ("gemma3_text", FAMILIES["gemma3"][1] | {"use_bidirectional_attention": True}),
}

# Rows of (prefix length, completion lengths), all padded to the longest.
ROWS = [(7, [6, 9]), (5, [3, 1, 4, 8, 2]), (0, [8, 6]), (6, [4, 9])]


def make(family, implementation=None):
    """A random model in evaluation mode, with biases and attention moved away from their initial zeros."""
    kind, values = {**FAMILIES, **REFUSED}[family]
    torch.manual_seed(0)
    options = {} if implementation is None else {"attn_implementation": implementation}
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**values), dtype=torch.float32, **options).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def batch(rows=ROWS):
    """ids, segments and positions [R, L], and texts: (row, slice of the completion, ids [n], prefix length)."""
    torch.manual_seed(1)
    length = max(prefix + sum(tails) for prefix, tails in rows) + 3
    ids = torch.randint(1, 64, (len(rows), length))
    segments, positions, texts = torch.full_like(ids, -1), torch.zeros_like(ids), []
    for r, (prefix, tails) in enumerate(rows):
        segments[r, :prefix] = 0
        positions[r, :prefix] = torch.arange(prefix)
        end = prefix
        for k, tail in enumerate(tails, start=1):
            place = slice(end, end + tail)
            if tails == [4, 9] and k == 2:  # the first completion is a prefix of the second
                ids[r, end : end + 4] = ids[r, end - 4 : end]
            segments[r, place], positions[r, place] = k, torch.arange(prefix, prefix + tail)
            texts.append((r, place, torch.cat([ids[r, :prefix], ids[r, place]]), prefix))
            end += tail
    return ids, segments, positions, texts


def shared_states(model, ids, segments, positions, visible=None, long=99):
    visible = segments >= 0 if visible is None else visible
    mask = attention_mask(segments, positions, visible, model.config, torch.float32, long=long)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def gradients(model, states):
    """{parameter: gradient} of a random linear function of the states, always the same one."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad((states * weights).sum(), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def assert_close(got, want, what="", floor=0.0, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * max(want.abs().max(), floor), what


def assert_close_gradients(got, want):
    # Some gradients are zero up to rounding (the softmax cancels a bias on the keys), so allow 1 % of the largest one.
    floor = 0.01 * max(g.abs().max() for g in want.values())
    for name in want:
        assert_close(got[name], want[name], name, floor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["sdpa where there is", "in two parts", "eager"])
def test_shared_rows_equal_one_sequence_per_completion(family, how):
    eager = how == "eager"
    if family == "gpt_neo" and eager:
        pytest.skip("needs use_sdpa: its own attention applies the window to places in the row")
    model = make(family, "eager" if eager else None)
    ids, segments, positions, texts = batch()
    separate = [model(input_ids=text[None], use_cache=False).last_hidden_state[0, p:] for _, _, text, p in texts]
    want = gradients(model, torch.cat(separate))
    if not eager:
        use_sdpa(model)
    states = shared_states(model, ids, segments, positions, long=1 if how == "in two parts" else 99)
    for (r, place, _, _), one in zip(texts, separate):
        assert_close(states[r, place], one, f"row {r}, {place}")
    assert_close_gradients(gradients(model, torch.cat([states[r, place] for r, place, _, _ in texts])), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("long", [1, 99])
def test_invisible_tokens_have_states_but_are_not_attended_to(family, long):
    """The last three tokens of some completions are invisible, like the scored pads of the published loss."""
    model = make(family)
    ids, segments, positions, texts = batch()
    visible = segments >= 0
    for r, place, _, _ in texts[::2]:
        visible[r, place.stop - 3 : place.stop] = False
        visible[r, place.start] = True  # the completion may have only three tokens
    separate = []
    for r, place, text, prefix in texts:
        keys = torch.cat([visible[r, :prefix], visible[r, place]])[None].long()
        kwargs = {"attention_mask": keys, "position_ids": torch.arange(len(text))[None], "use_cache": False}
        separate.append(model(input_ids=text[None], **kwargs).last_hidden_state[0, prefix:])
    want = gradients(model, torch.cat(separate))
    use_sdpa(model)
    states = shared_states(model, ids, segments, positions, visible, long)
    shared = torch.cat([states[r, place] for r, place, _, _ in texts])
    assert_close(shared, torch.cat(separate))
    assert_close_gradients(gradients(model, shared), want)


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "llama", "mistral, window", "gemma2", "falcon"])
def test_padding_changes_nothing_and_causes_no_nan(family):
    model = make(family)
    use_sdpa(model)
    ids, segments, positions, _ = batch()
    real = segments >= 0
    states = shared_states(model, ids, segments, positions)
    assert states.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model, states).values())  # including those through padding queries
    other = shared_states(model, torch.where(real, ids, 5), segments, positions)
    assert torch.equal(states[real], other[real])


# Families that call SDPA in every layer, at least where no window is shorter than the texts.
IN_TWO_PARTS = [
    "gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi", "stablelm", "olmo2",
    "olmo3",
]  # fmt: skip


@pytest.mark.parametrize("family", IN_TWO_PARTS)
def test_the_first_queries_of_a_long_row_are_computed_without_the_mask(family, monkeypatch):
    model, calls = make(family), []
    use_sdpa(model)
    ids, segments, positions, _ = batch()
    if family == "olmo3":  # two of its three layers have a window, which is not shorter than these texts
        model.config.sliding_window = int(positions.max()) + 1
    whole = torch.nn.functional.scaled_dot_product_attention

    def note(query, key, value, attn_mask=None, *args, **kwargs):
        calls.append((query.shape[2], key.shape[2], attn_mask is None))
        return whole(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    shared_states(model, ids, segments, positions, long=8)
    length = ids.shape[1]  # the shortest beginning without a second completion: a prefix of 5 and 3 tokens, or 0 and 8
    assert calls == [(8, 8, True), (length - 8, length, False)] * model.config.num_hidden_layers
    calls.clear()
    shared_states(model, ids, segments, positions, long=9)
    assert calls == [(length, length, False)] * model.config.num_hidden_layers


def test_a_mask_by_hand():
    """A prefix of 2, completions of 2 and 3 tokens and one pad; a window of 3 positions; place 6 is invisible."""
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 4, 0]])
    visible = torch.tensor([[True, True, True, True, True, True, False, False]])
    config = CONFIG_MAPPING["qwen2"](layer_types=MIXED, num_hidden_layers=3, use_sliding_window=True, sliding_window=3)
    config._attn_implementation = "sdpa"
    masks = attention_mask(segments, positions, visible, config, torch.float16)
    full = """
        1.......
        11......
        111.....
        1111....
        11..1...
        11..11..
        11..11..
        11......"""
    window = """
        1.......
        11......
        111.....
        .111....
        11..1...
        .1..11..
        ....11..
        11......"""  # the pad's row only has to be nonempty
    for kind, picture in (("full_attention", full), ("sliding_attention", window)):
        want = torch.tensor([[c == "1" for c in line.strip()] for line in picture.split()])
        assert masks[kind].shape == (1, 1, 8, 8) and masks[kind].dtype == torch.float16
        assert torch.equal(masks[kind][0, 0] == 0, want)
        assert (masks[kind][0, 0][~want] == torch.finfo(torch.float16).min).all()
    masks = attention_mask(segments, positions, visible, config, torch.float16, long=4)
    assert [masks[f"{kind}_attention"].causal for kind in ("full", "sliding")] == [4, 0]
    assert attention_mask(segments, positions, visible, config, torch.float16, long=5)["full_attention"].causal == 0
    visible[0, 3] = False
    config.sliding_window = 5  # as long as the longest text
    masks = attention_mask(segments, positions, visible, config, torch.float16, long=1)
    assert [masks[f"{kind}_attention"].causal for kind in ("full", "sliding")] == [3, 3]


def test_rows_of_one_completion_need_no_mask():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, -1, -1]])
    positions = torch.arange(5).repeat(2, 1)
    visible, config = segments >= 0, make("llama").config
    assert attention_mask(segments, positions, visible, config, torch.float32) is None
    visible[0, 3:] = False
    assert torch.equal(attention_mask(segments, positions, visible, config, torch.float32), visible.long())
    two = torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, -1, -1]])
    assert attention_mask(two, positions, two >= 0, config, torch.float32).shape == (2, 1, 5, 5)


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mpt"])
def test_padded_rows_of_one_completion_equal_single_sequences(family):
    model = make(family)
    rows = [(4, [9]), (6, [2]), (0, [7])]
    ids, segments, _, texts = batch(rows)
    positions = torch.arange(ids.shape[1]).repeat(len(rows), 1)
    separate = [model(input_ids=text[None], use_cache=False).last_hidden_state[0, p:] for _, _, text, p in texts]
    use_sdpa(model)
    states = shared_states(model, ids, segments, positions)
    for (r, place, _, _), one in zip(texts, separate):
        assert_close(states[r, place], one)


def test_all_layers_share_one_mask_in_memory():
    """For backward, SDPA would keep a copy per layer of a bool mask, and under autocast of one with another dtype."""
    model, kept = make("llama"), set()
    ids, segments, positions, _ = batch()

    def note(t):
        if t.dim() == 4 and t.shape[-1] == t.shape[-2] == ids.shape[1]:
            kept.add(t.untyped_storage().data_ptr())
        return t

    mask = attention_mask(segments, positions, segments >= 0, model.config, torch.bfloat16)
    assert mask.stride(2) % 8 == 0 and ids.shape[1] % 8  # aligned, although the row length is not
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    assert kept == {mask.untyped_storage().data_ptr()}


@pytest.mark.parametrize("family", ["gptj", "gpt_neo"])
@pytest.mark.parametrize("kind", ["none", "2-D", "bool", "additive"])
def test_sdpa_equals_the_original_attention(family, kind):
    original = make(family)
    ids = torch.randint(64, (2, 19))
    keys = torch.arange(19)[None] < torch.tensor([19, 12])[:, None]
    allowed = (keys[:, None] & torch.ones(19, 19, dtype=torch.bool).tril())[:, None]
    additive = torch.zeros(2, 1, 19, 19).masked_fill(~allowed, torch.finfo(torch.float32).min)
    mask = {"none": None, "2-D": keys.long(), "bool": allowed, "additive": additive}[kind]
    want = original(ids, attention_mask=additive if kind == "bool" else mask, use_cache=False).last_hidden_state
    model = copy.deepcopy(original)
    use_sdpa(model)
    got = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    if mask is not None:  # a pad may attend to nothing, which has no defined result
        got, want = got[keys], want[keys]
    assert_close(got, want)
    assert_close_gradients(gradients(model, got), gradients(original, want))


def test_gptj_in_fp16_survives_scores_beyond_65504():
    """Queries and keys are 40 x a unit-variance vector of 256: q.k is about 400,000 before scaling.

    Eager attention casts q and k to fp32 to prevent the overflow, but autocast casts them back to fp16.
    """
    config = CONFIG_MAPPING["gptj"](vocab_size=64, n_embd=256, n_head=1, n_layer=1, rotary_dim=32, n_positions=32)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for projection in (model.h[0].attn.q_proj, model.h[0].attn.k_proj):
        projection.weight.data = 40 * torch.eye(256)
    ids = torch.randint(64, (1, 16))
    exact = model(ids).last_hidden_state
    use_sdpa(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.autocast("cpu", torch.float16):
        assert_close(model(ids).last_hidden_state.float(), exact, tolerance=5e-3)


def test_use_sdpa_is_not_saved_and_changes_no_other_family(tmp_path):
    model = make("gpt_neo")
    use_sdpa(model)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    other = make("gemma2")
    before = other.config._attn_implementation
    use_sdpa(other)
    assert other.config._attn_implementation == before
