"""What a run will take: bytes, floating-point operations, seconds. From the configuration alone: no weights, no data.

Parameters, gradients and moments are counted. Activations and operations are read off a forward and a backward pass of
the real model over fake tensors (shapes without memory), so they hold for any architecture and change with the code.
"""

import weakref
from argparse import Namespace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from minirm.attention import attention_mask, probe_shared_rows, use_sdpa
from minirm.demo import use_demo
from minirm.freeze import find_blocks, freeze_bottom_layers
from minirm.model import empty_model, load_config
from minirm.shard import DTYPES, FROZEN_SHARE, checkpoint_trained_blocks
from minirm.sources import InputError, one_line

MACHINE = 8  # devices that share a copy of what is trained if --shard_size does not say: those of a usual machine
USABLE = 0.9  # of a device's memory: the rest is for CUDA itself and for gaps between tensors
FLOPS = flop_registry | {  # what it lacks
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a.numel() * b.shape[-1],  # of experts
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}


class Meter(TorchDispatchMode):
    """Counts what is computed inside: floating-point operations, and bytes of the tensors made that are still there.

    `peak` is the most there ever were; `kept` is added from outside, for gradients, `peak_with_kept` the most of both.
    torch's FlopCounterMode will not do beside it: what it refers to is freed late, so that peaks come out too high.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.now = self.peak = self.kept = self.peak_with_kept = 0
        self.known = weakref.WeakSet()

    def add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)
        self.peak_with_kept = max(self.peak_with_kept, self.now + self.kept)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOPS:
            self.flops += FLOPS[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


# The half of CUDA's autocast that the CPU's does not have: these compute, and keep, fp32. What decoders use of the list
# in https://docs.pytorch.org/docs/stable/amp.html
FP32 = {torch.pow, Tensor.pow, Tensor.__pow__, Tensor.__rpow__, torch.exp, Tensor.exp, torch.rsqrt, Tensor.rsqrt,
        torch.reciprocal, Tensor.reciprocal, torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.softmax,
        Tensor.softmax, F.softmax, F.layer_norm, torch.layer_norm, F.softplus}  # fmt: skip


class CudaAutocast(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in FP32:
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
        return func(*args, **(kwargs or {}))


def show_plan(args: Namespace) -> None:
    """Prints what a run with train.py's flags would take."""
    if not args.device:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80
        args.device = [memory, 400, 300]
    if args.world_size % (args.shard_size or 1):
        raise InputError(f"--shard_size {args.shard_size} must divide --world_size, which is {args.world_size}")
    dtype = DTYPES["fp16" if args.precision == "auto" else args.precision]  # a GPU's
    args.train_data = []  # needs none
    use_demo(args)
    config, _ = load_config(args.model, args.chat_template)
    not_shared = probe_shared_rows(config, max_length=args.max_length) if args.row_layout == "shared" else None
    try:
        found = estimate(config, args, dtype, "separate" if not_shared else args.row_layout)
    except (ValueError, RuntimeError) as error:  # experts in fp32
        raise InputError(f"--model {args.model}: cannot be planned ({one_line(error)})") from None
    print(f"{args.model} in {dtype}".replace("torch.", ""), table(found, args), sep="\n")


