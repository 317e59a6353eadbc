"""A run is never lost: checkpoints, resuming, stopping.

    checkpoint-<step>/   shard-*.safetensors   trained parameters, the optimizer's state and, as `best.*`, the parameters
                                               at the best evaluation if that was an earlier one; a file per process
                         checkpoint.json       all else that an exact resume needs, readable
                         SHA256SUMS            of the files above, as `sha256sum -c` takes it
    run.json             what is being trained on what, written before the first step; at the end, that it is finished

No file is a pickle. Random numbers are not among the state, since none are drawn while training: dropout is off, and
the order of the data is a function of seed and epoch.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from minirm.data import Prepared, tokenizer_state
from minirm.shard import on_first_process
from minirm.sources import InputError, file_digest, one_line, refusing

STATE, SUMS, RUN, METRICS = "checkpoint.json", "SHA256SUMS", "run.json", "metrics.jsonl"
PARTIAL = ".partial"  # what is not complete ends so, and whatever ends so may be removed

# Flags that say nothing about the trained model.
UNSAID = {"output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "cache_trunk",
          "report_to", "profile", "plan", "world_size", "device", "shard_size", "cpu_offload"}  # fmt: skip
# Flags that may differ when a run goes on: these, its length, and what changes memory or speed alone. Model and data are
# compared by content, so that they may move; batch size and accumulation by their product with the processes.
FREE = UNSAID | {"num_train_epochs", "max_steps", "eval_steps", "gradient_checkpointing", "model", "train_data", "eval_data",
                 "chat_template", "per_device_train_batch_size", "gradient_accumulation_steps"}  # fmt: skip
# What checkpoint.json has. sums: what training rows have summed up since the last one, of each process, so that a resume adds
# up in the same order. result, best: the last evaluation and that of the lowest loss. metrics: bytes of metrics.jsonl.
START = {
    "step": 0, "schedule_steps": 0, "skipped_steps": 0, "scaler": {}, "seconds": 0.0, "sums": [], "result": {}, "best": {},
    "recipe": {}, "processes": 0, "arguments": {}, "metrics": 0,
}  # fmt: skip
_held: list[int] = []  # the descriptor of the output folder, which is locked as long as it is open


class Stop(Exception):
    """The run ends here: Stop(one line for people, exit code). 0: nothing left to do; 3: a fault that will come again
    if nothing is changed; 128 + n: signal n asked for it."""


class Run(NamedTuple):
    state: dict  # of the checkpoint, or START; its recipe is what a checkpoint has to agree with
    checkpoint: Path | None  # to go on from
    finished: int | None  # steps after which it was finished


# -- Which run is this? -----------------------------------------------------------------------------------------------


def restarted() -> bool:
    """By torchrun --max_restarts: then the run goes on, whatever the flags began with."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def checkpoints(output: Path) -> dict[int, Path]:
    """{step: folder}, the newest first."""
    found = [(int(p.name[11:]), p) for p in output.glob("checkpoint-*") if p.name[11:].isdecimal()]
    return dict(sorted(found, reverse=True))


