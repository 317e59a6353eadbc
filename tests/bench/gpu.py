"""Check and measure minirm on one GPU: correctness, speed at real model sizes, and where the time goes.

    python tests/bench/gpu.py --output gpu.json     # about seven minutes on one H100 or H200; no network
    python tests/bench/gpu.py --write gpu.json      # put a table of these results into README.md
    python tests/bench/gpu.py --dry_run             # run everything with tiny models on the CPU

correctness    rewards on the CPU and the GPU, shared and separate rows, fp16 overflow, resuming, and flags that must not
               change a run: for each the largest difference and whether it is small enough (`ok`)
gptj_*         a GPT-J-6B shape in fp16: summaries (a prompt of 340 tokens, two answers of 38) and rankings (four answers)
llama_*        a Llama-8B shape in bf16: chats (a prompt of 2,900 tokens, two answers of 400)
profile        the five kernels that take most time in a step of GPT-J with shared rows

Models are random and made on the device. A step has four prompts (the published scheme and TRL: four pairs), AdamW and
clipping. The bottom 70 % of the layers are frozen, except in TRL's trainer, which runs with its defaults. Speeds are means
of two timed passes over eight prompts after a warm-up pass. `of_plan` is the peak memory over the peak that
`train.py --plan` predicts for the same flags and rows. `of_card` is the rate of the unavoidable operations (see peers.py)
over the rate of matrix products in the same process. TRL trains all layers, so it computes more than is counted.

Every part runs in its own process with a time limit. The results file is written after every part.
"""

import argparse
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
import torch.distributed as dist
import transformers
from peers import ACCUMULATION, PADDED, matmul_rate, published, quiet, trl, unavoidable
from readme import write_between
from rows import VOCABULARY, Trainer, make_config, make_groups
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train
from minirm.attention import LONG, attention_mask, use_sdpa
from minirm.errors import one_line
from minirm.estimate import estimate
from minirm.freeze import find_blocks
from minirm.model import RewardModel, init_head
from minirm.plan import make_plan
from minirm.probe import shake, small_batch
from minirm.rows import Batch
from minirm.shard import start_processes
from minirm.trunk_cache import TrunkCache

MARKS = "<!-- gpu -->", "<!-- /gpu -->"
COMMAND = "python tests/bench/gpu.py --output gpu.json"
METHODS = {
    "published": "published scheme",
    "separate": "separate rows",
    "shared": "shared rows",
    "one_part": "shared rows, attention in one part",
    "tokens": "shared rows, `--micro_batch_tokens 8192`",
    "cached": "shared rows, `--cache_trunk`, after the first epoch",
    "compiled": "shared rows, `--compile`",
    "lora": "shared rows, `--lora_rank 16`",
    "trl": "TRL's trainer as it comes",
}
GROUPS = {"rows": ["separate", "shared", "one_part", "tokens", "cached"]}  # methods that share a process and a model
GROUPS |= {method: [method] for method in ("published", "lora", "compiled", "trl")}
LIMITS = {"rows": 130, "published": 60, "lora": 45, "compiled": 120, "trl": 90}  # seconds
TITLES = {"gptj": "GPT-J-6B shape, fp16", "llama": "Llama-8B shape, bf16"}
PARTS = {
    "correctness": 150,
    **{f"{family}_{group}": n for family in TITLES for group, n in LIMITS.items()},
    "profile": 60,
}
TOKENS, RANK = 8192, 16
PROMPTS = 8  # per shape: two steps


def about() -> dict[str, str]:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# Correctness: each check returns its figures and `ok`.

FAMILIES = {
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4},
    "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    "qwen3": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
              "head_dim": 16},
    "gemma2": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
               "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
}  # fmt: skip
EXACT = 1e-4  # tolerance in fp32, relative to the largest reward
ROUNDED = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # a wrong mask changes rewards by 0.2 or more
WORDS = ["the", "a", "good", "bad", "answer", "question", "is", "was", "very", "short", "long", "clear"]


