"""Checkpoints: written atomically, verified by checksum, loaded on any number of processes.

    checkpoint-<step>/   shard-*.safetensors   trained parameters, optimizer state and, as `best.*`, the parameters at
                                               the best evaluation if that was an earlier one; one file per process
                         checkpoint.json       everything else that an exact resume needs, as readable text
                         SHA256SUMS            checksums of the files above, for `sha256sum -c`

No file is a pickle. RNG state is not saved, because training draws no random numbers: dropout is off, and the order of
the data is a function of seed and epoch.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from minirm import files
from minirm.errors import InputError, one_line
from minirm.files import PARTIAL, file_digest, put, to_disk
from minirm.shard import on_first_process

STATE, SUMS, METRICS = "checkpoint.json", "SHA256SUMS", "metrics.jsonl"
# Fields of checkpoint.json. sums: each process's metric sums since the last logged row, so that a resumed run adds in
# the same order. result, best: the last evaluation and the one with the lowest loss. metrics: size of metrics.jsonl.
START = {
    "step": 0, "schedule_steps": 0, "skipped_steps": 0, "scaler": {}, "seconds": 0.0, "sums": [], "result": {}, "best": {},
    "recipe": {}, "processes": 0, "arguments": {}, "metrics": 0,
}  # fmt: skip


def checkpoints(output: Path) -> dict[int, Path]:
    """{step: folder}, newest first."""
    found = [(int(p.name[11:]), p) for p in output.glob("checkpoint-*") if p.name[11:].isdecimal()]
    return dict(sorted(found, reverse=True))


def best_is_own(state: dict) -> bool:
    """Whether the best evaluation, if there is one, used the checkpoint's own parameters."""
    return state["best"].get("step", state["step"]) == state["step"]


def copies(trained: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU copy) of each parameter; for a sharded parameter, a copy of this process's shard."""
    return ((name, p.detach().to("cpu", copy=True)) for name, p in trained.items())


def tensors(state: dict, trained: dict[str, nn.Parameter], optimizer, best: dict[str, Tensor]) -> dict[str, Tensor]:
    """{name: tensor} to save, still sharded. Omits frozen parameters, and the best ones if they are the current ones.

    Does not use `get_state_dict`, because it makes an optimizer without state (fp16 skips the first steps) take a step.
    """
    kept = {f"model.{name}": p.detach() for name, p in trained.items()}
    kept |= {f"optimizer.{n}.{key}": v for n, p in trained.items() for key, v in optimizer.state.get(p, {}).items()}
    return kept | ({} if best_is_own(state) else {f"best.{name}": copy for name, copy in best.items()})


def save(output: Path, state: dict, trained: dict[str, nn.Parameter], optimizer, best: dict, limit: int, group) -> str:
    """Write checkpoint-<step> and keep the newest `limit` (0: all). All processes must call it. Returns a log line.

    state: see START; equal on all processes except state["sums"] [8]. best: `copies` from the time of state["best"].
    Raises Stop on every process if writing fails; earlier checkpoints stay untouched.
    """
    start = time.perf_counter()
    final = output / f"checkpoint-{state['step']}"
    partial = final.with_name(final.name + PARTIAL)
    kept = tensors(state, trained, optimizer, best)
    with writing(final, sum(t.numel() * t.element_size() for t in kept.values())):
        try:
            on_first_process(group, partial.mkdir)
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)  # syncs its files to disk
            dcp.save(kept, storage_writer=writer, process_group=group)
            mine = {p.name: file_digest(p) for p in partial.glob(f"shard-{dist.get_rank() + 1:05d}-*")}
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (mine, state["sums"].tolist()), group=group)
            digests = {name: digest for mine, _ in everyone for name, digest in mine.items()}
            state = state | {"sums": [sums for _, sums in everyone]}
            size = on_first_process(group, _complete, partial, final, state, digests, limit)
        except BaseException:  # CheckpointException derives from it
            # Not in `finally`, because a file system may show the old name to other processes even after the rename.
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return f"saved {final.name}: {size / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s"


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Like `files.writing`, for files in the output folder: the Stop also names the newest checkpoint."""
    output = path if path.is_dir() else path.parent
    newest = next(iter(checkpoints(output).values()), None)
    with files.writing(path, size, f"{newest.name} is intact" if newest else "there is no checkpoint yet"):
        try:
            yield
        except CheckpointException as error:
            cause = _cause(error)
            raise cause if isinstance(cause, OSError) else OSError(one_line(cause)) from None


def _cause(error: BaseException) -> BaseException:
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _complete(partial: Path, final: Path, state: dict, digests: dict[str, str], limit: int) -> int:
    """Add checkpoint.json and SHA256SUMS, rename the folder and remove old checkpoints. Returns its size in bytes."""
    if missing := [name for name in digests if not (partial / name).exists()]:
        raise OSError(f"process 0 does not see {missing[0]}; all machines must share --output_dir")
    to_disk(metrics := final.with_name(METRICS))
    state = state | {"metrics": metrics.stat().st_size}
    put(partial / STATE, json.dumps(state, indent=1).encode())
    digests[STATE] = file_digest(partial / STATE)
    put(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode())
    _remove(final)  # it may be damaged, or from beyond the step at which the run resumed
    os.rename(partial, final)
    to_disk(final.parent)
    there = checkpoints(final.parent)
    kept = [step for step in there if step <= state["step"]][: limit or None]  # newer ones are damaged and were skipped
    for step in there.keys() - kept:
        _remove(there[step])
    return sum(path.stat().st_size for path in final.iterdir())


def _remove(folder: Path) -> None:
    """Rename a folder before removing it, so that a half-removed one is not taken for a checkpoint."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old{PARTIAL}")))


