"""Cache the outputs of the frozen layers on disk, so that they are computed once and later epochs skip those layers.

    FOLDER/<key>/about.json                 what the key is a hash of: everything else that changes the states
    FOLDER/<key>/<ab>/<name>.safetensors    a prompt with its completions: states [tokens, H] in the compute precision

Only hidden states are cached. The trunk's own forward pass still makes masks, positions and rotary embeddings. In it,
frozen blocks return their input, and the last one returns the cached states. So the cache need not know a block's
arguments, and FSDP still gathers a sharded frozen block: all ranks stay in step even if one has a cache hit and
another a miss.

A file is named after what its content depends on, appears only when complete, and never changes. So any number of
processes and runs may share a folder and be killed at any time. A checksum detects damage from a power failure.

Cached states are bitwise equal to those computed in rows of the same shape. With one prompt per micro-step, the shape
is always the same. With more, rows are padded to the longest one in the micro-step, which changes from epoch to epoch,
and the rounding of a matrix product depends on the shape. Cached and uncached runs then agree up to rounding.
"""

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from minirm import attention, probe, rows
from minirm.data.prepare import totals
from minirm.data.tokens import tokenizer_state
from minirm.errors import InputError, printable, refusing
from minirm.files import put
from minirm.freeze import Frozen, find_blocks, freeze_bottom_layers
from minirm.rows import Batch


