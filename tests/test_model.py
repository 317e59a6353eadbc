"""Loading and refusing models: `python -m pytest tests/test_model.py`. Tiny random models, no network, 30 seconds."""

import argparse
import json
import math
import re
import shutil

import pytest
import torch
import transformers
from conftest import CONFIGS, make_model, make_tokenizer
from conftest import refusal as refused_in_one_line
from safetensors.torch import load_file, save_file
from test_attention import FAMILIES as FAMILIES_BY_NAME
from test_attention import REFUSED

from minirm.errors import InputError
from minirm.loss import pairwise_loss
from minirm.model import PAD_TOKEN, RewardModel, empty_model, init_head, load_config, saved_tensors
from minirm.weights import choose_precision, export, load_weights, stored_dtype, stored_weights

FAMILIES = ["gpt2", "gptj", "llama", "qwen2", "gpt_neox", "opt"]


def load(folder, seed=0):
    """(RewardModel, config, tokenizer) the way train.py makes them: empty, then filled by name, from both sources.

    It uses the published head, because errors in rewards near zero would be too small to notice.
    """
    config, tokenizer = load_config(str(folder))
    model = empty_model(config)
    read, weights = (
        stored_weights(str(folder), config, model, seed, True),
        load_weights(str(folder), config, seed, True),
    )
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    assert weights.keys() == dict(model.state_dict()).keys()
    with torch.no_grad():
        for name, target in saved_tensors(model):
            assert target.shape == weights[name].shape, name
            assert torch.equal(read(name), weights[name]) and read(name).dtype == weights[name].dtype, name
            target.copy_(weights[name])
    return model, config, tokenizer


def state(model):
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


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
def test_a_reward_for_every_token_and_it_depends_on_nothing_behind(model_folder, family):
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
    """GPT-2's config has dropout 0.1 everywhere."""
    model, config, _ = load(model_folder("gpt2"))
    assert config.resid_pdrop == 0.1 and not any(module.training for module in model.modules())
    ids = torch.arange(10, 20)[None]
    assert torch.equal(model(ids), model(ids))


