"""Train a reward model on pairs of answers: `torchrun --nproc_per_node 8 train.py`, or `python train.py`.

Read it from top to bottom: flags, set-up, then one explicit loop. The mathematics lives in plain functions in minirm/.
"""

import gc

gc.disable()  # imports create 0.7 million long-lived objects; collecting garbage among them takes 1/4 of the start-up

import argparse
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import torch.distributed as dist
import transformers
from packaging.specifiers import SpecifierSet
from tqdm import tqdm

from minirm import TESTED, checkpoint, run, shard
from minirm.attention import attention_mask, use_sdpa
from minirm.data.chat import unescaped
from minirm.data.demo import DEMO_DEFAULTS, use_demo
from minirm.data.prepare import Prepared, numbers, prepare, totals
from minirm.data.schemas import column, renames
from minirm.errors import InputError, Parser, Stop, disk_full_line, disk_is_full, one_line, printable, refusing
from minirm.estimate import show_plan
from minirm.files import as_json
from minirm.freeze import Frozen, find_blocks, freeze_bottom_layers
from minirm.lora import add_lora, init_lora, merge, save_adapter
from minirm.loss import centering_loss, divergence_loss, pairwise_loss
from minirm.model import LOADER, RewardModel, check_fit, empty_model, load_config
from minirm.plan import make_plan
from minirm.plot import save_curves
from minirm.probe import choose_layout
from minirm.report.card import model_card
from minirm.report.lines import final_report, headline, last_words, start_report
from minirm.report.measure import TENTHS, describe, measure, right_by_tenth
from minirm.report.profile import profiler
from minirm.report.trackers import open_trackers
from minirm.rows import Batch, ahead, collate
from minirm.signals import Watch, interrupted
from minirm.trunk_cache import TrunkCache, open_folder, probe_trunk_cache
from minirm.weights import brings_head, choose_precision, export, load_weights, stored_weights

gc.freeze()  # exclude them from later collections, in every process and at its exit
gc.enable()

HEAD_RATE = 10  # multiple of --learning_rate: a new head has further to go than pre-trained layers
LOWEST_SCALE = 1.0  # fp16 loss scale; if even this overflows, scaling cannot help