def estimate(config, args: Namespace, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """What a run takes, for `table` to print; of one device where it does not say otherwise.

    Args: config: of the model; args: train.py's flags, with device = (GB of memory, TFLOP/s, GB/s sent);
    dtype: what is computed in; layout: of the rows, "shared" or "separate".
    The rows are the longest that one comparison a prompt can make: two answers of which nothing is shared.
    Raises ValueError as `freeze_bottom_layers` does.
    """
    prompts, micro_steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    shards, offload = args.shard_size or (MACHINE if world % MACHINE == 0 else world), args.cpu_offload

    model = empty_model(config)
    use_sdpa(model.trunk)
    freeze_bottom_layers(model, args.freeze_ratio, embeddings=not args.train_embeddings)
    blocks = list(find_blocks(model)[1])
    for block in blocks if dtype != torch.float32 else ():
        block.forward = partial(_like_cuda, block.forward)
    if args.gradient_checkpointing:
        checkpoint_trained_blocks(model)
    rows, length = (prompts, 2 * args.max_length) if layout == "shared" else (2 * prompts, args.max_length)

    def count(module: nn.Module, trained: bool = True) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)

    number = dtype.itemsize  # bytes of one in the compute precision
    trained, frozen = count(model), count(model, trained=False)
    in_blocks = [count(block) for block in blocks]
    unit = max(*in_blocks, trained - sum(in_blocks))  # what FSDP gathers and reduces at a time; the rest is one, too
    frozen_unit = max(count(block, trained=False) for block in blocks)
    stay = (shards == 1 and not offload) or frozen * number <= FROZEN_SHARE * args.device[0] * 1e9
    frozen_shard = 0 if shards == 1 and stay else frozen * number / shards  # that FSDP gathers the whole from
    share = 4 * trained / shards  # bytes of a number in fp32 for each trained parameter of a device
    # Without a sync FSDP sums up whole gradients: all of them are there when the last micro-step begins.
    summed = 4 * trained if micro_steps > 1 else 0
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    meter, forward = _measure(model, rows, length, dtype, layout, kept=0 if summed or offload else 4 / shards)
    on_device = 0 if offload else share
    always = {
        "frozen parameters": buffers + (frozen * number if stay else 0) + (0 if offload else frozen_shard),
        "trained parameters, fp32": on_device,
        "moments of AdamW, fp32": 2 * on_device,
    }
    backward = {
        "whole gradients of earlier micro-steps, fp32": summed,
        # One device keeps its copy in the compute precision through forward. Several gather a unit while the one before
        # is in use; gradients of a unit come in the compute precision and are reduced in fp32.
        "trained parameters, gathered": 2 * unit * number if shards > 1 or offload else trained * number,
        "frozen parameters, gathered": 0 if stay else 2 * frozen_unit * number,
        "gradients on their way": unit * (number + 4),
        "activations": meter.peak,
    }
    step = {"gradients, fp32": on_device, "AdamW at work": on_device}
    in_backward = sum(backward.values()) - meter.peak + meter.peak_with_kept  # the gradients grow as activations go
    gathers = micro_steps * (1 - 1 / shards) * number
    sent = {
        "trained units gathered, forward": gathers * trained,
        "trained units gathered, backward": gathers * trained,
        "frozen units gathered": 0 if stay else gathers * frozen,
        "gradients reduced, fp32": 4 * trained * (1 - 1 / shards),
        "gradients summed over copies, fp32": 2 * share * (1 - shards / world),
    }
    return {
        "trained": trained, "frozen": frozen, "shards": shards, "rows": rows, "length": length,
        "always": always, "backward": backward, "step": step, "sent": sent,
        "peak": sum(always.values()) + max(in_backward, sum(step.values())),
        "host": 4 * share + frozen_shard if offload else 0,
        "forward FLOP": micro_steps * forward, "backward FLOP": micro_steps * (meter.flops - forward),
        "computing": micro_steps * meter.flops / (args.device[1] * 1e12), "sending": sum(sent.values()) / (args.device[2] * 1e9),
        "checkpoint": 12 * trained, "trunk cache": 1e6 * number * config.get_text_config().hidden_size,
    }  # fmt: skip


