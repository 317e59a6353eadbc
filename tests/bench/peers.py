"""Compare training speed with other trainers: pairs per second, one process, the same model and data.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=2 python tests/bench/peers.py [--quick] [--write] [--precision fp32] [--width 512] [--layers 12]

    (a) TRL's RewardTrainer with its defaults
    (b) the same with the bottom 70 % of the layers and the embeddings frozen
    (B) the same without gradient checkpointing, which TRL turns on by default
    (c) the published scheme: two full sequences padded to 550, the bottom 70 % frozen, the embeddings trained
    (d) minirm, a row for every answer
    (e) minirm, shared rows
    (f) minirm, shared rows and --cache_trunk, over the 5 epochs of the recipe, including the first one

A micro-step is one pair (minirm: one prompt) and a step four micro-steps, with AdamW and clipping. The methods take turns,
so a busy machine slows all of them. The table shows medians and the spread from fastest to slowest. Peak memory is measured
in a separate process, above its memory before the model.

The limit is the time of the unavoidable floating-point operations (each token once, no backward pass below the first
trained layer, products of queries with visible keys only) at the rate of a matrix product of the model's shape, measured in
the same run. (f) computes the frozen layers once in 5 epochs, and so does its limit.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
from readme import write_between
from rows import DTYPES, SHAPES, Trainer, make_config, make_groups, one_comparison_each
from tokenizers import Tokenizer, models

from minirm.freeze import find_blocks, freeze_bottom_layers
from minirm.model import init_head
from minirm.shard import start_processes
from minirm.trunk_cache import TrunkCache

METHODS = {
    "a": "TRL as it comes",
    "b": "TRL, same layers frozen",
    "B": "TRL, frozen, no checkpointing",
    "c": "published scheme",
    "d": "minirm, separate rows",
    "e": "minirm, shared rows",
    "f": "minirm, shared rows, cached trunk",
}
EPOCHS, ACCUMULATION, PADDED = 5, 4, 550
MARKS = "<!-- peers -->", "<!-- /peers -->"
ROOT = Path(__file__).resolve().parents[2]


def unused_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """TRL requires a tokenizer, but never uses it here."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def save_model(folder: Path, args) -> None:
    """Save a random causal language model as a user would have it."""
    config = make_config(args.model, args.width, args.layers)
    config.update({"pad_token_id": 0, "eos_token_id": 1})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    unused_tokenizer().save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Each of these makes a function that trains on all comparisons -> (pairs, tokens, tokens with padding, seconds).