def check_output(output: Path, choice: str) -> None:
    """Raises InputError if the output folder cannot be this run's, before any data is read. Leaves nothing behind."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    with refusing(f"--output_dir {output}: {there} is not a folder that can be written", OSError, "; choose another"):
        tempfile.TemporaryFile(dir=there).close()
    if not output.is_dir() or all(path.suffix == PARTIAL for path in output.iterdir()):
        return
    if not (output / RUN).exists() and not checkpoints(output):
        raise InputError(f"--output_dir {output} holds another run's files; choose another folder, or remove it first")
    if choice == "none" and not restarted():
        raise InputError(
            f"--output_dir {output} holds a run; without --resume_from_checkpoint none it goes on. To begin anew, "
            "choose another folder, or remove it first"
        )


def hold(output: Path) -> None:
    """Makes the folder, and locks it until this process ends or holds another one."""
    with refusing(f"--output_dir {output}: cannot be made", OSError, "; choose another folder"):
        output.mkdir(parents=True, exist_ok=True)
    while _held:
        os.close(_held.pop())
    _held.append(os.open(output, os.O_RDONLY))
    try:
        fcntl.flock(_held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--output_dir {output}: another run is writing there; wait for its end, or stop it") from None
    except OSError:
        pass  # some network file systems have no locks


def open_run(args: Namespace, recipe: dict, processes: int) -> Run:
    """On the first process: takes hold of the output folder and finds out where the run begins or goes on.

    Raises InputError if another process trains there, its run is another than this one, or what was asked for not whole.
    """
    output, choice = Path(args.output_dir), args.resume_from_checkpoint
    hold(output)
    record, state, folder, problem = {}, {}, None, ""
    try:
        record = dict(**json.loads((output / RUN).read_text())) if (output / RUN).exists() else {}
    except (ValueError, TypeError):  # TypeError: JSON, but no object
        problem = f"{output / RUN} cannot be read"
    own = checkpoints(output)
    given = choice not in ("auto", "none") and not (restarted() and own)
    for folder in [Path(choice)] if given else own.values():
        try:
            state = verify(folder)
            break
        except ValueError as error:
            problem = f"{folder} is not whole: {error}"
            print(problem if given else f"{problem}; it is passed over")
    if problem and not state:
        raise InputError(f"{problem}; give a whole checkpoint, or choose another --output_dir to begin anew")
    if given and max(own, default=0) > state["step"]:
        raise InputError(
            f"--output_dir {output} holds a run that has got further than {folder}; leave --resume_from_checkpoint away to "
            "go on with it, or choose another --output_dir"
        )
    finished = record.pop("finished", None)
    for saved in (record, state):
        if changed := differences(saved.get("recipe", {}), recipe):
            raise InputError(
                f"{folder or output} is of another run: {'; '.join(changed)}; undo that, or choose another --output_dir"
            )
    state = START | {"processes": processes} | record | state
    return Run(state | {"recipe": recipe | state["recipe"]}, folder, finished)


def make_recipe(args: Namespace, data: Prepared, config, tokenizer, processes: int) -> dict:
    """What must be the same for a run to go on: flags, and fingerprints of all that they refer to."""
    return {name: value for name, value in vars(args).items() if name not in FREE} | {
        "prompts a step": processes * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "weights of --model": model_fingerprint(args.model, config),
        "tokenizer of --model": hashlib.sha256(tokenizer_state(tokenizer).encode()).hexdigest(),
        "--train_data": data.sources["train"],
        "--eval_data": data.sources["eval"],
    }


def all_alike(recipe: dict, group) -> None:
    """Raises InputError on all processes if one has another recipe than the first: on its machine are other files, say."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, recipe, group=group)
    for rank, other in enumerate(everyone):
        if changed := differences(everyone[0], other):
            raise InputError(f"process {rank} was given another run than process 0: {'; '.join(changed)}")


def model_fingerprint(name: str, config) -> str:
    """Changes when the weights do. Of a large file 256 pieces are read, not the whole: a start takes long enough."""
    if not Path(name).is_dir():  # from the hub, where every commit has a name of its own
        return f"{name} {getattr(config, '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(0, size, max(1 << 16, size // 256)):
                file.seek(place)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def differences(then: dict, now: dict) -> list[str]:
    """What differs, in words. The number of prompts a step is not looked at: see `accumulation`."""
    changed = sorted(k for k in then.keys() & now.keys() - {"prompts a step"} if then[k] != now[k])
    return [f"{k}: the content has changed" if "--" in k else f"--{k} was {then[k]!r}, is {now[k]!r}" for k in changed]


def accumulation(run: Run, processes: int, batch_size: int, asked: int) -> int:
    """Micro-steps a step, so that a step has as many prompts as at the beginning on any number of processes.

    Raises InputError, with both numbers, where that cannot be.
    """
    whole, product = run.state["recipe"]["prompts a step"], processes * batch_size
    if whole == product * asked:
        return asked
    if processes == run.state["processes"] or whole % product:
        raise InputError(
            f"the run has {whole} prompts a step, but {processes} processes x {batch_size} prompts x {asked} micro-steps are "
            f"{product * asked}; choose --per_device_train_batch_size and --gradient_accumulation_steps so that they are equal"
        )
    return whole // product


def begin(output: Path, run: Run, args: Namespace, processes: int, total_steps: int) -> None:
    """On the first process: the record, and metrics.jsonl cut back to the start. Nothing else can be refused afterwards.

    Raises Stop if the run is finished, and InputError if it cannot be brought to end after total_steps.
    """
    done = max(run.finished or 0, run.state["step"])
    if run.finished == total_steps:
        raise Stop(f"{output} holds this run, finished after {total_steps} steps; nothing is left to do", 0)
    if done > total_steps or (run.finished and not run.checkpoint):
        raise InputError(
            f"--output_dir {output}: the run is at step {done} already{'' if run.checkpoint else ' and left no checkpoint'}, "
            f"{total_steps} were asked for; choose another folder"
        )
    record = {"recipe": run.state["recipe"], "processes": processes, "arguments": vars(args)}
    put(output / RUN, json.dumps(record, indent=1).encode())
    for leftover in output.glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    with open(output / METRICS, "a") as file:  # from here on rows come anew
        own = run.checkpoint and run.checkpoint.resolve().parent == output.resolve()
        file.truncate(min(file.tell(), run.state["metrics"] if own else 0))