def table(found: dict[str, Any], args: Namespace) -> str:
    """What `estimate` found, for people."""
    memory, flops, bandwidth = args.device
    seconds = found["computing"], found["sending"]
    share = found["peak"] / (memory * 1e9)
    gigabytes = {
        "on a device, always, GB": found["always"],
        "in backward, GB": found["backward"],
        "in the optimizer's step, GB": found["step"],
        "in host memory, a process, GB": {"parameters, gradients, moments": found["host"]},
        "sent by a device in a step, GB": found["sent"] | {"together": sum(found["sent"].values())},
        "on disk, GB": {"a checkpoint": found["checkpoint"], "--cache_trunk, a million tokens": found["trunk cache"]},
    }
    lines = [f"{found['trained']:,} parameters trained, {found['frozen']:,} frozen"]
    lines += [f"{args.world_size} devices of {memory:g} GB that compute {flops:g} TFLOP/s and send {bandwidth:g} GB/s"]
    lines[-1] += f"; {found['shards']} share a copy of what is trained" if args.world_size > 1 else ""
    lines += [
        f"{args.gradient_accumulation_steps} micro-steps a step, each of {found['rows']} rows of {found['length']} tokens"
    ]
    lines[-1] += ": the longest that prompts of one comparison can make"
    for title, parts in gigabytes.items():
        if shown := {name: value for name, value in parts.items() if value}:
            lines += ["", title, *(f"  {name:<46}{value / 1e9:>10,.3f}" for name, value in shown.items())]
    lines += [
        "",
        f"a step: {found['forward FLOP'] / 1e12:,.1f} TFLOP a device forward, {found['backward FLOP'] / 1e12:,.1f} backward",
    ]
    lines += [
        f"        {seconds[0]:.3f} s computing, {seconds[1]:.3f} s sending: {max(seconds):.3f} s if all of it overlaps, "
    ]
    lines[-1] += f"{sum(seconds):.3f} s if none does"
    lines += [f"memory: {found['peak'] / 1e9:,.1f} GB at most, {share:.0%} of a device: "]
    lines[-1] += "it fits" if share <= USABLE else (
        f"IT DOES NOT FIT, since {1 - USABLE:.0%} should be left to CUDA; more devices, --gradient_checkpointing, "
        "--gradient_accumulation_steps 1 or --cpu_offload need less"
    )  # fmt: skip
    return "\n".join(lines)


def _like_cuda(forward, *args, **kwargs):
    with CudaAutocast():
        return forward(*args, **kwargs)


def _measure(model: nn.Module, rows: int, length: int, dtype, layout: str, kept: float) -> tuple[Meter, int]:
    """(of a micro-step, FLOP of its forward pass). Replaces the model's parameters.

    kept: bytes that stay of the gradient of each trained parameter.
    """
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16  # as large as fp16, and experts know no other
    mask = None
    if layout == "shared":  # a short one shows its form
        short = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), torch.ones(1, 3) > 0
        mask = attention_mask(*short, model.trunk.config, dtype)
    meter, made = Meter(), {}

    def forget(parameter: Tensor) -> None:
        parameter.grad = None
        meter.kept += kept * parameter.numel()

    with FakeTensorMode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for module in model.modules():
            for places in (module._parameters, module._buffers):
                for name, p in places.items():
                    if p is not None and p not in made:  # gathered by FSDP in the compute precision, the head in fp32
                        computed = dtype if p.is_floating_point() and module is not model.score else p.dtype
                        made[p] = fake = torch.empty(p.shape, dtype=computed)
                        if places is module._parameters:
                            made[p] = fake = nn.Parameter(fake, p.requires_grad)
                        if fake.requires_grad:
                            fake.register_post_accumulate_grad_hook(forget)
                    places[name] = made.get(p)
        meter.known.update(p.untyped_storage() for p in made.values())
        with meter:
            ids, shape = torch.zeros(rows, length, dtype=torch.int64), (length, -(-length // 8) * 8)
            mask = tree_map_only(
                Tensor, lambda m: torch.empty(rows, m.shape[1], *shape, dtype=dtype)[..., :length], mask
            )
            rewards = model(ids, mask, None if mask is None else ids)
            forward = meter.flops
            rewards.sum().backward()
    return meter, forward
