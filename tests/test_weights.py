"""Reading and exporting weights: `python -m pytest tests/test_weights.py`. Tiny random models, no network."""

import argparse
import json
import re
import shutil

import pytest
import torch
import transformers
from conftest import load, make_model, make_tokenizer, state
from conftest import refusal as refused_in_one_line
from safetensors.torch import load_file, save_file

from minirm.errors import InputError
from minirm.model import empty_model, load_config
from minirm.weights import choose_precision, export, load_weights, stored_dtype, stored_weights


def changed(model_folder, family, folder, change, **values):
    """(name, config) of a copy of a model folder with change(tensors) applied to its stored tensors."""
    shutil.copytree(model_folder(family, **values), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), load_config(str(folder))[0]


def test_missing_and_misplaced_weights_are_refused_by_name(model_folder, tmp_path):
    hole = "transformer.h.2.mlp.c_fc.weight"
    name, config = changed(model_folder, "gpt2", tmp_path / "a", lambda w: {k: v for k, v in w.items() if k != hole})
    assert stored_weights(name, empty_model(config), 0) is None
    with pytest.raises(InputError, match=r"weights missing from the checkpoint: .*h\.2\.mlp\.c_fc\.weight \(1\)"):
        load_weights(name, config, 0)
    fifth = {"model.layers.4.mlp.up_proj.weight": torch.zeros(64, 32), "model.memory": torch.zeros(3)}
    name, config = changed(model_folder, "llama", tmp_path / "b", lambda w: w | fifth)
    assert stored_weights(name, empty_model(config), 0) is None
    with pytest.raises(
        InputError, match=r"unexpected weights in the checkpoint: model\.layers\.4\.mlp.*, model\.memory \(2\)"
    ):
        load_weights(name, config, 0)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_heads_and_buffers_of_old_checkpoints_are_ignored(prefix, model_folder, tmp_path):
    """The names are those of EleutherAI/gpt-j-6b's file and of a value head, with and without the trunk's prefix."""

    def old(weights):
        weights = {key.replace("transformer.", prefix): value for key, value in weights.items()}
        for layer in range(4):
            weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
        return weights | {"v_head.summary.weight": torch.ones(1, 32), "lm_head.weight": torch.ones(9, 32)}

    name, config = changed(model_folder, "gptj", tmp_path / "x", old)
    expected = load_weights(str(model_folder("gptj")), config, 0)
    read, weights = stored_weights(name, empty_model(config), 0), load_weights(name, config, 0)
    for key, value in expected.items():
        assert torch.equal(read(key), value) and torch.equal(weights[key], value), key


@pytest.mark.parametrize("way", ["sharded", "bin", "sharded bin", "half"])
def test_every_checkpoint_format_gives_the_same_weights(way, model_folder, tmp_path):
    """Single rows equal those of the full tensor. .bin files can only be read in full."""
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
    read, weights = stored_weights(str(name), empty_model(config), 0), load_weights(str(name), config, 0)
    assert (read is None) == ("bin" in way)
    for key, value in expected.items():
        value = value.half() if half and key != "score.weight" else value
        assert torch.equal(weights[key], value) and weights[key].dtype == value.dtype, key
        for start, stop in ((0, 1), (1, len(value) - 1), (len(value) - 1, len(value)), (2, 2)) if read else ():
            assert torch.equal(read(key, start, stop), value[start:stop]), (key, start, stop)


class Code:
    """A pickle may contain a call, which is executed on loading."""

    def __reduce__(self):
        return RAN.append, (1,)


RAN: list[int] = []


@pytest.mark.parametrize("kind", ["code", "namespace", "pointer", "script"])
def test_a_bin_file_with_more_than_tensors_is_refused_with_a_fix(kind, model_folder, tmp_path, monkeypatch):
    """The .bin holds a call, a training script's arguments, a git-lfs pointer or TorchScript. In each case torch's own
    message advises loading with weights_only=False."""
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
    assert message.startswith(f"--model {folder}: its .bin weights contain more than tensors") and not RAN
    if kind == "namespace":
        monkeypatch.chdir(folder)
        exec(re.search('python -c "(.*)"$', message)[1], {})  # noqa: S102 - as the user would type it
        expected = load_weights(str(model_folder("gpt2")), config, 0)
        assert all(torch.equal(value, expected[key]) for key, value in load_weights(str(folder), config, 0).items())


def test_tied_embeddings_stored_as_the_output_layer_are_found(model_folder, tmp_path):
    def as_output(weights):
        return {"lm_head.weight" if key == "transformer.wte.weight" else key: value for key, value in weights.items()}

    name, config = changed(model_folder, "gpt2", tmp_path / "x", as_output)
    expected = load_weights(str(model_folder("gpt2")), config, 0)
    assert stored_weights(name, empty_model(config), 0) is None
    assert all(torch.equal(value, expected[key]) for key, value in load_weights(name, config, 0).items())


