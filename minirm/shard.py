"""Processes, precision and sharding, applied to a plain model from outside (FSDP2)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from minirm.freeze import find_blocks
from minirm.sources import InputError

STEP_TIMEOUT = timedelta(minutes=10)  # a rank that waits longer for another inside a step gives up
START_TIMEOUT = timedelta(hours=24)  # the same while one rank prepares the data

# Frozen parameters need no gradient and no optimizer, so every rank can keep them whole as long as they take less than
# this share of its device: nothing is sent for them then, ever.
FROZEN_SHARE = 0.4


def start_processes() -> tuple[torch.device, DeviceMesh]:
    """Joins the processes that torchrun started, or makes a group of one. Returns this one's device and the mesh."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        # Under --max_restarts torchrun keeps its store, and in it the addresses of the processes that are gone
        # (pytorch/pytorch#135712). The count is the same for all processes only where there is one machine; for several
        # there is TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        store.set_timeout(STEP_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=STEP_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, init_device_mesh(device.type, (dist.get_world_size(),))


def patient_group() -> dist.ProcessGroup:
    """For what one process does while the others wait: preparing data, reading weights, writing files. Made by all of them, once."""
    return dist.new_group(backend="gloo", timeout=START_TIMEOUT)


def on_first_process(group: dist.ProcessGroup, function: Callable, *args) -> Any:
    """function(*args) on the first of all processes; all return its result, or raise what it raised: all end alike."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must not wait for it
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def first_process_first(group: dist.ProcessGroup) -> Iterator[None]:
    """The first process of each machine runs the block, then the others do, who find its files there.

    If the block raises InputError on a first process, it does so everywhere: all end alike.
    """
    refused = torch.zeros(1)
    try:
        if local_rank() > 0:
            dist.all_reduce(refused, group=group)
            if refused.item():
                raise InputError("another process refused the input")
        yield
    except InputError:
        refused += 1
        raise
    finally:
        if local_rank() == 0:
            dist.all_reduce(refused, group=group)
    if refused.item():
        raise InputError("another machine refused the input")


def checkpoint_trained_blocks(model: nn.Module) -> None:
    """Trained blocks keep their input alone and compute the rest once more in backward: less memory, more time."""
    for block in find_blocks(model)[1]:
        if any(p.requires_grad for p in block.parameters()):
            # The forward, not the call, so that FSDP's hooks stay outside and run once.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keeps frozen parameters in the compute precision; trained ones stay fp32 masters."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def shard(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, frozen_share: float = FROZEN_SHARE) -> bool:
    """FSDP over the blocks of a RewardModel, the head and the rest. Returns whether frozen parameters stay whole.

    Trained parameters travel in the compute precision, their gradients are summed in fp32. No FSDP unit mixes frozen
    and trained parameters, since those differ in precision.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    plain = MixedPrecisionPolicy()  # frozen units are stored in the compute precision, the head computes in fp32
    frozen = {p for p in model.parameters() if not p.requires_grad}
    if mesh.device_type == "cuda":
        memory = torch.cuda.get_device_properties("cuda").total_memory
    else:  # which the processes of this machine divide between them
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    whole = mesh.size() == 1 or sum(p.numel() * p.element_size() for p in frozen) <= frozen_share * memory
    # A single process has nothing to gather, so it need not throw gathered parameters away either.
    options = {"mesh": mesh, "reshard_after_forward": mesh.size() > 1, "ignored_params": frozen if whole else None}
    blocks = list(find_blocks(model)[1])
    units = [block for block in blocks if not whole or not frozen.issuperset(block.parameters())]
    if not whole:  # embeddings and the like: whatever is frozen outside the blocks is a unit of its own
        inside = {p for block in blocks for p in block.parameters()}
        units += [
            m
            for m in model.modules()
            if not frozen.isdisjoint(m.parameters(recurse=False)) and inside.isdisjoint(m.parameters())
        ]
    for unit in units:
        fully_shard(unit, mp_policy=plain if frozen.issuperset(unit.parameters()) else policy, **options)
    fully_shard(model.score, mp_policy=plain, **options)
    fully_shard(model, mp_policy=policy, **options)  # the rest: the final norm
    return whole


@torch.no_grad()
def fill(model: nn.Module, source: dict[str, Tensor] | None, device: torch.device) -> None:
    """Gives an empty, sharded model its weights. `source`, on rank 0: parameters and buffers by name; elsewhere None.

    One tensor at a time, so that no other rank ever holds the whole model.
    """
    model.to_empty(device=device)
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if source is not None:
            whole.copy_(source[name])
        if isinstance(target, DTensor):  # rank 0 sends every rank its slice
            target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))
        else:
            dist.broadcast(whole, src=0)
            target.copy_(whole)


def gather(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """All parameters and persistent buffers, whole, on the CPU of rank 0; None elsewhere. Every rank has to call it."""
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            state[name] = whole.to("cpu", dtype if whole.is_floating_point() else None).contiguous()
    return state if dist.get_rank() == 0 else None
