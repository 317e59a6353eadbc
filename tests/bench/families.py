"""Try every decoder family in transformers: train a small random model for two steps, export, reload and score it.

    pip install -e ".[test]"
    HF_HUB_OFFLINE=1 python tests/bench/families.py [family ...] [--json FILE]

For every configuration with a causal language model, train.py runs two steps with shared rows, if the probe allows them,
and with separate rows. Held-out losses have to agree to 1e-4. Then plain transformers and minirm.score load the exported
folder, with the code beside the weights if there is no class. Rewards have to agree to 1e-4. Takes about 15 minutes on
one core.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import make_comparisons, make_tokenizer, read_metrics, write_jsonl  # sets where datasets caches

# isort: split
import datasets
import torch
import transformers
from transformers.models.auto import modeling_auto as auto

import train
from minirm import score
from minirm.model import loader
from minirm.probe import shrunk

NO_ROOM = ("cpmant", "deepseek_v4", "moshi")  # for a pad token, so their tokenizer must bring one
LIMIT = 300  # seconds per family
# Entries that make a configuration small, besides those that the probe knows: upper limits and exact values.
AT_MOST = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_routed_experts": 4,
    "moe_k": 2, "num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 16,
}  # fmt: skip
EXACTLY = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
GEMMA = NARROW | {
    "head_dim": 16, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "sliding_window": 8,
}  # fmt: skip
GEMMA_4 = GEMMA | {"global_head_dim": 16, "num_kv_shared_layers": 0}
BY_HAND = {  # families whose sizes depend on each other
    "bailing_hybrid": NARROW | {
        "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 2,
        "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 8, "n_group": 1,
        "topk_group": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "bamba": NARROW | MAMBA_2 | {"attn_layer_indices": [1]},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},  # needs a multiple of four heads
    "dory": NARROW | {"head_dim": 16, "num_hidden_layers": 3, "n_input_layers": 1, "n_output_layers": 1, "sliding_window": 8},
    "dots1": NARROW | {"moe_intermediate_size": 32, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "doge": NARROW | {"keep_window_size": 2048},  # beyond this many tokens it also attends to later ones
    "falcon_h1": NARROW | MAMBA_2 | {"mamba_d_ssm": 64},
    "falcon_mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "gemma3n_text": GEMMA | {"num_kv_shared_layers": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": GEMMA_4,
    "gemma4_unified_text": GEMMA_4,
    "granitemoehybrid": NARROW | MAMBA_2 | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    },
    "hunyuan_v1_dense": NARROW | {"head_dim": 16},
    "hunyuan_v1_moe": NARROW | {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": NARROW | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 4, "num_experts": 4},
    "lfm2_moe": NARROW | {
        "moe_intermediate_size": 32, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "ministral": NARROW | {"head_dim": 16},
    "nemotron": NARROW | {"head_dim": 16},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "qwen4_exp_text": NARROW | {
        "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "hc_count": 2, "hc_lowrank": 8,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": NARROW | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8,
    },
    "zaya": NARROW | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "router_hidden_size": 16},
    "zamba2": NARROW | {
        "layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 2, "mamba_d_state": 8, "chunk_size": 8,
    },
}  # fmt: skip


def families() -> dict[str, type]:
    """{model_type: configuration} of all families with a causal language model."""
    kinds = {kind for kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING if kind not in auto.MODEL_FOR_MASKED_LM_MAPPING}
    return {kind.model_type: kind for kind in sorted(kinds, key=lambda kind: kind.model_type)}


def small_config(kind: type, tokenizer):
    """A configuration with few, narrow layers, but with every kind of layer of the default one."""
    if kind.model_type in BY_HAND:
        small = kind(**BY_HAND[kind.model_type])
    else:
        config = kind()
        text = config.get_text_config(decoder=True)
        fields = text.to_dict()
        for name in EXACTLY.keys() & fields.keys():
            setattr(text, name, EXACTLY[name])
        for name, value in AT_MOST.items():
            if isinstance(fields.get(name), int):
                setattr(text, name, min(value, fields[name]))
        small = shrunk(text, max_length=0)
    small.vocab_size, small.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    if "vocab_size_per_layer_input" in small.to_dict():
        small.vocab_size_per_layer_input = len(tokenizer) + 1  # one for padding
    for name in ("bos_token_id", "pad_token_id"):
        try:
            setattr(small, name, None)
        except Exception:  # noqa: BLE001 - some families require one
            setattr(small, name, 0)
    return small


def make_family(kind: type, folder: Path) -> Path:
    tokenizer = make_tokenizer(pad="<|pad|>" if kind.model_type in NO_ROOM else None)
    config = small_config(kind, tokenizer)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (size := sum(p.numel() for p in model.parameters())) > 1e8:
        raise ValueError(f"still has {size:,} parameters")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain_rewards(folder: Path, texts: list[str]) -> list[float]:
    """Rewards from plain transformers, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(folder, trust_remote_code=(folder / "modeling_reward.py").exists(), dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]


