"""Loading and refusing models: `python -m pytest tests/test_model.py`. Tiny random models, no network."""

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from conftest import CONFIGS, load, make_model, make_tokenizer, state
from test_attention import FAMILIES as FAMILIES_BY_NAME
from test_attention import REFUSED

from minirm.errors import InputError
from minirm.loss import pairwise_loss
from minirm.model import PAD_TOKEN, RewardModel, empty_model, init_head, load_config
from minirm.weights import export

FAMILIES = ["gpt2", "gptj", "llama", "qwen2", "gpt_neox", "opt"]

TEXT = "a very long and helpful answer, or is it the question that was long?"


def test_a_classifier_of_two_labels_gets_a_new_head(model_folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(model_folder("llama"), num_labels=2, pad_token_id=0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, config, _ = load(tmp_path, seed=3)
    assert config.num_labels == 1
    assert torch.equal(model.score.weight, init_head(32, 3, published=True))


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_has_a_reward_that_depends_on_no_later_token(model_folder, family):
    model, _, tokenizer = load(model_folder(family))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        whole, part = model(ids), model(ids[:, :5])
    assert whole.shape == ids.shape and whole.dtype == torch.float32
    assert torch.allclose(whole[:, :5], part, atol=1e-6)


def test_rewards_are_the_head_applied_to_the_trunks_own_output(model_folder):
    model, _, _ = load(model_folder("llama"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32).eval()
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        expected = plain.model(ids).last_hidden_state @ model.score.weight[0]
        assert torch.allclose(model(ids), expected, atol=1e-6)


def test_the_head_and_its_rewards_are_fp32_under_autocast(model_folder):
    model, _, _ = load(model_folder("gptj"))
    hidden = []
    model.trunk.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rewards = model(torch.arange(10, 20)[None])
    assert rewards.dtype == model.score.weight.dtype == torch.float32
    assert torch.allclose(rewards, hidden[0].float() @ model.score.weight[0], atol=1e-6)


def test_dropout_is_off(model_folder):
    """GPT-2's config sets dropout 0.1 everywhere."""
    model, config, _ = load(model_folder("gpt2"))
    assert config.resid_pdrop == 0.1 and not any(module.training for module in model.modules())
    ids = torch.arange(10, 20)[None]
    assert torch.equal(model(ids), model(ids))


def test_the_empty_model_takes_no_memory(model_folder):
    config, _ = load_config(str(model_folder("gptj")))
    model = empty_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_published_head_has_standard_deviation_1_over_sqrt_of_width_plus_1():
    """1 / sqrt(4095 + 1) = 1 / 64 = 0.015625; with 4095 numbers the estimate is within 4 / sqrt(2 * 4095) = 4.4 %."""
    head = init_head(4095, seed=0, published=True)
    assert head.shape == (1, 4095) and head.dtype == torch.float32
    assert head.std().item() == pytest.approx(0.015625, rel=0.044)
    assert abs(head.mean().item()) < 4 * 0.015625 / 64
    assert torch.equal(head, init_head(4095, 0, True)) and not torch.equal(head, init_head(4095, 1, True))
    assert torch.allclose(init_head(4095, seed=0), head / 1000, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_head_starts_within_0_05_of_log_2_in_every_precision(model_folder, family):
    """Even with final states thirty times as large as a random model's, which are too large for the published head."""
    model, _, _ = load(model_folder(family))
    ids = torch.randint(5, 200, (32, 20), generator=torch.Generator().manual_seed(0))

    def enlarge(module, args, output) -> None:
        output.last_hidden_state.mul_(30)

    model.trunk.register_forward_hook(enlarge)

    @torch.no_grad()
    def loss(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            chosen, rejected = model(ids).chunk(2)
        return pairwise_loss(chosen.flatten(), rejected.flatten()).item()

    assert loss(torch.float32) > 1
    model.score.weight.data = init_head(32, seed=0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert loss(dtype) == pytest.approx(math.log(2), abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Pad tokens and vocabularies


def with_vocabulary(folder, family, tokenizer, vocab_size):
    make_model(folder, family, vocab_size=vocab_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spare", [0, 1, 50])
def test_a_missing_pad_token_is_added_and_full_embeddings_grow(tmp_path, family, spare):
    tokenizer = make_tokenizer()
    count = len(tokenizer)
    folder = with_vocabulary(tmp_path / "in", family, tokenizer, count + spare)
    model, config, theirs = load(folder)
    assert (theirs.pad_token, theirs.pad_token_id) == (PAD_TOKEN, count)
    assert config.pad_token_id == count != theirs.eos_token_id
    wanted = count + max(spare, 1)
    assert config.vocab_size == model.trunk.get_input_embeddings().num_embeddings == wanted
    before = transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(model.trunk.get_input_embeddings().weight[: len(before)], before)
    export(state(model), config, theirs, tmp_path / "out")
    other, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert other.get_input_embeddings().num_embeddings == wanted


def test_a_pad_token_that_is_eos_is_replaced(tmp_path):
    tokenizer = make_tokenizer(pad="<|endoftext|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    config, theirs = load_config(str(with_vocabulary(tmp_path, "llama", tokenizer, len(tokenizer))))
    assert (theirs.eos_token, theirs.pad_token) == ("<|endoftext|>", PAD_TOKEN)
    assert config.pad_token_id == theirs.pad_token_id == len(tokenizer) != theirs.eos_token_id


def test_a_pad_token_other_than_eos_is_kept(tmp_path):
    tokenizer = make_tokenizer(pad="<pad>")
    config, theirs = load_config(str(with_vocabulary(tmp_path, "llama", tokenizer, len(tokenizer))))
    assert (theirs.pad_token, len(theirs)) == ("<pad>", len(tokenizer))
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.vocab_size == len(tokenizer)


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path):
    tokenizer = make_tokenizer()
    folder = with_vocabulary(tmp_path, "gpt2", tokenizer, len(tokenizer))
    edited(folder / "tokenizer_config.json", padding_side="left")
    assert transformers.AutoTokenizer.from_pretrained(folder).padding_side == "left"
    _, theirs = load_config(str(folder))
    assert theirs.padding_side == "right"


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line, before any weight


def refusal(name):
    with pytest.raises(InputError) as caught:
        load_config(str(name))
    message = str(caught.value)
    assert message.startswith(f"--model {name}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["no/such-model", "no-such-model", "/no/such/folder", "a/b/c", "x y", ""])
def test_unknown_models_are_refused(name):
    assert "not a model folder or name" in refusal(name)


def config_only(folder, config):
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config, wanted",
    [
        (transformers.BertConfig(), "bert is not a decoder"),
        (transformers.BertConfig(is_decoder=True), "bert is not a decoder"),
        (transformers.RobertaConfig(), "roberta is not a decoder"),
        (transformers.T5Config(), "t5 is not a decoder"),
        (transformers.BartConfig(), "bart is not a decoder"),
        (transformers.ViTConfig(), "vit is not a decoder"),
        (transformers.XLNetConfig(), "xlnet is not a decoder"),
        (transformers.CLIPConfig(), "clip_text_model is not a decoder"),
        (transformers.GPT2Config(quantization_config={"quant_method": "gptq", "bits": 4}), "its weights are quantised (gptq)"),
        (transformers.LlamaConfig(quantization_config={"quant_method": "awq", "bits": 4}), "its weights are quantised (awq)"),
        (transformers.LlamaConfig(quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()),
         "(bitsandbytes) and cannot be trained; use the unquantised original"),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config") if not isinstance(value, str) else "",
)  # fmt: skip
def test_encoders_and_quantised_models_are_refused(tmp_path, config, wanted):
    assert wanted in refusal(config_only(tmp_path, config))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    make_model(tmp_path, "llama")
    make_tokenizer(eos=None).save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}))
    assert "no EOS token" in refusal(tmp_path)


def edited(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"model_type": "nonsense"}, "that transformers can load|cannot build a model"),
        ({"hidden_size": "wide"}, "that transformers can load|cannot build a model"),
        ({"num_attention_heads": 5}, "that transformers can load|cannot build a model"),
        ({"rope_parameters": {"rope_type": "x"}}, "that transformers can load|cannot build a model"),
        ({"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}}, "custom code"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused(model_folder, tmp_path, monkeypatch, changes, wanted):
    """For custom code, transformers would ask on the terminal, and every rank would wait for the answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(model_folder("llama"), tmp_path / "x")
    edited(tmp_path / "x" / "config.json", **changes)
    assert re.search(wanted, refusal(tmp_path / "x"))


def test_a_folder_without_a_valid_config_or_tokenizer_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "x", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "its tokenizer cannot be loaded" in refusal(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(tmp_path / "x")


@pytest.mark.parametrize("family", [*FAMILIES_BY_NAME, *REFUSED])
def test_buffers_that_are_not_stored_equal_those_of_from_pretrained(family, tmp_path):
    """Rotary frequencies, masks and embedding scales are bitwise equal in every family."""
    kind, values = {**FAMILIES_BY_NAME, **REFUSED}[family]
    config = transformers.CONFIG_MAPPING[kind](**values | {"vocab_size": 50, "max_position_embeddings": 64})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    wanted = dict(transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).named_buffers())
    buffers = dict(empty_model(config).trunk.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, wanted[name]) and buffer.dtype == wanted[name].dtype, name


def test_the_reward_model_accepts_any_trunk():
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    rewards = RewardModel(transformers.AutoModel.from_config(config))(torch.arange(10)[None])
    assert rewards.shape == (1, 10) and rewards.requires_grad
