"""Freezing: `python -m pytest tests/test_freeze.py`. Builds tiny random models, no network.

int((1 - ratio) * layers) layers are trained, and at least one unless ratio is 1:
    28 layers, 0.7: int(8.4) = 8    12: int(3.6) = 3    3: int(0.9) = 0, so 1    2: int(0.6) = 0, so 1    1: 1
"""

import pytest
import torch
import transformers
from conftest import CONFIGS
from torch import nn

from minirm.freeze import find_blocks, freeze_bottom_layers, trained_layer_count
from minirm.model import RewardModel

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 50}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {name: (lambda make=make: make(50)) for name, make in CONFIGS.items()} | {
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=32, num_heads=4, num_layers=4, attention_types=[[["global", "local"], 2]]
    ),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(vocab_size=50, n_embd=32, n_layer=4, n_head=4),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=4, n_head=4),
    "bloom": lambda: transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=4, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=50, d_model=32, n_layers=4, n_heads=4, max_seq_len=64),
    "falcon": lambda: transformers.FalconConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**LLAMA),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=2),
    "phi": lambda: transformers.PhiConfig(**SMALL, intermediate_size=64),
    "phi3": lambda: transformers.Phi3Config(**LLAMA),
    "gemma": lambda: transformers.GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**LLAMA, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**LLAMA, head_dim=8),
    "qwen3": lambda: transformers.Qwen3Config(**LLAMA, head_dim=8),
    "stablelm": lambda: transformers.StableLmConfig(**LLAMA),
    "starcoder2": lambda: transformers.Starcoder2Config(**LLAMA),
    "olmo2": lambda: transformers.Olmo2Config(**LLAMA),
    "biogpt": lambda: transformers.BioGptConfig(**SMALL, intermediate_size=64),
    "persimmon": lambda: transformers.PersimmonConfig(**SMALL, intermediate_size=64, pad_token_id=0),
    "opt-350m": lambda: transformers.OPTConfig(  # narrower embeddings and project_in, project_out
        **SMALL, ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
}  # fmt: skip
BLOCKS = {
    **dict.fromkeys(["gpt2", "gptj", "gpt_neo", "gpt_bigcode", "openai-gpt", "bloom", "falcon"], "h"),
    **dict.fromkeys(["opt", "opt-350m"], "decoder.layers"),
    "mpt": "blocks",
}  # name of the block list; `layers` in all other families


def trunk(family):
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(FAMILIES[family]()).eval()


def gptj(layers):
    config = transformers.GPTJConfig(vocab_size=20, n_embd=8, n_layer=layers, n_head=2, rotary_dim=4, n_positions=16)
    with torch.device("meta"):
        return RewardModel(transformers.AutoModel.from_config(config))


def trained_layers(model):
    """Indices of the blocks that train. No block may be partly frozen."""
    shares = [[p.requires_grad for p in block.parameters()] for block in find_blocks(model)[1]]
    assert all(len(set(flags)) == 1 for flags in shares)
    return [i for i, flags in enumerate(shares) if flags[0]]


def test_layers_0_to_19_of_28_gptj_layers_are_frozen():
    model = gptj(28)
    frozen = freeze_bottom_layers(model)
    assert trained_layers(model) == [20, 21, 22, 23, 24, 25, 26, 27]
    assert (frozen.layers, frozen.total_layers) == (list(range(20)), 28)
    assert not model.trunk.wte.weight.requires_grad
    assert model.trunk.ln_f.weight.requires_grad and model.score.weight.requires_grad


@pytest.mark.parametrize("layers, trained", [(1, [0]), (2, [1]), (3, [2]), (12, [9, 10, 11])])
def test_small_models_train_at_least_one_layer(layers, trained):
    model = gptj(layers)
    frozen = freeze_bottom_layers(model)
    assert trained_layers(model) == trained
    assert frozen.layers == list(range(trained[0]))
    assert not model.trunk.wte.weight.requires_grad


@pytest.mark.parametrize(
    "layers, ratio, count",
    [(28, 0.7, 8), (12, 0.7, 3), (12, 0.5, 6), (12, 0.75, 3), (3, 0.99, 1), (3, 1, 0), (3, 1.0, 0), (3, 0, 3), (10, 0.7, 3)],
)  # fmt: skip
def test_layer_counts(layers, ratio, count):
    assert trained_layer_count(layers, ratio) == count


def test_ratio_0_freezes_nothing_and_ratio_1_everything_but_the_head():
    model = gptj(4)
    assert freeze_bottom_layers(model, 0) == ([], [], 4)
    assert all(p.requires_grad for p in model.parameters())
    frozen = freeze_bottom_layers(model, 1.0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    assert frozen.layers == [0, 1, 2, 3] and len(frozen.parameters) == len(list(model.trunk.parameters()))
    model = gptj(4)
    freeze_bottom_layers(model, 1.0, embeddings=False)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["trunk.wte.weight", "score.weight"]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, 70, float("nan")])
def test_a_ratio_out_of_range_is_refused_and_nothing_is_frozen(ratio):
    model = gptj(4)
    with pytest.raises(ValueError, match=f"0..1, got {ratio}"):
        freeze_bottom_layers(model, ratio)
    assert all(p.requires_grad for p in model.parameters())