def test_the_empty_model_takes_no_memory(model_folder):
    config, _ = load_config(str(model_folder("gptj")))
    model = empty_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_published_head_is_normal_with_standard_deviation_1_over_the_root_of_width_plus_1():
    """1 / sqrt(4095 + 1) = 1 / 64 = 0.015625; with 4095 numbers the estimate is within 4 / sqrt(2 * 4095) = 4.4 %."""
    head = init_head(4095, seed=0, published=True)
    assert head.shape == (1, 4095) and head.dtype == torch.float32
    assert head.std().item() == pytest.approx(0.015625, rel=0.044)
    assert abs(head.mean().item()) < 4 * 0.015625 / 64
    assert torch.equal(head, init_head(4095, 0, True)) and not torch.equal(head, init_head(4095, 1, True))
    assert torch.allclose(init_head(4095, seed=0), head / 1000, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_new_head_starts_within_0_05_of_log_2_in_every_precision(model_folder, family):
    """Also with final states thirty times as large as a random model's, for which the published head is not suited."""
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
def test_a_pad_token_is_added_where_there_is_none_and_embeddings_only_where_they_are_full(tmp_path, family, spare):
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


def test_a_pad_token_of_its_own_is_kept(tmp_path):
    tokenizer = make_tokenizer(pad="<pad>")
    config, theirs = load_config(str(with_vocabulary(tmp_path, "llama", tokenizer, len(tokenizer))))
    assert (theirs.pad_token, len(theirs)) == ("<pad>", len(tokenizer))
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.vocab_size == len(tokenizer)


def test_padding_goes_to_the_right_whatever_the_tokenizer_says(tmp_path):
    tokenizer = make_tokenizer()
    folder = with_vocabulary(tmp_path, "gpt2", tokenizer, len(tokenizer))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
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
    assert "no such model folder or name" in refusal(name)


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
        (
            transformers.GPT2Config(quantization_config={"quant_method": "gptq", "bits": 4}),
            "its weights are quantised (gptq)",
        ),
        (
            transformers.LlamaConfig(quantization_config={"quant_method": "awq", "bits": 4}),
            "its weights are quantised (awq)",
        ),
        (
            transformers.LlamaConfig(quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()),
            "(bitsandbytes), which cannot be trained; give the model it was made from",
        ),
    ],
    ids=lambda value: type(value).__name__.removesuffix("Config") if not isinstance(value, str) else "",
)
def test_what_is_no_decoder_or_could_not_be_loaded_afterwards_is_refused(tmp_path, config, wanted):
    assert wanted in refusal(config_only(tmp_path, config))


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    make_model(tmp_path, "llama")
    make_tokenizer(eos=None).save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}))
    assert "no EOS token" in refusal(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nonsense"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 5},
        {"rope_parameters": {"rope_type": "x"}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_refused(model_folder, tmp_path, changes):
    shutil.copytree(model_folder("llama"), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert re.search("not one for transformers|cannot make a model", refusal(tmp_path / "x"))


def test_a_config_that_is_not_json_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{")
    assert "not a valid JSON file" in refusal(tmp_path / "x")


def test_a_folder_without_a_tokenizer_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("llama"), tmp_path / "x", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "its tokenizer cannot be loaded" in refusal(tmp_path / "x")


def test_a_model_that_brings_its_own_code_is_refused_without_a_question(model_folder, tmp_path, monkeypatch):
    """transformers would ask on the terminal whether to run the code, and every rank would wait for an answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(model_folder("llama"), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    changes = {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert "custom code" in refusal(tmp_path / "x")


def changed(model_folder, family, folder, change, **values):
    """Copy a model folder and apply change(tensors) to its stored tensors -> the copy's name and config."""
    shutil.copytree(model_folder(family, **values), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), load_config(str(folder))[0]


def test_missing_and_misplaced_weights_are_refused_by_name(model_folder, tmp_path):
    hole = "transformer.h.2.mlp.c_fc.weight"
    name, config = changed(model_folder, "gpt2", tmp_path / "a", lambda w: {k: v for k, v in w.items() if k != hole})
    assert stored_weights(name, config, empty_model(config), 0) is None
    with pytest.raises(InputError, match=r"weights missing from the checkpoint: .*h\.2\.mlp\.c_fc\.weight \(1\)"):
        load_weights(name, config, 0)
    fifth = {"model.layers.4.mlp.up_proj.weight": torch.zeros(64, 32), "model.memory": torch.zeros(3)}
    name, config = changed(model_folder, "llama", tmp_path / "b", lambda w: w | fifth)
    assert stored_weights(name, config, empty_model(config), 0) is None
    with pytest.raises(InputError, match=r"of no use in the checkpoint: model\.layers\.4\.mlp.*, model\.memory \(2\)"):
        load_weights(name, config, 0)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_heads_and_the_buffers_of_old_checkpoints_are_left_aside(prefix, model_folder, tmp_path):
    """The names in EleutherAI/gpt-j-6b's file, and those of a value head, with and without the trunk's prefix."""

    def old(weights):
        weights = {key.replace("transformer.", prefix): value for key, value in weights.items()}
        for layer in range(4):
            weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
        return weights | {"v_head.summary.weight": torch.ones(1, 32), "lm_head.weight": torch.ones(9, 32)}

    name, config = changed(model_folder, "gptj", tmp_path / "x", old)
    expected = load_weights(str(model_folder("gptj")), config, 0)
    read, weights = stored_weights(name, config, empty_model(config), 0), load_weights(name, config, 0)
    for key, value in expected.items():
        assert torch.equal(read(key), value) and torch.equal(weights[key], value), key


@pytest.mark.parametrize("way", ["sharded", "bin", "sharded bin", "half"])
def test_every_form_of_a_checkpoint_gives_the_same_weights(way, model_folder, tmp_path):
    """Rows read alone equal those of the full tensor; .bin files can only be read in full, and never run code."""
    name, (folder, half) = tmp_path / "x", (model_folder("opt"), way == "half")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16 if half else torch.float32)
    shutil.copytree(folder, name, ignore=shutil.ignore_patterns("*.safetensors"))
    if way == "bin":
        torch.save(model.state_dict(), name / "pytorch_model.bin")
    elif way == "sharded bin":
        parts = {f"pytorch_model-{i}.bin": list(model.state_dict())[i::2] for i in range(2)}
        for file, keys in parts.items():
            torch.save({key: model.state_dict()[key] for key in keys}, name / file)
        index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        model.save_pretrained(name, max_shard_size="20KB" if way == "sharded" else "5GB")
        assert len(list(name.glob("*.safetensors"))) == (1 if half else 10)
    config, _ = load_config(str(name))
    expected = load_weights(str(folder), config, 0)
    read, weights = stored_weights(str(name), config, empty_model(config), 0), load_weights(str(name), config, 0)
    assert (read is None) == ("bin" in way)
    for key, value in expected.items():
        value = value.half() if half and key != "score.weight" else value
        assert torch.equal(weights[key], value) and weights[key].dtype == value.dtype, key
        for start, stop in ((0, 1), (1, len(value) - 1), (len(value) - 1, len(value)), (2, 2)) if read else ():
            assert torch.equal(read(key, start, stop), value[start:stop]), (key, start, stop)


class Code:
    """A pickle may contain a call, which is made on loading."""

    def __reduce__(self):
        return RAN.append, (1,)


RAN: list[int] = []


@pytest.mark.parametrize("kind", ["code", "namespace", "pointer", "script"])
def test_a_bin_of_more_than_tensors_is_refused_with_a_command_that_converts_it(
    kind, model_folder, tmp_path, monkeypatch
):
    """A call, a training script's arguments, a git-lfs pointer, TorchScript: each time torch's own message advises
    loading with weights_only=False."""
    folder = tmp_path / "x"
    shutil.copytree(model_folder("gpt2"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights, path = load_file(model_folder("gpt2") / "model.safetensors"), folder / "pytorch_model.bin"
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    elif kind == "script":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    else:
        torch.save(weights | {"x": Code() if kind == "code" else argparse.Namespace(lr=1)}, path)
    config, _ = load_config(str(folder))
    message = refused_in_one_line(load_weights, str(folder), config, 0)
    assert message.startswith(f"--model {folder}: its .bin weights are not only tensors") and not RAN
    if kind == "namespace":
        monkeypatch.chdir(folder)
        exec(re.search('python -c "(.*)"$', message)[1], {})  # noqa: S102, as the person would type it
        expected = load_weights(str(model_folder("gpt2")), config, 0)
        assert all(torch.equal(value, expected[key]) for key, value in load_weights(str(folder), config, 0).items())


def test_tied_embeddings_that_are_stored_as_the_output_layer_are_found(model_folder, tmp_path):
    def as_output(weights):
        return {"lm_head.weight" if key == "transformer.wte.weight" else key: value for key, value in weights.items()}

    name, config = changed(model_folder, "gpt2", tmp_path / "x", as_output)
    expected = load_weights(str(model_folder("gpt2")), config, 0)
    assert stored_weights(name, config, empty_model(config), 0) is None
    assert all(torch.equal(value, expected[key]) for key, value in load_weights(name, config, 0).items())


def test_experts_that_transformers_fuses_are_left_to_it(tmp_path):
    """Mixtral stores experts' matrices one by one and computes with all of them in one tensor."""
    folder, tokenizer = tmp_path / "mixtral", make_tokenizer()
    tokenizer.save_pretrained(folder)
    values = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, num_key_value_heads=2, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    assert "model.layers.1.block_sparse_moe.experts.1.w1.weight" in load_file(folder / "model.safetensors")
    config, _ = load_config(str(folder))
    assert stored_weights(str(folder), config, empty_model(config), 0) is None
    weights, wanted = load_weights(str(folder), config, 0), dict(model.model.named_parameters())
    assert wanted["layers.1.mlp.experts.gate_up_proj"].shape == (2, 32, 32)
    for key, value in wanted.items():
        assert torch.equal(weights[f"trunk.{key}"][: len(value)], value), key


@pytest.mark.parametrize("family", [*FAMILIES_BY_NAME, *REFUSED])
def test_buffers_that_no_checkpoint_has_are_those_of_from_pretrained(family, tmp_path):
    """Rotary frequencies, masks and embedding scales are bitwise equal in every family."""
    kind, values = {**FAMILIES_BY_NAME, **REFUSED}[family]
    config = transformers.CONFIG_MAPPING[kind](**values | {"vocab_size": 50, "max_position_embeddings": 64})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    wanted = dict(transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).named_buffers())
    buffers = dict(empty_model(config).trunk.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, wanted[name]) and buffer.dtype == wanted[name].dtype, name


def test_a_folder_without_weights_or_with_half_of_them_is_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("gpt2"), tmp_path / "x")
    config, _ = load_config(str(tmp_path / "x"))
    path = tmp_path / "x" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="its weights cannot be loaded"):
        load_weights(str(tmp_path / "x"), config, 0)
    path.unlink()
    with pytest.raises(InputError, match="its weights cannot be loaded"):
        load_weights(str(tmp_path / "x"), config, 0)


def test_weights_of_another_shape_than_the_config_says_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("gpt2"), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_inner": 77}))
    config, _ = load_config(str(tmp_path / "x"))
    with pytest.raises(InputError, match="its weights cannot be loaded|missing"):
        load_weights(str(tmp_path / "x"), config, 0)


def test_the_reward_model_takes_a_trunk_that_a_person_made():
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    rewards = RewardModel(transformers.AutoModel.from_config(config))(torch.arange(10)[None])
    assert rewards.shape == (1, 10) and rewards.requires_grad


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_precision_auto_is_bf16_for_weights_stored_so_where_the_gpu_computes_it(dtype, name, model_folder, tmp_path):
    """The device is faked: its kind and whether it computes in bf16 are arguments."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama")).to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for folder in (str(tmp_path / "one"), str(tmp_path / "shards")):
        assert stored_dtype(folder) == name
        assert choose_precision(folder, "cuda", True)[0] == ("bf16" if name == "BF16" else "fp16")
        assert choose_precision(folder, "cuda", False)[0] == "fp16"
        assert choose_precision(folder, "cpu", True) == ("fp32", "on a CPU")
    (tmp_path / "one" / "model.safetensors").unlink()
    assert choose_precision(str(tmp_path / "one"), "cuda", True)[0] == (
        "bf16" if name == "BF16" else "fp16"
    )  # by config.json