def tiny_model(family: str) -> RewardModel:
    """A random fp32 model on the CPU whose rewards have unit size."""
    ids = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **ids)
    torch.manual_seed(0)
    model = RewardModel(transformers.AutoModel.from_config(config, dtype=torch.float32)).eval().requires_grad_(False)
    use_sdpa(model.trunk)
    shake(model.trunk)
    model.score.weight.copy_(init_head(64, 0, published=True))
    return model


def tiny_batch(row_layout: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = lambda length: torch.randint(1, 64, (length,), generator=generator).tolist()
    texts = [(ids(prefix), [ids(tail) for tail in tails]) for prefix, tails in ((20, [12, 7, 9]), (11, [5, 16]))]
    return small_batch(texts, row_layout)


def rewards_of(model: RewardModel, batch: Batch, dtype: torch.dtype, long: int = LONG) -> torch.Tensor:
    """[K, T] rewards of all completions, on the CPU."""
    device = model.score.weight.device
    mask = attention_mask(batch.segments, batch.position_ids, batch.visible, model.trunk.config, dtype, device, long)
    there = batch.to(device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        rewards = model(there.input_ids, mask, there.position_ids)
    return rewards.flatten()[there.places].cpu()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def same_as_cpu(device: torch.device) -> dict:
    """Rewards in fp32 on the CPU and on the device."""
    differences = {}
    for family in FAMILIES:
        model, batch = tiny_model(family), tiny_batch("shared")
        wanted = rewards_of(model, batch, torch.float32)
        differences[family] = relative(rewards_of(model.to(device), batch, torch.float32), wanted)
    return {"largest_difference": differences, "ok": max(differences.values()) <= EXACT}


def same_as_separate(device: torch.device) -> dict:
    """Rewards of shared and of separate rows in half precision, with attention as in short rows and as in long ones."""
    differences, ok = {}, True
    for dtype, tolerance in ROUNDED.items():
        for family in FAMILIES:
            model = tiny_model(family).to(device)
            separate = rewards_of(model, tiny_batch("separate"), dtype)
            for rows, long in (("short", LONG), ("long", 1)):
                difference = relative(rewards_of(model, tiny_batch("shared"), dtype, long), separate)
                differences[f"{family}, {str(dtype)[6:]}, {rows} rows"] = difference
                ok &= difference <= tolerance
    return {"largest_difference": differences, "ok": ok}


def skipped_step(device: torch.device) -> dict:
    """A step that overflows in fp16 changes no parameter and halves the loss scale. The next step trains."""
    device, mesh, *_ = start_processes()
    trainer = Trainer(make_config("llama", 64, 2), None, device, mesh, torch.float16)
    work = [make_groups(1, 20, 8, 2, torch.Generator().manual_seed(0))]
    copies = lambda: [p.detach().clone() for p in trainer.trained]
    changed = lambda before: any(not torch.equal(a, b) for a, b in zip(before, copies()))
    found = {}
    for name, scale in (("overflow", 2.0**60), ("usual", 2.0**10)):
        trainer.scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        before = copies()
        trainer.step(work, "shared")
        found[name] = {"changed": changed(before), "scale": trainer.scaler.get_scale() / scale}
    dist.destroy_process_group()
    ok = found == {"overflow": {"changed": False, "scale": 0.5}, "usual": {"changed": True, "scale": 1.0}}
    return {**found, "ok": ok}


class Runs:
    """Runs of train.py with four steps on a tiny model: two epochs of eight prompts."""

    def __init__(self, folder: Path):
        self.folder, self.straight = folder, {}
        tokenizer = Tokenizer(models.BPE(self.alphabet(), []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = {"eos_token": "<eos>", "pad_token": "<pad>"}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = transformers.AutoConfig.for_model("gptj", **FAMILIES["gptj"], vocab_size=len(tokenizer), **ids)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        chosen = random.Random(0)
        text = lambda: " ".join(chosen.choices(WORDS, k=chosen.randint(6, 12)))
        for name, count in (("train", 8), ("eval", 4)):
            rows = [{"prompt": f"{i} {text()}", "chosen": text(), "rejected": text() + " x"} for i in range(count)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def alphabet() -> dict[str, int]:
        characters = ["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        return {character: i for i, character in enumerate(characters)}

    def run(self, name: str, *flags, stop_after: int = 0) -> list[float]:
        """Losses of steps and evaluations. stop_after: send a signal in that step."""
        output = self.folder / name
        words = [
            *("--model", self.folder / "model", "--output_dir", output, "--max_steps", 4, "--freeze_ratio", 0.5),
            *("--train_data", self.folder / "train.jsonl", "--eval_data", self.folder / "eval.jsonl", "--max_length", 200),
            *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--logging_steps", 1),
            *("--learning_rate", 1e-3, "--warmup_steps", 1, "--eval_steps", 0, "--save_steps", 0, *flags),
        ]  # fmt: skip
        agree, steps = train.run.agree, []

        def signalled(caught: list[int], losses, *values):
            steps.append(1)
            if len(steps) == stop_after:
                caught.append(signal.SIGTERM)
            return agree(caught, losses, *values)

        with patch.object(train.run, "agree", signalled), redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            code = train.main([str(word) for word in words])
        if code != (128 + signal.SIGTERM if stop_after else 0):
            raise RuntimeError(f"train.py {name}: exit code {code}: {one_line(said.getvalue()[-200:])}")
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [row.get("loss", row.get("eval_loss")) for row in rows]

    def usual(self, precision: str) -> list[float]:
        if precision not in self.straight:
            self.straight[precision] = self.run(f"straight-{precision}", "--precision", precision)
        return self.straight[precision]

    def compare(self, found: list[float], precision: str = "fp32") -> dict:
        wanted = self.usual(precision)
        if len(found) != len(wanted):
            raise RuntimeError(f"{len(found)} losses instead of {len(wanted)}")
        difference = max(abs(a - b) for a, b in zip(found, wanted))
        ok = difference <= (EXACT if precision == "fp32" else 10 * EXACT)  # GPU gradients vary in the last digit
        return {"largest_difference": difference, "learned": wanted[0] - wanted[-1], "ok": ok}

    def resumed(self) -> dict:
        """Stop after two steps in fp16 and resume."""
        self.run("resumed", "--precision", "fp16", stop_after=2)
        return self.compare(self.run("resumed", "--precision", "fp16"), "fp16")

    def with_flag(self, *flags) -> dict:
        return self.compare(self.run(str(flags[0])[2:], "--precision", "fp32", *flags))


def correctness(tiny: bool) -> Iterator[dict]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sys.modules["matplotlib"] = None  # as if not installed: drawing the curves takes longer than a run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        datasets.config.HF_DATASETS_CACHE = Path(temporary) / "datasets"
        runs = Runs(Path(temporary))
        checks: dict[str, Callable[[], dict | None]] = {
            "rewards in fp32 as on the CPU": partial(same_as_cpu, device),
            "shared rows as separate ones in half precision": partial(same_as_separate, device),
            "a step that overflows in fp16 is skipped": partial(skipped_step, device),
            "resumed as straight through, fp16": runs.resumed,
            "--cache_trunk changes nothing": partial(runs.with_flag, "--cache_trunk", Path(temporary) / "cache"),
            "--gradient_checkpointing changes nothing": partial(runs.with_flag, "--gradient_checkpointing"),
            "--cpu_offload changes nothing": partial(runs.with_flag, "--cpu_offload"),
            "--micro_batch_tokens changes nothing": partial(runs.with_flag, "--micro_batch_tokens", 500),
        }  # fmt: skip
        found: dict = about()
        for name, check in checks.items():
            needless = device.type == "cpu" and "offload" in name
            found[name] = None if needless else attempt(check)
            if isinstance(found[name], dict):
                found[name].setdefault("ok", False)
            yield found


def attempt(function: Callable[[], dict]) -> dict | str:
    """function(), or the reason why there is no result, so that one failure does not lose the other results."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # noqa: BLE001 - any error is a result
        traceback.print_exc()
        return {"error": one_line(f"{type(error).__name__}: {error}")}


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def shapes_of(family: str, tiny: bool) -> dict[str, tuple[int, int, int]]:
    """{name: (prompt tokens, answer tokens, answers per prompt)}. Lengths vary by up to a quarter."""
    prompt, answer = (30, 8) if tiny else (340, 38) if family == "gptj" else (2900, 400)
    if family == "llama":
        return {"chats, 2 answers": (prompt, answer, 2)}
    return {"summaries, 2 answers": (prompt, answer, 2), "rankings, 4 answers": (prompt, answer, 4)}


def config_of(family: str, tiny: bool) -> transformers.PreTrainedConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "num_labels": 1}
    width, layers, heads = (64, 2, 4) if tiny else (4096, 28, 16) if family == "gptj" else (4096, 32, 32)
    if family == "gptj":
        return transformers.GPTJConfig(
            vocab_size=VOCABULARY if tiny else 50400, n_embd=width, n_layer=layers, n_head=heads,
            rotary_dim=8 if tiny else 64, **ids,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY if tiny else 128256, hidden_size=width, intermediate_size=128 if tiny else 14336,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2 if tiny else 8,
        max_position_embeddings=8192, **ids,
    )  # fmt: skip


def dtype_of(family: str, tiny: bool) -> torch.dtype:
    return torch.float16 if family == "gptj" and not tiny else torch.bfloat16  # TRL has no fp16 on the CPU


class Speed:
    """The methods of one part on one model."""

    def __init__(self, family: str, tiny: bool, folder: Path):
        self.tiny, self.folder, self.family = tiny, folder, family
        self.device, self.mesh, *_ = start_processes()
        self.config, self.dtype = config_of(family, tiny), dtype_of(family, tiny)
        self.trainer: Trainer | None = None
        self.plans: dict[tuple, float] = {}  # bytes, by flags and layout
        generator = torch.Generator().manual_seed(1)
        shapes = shapes_of(family, tiny)
        self.groups = {
            name: make_groups(ACCUMULATION if tiny else PROMPTS, *shape, generator) for name, shape in shapes.items()
        }
        product = (64 if tiny else TOKENS), self.config.hidden_size, self.dtype, self.device, 1e7 if tiny else 1e14
        rates = [matmul_rate(*product) for _ in range(4)]
        self.rate = statistics.median(rates[1:])  # the first one warms up

    def random_model(self, factory) -> transformers.PreTrainedModel:
        with self.device:
            return factory.from_config(self.config, dtype=torch.float32)

    def planned(self, method: str, groups: list[dict]) -> float | None:
        """Peak in bytes that train.py --plan predicts for rows as long as the longest here; None for other trainers."""
        if method in ("published", "trl"):
            return None
        layout = "separate" if method == "separate" else "shared"
        answers = len(groups[0]["completions"])
        texts = [len(g["prefix"]) + max(map(len, g["completions"])) for g in groups]
        rows = [len(g["prefix"]) + sum(map(len, g["completions"])) for g in groups]
        length = (
            max(texts) if layout == "separate" else -(-max(rows) // 2)
        )  # the plan assumes two answers in a shared row
        flags = ["--model", "any", "--plan", "--max_length", length, "--gradient_accumulation_steps", ACCUMULATION]
        flags += ["--per_device_train_batch_size", answers // 2 if layout == "separate" else 1]
        flags += ["--micro_batch_tokens", TOKENS] if method == "tokens" else []
        flags += ["--lora_rank", RANK] if method == "lora" else []
        cuda = self.device.type == "cuda"
        memory = torch.cuda.get_device_properties(self.device).total_memory / 1e9 if cuda else 80
        words = (*map(str, flags), "--device", str(memory), "400", "300")
        if (words, layout) not in self.plans:
            args = train.parse_args([*words])
            self.plans[words, layout] = estimate(self.config, args, self.dtype, layout)["peak"]
        return self.plans[words, layout]

    def make(self, method: str, groups: list[dict]) -> Callable:
        """A function that trains on all groups and returns (pairs, tokens, tokens with padding, seconds)."""
        if method == "trl":
            model = self.random_model(transformers.AutoModelForSequenceClassification)
            return trl(model, groups, self.folder / "trl", self.dtype)
        if method == "published":
            padded = max(PADDED, max(len(g["prefix"]) + max(map(len, g["completions"])) for g in groups))
            return published(self.random_model(transformers.AutoModel), groups, self.dtype, 64 if self.tiny else padded)
        if self.trainer is None:
            backend = (
                "inductor" if method == "compiled" and not self.tiny else ""
            )  # inductor needs a compiler and much time
            self.trainer = Trainer(
                self.config, None, self.device, self.mesh, self.dtype, lora_rank=RANK if method == "lora" else 0,
                backend=backend,
            )  # fmt: skip
        trainer = self.trainer
        if method == "cached" and trainer.cache is None:
            blocks = list(find_blocks(trainer.model)[1])[: len(trainer.frozen.layers)]
            trainer.cache = TrunkCache(blocks, None, self.dtype, self.folder)
        lengths = [len(g["prefix"]) + sum(map(len, g["completions"])) for g in groups]
        plan = make_plan(
            lengths, [1.0] * len(groups), world_size=1, batch_size=1, accumulation=ACCUMULATION, shuffle=False,
            micro_batch_tokens=TOKENS if method == "tokens" else 0,
        )  # fmt: skip
        steps = [[[groups[g] for g in micro_step[0]] for micro_step in step.micro_steps] for step in plan]

        def run():
            begin, counts = time.perf_counter(), [0, 0, 0]
            for micro_steps in steps:
                layout = "separate" if method == "separate" else "shared"
                done = trainer.step(micro_steps, layout, long=math.inf if method == "one_part" else LONG)
                counts = [a + b for a, b in zip(counts, done)]
            return *counts, time.perf_counter() - begin

        return run

    def measure(self, method: str, groups: list[dict]) -> dict:
        cuda = self.device.type == "cuda"
        run = self.make(method, groups)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        run()  # warms up and fills the cache
        scale = self.trainer.scaler.get_scale() if self.trainer else 1.0
        passes = [run() for _ in range(1 if self.tiny else 2)]
        peak = torch.cuda.max_memory_allocated() if cuda else None
        (pairs, tokens, places, _), seconds = passes[0], statistics.mean(times[-1] for times in passes)
        frozen, rest = unavoidable(groups, self.config, lora=method == "lora")
        plan = self.planned(method, groups)
        return {
            "pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds, "padding": 1 - tokens / places,
            "seconds": [times[-1] for times in passes], "peak_gb": peak and peak / 1e9, "plan_gb": plan and plan / 1e9,
            "of_plan": peak and plan and peak / plan,
            "of_card": (rest if method == "cached" else frozen + rest) / seconds / self.rate,
            "skipped_steps": round(math.log2(scale / self.trainer.scaler.get_scale())) if self.trainer else None,
        }  # fmt: skip

    def free(self) -> None:
        self.trainer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def speed(family: str, group: str, tiny: bool) -> Iterator[dict]:
    with tempfile.TemporaryDirectory() as temporary:
        runs = Speed(family, tiny, Path(temporary))
        found: dict = about() | {"matmul_tflops": runs.rate / 1e12} | {shape: {} for shape in runs.groups}
        for method in GROUPS[group]:
            for shape, groups in runs.groups.items():
                found[shape][method] = result = attempt(partial(runs.measure, method, groups))
                if "pairs_per_second" not in result or group in ("published", "trl"):
                    runs.free()
                yield found
        dist.destroy_process_group()


def profile(tiny: bool) -> Iterator[dict]:
    """One step of GPT-J with shared rows, after two warm-up steps."""
    runs = Speed("gptj", tiny, Path())
    run = runs.make("shared", next(iter(runs.groups.values()))[:ACCUMULATION])
    run(), run()
    cuda = runs.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profiled:
        *_, seconds = run()
    # Count kernels only: the operations and named ranges that launch them have the same times.
    on_gpu = lambda e: e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    events = [e for e in profiled.key_averages() if not cuda or on_gpu(e)]
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    total, most = sum(spent.values()), sorted(spent, key=spent.__getitem__, reverse=True)[:5]
    top = [{"name": name[:80], "milliseconds": spent[name] / 1e3, "share": spent[name] / total} for name in most]
    yield about() | {"milliseconds": seconds * 1e3, "device_milliseconds": total / 1e3, "top": top}
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def run_part(part: str, tiny: bool) -> None:
    """Print the results so far as a line of JSON after each step of a part."""
    quiet()
    family, _, group = part.partition("_")
    parts = {"correctness": correctness, "profile": profile}
    for found in parts[part](tiny) if part in parts else speed(family, group, tiny):
        print(json.dumps(found), flush=True)


def warm_up() -> None:
    """Import what a dry run needs, once for all forked processes."""
    for module in ("torch._dynamo", "torch.distributed.tensor._ops"):
        importlib.import_module(module)
    if find_spec("trl"):
        importlib.import_module("trl.trainer.reward_trainer")
    for family in TITLES:
        transformers.AutoModelForSequenceClassification.from_config(config_of(family, tiny=True))


def forked(part: str, out, err) -> None:
    os.dup2(err.fileno(), 2)
    with redirect_stdout(out), redirect_stderr(err):
        run_part(part, tiny=True)


def answer(part: str, limit: float, dry_run: bool) -> dict:
    """The results of a part in its own process. A dry run forks to save the imports, as it has no GPU to initialise."""
    if part.endswith("_trl") and not find_spec("trl"):
        return {shape: {"trl": "not installed"} for shape in shapes_of(part.partition("_")[0], dry_run)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if dry_run:
            process = multiprocessing.get_context("fork").Process(target=forked, args=(part, out, err))
            process.start()
            process.join(limit)
            code = process.exitcode
            process.kill()
            process.join()
        else:
            process = subprocess.Popen([sys.executable, __file__, "--part", part], stdout=out, stderr=err)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            process.kill()
            process.wait()
        out.seek(0), err.seek(0)
        lines = [line for line in out if line.startswith("{") and line.endswith("}\n")]
        said = err.read().strip().splitlines()
    found = json.loads(lines[-1]) if lines else {}
    if code is None:
        found["error"] = f"no answer within {limit} s"
    elif code:
        found["error"] = one_line(said[-1] if said else f"exit code {code}")
    if '"error"' in json.dumps(found):
        print(*said[-12:], sep="\n", file=sys.stderr)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Output

COLUMNS = {
    "pairs_per_second": ("pairs/s", "{:,.2f}"), "tokens_per_second": ("tokens/s", "{:,.0f}"), "peak_gb": ("peak GB", "{:.1f}"),
    "of_plan": ("of the plan", "{:.2f}"), "of_card": ("of the card's rate", "{:.2f}"),
}  # fmt: skip


def cells(result: dict | str) -> list[str]:
    """A method's results in the order of COLUMNS."""
    if not isinstance(result, dict) or "error" in result:
        reason = result if isinstance(result, str) else result["error"]
        return [reason.replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
    return ["" if result[key] is None else text.format(result[key]) for key, (_, text) in COLUMNS.items()]


def verdict(result: dict | str | None) -> str:
    if result is None:
        return "not tried without a GPU"
    if not isinstance(result, dict) or "error" in result:
        return result if isinstance(result, str) else f"FAILED: {result['error']}"
    difference = result.get("largest_difference")
    largest = max(difference.values()) if isinstance(difference, dict) else difference
    return ("yes" if result["ok"] else "NO") + ("" if largest is None else f", largest difference {largest:.1e}")


def checks_of(value: dict) -> dict:
    return {name: result for name, result in value.items() if name not in (*about(), "error")}


def methods_of(value: dict) -> Iterator[tuple[str, str, dict | str]]:
    """(shape, method, result) of a speed part."""
    for shape, methods in value.items():
        for method, result in methods.items() if isinstance(methods, dict) else ():
            yield shape, method, result


def readable(part: str, value: dict) -> Iterator[str]:
    if part == "correctness":
        yield from (f"{name}: {verdict(result)}" for name, result in checks_of(value).items())
    elif part == "profile":
        yield from (f"{e['share']:6.1%} {e['milliseconds']:9.2f} ms  {e['name']}" for e in value.get("top", ()))
    else:
        for shape, method, result in methods_of(value):
            named = [f"{name} {cell}" for (name, _), cell in zip(COLUMNS.values(), cells(result)) if cell]
            failed = not isinstance(result, dict) or "error" in result
            yield f"{shape}, {METHODS[method]}: {cells(result)[0] if failed else ', '.join(named)}"
    if "error" in value:
        yield f"error: {value['error']}"


def table(results: dict) -> str:
    """A results file as Markdown."""
    known = next(value for value in results.values() if "card" in value)
    lines = [f"{known['card']}, torch {known['torch']}, transformers {known['transformers']}; `{COMMAND}`", ""]
    lines += [f"| | {' | '.join(name for name, _ in COLUMNS.values())} | × published |"]
    lines += ["|-" * (len(COLUMNS) + 2) + "|"]
    for family, title in TITLES.items():
        found: dict[str, dict] = {}  # [shape][method]
        for part, value in results.items():
            for shape, method, result in methods_of(value) if part.startswith(family) else ():
                found.setdefault(shape, {})[method] = result
        for shape, methods in found.items():
            lines.append(f"| **{title}, {shape}** |" + " |" * (len(COLUMNS) + 1))
            rate = lambda result: result.get("pairs_per_second") if isinstance(result, dict) else None
            base = rate(methods.get("published"))
            for method in [m for m in METHODS if m in methods]:
                speed = rate(methods[method])
                ratio = f"{speed / base:.1f}" if speed and base else ""
                lines.append(f"| {METHODS[method]} | {' | '.join(cells(methods[method]))} | {ratio} |")
    if checks := checks_of(results.get("correctness", {})):
        lines += ["", "| on this card | |", "|-|-|"]
        lines += [f"| {name} | {verdict(result).replace('|', '/')} |" for name, result in checks.items()]
    if top := results.get("profile", {}).get("top"):
        lines += ["", "Kernels that take most of a step of GPT-J with shared rows:", "", "```"]
        lines += [*readable("profile", {"top": top}), "```"]
    failed = [f"{part} ({value['error']})" for part, value in results.items() if "error" in value]
    lines += ["", f"Without a full result: {', '.join(failed)}."] if failed else []
    return "\n".join(lines)


def write(results: dict) -> None:
    """Write the table between its two marks in README.md."""
    write_between(MARKS, table(results), ROOT / "README.md")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="run everything with tiny models on the CPU")
    parser.add_argument("--output", type=Path, metavar="F.json", help="write the results to this file after every part")
    parser.add_argument("--write", type=Path, metavar="F.json", help="write the table of these results into README.md")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write:
        return write(json.loads(args.write.read_text()))
    if args.part:
        return run_part(args.part, args.dry_run)
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        warm_up()
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU found; --dry_run runs everything on the CPU")
    results: dict[str, dict] = {}
    for part, limit in PARTS.items():
        begin = time.perf_counter()
        results[part] = answer(part, limit, args.dry_run)
        print(f"{part} ({time.perf_counter() - begin:.0f} s)", *readable(part, results[part]), sep="\n  ", flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
