"""What `--model` may be: families that transformers has no class for, checkpoints that also see, adapters, GGUF files.

Run: pytest tests/test_families.py. Tiny random models, no network; two training steps each, in one process. All families
that transformers knows are gone through by tests/bench/families.py.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_comparisons, make_model, make_tokenizer, refusal, write_jsonl
from safetensors.torch import load_file
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import families

import train
from minirm.model import LOADER, classifier, empty_model, load_config, loader, saved_tensors
from minirm.weights import brings_head, export, load_weights, stored_weights


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# -- Families. -----------------------------------------------------------------------------------------------------------

# Those that differ most; how rows are laid out, and whether code beside the weights loads them.
UNLIKE = {
    "codegen": ("shared", True),
    "ctrl": ("shared", True),
}


@pytest.mark.parametrize("family", UNLIKE)
def test_a_family_trains_and_its_rewards_are_the_same_elsewhere(family, tmp_path):
    layout, code = UNLIKE[family]
    assert families.try_family(family, tmp_path) == (layout, LOADER if code else "a class of transformers")
    if code:
        config = config_of(tmp_path / "shared")
        name = config["architectures"][0]
        assert config["auto_map"] == {"AutoModelForSequenceClassification": f"modeling_reward.{name}"}
        card = (tmp_path / "shared" / "README.md").read_text()
        assert "from_pretrained(folder, trust_remote_code=True)" in card and LOADER in card


def test_a_family_with_a_class_brings_no_code_and_loses_that_of_its_base(model_folder, tmp_path):
    config, tokenizer = load_config(str(model_folder("llama")))
    config.auto_map = {"AutoModel": "code.Model"}
    model = empty_model(config)
    export({name: torch.zeros(t.shape) for name, t in saved_tensors(model)}, config, tokenizer, tmp_path)
    assert "auto_map" not in config_of(tmp_path) and not (tmp_path / LOADER).exists()


def test_the_names_of_all_classes_are_those_that_vllm_resolves():
    """vLLM looks for what stands before ForSequenceClassification with ForCausalLM or LMHeadModel behind it."""
    seen = Counter()
    for kind, lm in auto.MODEL_FOR_CAUSAL_LM_MAPPING.items():
        try:
            config = kind()
        except Exception:  # noqa: BLE001 - a configuration without defaults
            continue
        if kind in auto.MODEL_FOR_MASKED_LM_MAPPING or kind not in auto.MODEL_MAPPING or config.is_encoder_decoder:
            continue
        if source := loader(config):
            stem = classifier(config).__name__.removesuffix("ForSequenceClassification")
            assert lm.__name__ in {stem + "ForCausalLM", stem + "LMHeadModel"}, kind
            compile(source, LOADER, "exec")
        seen[bool(source)] += 1
    assert min(seen.values()) > 20
