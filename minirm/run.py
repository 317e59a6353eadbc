"""A run's identity: its record, recipe, lock and length, what may differ when it resumes, and how it stops."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minirm.checkpoint import METRICS, START, checkpoints, verify
from minirm.data.prepare import Prepared
from minirm.data.tokens import tokenizer_state
from minirm.errors import InputError, Stop, disk_full_line, disk_is_full, one_line, printable, refusing
from minirm.files import PARTIAL, put, writing
from minirm.model import lora_of
from minirm.plan import Step, steps_per_epoch
from minirm.shard import Processes, on_first_process
from minirm.signals import interrupted

RUN = "run.json"
# Flags that do not affect the trained model.
UNSAID = {"output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "cache_trunk",
          "report_to", "profile", "plan", "world_size", "device", "shard_size", "cpu_offload"}  # fmt: skip
# Flags that may differ when a run resumes: these, its length, and what changes only memory or speed. Model and data are
# compared by content, so their paths may change; batch size and accumulation by their product with the processes.
FREE = UNSAID | {"num_train_epochs", "max_steps", "eval_steps", "gradient_checkpointing", "micro_batch_tokens",
                 "compile", "model", "train_data", "eval_data", "chat_template", "per_device_train_batch_size",
                 "gradient_accumulation_steps"}  # fmt: skip

_held: list[int] = []  # descriptor of the output folder; holds its lock while open


class Run(NamedTuple):
    state: dict  # the checkpoint's state, or START; checkpoints must agree with its recipe
    checkpoint: Path | None  # the checkpoint to resume from
    finished: int | None  # number of steps after which the run finished
    epoch_steps: int = 0  # optimizer steps per epoch
    total_steps: int = 0  # optimizer steps of the whole run


def restarted() -> bool:
    """Whether torchrun --max_restarts restarted this process. Then the run resumes, whatever the flags say."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_output(output: Path, choice: str) -> None:
    """Raise InputError, before any data is read, if the run cannot use this output folder. Leaves nothing behind."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    with refusing(f"--output_dir {output}: {there} is not a folder that can be written", OSError, "; choose another"):
        tempfile.TemporaryFile(dir=there).close()
    if not output.is_dir() or all(path.suffix == PARTIAL for path in output.iterdir()):
        return
    if not (output / RUN).exists() and not checkpoints(output):
        raise InputError(f"--output_dir {output} holds files of another run; choose another folder, or remove it first")
    if choice == "none" and not restarted():
        advice = "To start over, choose another folder, or remove it first"
        what = f"--output_dir {output} already holds a run; omit --resume_from_checkpoint none to resume it"
        raise InputError(f"{what}. {advice}")


def hold(output: Path) -> None:
    """Create the folder, and lock it until this process ends or holds another one."""
    with refusing(f"--output_dir {output}: cannot be created", OSError, "; choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
    while _held:
        os.close(_held.pop())
    _held.append(os.open(output, os.O_RDONLY))
    try:
        fcntl.flock(_held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = "another run is writing there; wait until it ends, or stop it"
        raise InputError(f"--output_dir {output}: {what}") from None
    except OSError:
        pass  # some network file systems have no locks


def open_run(args: Namespace, recipe: dict, processes: int) -> Run:
    """Lock the output folder and find out where the run starts or resumes. Call on rank 0.

    Raises InputError if another process trains there, if it holds another run, or if the requested one is damaged.
    """
    output, choice = Path(args.output_dir), args.resume_from_checkpoint
    hold(output)
    record, state, folder, problem = {}, {}, None, ""
    try:
        record = dict(**json.loads((output / RUN).read_text())) if (output / RUN).exists() else {}
    except (ValueError, TypeError):  # TypeError: JSON, but not an object
        problem = f"{output / RUN} cannot be read"
    own = checkpoints(output)
    given = choice not in ("auto", "none") and not (restarted() and own)
    for folder in [Path(choice)] if given else own.values():
        try:
            state = verify(folder)
            break
        except ValueError as error:
            problem = f"{folder} is not an intact checkpoint: {error}"
            print(printable(problem if given else f"{problem}; skipping it"))
    if problem and not state:
        raise InputError(f"{problem}; give an intact checkpoint, or choose another --output_dir to start over")
    if given and max(own, default=0) > state["step"]:
        advice = "omit --resume_from_checkpoint to resume it, or choose another --output_dir"
        raise InputError(f"--output_dir {output} holds a run that is ahead of {folder}; {advice}")
    finished = record.pop("finished", None)
    for saved in (record, state):
        if changed := differences(saved.get("recipe", {}), recipe):
            what = f"{folder or output} belongs to another run: {'; '.join(changed)}"
            raise InputError(f"{what}; undo this, or choose another --output_dir")
    state = START | {"processes": processes} | record | state
    return Run(state | {"recipe": recipe | state["recipe"]}, folder, finished)


def make_recipe(args: Namespace, data: Prepared, config, tokenizer, processes: int) -> dict:
    """What must stay the same for a run to resume: flags, and fingerprints of everything they refer to."""
    return {name: value for name, value in vars(args).items() if name not in FREE} | {
        "prompts a step": processes * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "weights of --model": model_fingerprint(args.model, config),
        "tokenizer of --model": hashlib.sha256(tokenizer_state(tokenizer).encode()).hexdigest(),
        "--train_data": data.sources["train"],
        "--eval_data": data.sources["eval"],
    }


def all_alike(recipe: dict, group) -> None:
    """Raise InputError on every process if one's recipe differs from rank 0's, perhaps by the files on its machine."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, recipe, group=group)
    for rank, other in enumerate(everyone):
        if changed := differences(everyone[0], other):
            what = "was started with other flags or files than process 0"
            raise InputError(f"process {rank} {what}: {'; '.join(changed)}")


