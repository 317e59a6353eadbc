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
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from minirm import checkpoint, run, shard
from minirm.attention import attention_mask
from minirm.checks import check_flags, warn_untested
from minirm.data.chat import unescaped
from minirm.data.demo import DEMO_DEFAULTS
from minirm.data.schemas import column
from minirm.errors import Parser, Stop, printable
from minirm.estimate import show_plan
from minirm.feed import Feed
from minirm.finish import write_model
from minirm.loss import centering_loss, divergence_loss, pairwise_loss
from minirm.report.lines import final_report, headline, last_words, print0, start_report
from minirm.report.measure import TENTHS, describe, measure, right_by_tenth
from minirm.report.profile import profiler
from minirm.report.trackers import MetricsLog
from minirm.rows import Batch
from minirm.signals import Watch, interrupted
from minirm.start import HEAD_RATE, load_model, read_inputs

gc.freeze()  # exclude them from later collections, in every process and at its exit
gc.enable()

LOWEST_SCALE = 1.0  # fp16 loss scale; if even this overflows, scaling cannot help

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
    check_flags(args, parser, sys.argv if argv is None else argv)
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


def train(args: argparse.Namespace, watch: Watch) -> None:
    processes = shard.start_processes(args.shard_size)
    device, rank, world_size, patient = processes.device, processes.rank, processes.world_size, processes.patient
    inputs = read_inputs(args, processes)
    output, dtype, model = Path(args.output_dir), shard.DTYPES[args.precision], inputs.model
    if inputs.why:
        print0(f"--precision auto chose {args.precision} {inputs.why}")
    resumed = run.begin(args, inputs.data, inputs.config, inputs.tokenizer, processes)
    start, skipped, result, best = (resumed.state[k] for k in ("step", "skipped_steps", "result", "best"))
    epoch_steps, total_steps = resumed.epoch_steps, resumed.total_steps
    feed = Feed(args, inputs, processes, epoch_steps)
    log = MetricsLog(output, args, start)
    shard.on_first_process(patient, log.open)
    if rank == 0:
        print(start_report(args, inputs, feed.sample(), total_steps))
    cache = feed.cache = load_model(args, inputs, processes)

    # Collect the sharded parameters now: after a forward pass FSDP may have swapped in unsharded copies.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = trained["score.weight"]
    rest = {"params": [p for p in trained.values() if p is not head], "lr": args.learning_rate}
    optimizer = torch.optim.AdamW(
        [rest, {"params": [head], "lr": args.head_learning_rate}],
        betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=device.type == "cuda",
    )  # fmt: skip
    scheduler = transformers.get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
    home = "cpu" if args.cpu_offload else device.type  # where gradients are after backward
    scaler = torch.amp.GradScaler(home, enabled=dtype == torch.float16)  # a no-op when disabled
    one = torch.ones((), device=home)
    scaler.scale(one)  # creates the scale there, so that unscale_ need not wait for a copy
    kept: dict[str, torch.Tensor] = {}  # trained parameters at the best evaluation, on the CPU
    if resumed.checkpoint:
        kept = checkpoint.load(resumed.checkpoint, resumed.state, trained, optimizer, scheduler, scaler, patient)
        print0(f"resuming from {printable(resumed.checkpoint)}, step {start} of {total_steps}\n")
    scale = scaler.get_scale()

    def compute(batch: Batch) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """One forward pass -> the batch on the device, rewards [R, L], and the loss of each pair [P]."""
        mask = attention_mask(batch.segments, batch.position_ids, batch.visible, model.trunk.config, dtype, device)
        batch = batch.to(device)
        skip = cache.over(batch) if cache else nullcontext()  # skips the frozen layers if the whole batch is cached
        with skip, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            rewards = model(batch.input_ids, mask, batch.position_ids)  # [R, L] fp32
        return batch, rewards, comparison_loss(args, batch, rewards) if len(batch.chosen) else rewards[0, :0]

    held_out = describe(inputs.data.eval, args.eval_data or args.train_data, args.pair_weight == "prompt")

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
        count = len(feed.eval_micro_steps)
        for pairs, batch in tqdm(feed.eval(), "evaluating", count, leave=False, disable=rank > 0):
            if stop := run.agreed(watch.caught):
                return stop
            batch, rewards, losses = compute(batch)
            if len(pairs):  # a forward pass made only for the collectives does not count
                right = right_by_tenth(*batch.pair_rewards(rewards), batch.start, batch.end)
                columns = torch.column_stack([*batch.end_rewards(rewards), losses, right])
                table[pairs.to(device, non_blocking=True)] = columns.double()
        dist.all_reduce(table)
        columns = table.cpu().T
        result = {"step": step, **measure(*columns[:3], columns[3:].T, **held_out)}
        shard.on_first_process(patient, log, result)
        if rank == 0:
            bar.write(headline(result))
        if args.keep == "best" and step and result["eval_loss"] < best.get("eval_loss", math.inf):
            best = result
            kept.update(checkpoint.copies(trained))
        return 0

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
    for step, planned, batches in feed.train(start, total_steps):
        # One optimizer step, in this order:
        #   scale, backward (per micro-step; gradients are reduced on the last), unscale, clip, step, update
        losses = []
        for m, batch in enumerate(batches):
            shard.begin_micro_step(model, last=m == len(batches) - 1)
            batch, rewards, pair_losses = compute(batch)
            loss_sum = (pair_losses * batch.weight).sum()
            # FSDP averages over ranks; multiplying by world_size makes that a sum. So the step's loss is exactly the
            # weighted mean over its pairs for any split into micro-steps and ranks, also in an epoch's short last step.
            scaler.scale(loss_sum * world_size / planned.weight).backward()
            losses.append(loss_sum.detach())
            if len(batch.chosen):  # a forward pass made only for the collectives does not count
                chosen, rejected = batch.end_rewards(rewards.detach())
                correct, margin = (chosen > rejected).sum(), (chosen - rejected).sum()
                sums += torch.stack([loss_sum.detach(), batch.weight.sum(), correct, margin])
                seen += torch.tensor([len(chosen), batch.tokens, batch.input_ids.numel(), batch.separate_tokens])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm or math.inf).full_tensor()
        scaler.step(optimizer)  # skips the step if any rank has an inf or nan
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # Identical on all ranks, so all stop together. Nothing else in a step waits for the device.
        stop, where, (grad_norm, new_scale) = run.agree(watch.caught, losses, norm, scaler.scale(one))
        failed = partial(run.not_finite, step + 1, planned, where, inputs)
        if not scaler.is_enabled() and (where or not math.isfinite(grad_norm)):
            what = f"the {'loss' if where else 'gradient'} is not finite"
            raise failed(what, "Try a lower --learning_rate, or look at these comparisons")
        if new_scale < LOWEST_SCALE:
            what = f"the loss scale fell below {LOWEST_SCALE}: fp16 overflows at any"
            raise failed(what, "Try --precision bf16 or a lower --learning_rate")
        if new_scale < scale:
            skipped += 1
        else:  # the schedule advances only if the optimizer stepped
            scheduler.step()
        scale = new_scale
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
                "grad_norm": grad_norm, "loss_scale": scale, "skipped_steps": skipped,
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
            raise Stop(f"{said}; run the same command again to resume", 128 + stop)
        since += time.perf_counter() - paused
    bar.close()
    watch.saving = not args.save_steps  # without a checkpoint of the last step, a signal must not interrupt the export

    # -- Export the trained model. -------------------------------------------------------------------------------------
    last, result = result, best if kept else result
    with torch.no_grad():
        for name, copy in kept.items():
            trained[name].copy_(copy)
    gathered = shard.gather(model, dtype)
    shard.on_first_process(patient, write_model, args, inputs, gathered, result, total_steps)
    if rank == 0:
        print(final_report(result), last_words(result, last, output), sep="\n")


def main(argv: list[str] | None = None) -> int:
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # OPT's views are never modified in place
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # load_weights rejects missing weights; all else is expected
    line, code = "", 0
    with Watch() as watch:
        try:
            args = parse_args(argv)
            warn_untested()
            if args.plan:
                show_plan(args)
            else:
                train(args, watch)
        except BaseException as error:  # noqa: BLE001
            line, code = run.ending(error)  # raises what is not the user's or the machine's fault
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    if line and (os.environ.get("RANK", "0") == "0" or code == 1):
        tqdm.write(printable(f"train.py: {line}"), file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
