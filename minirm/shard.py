"""Processes, precision and sharding, applied to a plain model from outside (FSDP2)."""

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from minirm.errors import InputError, Stop
from minirm.freeze import find_blocks
from minirm.model import saved_tensors

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STEP_TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another within a step
START_TIMEOUT = timedelta(hours=24)  # how long it waits while one process prepares data, reads weights or writes files

# Frozen parameters need no gradients and no optimizer state. If they take less than this share of the device memory,
# every rank keeps them unsharded and they are never communicated again.
FROZEN_SHARE = 0.4
# Trained parameters that take less than this share, in the compute precision, are gathered once per step instead of
# twice per micro-step.
TRAINED_SHARE = 0.1


class Processes(NamedTuple):
    device: torch.device
    mesh: DeviceMesh  # [shard] or [replicate, shard]
    rank: int
    world_size: int
    patient: dist.ProcessGroup  # has a long timeout, for waiting while one process works


def start_processes(shard_size: int = 0) -> Processes:
    """Join the processes that torchrun started, or make a group of one.

    `shard_size` consecutive processes (0: those of a machine) share one copy of the model. The mesh is [shard] if they
    are all processes, else [replicate, shard]. Raises InputError if shard_size does not divide the number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shard_size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % shard_size:
        raise InputError(f"--shard_size {shard_size} must divide the number of processes, which is {processes}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        # By default gloo uses the address of the hostname, often 127.0.1.1, which other machines cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_towards(os.environ["MASTER_ADDR"]))
    store, rank, world_size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        # Under --max_restarts torchrun keeps its store, which still holds the addresses of dead processes
        # (pytorch/pytorch#135712). All processes see the same restart count only on a single machine; on several
        # machines, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        store.set_timeout(STEP_TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=STEP_TIMEOUT)
    sizes, names = (processes // shard_size, shard_size), ("replicate", "shard")
    whole = shard_size == processes
    mesh = init_device_mesh(device.type, sizes[whole:], mesh_dim_names=None if whole else names)
    return Processes(device, mesh, rank, world_size, dist.new_group(backend="gloo", timeout=START_TIMEOUT))


def interface_towards(host: str) -> str:
    """The network interface through which this machine reaches `host`, or "" if unknown (Linux, IPv4)."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface may have no address; 0x8915 is SIOCGIFADDR, see netdevice(7)
                own = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24]
                if socket.inet_ntoa(own) == probe.getsockname()[0]:
                    return name
    return ""


def on_first_process(group: dist.ProcessGroup, function: Callable, *args) -> Any:
    """Call function(*args) on rank 0. Every rank returns its result or raises its exception, so all end together."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not hang
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def first_process_first(group: dist.ProcessGroup) -> Iterator[None]:
    """Run the block on the first process of each machine, then on the others, which find the files it wrote.

    If the block raises InputError or Stop on a first process, all processes end with that line and exit code.
    """
    first, ending = dist.get_node_local_rank(0) == 0, None

    def exchange() -> None:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, ending, group=group)
        if ending is None and any(everyone):
            raise Stop(*next(filter(None, everyone)))

    if not first:
        exchange()
    try:
        yield
    except InputError as error:
        ending = f"error: {error}", 2
        raise
    except Stop as stop:
        ending = stop.args
        raise
    finally:
        if first and (ending or sys.exception() is None):  # an interrupt must not wait for the others
            exchange()


def checkpoint_trained_blocks(model: nn.Module) -> None:
    """Make trained blocks keep only their input and recompute the rest in backward, which trades time for memory."""
    for block in find_blocks(model)[1]:
        if hasattr(block, "has_adapters") or any(p.requires_grad for p in block.parameters()):
            # Wrap forward, not __call__, so that FSDP's hooks stay outside and run once.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to the compute precision; trained ones stay fp32 masters."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, offload=False, frozen_share=FROZEN_SHARE) -> bool:
    """Apply FSDP to all parts of a RewardModel. Returns whether frozen parameters stay on the device.

    Trained parameters are gathered in `dtype`, the compute precision; gradients are reduced in fp32. No FSDP unit mixes
    frozen and trained parameters, because they differ in precision. offload: keep shards, gradients and optimizer state
    in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)  # of units with trained parameters
    frozen = {p for p in model.parameters() if not p.requires_grad}
    if mesh.device_type == "cuda":
        memory = torch.cuda.get_device_properties("cuda").total_memory
    else:  # the processes of a machine divide its memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Ranks must agree: if one kept what another gathers, both would hang.
    least = torch.tensor(memory, dtype=torch.float64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    # A process with its own full copy gathers nothing, so it need not free gathered parameters either.
    alone = mesh.shape[-1] == 1
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad == trained) for trained in (False, True)]
    stay, once = what_stays(*(n * dtype.itemsize for n in counts), least.item(), alone, offload, frozen_share)
    ignored = frozen if alone and stay else set()
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not once, "ignored_params": ignored}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    layers = find_blocks(model)[1]
    blocks = [block for block in layers if not ignored.issuperset(block.parameters())]
    # Embeddings, and other frozen modules outside the blocks, are separate units.
    inside = {*layers.parameters()} | ignored
    outside = [m for m in model.modules() if [*m.parameters(recurse=False)] and inside.isdisjoint(m.parameters())]
    others = [m for m in outside if isinstance(m, nn.Embedding) or frozen & {*m.parameters(recurse=False)}]
    for unit in blocks + others:
        if not frozen.issuperset(unit.parameters()):
            fully_shard(unit, mp_policy=policy, **options)
        else:  # frozen parameters never change, so gather them once and keep them if there is room
            fully_shard(unit, **options | {"reshard_after_forward": not stay})
            unit.set_reshard_after_backward(not stay)
    for block, following in pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])  # FSDP already prefetches in backward
    fully_shard(model, **options)  # the rest, in fp32: the final norm, the head, adapters
    trained = [m for m in (*blocks, *others, model) if any(p.requires_grad for p in m.parameters())]
    if mesh.device_type == "cpu":
        for unit in trained:
            unit.set_custom_reduce_scatter(HostReduceScatter())
    model.gathered_once = trained if once else []
    return stay