def model_fingerprint(name: str, config) -> str:
    """A hash that changes when the weights do. It samples 256 pieces of a large file, to keep the start-up short."""
    if not Path(name).exists():  # from the hub, where the commit hash identifies the weights
        return f"{name} {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    if lora := lora_of(name):
        digest.update(model_fingerprint(lora["base_model_name_or_path"], config).encode())
    files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
    for path in [Path(name)] if Path(name).is_file() else sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1 << 16, size // 256)):
                file.seek(place)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def differences(then: dict, now: dict) -> list[str]:
    """Describe what differs. Ignores the number of prompts per step, which `accumulation` checks."""
    changed = sorted(k for k in then.keys() & now.keys() - {"prompts a step"} if then[k] != now[k])
    return [f"{k}: its content has changed" if "--" in k else f"--{k} was {then[k]!r}, is {now[k]!r}" for k in changed]


def accumulation(run: Run, processes: int, batch_size: int, asked: int) -> int:
    """Micro-steps that keep the run's prompts per step on any number of processes. Raises InputError if none do."""
    whole, product = run.state["recipe"]["prompts a step"], processes * batch_size
    if whole == product * asked:
        return asked
    if processes == run.state["processes"] or whole % product:
        now = f"{processes} processes x {batch_size} prompts x {asked} micro-steps are {product * asked}"
        advice = "choose --per_device_train_batch_size and --gradient_accumulation_steps so that both agree"
        raise InputError(f"the run has {whole} prompts per step, but {now}; {advice}")
    return whole // product


def begin(args: Namespace, data: Prepared, config, tokenizer, processes: Processes) -> Run:
    """Start or resume a run. Sets args.gradient_accumulation_steps (see `accumulation`). No later check refuses a run.

    Raises InputError, and Stop if the run is finished, on every process.
    """
    world_size, batch_size = processes.world_size, args.per_device_train_batch_size
    recipe = make_recipe(args, data, config, tokenizer, world_size)
    all_alike(recipe, processes.patient)  # every machine has read data and model on its own
    run = on_first_process(processes.patient, open_run, args, recipe, world_size)
    args.gradient_accumulation_steps = accumulation(run, world_size, batch_size, args.gradient_accumulation_steps)
    epoch_steps = steps_per_epoch(len(data.train), world_size, batch_size, args.gradient_accumulation_steps)
    total_steps = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * epoch_steps)
    run = run._replace(epoch_steps=epoch_steps, total_steps=total_steps)
    on_first_process(processes.patient, write_record, run, args, world_size)
    return run