def trl(
    model: str | transformers.PreTrainedModel, groups: list[dict], output: Path, dtype: torch.dtype, checkpointing=True
) -> Callable:
    from trl import RewardConfig, RewardTrainer  # slow to import and optional

    pairs = [pair for group in groups for pair in one_comparison_each(group)]
    ids = [[pair["prefix"] + tail for tail in pair["completions"]] for pair in pairs]
    clock = []

    class Clock(transformers.TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            clock.append(time.perf_counter())

        def on_epoch_end(self, *_, **__):
            synchronize()
            clock.append(time.perf_counter())

    options = {} if checkpointing else {"gradient_checkpointing": False}
    trainer = RewardTrainer(
        model=model,
        processing_class=unused_tokenizer(),
        train_dataset=datasets.Dataset.from_dict({"chosen_ids": [c for c, _ in ids], "rejected_ids": [r for _, r in ids]}),
        callbacks=[Clock()],
        args=RewardConfig(
            output_dir=str(output), per_device_train_batch_size=1, gradient_accumulation_steps=ACCUMULATION,
            num_train_epochs=1, learning_rate=1e-5, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
            use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(), **options,
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)

    def run():
        clock.clear()
        trainer.train()
        real, padded = sum(len(side) for sides in ids for side in sides), sum(2 * max(map(len, sides)) for sides in ids)
        return len(ids), real, padded, clock[1] - clock[0]

    return run


def published(trunk: torch.nn.Module, groups: list[dict], dtype: torch.dtype, padded: int = PADDED) -> Callable:
    """Pad both texts, one batch and one loss per pair. This plain loop has none of the overhead of its trainer."""
    pairs = [pair for group in groups for pair in one_comparison_each(group)]
    device = trunk.device
    freeze_bottom_layers(trunk, 0.7, embeddings=False)
    for parameter in trunk.parameters():
        if not parameter.requires_grad and parameter.dim() > 1:  # norms get the fp32 states of trained embeddings
            parameter.data = parameter.data.to(dtype)
    head = torch.nn.Parameter(init_head(trunk.config.hidden_size, 0).to(device))
    trained = [*(p for p in trunk.parameters() if p.requires_grad), head]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run():
        begin = time.perf_counter()
        for first in range(0, len(pairs), ACCUMULATION):
            for pair in pairs[first : first + ACCUMULATION]:
                texts = [pair["prefix"] + tail for tail in pair["completions"]]
                ids, mask = torch.zeros(2, padded, dtype=torch.int64), torch.zeros(2, padded, dtype=torch.int64)
                for row, text in enumerate(texts):
                    ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    hidden = trunk(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
                rewards = hidden.float() @ head[0]
                scored = slice(len(pair["prefix"]), max(map(len, texts)))
                loss = -torch.nn.functional.logsigmoid(rewards[0, scored] - rewards[1, scored]).mean()
                scaler.scale(loss / ACCUMULATION).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        synchronize()
        real = sum(len(pair["prefix"]) + len(tail) for pair in pairs for tail in pair["completions"])
        return len(pairs), real, len(pairs) * 2 * padded, time.perf_counter() - begin

    return run


def ours(folder: Path, groups: list[dict], args, device, mesh, layout: str, cached: bool) -> Callable:
    source = transformers.AutoModel.from_pretrained(folder)
    weights = {f"trunk.{name}": t for name, t in [*source.named_parameters(), *source.named_buffers()]}
    config = make_config(args.model, args.width, args.layers)
    trainer = Trainer(
        config, weights | {"score.weight": init_head(args.width, 0)}, device, mesh, DTYPES[args.precision]
    )
    blocks = list(find_blocks(trainer.model)[1])[: len(trainer.frozen.layers)]
    if cached:
        trainer.cache = TrunkCache(blocks, None, trainer.dtype, folder)

    def run():
        with tempfile.TemporaryDirectory() as empty:
            if cached:
                trainer.cache.folder, trainer.cache.known = Path(empty), set()
            begin, counts = time.perf_counter(), [0, 0, 0]
            for _ in range(EPOCHS if cached else 1):
                for first in range(0, len(groups), ACCUMULATION):
                    done = trainer.step([[group] for group in groups[first : first + ACCUMULATION]], layout)
                    counts = [a + b for a, b in zip(counts, done)]
            return *counts, time.perf_counter() - begin

    return run


def make(method: str, folder: Path, groups: list[dict], args, device, mesh) -> Callable:
    dtype = DTYPES[args.precision]
    if method in "abB":
        model: str | transformers.PreTrainedModel = str(folder)
        if method != "a":
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
            freeze_bottom_layers(model, 0.7)
        return trl(model, groups, folder / "trl", dtype, checkpointing=method != "B")
    if method == "c":
        return published(transformers.AutoModel.from_pretrained(folder).to(device), groups, dtype)
    return ours(folder, groups, args, device, mesh, "separate" if method == "d" else "shared", cached=method == "f")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Limits and memory


def unavoidable(groups: list[dict], config, lora: bool = False) -> tuple[float, float]:
    """Floating-point operations of one pass: (frozen layers, everything else). lora: without gradients of matrices."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    frozen = len(freeze_bottom_layers(model, 0.7).layers)
    blocks = find_blocks(model)[1]
    weights = sum(m.weight.numel() for m in blocks[0].modules() if isinstance(m, torch.nn.Linear))
    tokens = seen = 0  # seen: pairs of a token and one that it attends to
    for group in groups:
        prefix, tails = len(group["prefix"]), [len(tail) for tail in group["completions"]]
        tokens += prefix + sum(tails)
        seen += prefix * (prefix + 1) // 2 + sum(tail * prefix + tail * (tail + 1) // 2 for tail in tails)
    products, attention = 2 * weights * tokens, 4 * config.hidden_size * seen
    # Backward costs one forward pass for the inputs of every product, and another for its weights.
    return frozen * (products + attention), (len(blocks) - frozen) * ((2 if lora else 3) * products + 3 * attention)


def matmul_rate(tokens: int, width: int, dtype: torch.dtype, device: torch.device, total: float = 0) -> float:
    """Floating-point operations per second of [tokens, width] x [width, 4 width].

    total: operations to time; 0 means about 0.2 s on a CPU core in fp32.
    """
    a = torch.randn(tokens, width, dtype=dtype, device=device)
    b = torch.randn(width, 4 * width, dtype=dtype, device=device)
    flop = 2 * a.numel() * b.shape[1]
    count = max(1, int((total or (2e13 if device.type == "cuda" else 2e10)) / flop))
    a @ b
    synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        a @ b
    synchronize()
    return flop * count / (time.perf_counter() - begin)


def in_child(function: Callable, *args):
    """function(*args) in a forked process, so that its memory is freed afterwards."""

    def child(pipe) -> None:
        quiet()
        pipe.send(function(*args))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def peak_memory(method: str, folder: Path, groups: list[dict], args) -> int:
    """Peak bytes above the memory before the model."""
    device, mesh, *_ = start_processes()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    make(method, folder, groups, args, device, mesh)()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------


def write(table: str, results: dict, unit: str) -> None:
    """Write the table between its two marks in README.md, and the chart beside this file."""
    import matplotlib.pyplot as plt

    write_between(MARKS, f"![pairs per second](tests/bench/peers.png)\n\n{table}", ROOT / "README.md")
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 2.6), sharey=True, squeeze=False)
    for axis, (shape, rows) in zip(axes[0], results.items()):
        colors = ["tab:blue" if method in "def" else "tab:gray" for method in rows]
        bars = axis.barh([METHODS[method] for method in rows], [row["rate"] for row in rows.values()], color=colors)
        axis.bar_label(bars, [f"{row['rate']:.2f}" for row in rows.values()], padding=2, fontsize=7)
        axis.set_title(shape.partition(" ")[2], fontsize=8)
        axis.set_xlabel("pairs per second", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.2)
    axes[0, 0].invert_yaxis()
    figure.suptitle(unit, fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "tests/bench/peers.png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama", choices=["llama", "gptj"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--prompts", type=int, default=4, help="prompts per shape; a multiple of 4 gives whole steps")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--methods", default="abBcdef")
    parser.add_argument("--shapes", default="abc")
    parser.add_argument("--quick", action="store_true", help="run everything once with a small model")
    parser.add_argument(
        "--write", action="store_true", help="write the table into README.md and the chart beside this file"
    )
    args = parser.parse_args()
    if args.quick:
        args.width, args.layers, args.prompts, args.repeat = 128, 4, 4, 1
    quiet()
    shapes = {name: shape for name, shape in SHAPES.items() if name[1] in args.shapes}
    groups = {n: make_groups(args.prompts, *shape, torch.Generator().manual_seed(1)) for n, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_child(save_model, folder, args)
        memory = {(n, m): in_child(peak_memory, m, folder, groups[n], args) for n in shapes for m in args.methods}
        device, mesh, *_ = start_processes()
        unit = f"{args.model}, {args.layers} layers of width {args.width}, 70 % frozen, {args.precision}, " + (
            torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        lines = [
            "| | pairs/s | spread | × (a) | × (b) | × (c) | real tokens a pair | with pads | peak memory | of the limit |",
            "|-|-|-|-|-|-|-|-|-|-|",
        ]
        results: dict[str, dict] = {}
        for name in shapes:
            runs = {method: make(method, folder, groups[name], args, device, mesh) for method in args.methods}
            seconds: dict[str, list[float]] = {method: [] for method in runs}
            rates, counts = [], {}
            tokens = sum(len(g["prefix"]) + sum(map(len, g["completions"])) for g in groups[name]) // args.prompts
            for turn in range(args.repeat + 1):
                for method, run in runs.items():
                    rates.append(matmul_rate(tokens, args.width, DTYPES[args.precision], device))
                    *counts[method], took = run()
                    if turn:  # the first turn warms up
                        seconds[method].append(took)
            rows = results[name] = {}
            frozen, rest = unavoidable(groups[name], make_config(args.model, args.width, args.layers))
            for method, (pairs, real, padded) in counts.items():
                flop = frozen + EPOCHS * rest if method == "f" else frozen + rest
                median = statistics.median(seconds[method])
                rows[method] = {
                    "rate": pairs / median, "spread": (max(seconds[method]) - min(seconds[method])) / median,
                    "real": real / pairs, "padded": padded / pairs, "memory": memory[name, method], "limit": flop / statistics.median(rates) / median,
                }  # fmt: skip
            lines.append(f"| **{name.partition(' ')[2]}** | | | | | | | | | |")
            for method, row in rows.items():
                ratios = [f"{row['rate'] / rows[other]['rate']:.1f}" if other in rows else "" for other in "abc"]
                cells = [f"({method}) {METHODS[method]}", f"{row['rate']:.2f}", f"{row['spread']:.0%}", *ratios]
                cells += [f"{row['real']:.0f}", f"{row['padded']:.0f}", f"{row['memory'] / 1e6:,.0f} MB"]
                cells += [f"{row['limit']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
            print(f"{name}: matrix products {statistics.median(rates) / 1e9:,.0f} GFLOP/s, "
                  f"{min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f}", flush=True)  # fmt: skip
            del runs
        table = f"{unit}\n\n" + "\n".join(lines)
        print(table)
        if args.write:
            write(table, results, unit)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
