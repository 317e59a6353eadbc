"""What `--model` accepts: families without a class in transformers, multimodal checkpoints, adapters, GGUF files.

Run: pytest tests/test_families.py. Tiny random models, no network; two training steps each, in one process.
tests/bench/families.py covers all families in transformers.
"""

import importlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_comparisons, make_model, make_tokenizer, read_metrics, refusal, write_jsonl
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import families

import train
from minirm.freeze import freeze_bottom_layers
from minirm.model import LOADER, classifier, empty_model, is_causal, load_config, loader, saved_tensors
from minirm.run import model_fingerprint
from minirm.weights import brings_head, export, load_weights, stored_weights


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# -- Families. -----------------------------------------------------------------------------------------------------------

# The families that differ most: (row layout, whether the export needs code beside the weights).
UNLIKE = {
    "bloom": ("separate", False),  # alibi
    "cohere2": ("shared", True),  # sliding windows, layers without positions
    "ctrl": ("shared", True),  # computes positions instead of storing them; layers in a list called h
    "deepseek_v3": ("shared", False),  # MLA, experts
    "falcon_h1": ("separate", True),  # attention and Mamba 2 in one layer; buffers that are not stored
    "gemma3n_text": ("shared", True),  # layers use the keys and values of other layers
    "gemma4_text": ("shared", True),  # embeddings per layer
    "gpt_oss": ("shared", False),  # attention sinks
    "granitemoehybrid": ("separate", True),
    "lfm3": ("separate", True),  # convolutions
    "llama4_text": ("shared", True),  # chunks
    "mamba": ("separate", True),  # no attention at all
    "xglm": ("shared", True),
}


@pytest.mark.parametrize("family", UNLIKE)
def test_a_family_trains_and_transformers_gives_the_same_rewards(family, tmp_path):
    if family not in families.families():
        pytest.skip("transformers is older than this family")
    layout, code = UNLIKE[family]
    assert families.try_family(family, tmp_path) == (layout, LOADER if code else "a class of transformers")
    if code:
        config = config_of(tmp_path / "shared")
        name = config["architectures"][0]
        assert config["auto_map"] == {"AutoModelForSequenceClassification": f"modeling_reward.{name}"}
        card = (tmp_path / "shared" / "README.md").read_text()
        assert "from_pretrained(folder, trust_remote_code=True)" in card and LOADER in card


def test_a_family_with_a_class_is_exported_without_code(model_folder, tmp_path):
    config, tokenizer = load_config(str(model_folder("llama")))
    config.auto_map = {"AutoModel": "code.Model"}
    model = empty_model(config)
    export({name: torch.zeros(t.shape) for name, t in saved_tensors(model)}, config, tokenizer, tmp_path)
    assert "auto_map" not in config_of(tmp_path) and not (tmp_path / LOADER).exists()


def decoders():
    """(configuration, causal class) of every decoder in transformers whose configuration has defaults."""
    for kind, lm in auto.MODEL_FOR_CAUSAL_LM_MAPPING.items():
        try:
            config = kind()
        except Exception:  # noqa: BLE001 - it has no defaults
            config = None
        text = config and config.get_text_config(decoder=True) is config
        if text and kind in auto.MODEL_MAPPING and is_causal(config):
            yield config, lm


def test_vllm_resolves_the_names_of_all_classes():
    """For XForSequenceClassification vLLM looks for XForCausalLM or XLMHeadModel among the models it knows."""
    seen = Counter()
    for config, lm in decoders():
        if source := loader(config):
            stem = classifier(config).__name__.removesuffix("ForSequenceClassification")
            assert lm.__name__ in {stem + "ForCausalLM", stem + "LMHeadModel"}, config.model_type
            compile(source, LOADER, "exec")
        seen[bool(source)] += 1
    assert min(seen.values()) > 20


def test_an_embedding_table_of_more_than_tokens_gets_no_pad_token(tmp_path, monkeypatch):
    """CPM-Ant's table holds its prompts after its tokens, and one more token would shift them."""
    monkeypatch.setattr(families, "NO_ROOM", ())
    folder = families.make_family(families.families()["cpmant"], tmp_path)
    config, _ = load_config(str(folder))
    assert "give its tokenizer a pad_token other than EOS" in refusal(load_weights, str(folder), config, 0)