def print0(line: str) -> None:
    """Print on rank 0 to stderr without breaking the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


DESCRIPTION = """Train a reward model on human preference pairs: prompts with a chosen and a rejected answer.
Without flags it trains a tiny model on embedded data, in minutes, on any machine. The other defaults are the published
recipe for a 6B model."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags. Raises InputError for unknown flags and values out of range."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description=DESCRIPTION, formatter_class=formatter, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("data").add_argument
    add("--train_data", nargs="+", default=["demo"],
        help=".jsonl .json .csv .tsv .parquet files, also .gz .bz2 .xz .zst, globs, folders, URLs, or datasets as name, "
             "name:split or name:config:split; @1000 at the end takes 1000 rows, @0.5 half of them; demo: made here")
    add("--eval_data", nargs="+", default=[], help="evaluation data, same formats; without it --eval_fraction of the prompts is held out")
    add("--eval_fraction", type=float, default=0.05, help="share of the prompts held out if --eval_data is not given")
    add("--columns", nargs="+", default=[], type=column, metavar="NAME=COLUMN",
        help="map nonstandard column names: prompt=question chosen=response_j rejected=response_k; dots access nested fields")
    add("--separator", default=r"\n", type=unescaped, help="text between prompt and answer, unless there is whitespace already")
    add("--chat_template", help="Jinja file for chat data (default: the tokenizer's own)")
    add("--max_length", type=int, default=550, help="maximum tokens of prompt + completion + EOS")
    add("--overlong", default="truncate", choices=["truncate", "drop", "error"],
        help="what to do with longer comparisons: truncate the prompt on the left, drop them, or stop")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="demo", help="name or folder of any decoder that transformers loads; demo: a tiny local one")
    add("--freeze_ratio", type=float, default=0.7, help="share of the layers to freeze, from the bottom; 0 trains all, 1 only the head")
    add("--train_embeddings", action="store_true", help="also train the embeddings (default: frozen with the layers)")
    add("--lora_rank", type=int, default=0, help="rank of LoRA adapters on the unfrozen blocks' linear layers; 0 trains those blocks in full")
    add("--lora_alpha", type=float, help="adapters are scaled by lora_alpha / rank (default: 2 x rank)")
    add = parser.add_argument_group("objective").add_argument
    add("--loss", default="divergence", choices=["divergence", "last", "trlx"],
        help="divergence: every token from the first difference on; last: only the end rewards; trlx: as published, pads included")
    add("--pair_weight", default="pair", choices=["pair", "prompt"],
        help="pair: comparisons have equal weight; prompt: prompts have equal weight, split among their comparisons")
    add("--center_rewards_coefficient", type=float, default=0.0,
        help="weight of (chosen + rejected)^2 in the loss; 0.01 centers rewards at zero, 0 disables it")
    add("--margin_scale", type=float, default=1.0, help="reward units per unit of data margin; 0 ignores margins")
    add = parser.add_argument_group("optimization").add_argument
    add("--learning_rate", type=float, default=1e-5, help="peak learning rate")
    add("--head_learning_rate", type=float, help=f"peak learning rate of the head (default: {HEAD_RATE} x --learning_rate for a new "
        "head; --learning_rate for an existing reward head and for --loss trlx)")
    add("--warmup_steps", type=int, default=100, help="optimizer steps of warm-up; 0 disables it")
    add("--lr_scheduler_type", default="constant_with_warmup", help="schedule, named as in transformers.get_scheduler",
        choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
                 "inverse_sqrt"])
    add("--num_train_epochs", type=float, default=5, help="training epochs")
    add("--max_steps", type=int, default=-1, help="optimizer steps; -1 uses --num_train_epochs, 0 only evaluates")
    add("--per_device_train_batch_size", type=int, default=1,
        help="prompts per process and micro-step, each with all its comparisons")
    add("--gradient_accumulation_steps", type=int, default=4, help="micro-steps per optimizer step")
    add("--weight_decay", type=float, default=0.0, help="AdamW weight decay; 0 disables it")
    add("--max_grad_norm", type=float, default=1.0, help="maximum gradient norm for clipping; 0 disables it")
    add("--seed", type=int, default=0, help="random seed (data order, held-out split, head)")
    add = parser.add_argument_group("evaluation and logging").add_argument
    add("--eval_steps", type=int, default=500, help="optimizer steps between evaluations, "
        "with early ones at 1/10, 2/10 and 4/10 of that; 0: only at the start and end")
    add("--logging_steps", type=int, default=10, help="optimizer steps between rows of metrics.jsonl; 0 disables them")
    add("--report_to", nargs="+", default=["none"], choices=["none", "tensorboard", "wandb"],
        help="trackers that receive the same metrics")
    add("--profile", type=int, default=0, help="optimizer steps to profile from the third on; writes traces to --output_dir; 0 disables it")
    add = parser.add_argument_group("saving and resuming").add_argument
    add("--output_dir", default="runs/demo", help="folder for the trained model, metrics.jsonl and checkpoints")
    add("--save_steps", type=int, default=500, help="optimizer steps between checkpoints; 0 saves only when stopped by a signal")
    add("--save_total_limit", type=int, default=1, help="number of newest checkpoints to keep; 0 keeps all")
    add("--keep", default="best", choices=["best", "last"],
        help="model to export: best has the lowest eval_loss (ignoring step 0), last is the final one")
    add("--resume_from_checkpoint", default="auto", help="auto: newest intact one in --output_dir; none; or a folder")
    add = parser.add_argument_group("speed and memory").add_argument
    add("--precision", default="auto", choices=["auto", *shard.DTYPES], help="auto: on CUDA bf16 for weights stored in bf16, else fp16; fp32 on CPU")
    add("--micro_batch_tokens", type=int, default=0, help="token budget per process and micro-step, padding included; a step "
        "keeps its prompts (batch x accumulation x processes); 0: --per_device_train_batch_size prompts per micro-step")
    add("--compile", action="store_true", help="compile each block with torch.compile; worthwhile on GPUs")
    add("--row_layout", default="shared", choices=["shared", "separate"],
        help="shared: one row holds a prompt with all its completions; separate: one row per completion")
    add("--cache_trunk", help="folder for the frozen layers' outputs, computed once for all epochs and runs (default: no cache)")
    add("--gradient_checkpointing", action="store_true", help="recompute the trained layers in backward to save memory")
    add("--shard_size", type=int, default=0, help="processes that share one copy of the trained parameters; 0: all those on a machine")
    add("--cpu_offload", action="store_true", help="keep trained parameters and optimizer state in host memory (GPUs only)")
    add = parser.add_argument_group("planning").add_argument
    add("--plan", action="store_true", help="print a run's memory, network and time estimates and exit; needs no data")
    add("--world_size", type=int, default=1, help="devices to plan for")
    add("--device", type=float, nargs=3, default=[], metavar=("GB", "TFLOP/s", "GB/s"),
        help="each device's memory, speed at this precision and network bandwidth (default: this machine's memory or 80, 400, 300)")
    # fmt: on
    args = parser.parse_args(argv)
    if args.model == "demo":  # a model this small needs other values than one with billions of parameters
        parser.set_defaults(**DEMO_DEFAULTS)
        args = parser.parse_args(argv)
    # fmt: off
    for what, holds, names in (
        ("be positive", lambda value: 0 < value < math.inf,
         "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_length world_size device"),
        ("not be negative", lambda value: 0 <= value < math.inf,
         """learning_rate head_learning_rate warmup_steps weight_decay max_grad_norm eval_steps logging_steps save_steps
         save_total_limit shard_size center_rewards_coefficient margin_scale profile lora_rank
         micro_batch_tokens"""),
        ("lie in 0..1", lambda value: 0 <= value <= 1, "freeze_ratio"),
        ("lie in 0..2**63 - 1", lambda value: 0 <= value < 2**63, "seed"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not all(map(holds, value if isinstance(value, list) else [value])):
                raise InputError(f"--{name} must {what}, got {value}")
    # fmt: on
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    elif not 0 < args.lora_alpha < math.inf:
        raise InputError(f"--lora_alpha must be positive, got {args.lora_alpha}")
    if args.lora_rank and args.train_embeddings:
        raise InputError("--train_embeddings does not go with --lora_rank, which trains adapters of the blocks alone")
    if args.loss == "trlx":  # must stay as published
        for name in ("pair_weight", "center_rewards_coefficient", "margin_scale"):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name} does not go with --loss trlx; leave it away, or choose another --loss")
    for name in set(args.report_to) - {"none"}:
        if not getattr(find_spec(name), "origin", None):  # None: only a folder with that name
            raise InputError(f"--report_to {name}: {name} is not installed; pip install {name}")
    idle = {
        "--eval_fraction": args.eval_data, "--num_train_epochs": args.max_steps >= 0,
        "--warmup_steps": args.lr_scheduler_type == "constant", "--train_embeddings": args.freeze_ratio == 0,
        "--keep": args.eval_steps == 0, "--cpu_offload": not torch.cuda.is_available() and not args.plan,
        "--lora_alpha": args.lora_rank == 0, "--world_size": not args.plan, "--device": not args.plan,
    }  # fmt: skip
    given = {word.partition("=")[0] for word in (sys.argv if argv is None else argv)}
    for flag in [flag for flag, without_effect in idle.items() if without_effect and flag in given]:
        beside = "without a GPU" if flag == "--cpu_offload" else "beside the other flags"
        print0(f"train.py: warning: {flag} has no effect {beside}")
    return args


def comparison_loss(args: argparse.Namespace, batch: Batch, rewards: torch.Tensor) -> torch.Tensor:
    """[R, L] rewards -> the loss of each pair [P]."""
    ends, each = batch.end_rewards(rewards), {"reduction": "none"}
    margin = None if args.loss == "trlx" else args.margin_scale * batch.margin
    if args.loss == "last":
        losses = pairwise_loss(*ends, margin, **each)
    else:
        losses = divergence_loss(*batch.pair_rewards(rewards), batch.start, batch.end, margin=margin, **each)
    if args.center_rewards_coefficient:
        losses = losses + args.center_rewards_coefficient * centering_loss(*ends, **each)
    return losses


class Inputs(NamedTuple):
    """Everything a run needs before weights are loaded."""

    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    model: RewardModel  # on the meta device: shapes without memory
    frozen: Frozen
    data: Prepared
    layout: str  # row layout: "shared" or "separate"
    not_shared: str | None  # why shared rows were refused, if they were requested
    extras: int | None  # see `probe_trunk_cache`
    why: str  # reason for the precision that --precision auto chose


def read_inputs(args: argparse.Namespace, processes: shard.Processes) -> Inputs:
    """Read configuration, tokenizer and data, and freeze the empty model. Raises InputError on every rank."""
    shard.on_first_process(processes.patient, run.check_output, Path(args.output_dir), args.resume_from_checkpoint)
    with shard.first_process_first(processes.patient):
        use_demo(args)
        config, tokenizer = load_config(args.model, args.chat_template)
        why = ""
        if args.precision == "auto":
            cuda = processes.device.type == "cuda"
            args.precision, why = choose_precision(
                args.model, processes.device.type, cuda and torch.cuda.is_bf16_supported(False)
            )
        if args.head_learning_rate is None:
            like_the_rest = args.loss == "trlx" or brings_head(args.model)
            args.head_learning_rate = args.learning_rate * (1 if like_the_rest else HEAD_RATE)
        model = empty_model(config)
        use_sdpa(model.trunk)
        with refusing(f"--model {args.model}: its layers cannot be frozen", ValueError):
            frozen = freeze_bottom_layers(model, args.freeze_ratio, embeddings=not args.train_embeddings)
            add_lora(model, args.lora_rank, args.lora_alpha, frozen)
        data = prepare(
            tokenizer, args.train_data, args.eval_data, eval_fraction=args.eval_fraction, separator=args.separator,
            max_length=args.max_length, overlong=args.overlong, seed=args.seed, columns=renames(args.columns),
        )  # fmt: skip
        check_fit(args, config, totals(data.report["train"] + data.report["eval"]))
    # Shared rows are used only if they give identical results; a small model of the same architecture decides.
    layout, not_shared = choose_layout(config, args.model, args.row_layout, args.max_length)
    extras = probe_trunk_cache(args, config, frozen) if args.cache_trunk else None
    return Inputs(config, tokenizer, model, frozen, data, layout, not_shared, extras, why)


def load_model(args: argparse.Namespace, inputs: Inputs, processes: shard.Processes) -> TrunkCache | None:
    """Shard the empty model, then let every rank load its own shard. Returns the --cache_trunk cache."""
    config, model, frozen, dtype = inputs.config, inputs.model, inputs.frozen, shard.DTYPES[args.precision]
    if args.gradient_checkpointing:
        shard.checkpoint_trained_blocks(model)
    if args.compile:  # cached frozen blocks are skipped, so do not compile them
        for block in find_blocks(model)[1][len(frozen.layers) if args.cache_trunk else 0 :]:
            block.compile(dynamic=True)
    shard.cast_frozen(model, dtype)
    shard.shard(model, processes.mesh, dtype, args.cpu_offload)
    with shard.first_process_first(processes.patient):  # one process per machine downloads, if necessary
        read = stored_weights(args.model, config, model, args.seed, args.loss == "trlx")
    load = partial(load_weights, args.model, config, args.seed, args.loss == "trlx")
    read = shard.fill(model, processes.device, args.cpu_offload, processes.patient, read, load)
    init_lora(model, args.seed)
    if not args.cache_trunk:
        return None
    about = (config, inputs.tokenizer, read, frozen, inputs.data.report, inputs.layout, processes.device.type)
    folder = shard.on_first_process(processes.patient, open_folder, args, *about)
    return TrunkCache(list(find_blocks(model)[1])[: len(frozen.layers)], inputs.extras, dtype, folder)


def train(args: argparse.Namespace, watch: Watch) -> None:
    processes = shard.start_processes(args.shard_size)
    device, rank, world_size, patient = processes.device, processes.rank, processes.world_size, processes.patient
    inputs = read_inputs(args, processes)
    output, dtype = Path(args.output_dir), shard.DTYPES[args.precision]
    if inputs.why:
        print0(f"--precision auto is {args.precision}, {inputs.why}")
    data, tokenizer, model = inputs.data, inputs.tokenizer, inputs.model
    resumed = run.begin(args, data, inputs.config, tokenizer, processes)
    start, skipped, result, best = (resumed.state[k] for k in ("step", "skipped_steps", "result", "best"))
    epoch_steps, total_steps = resumed.epoch_steps, resumed.total_steps

    # Both layouts sort rows by unique tokens, so that both make the same steps.
    lengths = {part: numbers(getattr(data, part), "shared_tokens") for part in ("train", "eval")}
    pairs = {part: numbers(getattr(data, part), "pairs") for part in ("train", "eval")}
    weights = pairs["train"].double()
    if args.pair_weight == "prompt":  # a prompt counts once, even if its comparisons form several groups
        weights = weights / numbers(data.train, "prompt_pairs")
    cut = {"batch_size": args.per_device_train_batch_size, "micro_batch_tokens": args.micro_batch_tokens}
    plan_of = partial(make_plan, world_size=world_size, seed=args.seed, **cut)
    eval_plan = plan_of(lengths["eval"], pairs["eval"], shuffle=False)
    to_batch = partial(
        collate, row_layout=inputs.layout, pad_id=tokenizer.pad_token_id, row_limit=2 * args.max_length,
        trlx_eos_id=tokenizer.eos_token_id if args.loss == "trlx" else None,
    )  # fmt: skip
    trackers: list[Callable[[dict], None]] = []  # only on rank 0
    shard.on_first_process(patient, lambda: trackers.append(open_trackers(args.report_to, output, vars(args), start)))
    if rank == 0:
        sample = plan_of(lengths["train"], pairs["train"])[:64]
        sample = [to_batch([data.train[g] for g in step.micro_steps[0][0]]) for step in sample]
        print(
            start_report(
                args, data, tokenizer, model, inputs.frozen, inputs.layout, inputs.not_shared, sample, total_steps
            )
        )
    cache = load_model(args, inputs, processes)
    # Collect the sharded parameters now: after a forward pass FSDP may have swapped in unsharded copies.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = trained["score.weight"]
    rates = [([p for p in trained.values() if p is not head], args.learning_rate), ([head], args.head_learning_rate)]
    by_rate = [{"params": parameters, "lr": rate} for parameters, rate in rates]
    optimizer = torch.optim.AdamW(
        by_rate, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda"
    )
    scheduler = transformers.get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
    home = "cpu" if args.cpu_offload else device.type  # where gradients are after backward
    scaler = torch.amp.GradScaler(home, enabled=dtype == torch.float16)  # a no-op when disabled
    scaler.scale(torch.zeros((), device=home))  # creates the scale there, so that unscale_ need not wait for a copy
    kept: dict[str, torch.Tensor] = {}  # trained parameters at the best evaluation, on the CPU
    if resumed.checkpoint:
        kept = checkpoint.load(resumed.checkpoint, resumed.state, trained, optimizer, scheduler, scaler, patient)
        print0(f"goes on from {printable(resumed.checkpoint)}, step {start} of {total_steps}\n")

    def read(part: str, micro_steps: list[list[list[int]]]) -> list[Batch]:
        """Collate this rank's share of some micro-steps on the CPU. `ahead` runs this in a thread."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current device is a thread's own, and pinning needs it
        batches = []
        for groups in micro_steps:
            # A rank with no groups left still runs a forward pass, because every rank must enter every collective.
            batch = to_batch([getattr(data, part)[g] for g in groups[rank]] or [data.train[0] | {"chosen": []}])
            batches.append(batch.pinned() if device.type == "cuda" else batch)
        return batches

    def compute(batch: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """One forward pass -> the batch on the device, rewards [R, L], and the loss of each pair [P]."""
        mask = attention_mask(batch.segments, batch.position_ids, batch.visible, model.trunk.config, dtype, device)
        with cache.over(batch) if cache else nullcontext():  # skips the frozen layers if the whole batch is cached
            batch = batch.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                rewards = model(batch.input_ids, mask, batch.position_ids)  # [R, L] fp32
        return batch, rewards, comparison_loss(args, batch, rewards) if len(batch.chosen) else rewards[0, :0]

    held_out = describe(data.eval, args.eval_data or args.train_data, args.pair_weight == "prompt")
    pairs_of = torch.arange(len(held_out["prompt"])).split(pairs["eval"].tolist())  # [g]: its pairs' indices

    def log(row: dict) -> None:
        """Append one line to metrics.jsonl. Call on rank 0."""
        line, path = as_json(row) + "\n", output / checkpoint.METRICS
        with checkpoint.writing(path, len(line)), open(path, "a") as file:
            file.write(line)
        trackers[0](row)
        if "eval_loss" in row:
            bar.write(headline(row))

    def due(every: int, step: int) -> bool:
        return bool(every) and step % every == 0 or step == total_steps

    def evaluation_due(step: int) -> bool:
        """Also early, at 1/10, 2/10 and 4/10 of the first --eval_steps, to reveal quickly if a run does not learn."""
        return due(args.eval_steps, step) or 10 * step in (args.eval_steps, 2 * args.eval_steps, 4 * args.eval_steps)

    @torch.no_grad()
    def evaluate(step: int) -> int:
        """Score every held-out pair once. Each rank fills in its own pairs' rows; the sum over ranks is the full table.

        Keeps a copy of the parameters if they are the best so far. Returns the signal that interrupted it, or 0.
        """
        nonlocal result, best
        # Columns: chosen and rejected end reward, loss, and the share of correct places in each tenth.
        table = torch.zeros(len(held_out["prompt"]), 3 + TENTHS, dtype=torch.float64, device=device)
        micro_steps = [[micro_step] for step in eval_plan for micro_step in step.micro_steps]
        batches = ahead(partial(read, "eval"), micro_steps)
        for [micro_step], [batch] in tqdm(batches, "evaluating", len(micro_steps), leave=False, disable=rank > 0):
            if stop := run.agreed(watch.caught):
                return stop
            batch, rewards, losses = compute(batch)
            if micro_step[rank]:
                here = torch.cat([pairs_of[g] for g in micro_step[rank]]).to(device, non_blocking=True)
                right = right_by_tenth(*batch.pair_rewards(rewards), batch.start, batch.end)
                table[here] = torch.column_stack([*batch.end_rewards(rewards), losses, right])
        dist.all_reduce(table)
        columns = table.cpu().T
        result = {"step": step, **measure(*columns[:3], columns[3:].T, **held_out)}
        shard.on_first_process(patient, log, result)
        if args.keep == "best" and step and result["eval_loss"] < best.get("eval_loss", math.inf):
            best = result
            kept.update(checkpoint.copies(trained))
        return 0

    def planned_steps() -> Iterator[tuple[int, list[list[list[int]]], float]]:
        """Yield (step, micro-steps, each [groups of rank 0, of rank 1, ...], weight of all their pairs)."""
        for step in range(start, total_steps):
            epoch, place = divmod(step, epoch_steps)
            if place == 0 or step == start:
                plan = plan_of(lengths["train"], weights, accumulation=args.gradient_accumulation_steps, epoch=epoch)
            yield step, *plan[place]

    # -- The loop. ------------------------------------------------------------------------------------------------------
    bar = tqdm(total=total_steps, initial=start, desc="training", unit="step", disable=rank > 0)
    watch.saving = True  # from here on, a signal takes effect after the current step is finished and saved
    unevaluated = start == 0 or (evaluation_due(start) and result["step"] < start)
    if unevaluated and (stop := evaluate(start)):
        raise Stop(interrupted(stop), 128 + stop)
    # This rank's sums since the last logged row; a checkpoint stores every rank's.
    before = torch.tensor(resumed.state["sums"], dtype=torch.float64).view(-1, 8)[rank::world_size].sum(dim=0)
    sums = before[:4].to(device)  # weighted loss, weight, correct, reward margin
    seen = before[4:]  # pairs, tokens, positions with padding, tokens without sharing
    since = time.perf_counter() - resumed.state["seconds"]
    profiled = profiler(args.profile, total_steps - start, output, patient)
    for (step, micro_steps, step_weight), batches in ahead(lambda planned: read("train", planned[1]), planned_steps()):
        # One optimizer step, in this order:
        #   scale, backward (per micro-step; gradients are reduced on the last), unscale, clip, step, update
        losses = []
        for m, (micro_step, batch) in enumerate(zip(micro_steps, batches, strict=True)):
            shard.begin_micro_step(model, last=m == len(micro_steps) - 1)
            batch, rewards, pair_losses = compute(batch)
            here = torch.tensor(micro_step[rank], dtype=torch.int64)
            weight = (weights[here] / pairs["train"][here]).repeat_interleave(pairs["train"][here]).float()  # [P]
            weight = weight.to(device, non_blocking=True)  # a blocking copy would wait for the GPU
            loss_sum = (pair_losses * weight).sum()
            # FSDP averages over ranks; multiplying by world_size makes that a sum. So the step's loss is exactly the
            # weighted mean over its pairs for any split into micro-steps and ranks, also in an epoch's short last step.
            scaler.scale(loss_sum * world_size / step_weight).backward()
            losses.append(loss_sum.detach())
            if micro_step[rank]:  # a forward pass made only for the collectives does not count
                chosen, rejected = batch.end_rewards(rewards.detach())
                correct, margin = (chosen > rejected).sum(), (chosen - rejected).sum()
                sums += torch.stack([loss_sum.detach(), weight.sum(), correct, margin])
                seen += torch.tensor([len(chosen), batch.tokens, batch.input_ids.numel(), batch.separate_tokens])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm or math.inf)
        grad_norm = norm.full_tensor().item()
        stop, where = run.agree(watch.caught, losses)  # identical on all ranks, so all stop together
        groups = micro_steps[where[0]][where[1]] if where else [g for of_rank in micro_steps[0] for g in of_rank]
        failed = partial(run.not_finite, step + 1, groups, data, tokenizer)
        if not scaler.is_enabled() and (where or not math.isfinite(grad_norm)):
            what = f"the {'loss' if where else 'gradient'} is not finite"
            raise failed(what, "Try a lower --learning_rate, or look at these comparisons")
        scale = scaler.get_scale()
        scaler.step(optimizer)  # skips the step if any rank has an inf or nan
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if scaler.get_scale() < scale:
            skipped += 1
            if scaler.get_scale() < LOWEST_SCALE:
                what = f"the loss scale fell below {LOWEST_SCALE}: fp16 overflows at any"
                raise failed(what, "Try --precision bf16 or a lower --learning_rate")
        else:  # the schedule advances only if the optimizer stepped
            scheduler.step()
        step += 1
        bar.update()
        profiled()

        if due(args.logging_steps, step):
            seconds = time.perf_counter() - since
            summed = torch.cat([sums, seen.to(device)])
            dist.all_reduce(summed)
            loss, of, correct, margin, n, tokens, places, separate = summed.tolist()
            shard.on_first_process(patient, log, {
                "step": step, "epoch": step / epoch_steps, "loss": loss / of, "accuracy": correct / n,
                "reward_margin": margin / n, "learning_rate": scheduler.get_last_lr()[0],
                "grad_norm": grad_norm, "loss_scale": scaler.get_scale(), "skipped_steps": skipped,
                "pairs": int(n), "tokens": int(tokens), "padding": 1 - tokens / places,
                "tokens_saved": 1 - tokens / separate, "pairs_per_second": n / seconds, "tokens_per_second": tokens / seconds,
            })  # fmt: skip
            bar.set_postfix_str(f"loss {loss / of:.4f}, accuracy {correct / n:.3f}, {n / seconds:.1f} pairs/s")
            sums.zero_(), seen.zero_()
            since = time.perf_counter()
        paused = time.perf_counter()
        if evaluation_due(step) and not stop:
            stop = evaluate(step)
        if stop or (args.save_steps and due(args.save_steps, step)):
            state = resumed.state | {
                "step": step, "schedule_steps": scheduler.last_epoch, "skipped_steps": skipped, "scaler": scaler.state_dict(),
                "seconds": paused - since, "sums": torch.cat([sums.cpu(), seen]), "result": result, "best": best,
                "processes": world_size, "arguments": vars(args),
            }  # fmt: skip
            line = checkpoint.save(output, state, trained, optimizer, kept, args.save_total_limit, patient)
            if rank == 0:
                bar.write(line)
        if stop:
            said = f"{signal.Signals(stop).name}: stopped after step {step} of {total_steps}"
            raise Stop(f"{said}; the same command goes on from there", 128 + stop)
        since += time.perf_counter() - paused
    bar.close()
    watch.saving = not args.save_steps  # without a checkpoint of the last step, a signal must not interrupt the export

    # -- Export the trained model. -------------------------------------------------------------------------------------
    last, result = result, best if kept else result
    with torch.no_grad():
        for name, copy in kept.items():
            trained[name].copy_(copy)
    gathered = shard.gather(model, dtype)
    state = merge(model, gathered)

    def write_model() -> None:
        notes: dict = {"minirm": {"separator": args.separator, "max_length": args.max_length}}  # for minirm.score
        if math.isfinite(result["eval_reward_std"]):  # OpenRLHF's names; it divides by std
            notes |= {"mean": result["eval_reward_mean"], "std": max(result["eval_reward_std"], 1e-8)}
        with checkpoint.writing(output, sum(t.numel() * t.element_size() for t in state.values())):
            try:
                save_curves([output], output / "curves.png")
            except Exception as error:  # noqa: BLE001 - a missing or broken matplotlib must not prevent the export
                print(f"no curves.png: {one_line(error)}")
            with checkpoint.whole_model(output) as folder:
                export(state, inputs.config, tokenizer, folder, notes)
                if args.lora_rank:
                    save_adapter(model, gathered, args.model, folder / "adapter")
                card = model_card(args, data.report, result, tokenizer, output, (folder / LOADER).exists())
                (folder / "README.md").write_text(card)
            run.finish(output, total_steps)

    shard.on_first_process(patient, write_model)
    if rank == 0:
        print(final_report(result), last_words(result, last, output), sep="\n")


def warn_untested() -> None:
    """Warn about installed versions outside the tested ranges. The run continues."""
    for module in (torch, transformers):
        name, version = module.__name__, module.__version__
        if not SpecifierSet(TESTED[name]).contains(version, prereleases=True):
            print0(f"train.py: warning: {name} {version} is installed, but minirm is tested with {name}{TESTED[name]}")


def main(argv: list[str] | None = None) -> int:
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # OPT's views are never modified in place
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # load_weights rejects missing weights; all else is expected
    line, code, rank = "", 0, os.environ.get("RANK", "0")
    with Watch() as watch:
        try:
            args = parse_args(argv)
            warn_untested()
            if args.plan:
                show_plan(args)
            else:
                train(args, watch)
        except InputError as error:
            line, code = f"error: {error}", 2
        except Stop as stop:
            line, code = stop.args
        except KeyboardInterrupt as stop:  # raised outside the training loop
            number = stop.args[0] if stop.args else signal.SIGINT
            line, code = interrupted(number), 128 + number
        except OSError as error:
            if not disk_is_full(error):
                raise
            line, code = disk_full_line(error, "a file could not be written"), 3
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            line, code = f"process {rank} ends, since another one was lost ({one_line(error)})", 1
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if line and (rank == "0" or code == 1):
        tqdm.write(
            printable(f"train.py: {line}"), file=sys.stderr if code else sys.stdout
        )  # does not break a progress bar
    return code


if __name__ == "__main__":
    sys.exit(main())