def finish(output: Path, step: int) -> None:
    """On the first process, after all is written: the same command typed again has nothing to do."""
    record = json.loads((output / RUN).read_text())
    put(output / RUN, json.dumps(record | {"finished": step}, indent=1).encode())


# -- Writing and reading. ---------------------------------------------------------------------------------------------


def best_is_own(state: dict) -> bool:
    """Whether the best evaluation, if there is any, was that of the checkpoint's own parameters."""
    return state["best"].get("step", state["step"]) == state["step"]


def copies(trained: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """(name, copy on the CPU) of each parameter, one after the other; of a sharded one this process's shard."""
    return ((name, p.detach().to("cpu", copy=True)) for name, p in trained.items())


def tensors(state: dict, trained: dict[str, nn.Parameter], optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that has to be kept, by name; sharded tensors stay so. Nothing frozen, and the best only where it is another.

    Not by `get_state_dict`, which makes an optimizer that has not moved yet (fp16 skips its first steps) take a step.
    """
    kept = {f"model.{name}": p.detach() for name, p in trained.items()}
    kept |= {f"optimizer.{n}.{key}": v for n, p in trained.items() for key, v in optimizer.state.get(p, {}).items()}
    return kept | ({} if best_is_own(state) else {f"best.{name}": copy for name, copy in best.items()})


def save(output: Path, state: dict, trained: dict[str, nn.Parameter], optimizer, best: dict, limit: int, group) -> str:
    """Writes checkpoint-<step> and removes older ones beyond `limit` (0: none). All processes; returns a line to print.

    best: `copies` as of state["best"], or {}.
    state["sums"]: [8] of this process; the rest, as in START and more, is the same on all of them.
    Raises Stop on all of them if it cannot be written; the earlier checkpoints are untouched then.
    """
    start = time.perf_counter()
    final = output / f"checkpoint-{state['step']}"
    partial = final.with_name(final.name + PARTIAL)
    kept = tensors(state, trained, optimizer, best)
    with writing(final, sum(t.numel() * t.element_size() for t in kept.values())):
        try:
            on_first_process(group, partial.mkdir)
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)  # synced to disk
            dcp.save(kept, storage_writer=writer, process_group=group)
            mine = {p.name: file_digest(p) for p in partial.glob(f"shard-{dist.get_rank() + 1:05d}-*")}
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (mine, state["sums"].tolist()), group=group)
            files = {name: digest for digests, _ in everyone for name, digest in digests.items()}
            state = state | {"sums": [sums for _, sums in everyone]}
            size = on_first_process(group, _complete, partial, final, state, files, limit)
        except BaseException:  # CheckpointException is one
            # Half a checkpoint only takes up room. Not also after it has its name: other machines may know the old one yet.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return f"{final.name}: {size / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s"


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turns what the disk or file system objects to into a Stop that names the path and the bytes it takes."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        output = path if path.is_dir() else path.parent
        earlier = [folder.name for folder in checkpoints(output).values()]
        raise Stop(
            f"{path}: could not be written ({one_line(_cause(error))}). It takes {size:,} bytes; {shutil.disk_usage(output).free:,} "
            f"are free. {earlier[0] if earlier else 'No checkpoint'} is whole; make room and type the same command again",
            3,
        ) from None


def _cause(error: BaseException) -> BaseException:
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _complete(partial: Path, final: Path, state: dict, files: dict[str, str], limit: int) -> int:
    """Adds checkpoint.json and SHA256SUMS, gives the folder its name, removes what is too old. Returns its bytes."""
    if missing := [name for name in files if not (partial / name).exists()]:
        raise OSError(f"{missing[0]} is not seen by the first process; all machines must share --output_dir")
    _sync(metrics := final.with_name(METRICS))
    state = state | {"metrics": metrics.stat().st_size}
    put(partial / STATE, json.dumps(state, indent=1).encode())
    files[STATE] = file_digest(partial / STATE)
    put(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items())).encode())
    _remove(final)  # one that was not whole, or lay beyond the place from which the run was begun again
    os.rename(partial, final)
    _sync(final.parent)
    there = checkpoints(final.parent)
    kept = [step for step in there if step <= state["step"]][: limit or None]  # newer ones were passed over: not whole
    for step in there.keys() - kept:
        _remove(there[step])
    return sum(path.stat().st_size for path in final.iterdir())


def _remove(folder: Path) -> None:
    """Renamed first, so that a folder half removed is not taken for a checkpoint."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}")))