def test_a_model_that_cannot_grow_by_a_pad_token_is_refused_before_loading(tmp_path):
    config = families.small_config(families.families()["gemma3n_text"], make_tokenizer())
    config.vocab_size_per_layer_input = len(make_tokenizer())
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert "give its tokenizer a pad_token other than EOS" in refusal(load_config, str(tmp_path))


def test_per_layer_inputs_are_frozen_with_the_embeddings():
    """Gemma 3n and 4 feed the tokens into each layer. If that were trained, backward would run through all layers."""
    for family, below in (("gemma4_text", "per_layer_model_projection"), ("gemma3n_text", "altup_projections.0")):
        config = families.small_config(families.families()[family], make_tokenizer())
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        frozen = freeze_bottom_layers(model, 0.5)
        assert {"embed_tokens_per_layer.weight", f"{below}.weight"} <= {*frozen.parameters}, family
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(re.match(r"layers\.[23]\.|norm\.|altup_unembed_projections", name) for name in trained), trained


@pytest.mark.parametrize("family", ["gemma4_text", "lfm3", "mamba"])
def test_caching_the_frozen_layers_changes_nothing_in_unusual_families(family, tmp_path):
    if family not in families.families():
        pytest.skip("transformers is older than this family")
    model = families.make_family(families.families()[family], tmp_path / "model")
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))
    losses = []
    for more in ([], ["--cache_trunk", tmp_path / "cache"]):
        flags = ["--model", model, "--train_data", data, "--eval_data", data, "--output_dir", tmp_path / f"{len(more)}"]
        flags += ["--max_steps", 3, "--learning_rate", 1e-3, "--warmup_steps", 0, "--save_steps", 0, *more]
        assert train.main(list(map(str, flags))) == 0
        losses.append([row["eval_loss"] for row in read_metrics(tmp_path / f"{len(more)}") if "eval_loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# -- Multimodal checkpoints. --------------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
SEEN = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")}
LINEAR |= {f"linear_{kind}_head_dim": 16 for kind in ("key", "value")}
DEEP = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8}
MANY = {  # model_type: its parts
    "gemma3": {"text_config": TEXT, "vision_config": SEEN, "mm_tokens_per_image": 4},
    "llava": {"text_config": {"model_type": "llama"} | TEXT,
              "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32} | SEEN},
    "mistral3": {"text_config": {"model_type": "mistral"} | TEXT,
                 "vision_config": {"model_type": "pixtral", "head_dim": 16} | SEEN},
    "qwen3_5": {"text_config": TEXT | LINEAR, "vision_config": DEEP | {"num_position_embeddings": 16}},
}  # fmt: skip


def make_multimodal(family: str, folder: Path) -> Path:
    tokenizer = make_tokenizer()
    parts = json.loads(json.dumps(MANY[family]))
    parts["text_config"] |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**parts)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", MANY)
def test_the_decoder_of_a_multimodal_checkpoint_trains_and_becomes_a_text_model(family, tmp_path):
    model = make_multimodal(family, tmp_path / "model")
    names = [name for name in load_file(model / "model.safetensors") if "vision" in name or "visual" in name]
    assert names
    families.try_model(model, tmp_path)  # also compares rewards with plain transformers
    text = config_of(tmp_path / "shared")
    assert text["model_type"] == config_of(model)["text_config"]["model_type"] and "vision_config" not in text
    trained = load_file(tmp_path / "shared" / "model.safetensors")
    assert not any("vision" in name or "visual" in name or "projector" in name for name in trained)


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_the_vision_tower_is_not_read(family, tmp_path):
    """Only the decoder's tensors are read, in full or by rows. Other tensors may have any shape."""
    folder = make_multimodal(family, tmp_path)
    config, _ = load_config(str(folder))
    whole = load_weights(str(folder), config, 0)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "vision" in name:
            tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = empty_model(config)
    read = stored_weights(str(folder), model, 0)
    again = load_weights(str(folder), config, 0)
    for name, _ in saved_tensors(model):
        assert torch.equal(read(name), whole[name]) and torch.equal(again[name], whole[name]), name
        if whole[name].dim() and len(whole[name]) > 2:
            assert torch.equal(read(name, 1, 3), whole[name][1:3])


def test_a_missing_tensor_of_the_decoder_is_named(tmp_path):
    folder = make_multimodal("gemma3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config, _ = load_config(str(folder))
    assert "layers.1.mlp.up_proj.weight" in refusal(load_weights, str(folder), config, 0)


# -- Adapters. -----------------------------------------------------------------------------------------------------------


def one_step(model, data, output):
    given = ["--model", model, "--train_data", data, "--eval_data", data, "--output_dir", output]
    assert train.main([*map(str, given), "--max_steps", "1", "--save_steps", "0"]) == 0


def test_a_peft_adapter_is_merged_into_its_base(tmp_path):
    """W + alpha / r B A, recomputed from the adapter's own file. Other weights stay unchanged."""
    peft = pytest.importorskip("peft")
    base = make_model(tmp_path / "base", "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    about = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(model, about).save_pretrained(tmp_path / "adapter")
    config, _ = load_config(str(tmp_path / "adapter"))
    got = load_weights(str(tmp_path / "adapter"), config, 0)
    assert not brings_head(str(tmp_path / "adapter"))
    low = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    plain = load_weights(str(base), config, 0)
    changed = 0
    for name, tensor in plain.items():
        key = f"base_model.model.{name.replace('trunk.', 'model.').removesuffix('.weight')}.lora_"
        if key + "A.weight" in low:
            tensor = tensor + 3.0 * low[key + "B.weight"] @ low[key + "A.weight"]
            changed += 1
        torch.testing.assert_close(got[name], tensor, msg=name)
    assert changed == 8
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))
    one_step(tmp_path / "adapter", data, tmp_path / "out")
    before = model_fingerprint(str(tmp_path / "adapter"), config)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1  # the base belongs to the fingerprint
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(str(tmp_path / "adapter"), config) != before


def test_a_minirm_adapter_keeps_its_head(tmp_path):
    pytest.importorskip("peft")
    base = make_model(tmp_path / "base", "llama")
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))
    flags = ["--model", base, "--train_data", data, "--eval_data", data, "--output_dir", tmp_path / "out"]
    flags += ["--lora_rank", 4, "--max_steps", 2, "--learning_rate", 1e-2, "--warmup_steps", 0, "--save_steps", 0]
    assert train.main(list(map(str, flags))) == 0
    adapter = str(tmp_path / "out" / "adapter")
    assert brings_head(adapter)
    config, _ = load_config(adapter)
    got = load_weights(adapter, config, 0)
    for name, tensor in load_weights(str(tmp_path / "out"), config, 0).items():
        torch.testing.assert_close(got[name], tensor, msg=name)