def test_experts_that_transformers_fuses_are_loaded_by_it(tmp_path):
    """Mixtral stores the experts' matrices one by one and computes with one tensor of them all."""
    folder, tokenizer = tmp_path / "mixtral", make_tokenizer()
    tokenizer.save_pretrained(folder)
    values = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=len(tokenizer), num_local_experts=2, num_key_value_heads=2, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    assert "model.layers.1.block_sparse_moe.experts.1.w1.weight" in load_file(folder / "model.safetensors")
    config, _ = load_config(str(folder))
    assert stored_weights(str(folder), empty_model(config), 0) is None
    weights, wanted = load_weights(str(folder), config, 0), dict(model.model.named_parameters())
    assert wanted["layers.1.mlp.experts.gate_up_proj"].shape == (2, 32, 32)
    for key, value in wanted.items():
        assert torch.equal(weights[f"trunk.{key}"][: len(value)], value), key


def test_missing_and_truncated_weights_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("gpt2"), tmp_path / "x")
    config, _ = load_config(str(tmp_path / "x"))
    path = tmp_path / "x" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="its weights cannot be loaded"):
        load_weights(str(tmp_path / "x"), config, 0)
    path.unlink()
    with pytest.raises(InputError, match="its weights cannot be loaded"):
        load_weights(str(tmp_path / "x"), config, 0)


def test_weights_whose_shape_contradicts_the_config_are_refused(model_folder, tmp_path):
    shutil.copytree(model_folder("gpt2"), tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_inner": 77}))
    config, _ = load_config(str(tmp_path / "x"))
    with pytest.raises(InputError, match="its weights cannot be loaded|missing"):
        load_weights(str(tmp_path / "x"), config, 0)


@pytest.mark.parametrize("dtype, name", [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_precision_auto_is_bf16_for_bf16_weights_on_gpus_that_support_it(dtype, name, model_folder, tmp_path):
    """No GPU is needed: the kind of device and whether it computes in bf16 are arguments."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama")).to(dtype)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for folder in (str(tmp_path / "one"), str(tmp_path / "shards")):
        assert stored_dtype(folder) == name
        assert choose_precision(folder, "cuda", True)[0] == ("bf16" if name == "BF16" else "fp16")
        assert choose_precision(folder, "cuda", False)[0] == "fp16"
        assert choose_precision(folder, "cpu", True) == ("fp32", "because there is no GPU")
    (tmp_path / "one" / "model.safetensors").unlink()
    by_config = choose_precision(str(tmp_path / "one"), "cuda", True)[0]
    assert by_config == ("bf16" if name == "BF16" else "fp16")


# ---------------------------------------------------------------------------------------------------------------------
# Exporting


@pytest.mark.parametrize("eos", [7, [7, 8]])
def test_the_exported_pad_token_differs_from_every_eos(tmp_path, eos):
    """In instruction-tuned models the tokenizer's EOS ends a turn; the config names the base model's EOS, or both."""
    tokenizer = make_tokenizer(pad="<pad>")
    eos = [tokenizer.pad_token_id if i == 7 else i for i in eos] if isinstance(eos, list) else tokenizer.pad_token_id
    make_model(tmp_path / "in", "qwen2", eos_token_id=eos)
    tokenizer.save_pretrained(tmp_path / "in")
    model, config, tokenizer = load(tmp_path / "in")
    export(state(model), config, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id != tokenizer.pad_token_id == config["pad_token_id"]


def test_the_chat_template_is_exported(model_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(source)
    model, config, tokenizer = load(source)
    export(state(model), config, tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == tokenizer.chat_template
    text = theirs.apply_chat_template([{"role": "user", "content": "it"}], tokenize=False)
    assert text == "it<|endoftext|>"  # as it is scored


def test_additional_config_entries_are_read_back_unchanged(model_folder, tmp_path):
    model, config, tokenizer = load(model_folder("llama"))
    notes = {"mean": -0.25, "std": 1.5, "minirm": {"separator": "\n\tß", "max_length": 99}}
    export(state(model), config, tokenizer, tmp_path, notes)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (theirs.mean, theirs.std, theirs.minirm) == (-0.25, 1.5, {"separator": "\n\tß", "max_length": 99})
    assert not hasattr(config, "mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_export_is_stored_and_loaded_in_half_precision(model_folder, tmp_path, dtype):
    model, config, tokenizer = load(model_folder("gptj"))
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state(model).items()}
    export(half, config, tokenizer, tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert other.dtype == dtype


def test_exporting_incomplete_weights_is_an_error(model_folder, tmp_path):
    model, config, tokenizer = load(model_folder("gpt2"))
    weights = state(model)
    del weights["trunk.ln_f.weight"]
    with pytest.raises(RuntimeError, match=r"GPT2ForSequenceClassification .*transformer\.ln_f\.weight"):
        export(weights, config, tokenizer, tmp_path)


def test_opt_350m_with_its_narrower_final_states_can_be_exported(tmp_path):
    changes = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    model, config, tokenizer = load(make_model(tmp_path / "in", "opt", **changes))
    assert model.score.weight.shape == (1, 16)
    export(state(model), config, tokenizer, tmp_path / "out")
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("the good answer is short")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(other(ids).logits[:, 0], model(ids)[:, -1], atol=1e-5)