class HostReduceScatter:
    """Reduce-scatter that averages gradients on CPUs. Gloo's own averages all of them on every rank, then keeps a share."""

    allocate = staticmethod(torch.empty)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        assert op == dist.ReduceOp.AVG, f"expected FSDP to ask for the mean of gradients, got {op}"
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        torch.mean(parts.view(group.size(), -1), dim=0, out=output_tensor)


def what_stays(frozen: int, trained: int, memory: float, alone: bool, offload: bool, share=FROZEN_SHARE) -> tuple:
    """(whether frozen parameters stay gathered for good, whether trained ones stay gathered for a whole step).

    frozen, trained: total bytes in the compute precision; memory: bytes of a device; alone: nothing is sharded.
    """
    stay = (alone and not offload) or frozen <= share * memory
    return stay, not offload and (alone or trained <= TRAINED_SHARE * memory)


def begin_micro_step(model: nn.Module, last: bool) -> None:
    """Reduce gradients, and free trained parameters that are gathered once per step, only after the last micro-step."""
    model.set_requires_gradient_sync(last)
    for unit in model.gathered_once:
        unit.set_reshard_after_backward(last, recurse=False)


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a parameter, and the index of the first. FSDP splits rows as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    rows, mesh = len(tensor), tensor.device_mesh
    return tensor.to_local(), min(-(-rows // mesh.shape[-1]) * mesh.get_local_rank(mesh.ndim - 1), rows)


@torch.no_grad()
def fill(model: nn.Module, device, offload: bool, group, read: Callable | None, load: Callable) -> Callable:
    """Load weights into an empty, sharded model. No process except perhaps rank 0 ever holds more than its share.

    read: read(name, start, stop) -> rows of a tensor; None if this process cannot read rows. If any process cannot,
    rank 0 calls load() -> {name: tensor} in host memory and broadcasts each tensor. Returns a `read` for rank 0.
    """
    able = torch.tensor(read is not None, dtype=torch.int32)
    dist.all_reduce(able, dist.ReduceOp.MIN, group=group)
    source: dict[str, Tensor] = {}
    if not able:
        on_first_process(group, lambda: source.update(load()))

    def place(tensor: Tensor) -> Tensor:
        home = "cpu" if offload and isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=home) if tensor.is_meta else tensor.to(device)

    model._apply(place)
    for name, target in saved_tensors(model):
        (mine, start), whole = own_rows(target), None
        if not able:
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
            if source:
                whole.copy_(source[name])
            dist.broadcast(whole, src=0)
        stop = start + len(mine) if mine.dim() else None
        mine.copy_(read(name, start, stop) if able else whole[start:stop] if mine.dim() else whole)
    dist.barrier(group)  # this group has the long timeout
    return read if able else lambda name: source[name]


def gather(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """All parameters and persistent buffers, unsharded, on rank 0's CPU; {} on other ranks. Every rank must call it."""
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            rounded = whole.is_floating_point() and not name.startswith("lora.")  # adapters are merged in fp32
            state[name] = whole.to("cpu", dtype if rounded else None).contiguous()
    return state