@pytest.mark.parametrize("package, name", [("peft", "adapter"), ("gguf", "model.gguf")])
def test_a_model_whose_reader_is_not_installed_is_refused_with_what_to_type(package, name, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("minirm.model.find_spec", lambda wanted: None if wanted == package else find(wanted))
    (tmp_path / "adapter").mkdir()
    about = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    line = refusal(load_config, str(tmp_path / name))
    assert line.endswith(f"pip install {package}") and str(tmp_path / name) in line


# -- GGUF. ---------------------------------------------------------------------------------------------------------------

NAMES = {  # in a GGUF file: in transformers' Qwen 2
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_gguf(folder: Path, path: Path) -> Path:
    """Write an unquantised Qwen 2 and its tokenizer to one file, as llama.cpp's converter does."""
    gguf = pytest.importorskip("gguf")
    config, state = config_of(folder), load_file(folder / "model.safetensors")
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(bpe["vocab"]["<|endoftext|>"])
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {"lm_head.weight": "output.weight"}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in NAMES.items():
            for part in ("weight", "bias"):
                names[f"model.layers.{layer}.{ours}.{part}"] = f"blk.{layer}.{theirs}.{part}"
    for name, tensor in state.items():
        writer.add_tensor(names[name], tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_has_the_weights_of_its_source_and_trains(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2")
    (tmp_path / "gguf").mkdir()
    path = write_gguf(folder, tmp_path / "gguf" / "small.gguf")
    config, tokenizer = load_config(str(path))
    text = "the good answer is not very short"
    assert tokenizer.encode(text) == make_tokenizer().encode(text)
    wanted = load_weights(str(folder), load_config(str(folder))[0], 0)
    tokens = config_of(folder)["vocab_size"]  # followed by the padding tokens
    for name, tensor in load_weights(str(path), config, 0).items():
        torch.testing.assert_close(tensor[:tokens].float(), wanted[name][:tokens].float(), msg=name)
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))
    one_step(path, data, tmp_path / "out")
    assert config_of(tmp_path / "out")["architectures"] == ["Qwen2ForSequenceClassification"]