def write_record(run: Run, args: Namespace, processes: int) -> None:
    """Write run.json and truncate metrics.jsonl to the step at which the run resumes. Call on rank 0.

    Raises Stop if the run is finished, and InputError if it cannot end after run.total_steps.
    """
    output, total_steps, done = Path(args.output_dir), run.total_steps, max(run.finished or 0, run.state["step"])
    if run.finished == total_steps:
        raise Stop(f"{output} holds this run, finished after {total_steps} steps; nothing to do", 0)
    if done > total_steps or (run.finished and not run.checkpoint):
        reached = f"step {done}{'' if run.checkpoint else ' and left no checkpoint'}"
        what = f"the run has already reached {reached}, but it should end at step {total_steps}"
        raise InputError(f"--output_dir {output}: {what}; choose another folder")
    record = {"recipe": run.state["recipe"], "processes": processes, "arguments": vars(args)}
    with writing(output / RUN):
        put(output / RUN, json.dumps(record, indent=1).encode())
    for leftover in output.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    with open(output / METRICS, "a") as file:  # later rows will be written again
        own = run.checkpoint and run.checkpoint.resolve().parent == output.resolve()
        file.truncate(min(file.tell(), run.state["metrics"] if own else 0))


def finish(output: Path, step: int) -> None:
    """Mark the run as finished, so that repeating the command does nothing. Call on rank 0 after all is written."""
    record = json.loads((output / RUN).read_text())
    put(output / RUN, json.dumps(record | {"finished": step}, indent=1).encode())


# -- Stopping. --------------------------------------------------------------------------------------------------------
def agreed(caught: list[int]) -> int:
    """The signal that any process has caught, the same on all; 0: none. Uses gloo, so that no GPU has to wait."""
    number = torch.tensor(max(caught, default=0))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def agree(caught: list[int], losses: list[Tensor], *values: Tensor) -> tuple[int, tuple[int, int] | None, list[float]]:
    """Agree on what any process has seen: (signal or 0, (micro-step, process) of the first non-finite loss or None).

    losses: [] of each micro-step; values: [], returned as numbers. One all-reduce of two numbers per step, and the only
    point in a step at which this process waits for its device.
    """
    world_size, none = dist.get_world_size(), 1 << 40
    finite = torch.isfinite(torch.stack(losses))
    places = torch.arange(len(losses), device=finite.device) * world_size + dist.get_rank()
    first = torch.where(finite, none, places).min()
    seen = torch.stack([torch.full_like(first, -max(caught, default=0)), first]).double()
    dist.all_reduce(seen, dist.ReduceOp.MIN)
    number, place, *numbers = torch.cat([seen, torch.stack([v.to(seen, non_blocking=True) for v in values])]).tolist()
    return -int(number), None if place == none else divmod(int(place), world_size), numbers


def not_finite(step: int, planned: Step, where: tuple[int, int] | None, inputs, what: str, hint: str) -> Stop:
    """The Stop of a diverged run. It names the prompts at `where` (see `agree`), or in the first micro-step."""
    groups = planned.micro_steps[where[0]][where[1]] if where else [g for rank in planned.micro_steps[0] for g in rank]
    ids = ", ".join(map(str, groups[:8])) + (", ..." if len(groups) > 8 else "")
    row = inputs.data.train[groups[0]]
    text = inputs.tokenizer.decode((row["prefix"] + row["completions"][0])[:24])
    prompts = f"training prompts {ids} (counted from 0 after filtering; the first begins {text!r})"
    advice = "The newest checkpoint precedes this step; run the same command again to resume from it"
    return Stop(f"step {step}: {what}. It occurred in {prompts}. {hint}. {advice}", 3)


def ending(error: BaseException) -> tuple[str, int]:
    """(line to print, exit code) of an error that ends a run. Raises the error again if it is a defect of minirm."""
    if isinstance(error, InputError):
        return f"error: {error}", 2
    if isinstance(error, Stop):
        return error.args
    if isinstance(error, KeyboardInterrupt):  # raised outside the training loop
        number = error.args[0] if error.args else signal.SIGINT
        return interrupted(number), 128 + number
    if isinstance(error, OSError) and disk_is_full(error):
        return disk_full_line(error, "a file could not be written"), 3
    if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return f"process {os.environ.get('RANK', '0')} ends, since another one was lost ({one_line(error)})", 1
    raise error