def put(path: Path, content: bytes, sync: bool = True) -> None:
    """The whole content or nothing, whoever else writes that file or is killed; with `sync` even if the power fails."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        if sync:
            _sync(partial)
        os.replace(partial, path)
        if sync:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def whole_model(output: Path) -> Iterator[Path]:
    """A folder to write the trained model's files into; they go to `output` when all of them are on disk.

    Nothing loads without config.json, which is taken away first and comes last. So at any moment `output` holds the
    model of before, or the new one, or none that loads: never the weights of one beside shards or config of another.
    """
    partial = output / f"model{PARTIAL}"
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        (output / "config.json").unlink(missing_ok=True)
        _sync(output)
        for path in output.glob("model*.safetensors*"):  # another number of shards has other names
            path.unlink()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, output / path.name)
            _sync(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify(folder: Path) -> dict:
    """The state of a checkpoint of which every byte is as it was written. Raises ValueError saying what is not."""
    try:
        sums = (folder / SUMS).read_text(errors="replace")
        files = [folder / STATE, *folder.glob("*.safetensors")]
        with ThreadPoolExecutor() as pool:
            lines = {f"{digest}  {path.name}\n" for path, digest in zip(files, pool.map(file_digest, files))}
        if odd := lines ^ {*sums.splitlines(keepends=True)}:
            name = one_line(min(odd).partition("  ")[2])
            raise ValueError(f"{name} or its line in {SUMS} is not as it was written")
        state = json.loads((folder / STATE).read_text())
        if wrong := [key for key, value in START.items() if type(state.get(key)) is not type(value)]:
            raise ValueError(f"{STATE} has no {', '.join(wrong)}")
        state["recipe"]["prompts a step"]
        [0.0 + row["step"] + row["eval_loss"] for row in (state["result"], state["best"] or state["result"])]
        torch.tensor(state["sums"], dtype=torch.float64).view(-1, 8)
        return state
    except OSError as error:
        raise ValueError(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{STATE} is of another form ({one_line(error)})") from None


def load(run: Run, trained: dict[str, nn.Parameter], optimizer, scheduler, scaler, group) -> dict[str, Tensor]:
    """Takes up where a checkpoint was made, in place, on any number of processes. All of them have to call it.

    Returns the parameters as of state["best"] as `copies` does, {} if there is none. Raises InputError if it cannot.
    """
    state = run.state
    best = dict(copies(trained)) if state["best"] else {}  # to be filled
    reader = HuggingFaceStorageReader(str(run.checkpoint))
    try:
        for stored, item in reader.read_metadata().state_dict_metadata.items():
            name, _, key = stored.removeprefix("optimizer.").rpartition(".")
            if stored.startswith("optimizer.") and (p := trained.get(name)) is not None:
                optimizer.state[p][key] = torch.zeros_like(p) if item.size == p.shape else torch.zeros(item.size)
        dcp.load(tensors(state, trained, optimizer, best), storage_reader=reader, process_group=group)
    except (CheckpointException, SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{run.checkpoint}: cannot be loaded ({one_line(_cause(error))})") from None
    scaler.load_state_dict(state["scaler"])
    # The place in the schedule alone: its length may have changed. The step puts the rate into the optimizer.
    moved = state["schedule_steps"]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": moved - 1, "_step_count": moved + 1})
    scheduler.step()
    return dict(copies(trained)) if best and best_is_own(state) else best


# -- Stopping. --------------------------------------------------------------------------------------------------------


def note_signals(caught: list[int] | None) -> None:
    """From now on SIGTERM, SIGINT and SIGUSR1 are only noted, in this list; None: they do what they usually do."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual if caught is None else lambda n, _: caught.append(n))


def agree(caught: list[int], losses: list[Tensor]) -> tuple[int, tuple[int, int] | None]:
    """What any process has noticed, the same on all: (signal or 0, (micro-step, process) of the first non-finite loss).

    losses: [] of each micro-step. One all-reduce of two numbers a step.
    """
    world_size, none = dist.get_world_size(), 1 << 40
    finite = torch.isfinite(torch.stack(losses))
    places = torch.arange(len(losses), device=finite.device) * world_size + dist.get_rank()
    first = torch.where(finite, none, places).min()
    values = torch.stack([torch.full_like(first, -max(caught, default=0)), first])
    dist.all_reduce(values, dist.ReduceOp.MIN)
    number, place = values.tolist()
    return -number, None if place == none else divmod(place, world_size)


def not_finite(step: int, groups: list[int], data: Prepared, tokenizer, what: str, hint: str) -> Stop:
    """What to raise when training has come to nothing, naming the comparisons that were being computed."""
    ids = ", ".join(map(str, groups[:8])) + (", ..." if len(groups) > 8 else "")
    row = data.train[groups[0]]
    text = tokenizer.decode((row["prefix"] + row["completions"][0])[:24])
    return Stop(
        f"step {step}: {what}. Computed were the training prompts {ids} (counted from 0 after the filters; the first begins "
        f"{text!r}). {hint}. The newest checkpoint is from before this and goes on with the same command",
        3,
    )