def test_embeddings_can_stay_trainable_as_in_the_published_code():
    model = gptj(28)
    frozen = freeze_bottom_layers(model, 0.7, embeddings=False)
    assert model.trunk.wte.weight.requires_grad
    assert frozen.layers == list(range(20))
    assert not any("wte" in name for name in frozen.parameters)


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_reaches_below_the_first_trained_block(family, embeddings):
    """Half of 4 layers, blocks 0 and 1, are frozen. The graph reaches below them only if the embeddings are trained."""
    model = RewardModel(trunk(family))
    frozen = freeze_bottom_layers(model, 0.5, embeddings=embeddings)
    name, blocks = find_blocks(model)
    assert name == "trunk." + BLOCKS.get(family, "layers")
    assert (frozen.layers, frozen.total_layers) == ([0, 1], 4)

    inputs = []
    blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append([*args, *kwargs.values()]), with_kwargs=True
    )
    rewards = model(torch.randint(2, 50, (2, 7), generator=torch.Generator().manual_seed(0)))
    assert rewards.shape == (2, 7)
    rewards.sum().backward()
    reaches_below = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs[0])
    assert reaches_below == (not embeddings)

    # Frozen parameters have no gradient and all others do.
    parameters = dict(model.named_parameters())
    assert sorted(frozen.parameters) == sorted(n for n, p in parameters.items() if not p.requires_grad)
    assert [n for n in frozen.parameters if parameters[n].grad is not None] == []
    assert [n for n, p in parameters.items() if p.requires_grad and p.grad is None] == []
    in_blocks = sum(p.numel() for block in blocks[:2] for p in block.parameters())
    of_embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    count = sum(parameters[n].numel() for n in frozen.parameters)
    if family in ("bloom", "opt-350m") and embeddings:  # plus the embeddings' norm (2 x 32) or projection (16 x 32)
        of_embeddings += {"bloom": 64, "opt-350m": 512}[family]
    assert count == in_blocks + (of_embeddings if embeddings else 0)


@pytest.mark.parametrize(
    "wrap, names",
    [
        (lambda config: transformers.AutoModel.from_config(config), "h.0.ln_1.weight wte.weight"),
        (lambda config: transformers.AutoModelForCausalLM.from_config(config), "transformer.h.0.ln_1.weight"),
        (lambda config: transformers.AutoModelForSequenceClassification.from_config(config), "transformer.wte.weight"),
        (lambda config: RewardModel(transformers.AutoModel.from_config(config)), "trunk.h.0.ln_1.weight"),
    ],
)
def test_decoders_are_accepted_bare_and_with_any_head(wrap, names):
    with torch.device("meta"):
        model = wrap(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=10, n_head=2, n_positions=8))
    frozen = freeze_bottom_layers(model)
    assert trained_layers(model) == [7, 8, 9]
    assert set(names.split()) <= set(frozen.parameters)


def test_models_with_an_encoder_are_refused_with_the_names_found():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with torch.device("meta"):
        model = transformers.T5Model(config)
    with pytest.raises(
        ValueError, match=r"T5Model: .*h, layers, blocks, layer or block; found encoder.block and decoder.block"
    ):
        freeze_bottom_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.ModuleDict({"tiers": nn.ModuleList([nn.Linear(2, 2)])})])
def test_a_model_without_blocks_is_refused_with_the_names_looked_for(model):
    lists = "tiers" if isinstance(model, nn.ModuleDict) else "none"
    with pytest.raises(
        ValueError, match=rf"called h, layers, blocks, layer or block; found none \(its module lists: {lists}\)"
    ):
        freeze_bottom_layers(model)


class Decoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 2)
        self.layers = nn.ModuleList(layers)


def test_weights_shared_across_the_freezing_boundary_are_refused():
    shared = nn.Linear(2, 2)
    whole, partly = [shared, nn.Linear(2, 2), shared, nn.Linear(2, 2)], [nn.Linear(2, 2) for _ in range(4)]
    partly[3].weight = partly[0].weight
    for layers in (whole, partly):
        model = Decoder(layers)
        with pytest.raises(ValueError, match="layers 0-1 of layers share weights with the layers above"):
            freeze_bottom_layers(model, 0.5)
        assert all(p.requires_grad for p in model.parameters())


def test_weights_shared_on_one_side_of_the_boundary_are_accepted():
    shared = nn.Linear(2, 2)
    model = Decoder([shared, shared, nn.Linear(2, 2), nn.Linear(2, 2)])
    assert freeze_bottom_layers(model, 0.5) == ([0, 1], ["embed_tokens.weight", "layers.0.weight", "layers.0.bias"], 4)
    shared = nn.Linear(2, 2)
    model = Decoder([shared, shared])  # frozen entirely or not at all
    assert freeze_bottom_layers(model, 0) == ([], [], 2)
    assert freeze_bottom_layers(model, 1).layers == [0, 1]
    assert not shared.weight.requires_grad


def test_freezing_keeps_parameters_that_were_frozen_before():
    """Freezing never unfreezes: a user may have frozen more beforehand."""
    model = gptj(4)
    model.trunk.ln_f.requires_grad_(False)
    freeze_bottom_layers(model, 0.5)
    assert not model.trunk.ln_f.weight.requires_grad
    assert trained_layers(model) == [2, 3]