@contextmanager
def whole_model(output: Path) -> Iterator[Path]:
    """Yield a folder for the trained model's files; they move to `output` once all of them are on disk.

    A model does not load without config.json, which is removed first and added last. So `output` always holds the old
    model, the new one, or none that loads, but never a mixture of the two.
    """
    partial = output / f"model{PARTIAL}"
    try:
        partial.mkdir()
        yield partial
        for path in (*partial.rglob("*"), partial):
            to_disk(path)
        (output / "config.json").unlink(missing_ok=True)
        to_disk(output)
        for path in output.glob("model*.safetensors*"):  # names differ with the number of shards
            path.unlink()
        shutil.rmtree(output / "adapter", ignore_errors=True)  # os.replace cannot replace a folder
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, output / path.name)
            to_disk(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify(folder: Path) -> dict:
    """Verify every byte of a checkpoint and return its state. Raises ValueError with what is damaged."""
    try:
        sums = (folder / SUMS).read_text(errors="replace")
        files = [folder / STATE, *folder.glob("*.safetensors")]
        with ThreadPoolExecutor() as pool:
            lines = {f"{digest}  {path.name}\n" for path, digest in zip(files, pool.map(file_digest, files))}
        if odd := lines ^ {*sums.splitlines(keepends=True)}:
            name = one_line(min(odd).partition("  ")[2])
            raise ValueError(f"{name} does not match {SUMS}")
        state = json.loads((folder / STATE).read_text())
        if wrong := [key for key, value in START.items() if type(state.get(key)) is not type(value)]:
            raise ValueError(f"{STATE} lacks {', '.join(wrong)}")
        state["recipe"]["prompts a step"]
        [0.0 + row["step"] + row["eval_loss"] for row in (state["result"], state["best"] or state["result"])]
        torch.tensor(state["sums"], dtype=torch.float64).view(-1, 8)
        return state
    except OSError as error:
        raise ValueError(f"{Path(error.filename or folder).name}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{STATE} has an unexpected form ({one_line(error)})") from None


def load(folder: Path, state: dict, trained: dict, optimizer, scheduler, scaler, group) -> dict[str, Tensor]:
    """Restore a checkpoint in place, on any number of processes. All of them must call it.

    Returns the parameters from the time of state["best"], as `copies` does, or {}. Raises InputError if loading fails.
    """
    best = dict(copies(trained)) if state["best"] else {}  # dcp.load fills it
    reader = HuggingFaceStorageReader(str(folder))
    try:
        for stored, item in reader.read_metadata().state_dict_metadata.items():
            name, _, key = stored.removeprefix("optimizer.").rpartition(".")
            if stored.startswith("optimizer.") and (p := trained.get(name)) is not None:
                optimizer.state[p][key] = torch.zeros_like(p) if item.size == p.shape else torch.zeros(item.size)
        dcp.load(tensors(state, trained, optimizer, best), storage_reader=reader, process_group=group)
    except (CheckpointException, SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be loaded ({one_line(_cause(error))})") from None
    scaler.load_state_dict(state["scaler"])
    # Restore only the position in the schedule, whose length may have changed. step() sets the optimizer's rate.
    moved = state["schedule_steps"]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": moved - 1, "_step_count": moved + 1})
    scheduler.step()
    return dict(copies(trained)) if best and best_is_own(state) else best