class TrunkCache:
    """`with cache.over(cache.look_up(batch)): model(...)` skips the frozen blocks if all of the batch is cached.

    Otherwise it computes them and caches what is missing. `look_up` reads files, so that a thread can do it ahead of time.
    """

    def __init__(self, blocks: list[nn.Module], extras: int | None, dtype: torch.dtype, folder: Path | None = None):
        """blocks: the frozen ones, in order; extras: see `probe_trunk_cache`; folder: None writes nothing.

        Replaces the blocks' `forward` in place, inside FSDP's hooks. Blocks that FSDP does not shard (with one process)
        stay on the CPU until the first cache miss, so a run without misses needs no device memory for them.
        """
        self.folder, self.dtype, self.extras, self.writing = folder, dtype, extras, folder is not None
        self.waiting = [block for block in blocks if not any(isinstance(p, DTensor) for p in block.parameters())]
        self.kept: Tensor | None = None  # [tokens, H]: cached states, which the last block returns
        self.computed: Tensor | None = None  # [R, L, H]: the last block's own output
        self.real: Tensor | None = None  # [R, L] bool: not padding
        for block in self.waiting:
            block.to("cpu")
        for block in blocks:
            block.forward = partial(self._through, block.forward, block is blocks[-1])

    def _through(self, forward, last: bool, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.kept is None:
            while self.waiting:
                self.waiting.pop().to(hidden.device)
            output = forward(*args, **kwargs)
            if last:
                self.computed, *more = output if isinstance(output, tuple) else (output,)
                self.extras = len(more) if isinstance(output, tuple) else None
            return output
        if last:  # padding keeps the embeddings' output, because it is finite and nothing attends to it
            # Assigning to hidden[self.real] would wait for the GPU.
            hidden = hidden.masked_scatter(self.real[..., None], self.kept.to(hidden))
        return hidden if self.extras is None else (hidden, *[None] * self.extras)

    def look_up(self, batch: Batch) -> Batch:
        """The same CPU batch with `cached`: each group's name and states [tokens, H], None if they are not cached yet."""
        return replace(batch, cached=[(name, self._read(name)) for name in group_names(batch)])

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Wrap a forward pass over `batch`, which `look_up` has returned; it may have moved to another device since."""
        self.real, device = batch.segments >= 0, batch.segments.device
        # What was missing may have been computed since.
        found = [(name, self._read(name) if states is None else states) for name, states in batch.cached]
        missing = any(states is None for _, states in found)
        self.kept = None if missing else torch.cat([states.to(device, non_blocking=True) for _, states in found])
        try:
            yield
            for g, (name, states) in enumerate(found):
                if states is None and self.writing:
                    mine = torch.tensor(batch.group) == g
                    self._write(name, self.computed.detach()[mine][self.real[mine]].to("cpu", self.dtype))
        finally:
            self.kept = self.computed = self.real = None

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        """[tokens, H], or None if the file is missing or damaged."""
        try:
            with safe_open(self._path(name), "pt") as file:
                states = file.get_tensor("states")
                return states if file.metadata()["crc32"] == _checksum(states) else None
        except (OSError, SafetensorError, KeyError, TypeError):
            return None

    def _write(self, name: str, states: Tensor) -> None:
        try:
            put(self._path(name), save({"states": states}, {"crc32": _checksum(states)}), sync=False)
        except OSError as error:
            self.writing = False
            line = f"--cache_trunk {self.folder.parent}: cannot be written ({error.strerror or error})"
            tqdm.write(f"{printable(line)}; the run continues, but caches no more", file=sys.stderr)


def _checksum(states: Tensor) -> str:
    return str(zlib.crc32(states.contiguous().view(torch.uint8).numpy()))


def group_names(batch: Batch) -> list[str]:
    """Name each group of a CPU batch by a hash of everything that its states depend on, besides the folder's key."""
    names = []
    for g in range(batch.group[-1] + 1):
        mine = torch.tensor(batch.group) == g
        real = batch.segments[mine] >= 0
        digest = hashlib.blake2b(real.sum(dim=1).numpy().tobytes(), digest_size=16)
        for values in (batch.input_ids, batch.position_ids, batch.segments, batch.visible):
            digest.update(values[mine][real].numpy().tobytes())
        names.append(digest.hexdigest())
    return names


# -- At the start: whether caching is possible, where, and whether there is room. --------------------------------------
def probe_trunk_cache(args, config, frozen: Frozen) -> int | None:
    """How many values besides the hidden states a block of this architecture returns; None if it returns a bare tensor.

    Tries the cache on a small random model: caches one batch's hidden states, runs another batch, then runs the first
    again with frozen blocks skipped. Raises InputError with the reason if caching is not possible.
    """
    if not frozen.layers:
        what = f"--freeze_ratio {args.freeze_ratio} freezes no layer"
        raise InputError(f"--cache_trunk: {what}; raise it, or omit --cache_trunk")
    # Each batch has two rows, and the second one is padded.
    batches = [probe.small_batch([(ids, [[9, 10, 11], [12]])], "separate") for ids in ([5, 6, 7], [8, 20, 21])]
    what = f"--cache_trunk: not possible for {config.model_type}"  # for whatever reason
    with refusing(what, advice="; omit --cache_trunk"), probe.trying():
        model = probe.small_model(config, args.max_length)
        ratio = 1 if len(frozen.layers) == frozen.total_layers else 0.5
        below = freeze_bottom_layers(model, ratio, embeddings=not args.train_embeddings).layers
        cache = TrunkCache([find_blocks(model)[1][i] for i in below], None, torch.float32)

        def states(batch: Batch) -> Tensor:
            cache.real = batch.segments >= 0
            return probe.small_states(model, batch)[cache.real]

        wanted, computed = states(batches[0]), cache.computed
        if computed.requires_grad:
            raise ValueError("parameters below the first trained layer are trained, as with --train_embeddings")
        states(batches[1])
        cache.kept = computed[batches[0].segments >= 0]
        if not torch.allclose(states(batches[0]), wanted, rtol=1e-4, atol=1e-5):
            raise ValueError("its layers pass on more than hidden states")
    return cache.extras


def open_folder(
    args, config, tokenizer, read: Callable[[str], Tensor], frozen: Frozen, report: dict, layout: str, device: str
) -> Path:
    """Return the folder for these states, and print how much space they need and how much is free. Call on rank 0.

    read: name -> full weights, on the CPU. Raises InputError if the folder is not writable or the disk is too small.
    """

    def fingerprint(name: str) -> str:
        values = read(name).contiguous()
        digest = hashlib.sha256(values.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return f"{name} {values.dtype} {tuple(values.shape)} {digest}"

    with ThreadPoolExecutor() as pool:  # hashlib and torch release the GIL
        weights = list(pool.map(fingerprint, sorted(frozen.parameters)))
    code = b"".join(Path(module.__file__).read_bytes() for module in (attention, rows, sys.modules[__name__]))
    about = {
        "weights": weights,  # only the frozen ones, so that a retrained model finds the same cache
        "config": {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")},
        "frozen layers": len(frozen.layers),
        "tokenizer": hashlib.sha256(tokenizer_state(tokenizer).encode()).hexdigest(),
        "max_length": args.max_length,
        "row_layout": layout,
        "precision": args.precision,
        # This affects rounding, see the top of this file.
        "one prompt per micro-step": args.per_device_train_batch_size == 1 and not args.micro_batch_tokens,
        "device": device,
        "versions": [torch.__version__, transformers.__version__],
        "code": hashlib.sha256(code).hexdigest(),
    }
    text = json.dumps(about, indent=1, sort_keys=True, default=str)
    folder = Path(args.cache_trunk) / hashlib.sha256(text.encode()).hexdigest()[:32]
    with refusing(f"--cache_trunk {args.cache_trunk}: cannot be written", OSError, "; choose another folder"):
        put(folder / "about.json", text.encode())
        there = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        free = shutil.disk_usage(folder).free
    counts = totals(report["train"] + report["eval"])
    itemsize = 4 if args.precision == "fp32" else 2
    needed = counts[f"{layout} tokens"] * config.get_text_config().hidden_size * itemsize
    sizes = f"need {needed / 1e6:,.1f} MB; {there / 1e6:,.1f} MB are cached already, {free / 1e6:,.1f} MB are free"
    sizes = f"the frozen layers' outputs for {counts['prompts']:,} prompts {sizes}"
    if needed - there > free:
        raise InputError(f"--cache_trunk {args.cache_trunk}: {sizes}; choose another folder, or omit --cache_trunk")
    print(f"--cache_trunk: {sizes}\n")
    return folder