def try_model(model: Path, folder: Path) -> str:
    """Train, export, reload and score a model folder -> the row layout, "shared" or "separate". Raises if anything fails."""
    rows = make_comparisons(8)
    data = write_jsonl(folder / "train.jsonl", rows)
    held_out = write_jsonl(folder / "eval.jsonl", make_comparisons(4, seed=1))
    losses, used = {}, ""
    for layout in ("shared", "separate"):
        flags = ["--model", model, "--train_data", data, "--eval_data", held_out, "--output_dir", folder / layout]
        flags += ["--max_steps", 2, "--row_layout", layout, "--learning_rate", 1e-3, "--warmup_steps", 0]
        flags += ["--save_steps", 0, "--max_length", 64]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = train.main([*map(str, flags)])
        if code:
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])
        if layout == "shared":
            used = "separate" if "its own row" in said.getvalue() else "shared"
        losses[layout] = [row["eval_loss"] for row in read_metrics(folder / layout) if "eval_loss" in row]
    difference = max(abs(a - b) for a, b in zip(losses["shared"], losses["separate"], strict=True))
    if not difference <= 1e-4:
        raise RuntimeError(f"held-out losses of shared and separate rows differ by {difference:.2g}")
    eos = transformers.AutoTokenizer.from_pretrained(folder / "shared").eos_token
    texts = [f"{row['prompt']}\n{row[side]}{eos}" for row in rows for side in ("chosen", "rejected")]
    wanted = plain_rewards(folder / "shared", texts)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        command = ["--model", str(folder / "shared"), "--data", str(data), "--output", str(folder / "scores.jsonl")]
        if code := score.main(command):
            raise RuntimeError(out.getvalue().strip().splitlines()[-1])
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    got = [row[side] for row in scores for side in ("chosen", "rejected")]
    largest = max(map(abs, wanted))
    difference = max(abs(a - b) for a, b in zip(got, wanted, strict=True)) / max(1.0, largest)
    if not difference <= 1e-4 or not largest > 0:
        raise RuntimeError(f"rewards of minirm.score and of transformers differ by {difference:.2g} of {largest:.2g}")
    return used


def try_family(name: str, folder: Path) -> tuple[str, str]:
    """(row layout, how it is loaded), ("refused", why), ("not small", why) or ("another", why)."""
    kind = families()[name]
    with contextlib.suppress(Exception):
        config = kind()
        if config.is_encoder_decoder or type(text := config.get_text_config(decoder=True)) is not kind:
            why = "encoder and decoder" if config.is_encoder_decoder else f"its decoder is {text.model_type}"
            return "another", why
    try:
        model = make_family(kind, folder / "model")
    except Exception as error:  # noqa: BLE001 - unknown how to shrink it
        return "not small", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    try:
        used = try_model(model, folder)
    except Exception as error:  # noqa: BLE001
        if not isinstance(error, RuntimeError):
            traceback.print_exc()
        return "refused", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return used, "modeling_reward.py" if loader(small_config(kind, make_tokenizer())) else "a class of transformers"


def in_child(name: str, queue) -> None:
    with tempfile.TemporaryDirectory() as folder:
        queue.put(try_family(name, Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.modules["matplotlib"] = None  # drawing curves would take longer than a run
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    results = {}
    context = multiprocessing.get_context("fork")
    for name in args.names or families():
        queue = context.SimpleQueue()
        child = context.Process(target=in_child, args=(name, queue))
        child.start()
        child.join(LIMIT)
        child.kill()
        results[name] = queue.get() if not queue.empty() else ("refused", f"no answer within {LIMIT} s")
        print(f"{name:<28} {results[name][0]:<10} {results[name][1]}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    counts = Counter(outcome for outcome, _ in results.values())
    tried = len(results) - counts["not small"] - counts["another"]
    trained = counts["shared"] + counts["separate"]
    print(f"transformers {transformers.__version__}: {trained} of {tried} train", dict(counts))


if __name__ == "__main__":
    main()
