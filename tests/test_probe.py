"""The probe for shared rows: `python -m pytest tests/test_probe.py`. Tiny random models, no network."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from test_attention import FAMILIES, LLAMA, REFUSED, WINDOW
from transformers import CONFIG_MAPPING
from transformers.utils import logging

from minirm import attention, probe
from minirm.errors import InputError
from minirm.probe import choose_layout, probe_shared_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_accepts_every_exact_family(family):
    kind, values = FAMILIES[family]
    assert probe_shared_rows(CONFIG_MAPPING[kind](**values)) is None


def test_the_probe_tests_the_attention_that_will_run():
    assert probe_shared_rows(CONFIG_MAPPING["llama"](attn_implementation="eager", **LLAMA)) is None
    assert "flex_attention" in probe_shared_rows(CONFIG_MAPPING["llama"](attn_implementation="flex_attention", **LLAMA))


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAMILIES.values()}))
def test_the_probe_accepts_published_sizes(kind):
    assert probe_shared_rows(CONFIG_MAPPING[kind]()) is None


@pytest.mark.parametrize("family", REFUSED)
def test_the_probe_refuses_with_a_reason(family):
    kind, values = REFUSED[family]
    reason = probe_shared_rows(CONFIG_MAPPING[kind](**values))
    assert reason.startswith(f"{kind}: ") and "\n" not in reason and len(reason) < 300


@pytest.mark.parametrize("kind", ["bloom", "mpt", "mamba", "rwkv", "recurrent_gemma", "falcon_h1", "jamba", "doge"])
def test_the_probe_refuses_published_sizes(kind):
    assert probe_shared_rows(CONFIG_MAPPING[kind]()).startswith(f"{kind}: ")


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon, alibi", "mamba", "recurrent_gemma"])
def test_what_cannot_share_rows_trains_in_separate_ones(family):
    kind, values = REFUSED[family]
    layout, reason = choose_layout(CONFIG_MAPPING[kind](**values), "some/model", "shared", 550)
    assert layout == "separate" and reason.startswith(f"{kind}: ")


@pytest.mark.parametrize("asked", ["shared", "separate"])
def test_a_model_that_padding_disturbs_is_refused(asked):
    """CPM-Ant expects its padding on the left. Doge keeps 2,048 keys per query, chosen among all positions."""
    refused = "--model some/model: padding changes its results"
    small = {"hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64, "num_hidden_layers": 2}
    with pytest.raises(InputError, match=refused):
        choose_layout(CONFIG_MAPPING["cpmant"](vocab_size=64, **small), "some/model", asked, 550)
    doge = CONFIG_MAPPING["doge"]()
    if Version(transformers.__version__) >= Version("5.24"):  # in 5.17 any padding disturbs it
        assert choose_layout(doge, "some/model", asked, 1024) == (asked, None)  # no row has more keys
    with pytest.raises(InputError, match=refused):
        choose_layout(doge, "some/model", asked, 4096)


def test_length_dependent_ropes_are_exact_up_to_their_threshold():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = CONFIG_MAPPING["llama"](max_position_embeddings=2048, rope_parameters=dynamic)
    assert probe_shared_rows(config, max_length=2048) is None
    assert "differ by" in probe_shared_rows(config, max_length=2049)
    assert "differ by" in probe_shared_rows(config)
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}
    long = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=4096, **factors)
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    config = CONFIG_MAPPING["phi3"](rope_parameters=long, **sizes)
    assert probe_shared_rows(config, max_length=550) is None
    assert "differ by" in probe_shared_rows(config, max_length=8192)
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    config = CONFIG_MAPPING["llama"](max_position_embeddings=131072, rope_parameters=llama3)
    assert probe_shared_rows(config) is None


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neo", "llama", "mistral, window", "qwen2, windows", "gemma2"])
def test_the_probe_notices_a_wrong_mask(family, monkeypatch):
    """Each function breaks the mask slightly, the last two only in models with windows."""
    right = attention._additive
    kind, values = FAMILIES[family]
    config = CONFIG_MAPPING[kind](**values)

    def sees_the_next_token(allowed, positions, *more, **near):
        return right(allowed | torch.ones_like(allowed).tril(1) & (positions > 0)[:, None], positions, *more, **near)

    def window_one_too_wide(allowed, positions, dtype, window=None):
        return right(allowed, positions, dtype, None if window is None else window + 1)

    def window_by_place(allowed, positions, *more, **near):
        return right(allowed, torch.arange(allowed.shape[1])[None], *more, **near)

    monkeypatch.setattr(attention, "_additive", sees_the_next_token)
    assert "differ by" in probe_shared_rows(config)
    if WINDOW in (values.get("sliding_window"), values.get("window_size")):
        for wrong in (window_one_too_wide, window_by_place):
            monkeypatch.setattr(attention, "_additive", wrong)
            assert "differ by" in probe_shared_rows(config), wrong.__name__


def test_the_probe_refuses_when_shrinking_loses_a_kind_of_layer(monkeypatch):
    """Gemma 2 shrunk to two layers of one kind would have no full attention."""
    shrunk = probe.shrunk

    def careless(config, max_length):
        small = shrunk(config, max_length)
        small.layer_types = ["sliding_attention", "sliding_attention"]
        return small

    monkeypatch.setattr(probe, "shrunk", careless)
    assert "lacks" in probe_shared_rows(CONFIG_MAPPING["gemma2"]())


def test_the_probe_leaves_no_trace(capfd):
    config = CONFIG_MAPPING["gptj"]()
    torch.set_num_threads(2)
    before, state, verbosity = copy.deepcopy(config.__dict__), torch.get_rng_state(), logging.get_verbosity()
    assert probe_shared_rows(config) is None
    assert probe_shared_rows(CONFIG_MAPPING["recurrent_gemma"]()) is not None
    assert config.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.get_verbosity() == verbosity and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert capfd.readouterr() == ("", "")
