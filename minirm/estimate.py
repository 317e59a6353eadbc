"""Estimate a run's bytes, floating-point operations and seconds from the configuration alone: no weights, no data.

Parameters, gradients and moments are counted. Activations and operations are measured in a forward and backward pass of
the real model over fake tensors (shapes without memory), so they hold for any architecture and follow the code.
"""

import copy
import weakref
from argparse import Namespace
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel

from minirm.attention import LONG, attention_mask, use_sdpa
from minirm.data.demo import use_demo
from minirm.errors import InputError, printable, refusing
from minirm.freeze import find_blocks, freeze_bottom_layers
from minirm.lora import add_lora
from minirm.model import RewardModel, load_config
from minirm.probe import choose_layout
from minirm.shard import DTYPES, checkpoint_trained_blocks, what_stays
from minirm.weights import choose_precision

MACHINE = 8  # devices that share a copy of the trained parameters without --shard_size: those of a typical machine
USABLE = 0.9  # share of a device's memory; the rest is for CUDA itself and for fragmentation
aten = torch.ops.aten
FLOPS = flop_registry | {  # plus what it lacks: experts, and CPU attention, whose first arguments are those on GPUs
    aten._grouped_mm: lambda a, b, *_, **__: 2 * a.numel() * b.shape[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        flop_registry[aten._scaled_dot_product_flash_attention_backward],
}  # fmt: skip
# Operations that CUDA's autocast runs in fp32, with fp32 outputs, but the CPU's does not: those that decoders use from
# the list in https://docs.pytorch.org/docs/stable/amp.html.
FP32 = {"pow", "__pow__", "__rpow__", "exp", "rsqrt", "reciprocal", "sum", "cumsum", "softmax", "layer_norm",
        "softplus"}  # fmt: skip


class CudaAutocast(TorchFunctionMode, ContextDecorator):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in FP32:
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
        return func(*args, **(kwargs or {}))


class Meter(TorchDispatchMode):
    """Count floating-point operations, and the bytes of live tensors that were created inside.

    `peak` is their maximum, including what was added from outside.
    Do not combine it with torch's FlopCounterMode, which frees its references late and so inflates the peak.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def add(self, count: float) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)

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


def micro_step(model: RewardModel, rows: int, length: int, dtype, layout: str, kept: float) -> tuple[Meter, int]:
    """(Meter of forward and backward, FLOP of the forward pass). kept: bytes kept per element of a trained gradient."""
    fake, mask = model.score.weight.fake_mode, None
    if layout == "shared":  # a short mask shows the structure; each half of a row is a text
        text = length // 2
        short = torch.tensor([[0, 1, 2]]), torch.tensor([[0, text - 1, text - 1]]), torch.ones(1, 3) > 0
        mask = attention_mask(*short, model.trunk.config, dtype, long=1)
    meter = Meter([*model.parameters(), *model.buffers()])

    def forget(parameter: Tensor) -> None:
        parameter.grad = None
        meter.add(kept * parameter.numel())

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(forget)
    with fake, torch.autocast("cpu", dtype, enabled=dtype != torch.float32), meter:
        ids, wide = torch.zeros(rows, length, dtype=torch.int64), -(-length // 8) * 8

        def full(m: Tensor) -> Tensor:
            whole = torch.empty(rows, m.shape[1], length, wide, dtype=dtype)[..., :length]
            whole.causal = text if getattr(m, "causal", 0) and text >= LONG else 0
            return whole

        rewards = model(ids, tree_map_only(Tensor, full, mask), None if mask is None else ids)
        forward = meter.flops
        rewards.sum().backward()
    return meter, forward


def estimate(config, args: Namespace, dtype: torch.dtype, layout: str) -> dict[str, Any]:
    """Estimate a run's cost for `table` to print, per device unless stated otherwise.

    args: train.py's flags, with device = (GB of memory, TFLOP/s, GB/s sent); dtype: the compute precision; layout:
    "shared" or "separate" rows, as long as one comparison per prompt can make them: two answers that share nothing.
    Raises ValueError as `freeze_bottom_layers` does.
    """
    prompts, micro_steps, world = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    shards, offload = args.shard_size or (MACHINE if world % MACHINE == 0 else world), args.cpu_offload
    computed = torch.bfloat16 if dtype == torch.float16 else dtype  # same size; experts support only bf16
    with FakeTensorMode():  # parameters as FSDP gathers them, the head in fp32
        model = RewardModel(AutoModel.from_config(copy.deepcopy(config), dtype=computed)).eval()
        frozen_part = freeze_bottom_layers(model, args.freeze_ratio, embeddings=not args.train_embeddings)
        add_lora(model, args.lora_rank, args.lora_alpha, frozen_part)
    use_sdpa(model.trunk)
    blocks = find_blocks(model)[1]
    for block in blocks:  # not around the whole step: it would not apply when backward recomputes checkpointed blocks
        block.forward = CudaAutocast()(block.forward)
    if args.gradient_checkpointing:
        checkpoint_trained_blocks(model)
    if args.micro_batch_tokens:  # assume the longest possible prompts of one comparison
        whole, prompts = prompts * micro_steps, max(1, args.micro_batch_tokens // (2 * args.max_length))
        prompts = min(prompts, whole)
        micro_steps = -(-whole // prompts)
    rows, length = (prompts, 2 * args.max_length) if layout == "shared" else (2 * prompts, args.max_length)

    def count(module: nn.Module, trained: bool = True) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad == trained)

    number = dtype.itemsize  # bytes per number in the compute precision
    sent_as = 4 if args.lora_rank else number  # that FSDP gathers: adapters are gathered with the head, in fp32
    trained, frozen = count(model), count(model, trained=False)
    units = [count(block) for block in blocks]
    unit = max(*units, trained - sum(units))  # largest FSDP unit; the rest is a unit, too
    frozen_unit = max(count(block, trained=False) for block in blocks)
    stay, once = what_stays(frozen * number, trained * number, args.device[0] * 1e9, shards == 1, offload)
    frozen_shard = 0 if shards == 1 and stay else frozen * number / shards  # from which FSDP gathers
    share = 4 * trained / shards  # bytes of one fp32 number for each trained parameter on a device
    # Without a sync FSDP accumulates unsharded gradients: all of them exist when the last micro-step begins.
    summed = 4 * trained if micro_steps > 1 else 0
    buffers = sum(b.nbytes for b in model.buffers())
    meter, forward = micro_step(model, rows, length, computed, layout, 0 if summed or offload else 4 / shards)
    on_device = 0 if offload else share
    gathers = micro_steps * (1 - 1 / shards)
    parts = {  # bytes
        "on a device, always": {
            "frozen parameters": buffers + (frozen * number if stay else 0) + (0 if offload else frozen_shard),
            "trained parameters, fp32": on_device,
            "moments of AdamW, fp32": 2 * on_device,
        },
        "in backward": {
            "whole gradients of earlier micro-steps, fp32": summed,
            # Kept for the whole step if there is room; else a unit is gathered while the previous one is in use. Its
            # gradients arrive in the compute precision and are reduced in fp32.
            "trained parameters, gathered": trained * sent_as if once else 2 * unit * sent_as,
            "frozen parameters, gathered": 0 if stay else 2 * frozen_unit * number,
            "gradients being reduced": unit * (sent_as + 4),
            "activations, gradients of a single micro-step": meter.peak,
        },
        "in the optimizer's step": {"gradients, fp32": on_device, "AdamW's temporaries, fp32": on_device},
        "in host memory, per process": {"parameters, gradients, moments": 4 * share + frozen_shard if offload else 0},
        "sent per device and step": {
            "trained units gathered": (gathers / micro_steps if once else 2 * gathers) * sent_as * trained,
            "frozen units gathered": 0 if stay else (2 if args.lora_rank else 1) * gathers * number * frozen,
            "gradients reduced, fp32": 4 * trained * (1 - 1 / shards),
            "gradients summed over copies, fp32": 2 * share * (1 - shards / world),
        },
    }
    always, backward, step, _, sent = (sum(part.values()) for part in parts.values())
    width = config.get_text_config().hidden_size
    parts["on disk"] = {"a checkpoint": 12 * trained, "--cache_trunk, a million tokens": 1e6 * number * width}
    return {
        "trained": trained, "frozen": frozen, "shards": shards, "rows": rows, "length": length, "micro_steps": micro_steps,
        "parts": parts, "peak": always + max(backward, step),
        "forward FLOP": micro_steps * forward, "backward FLOP": micro_steps * (meter.flops - forward),
        "computing": micro_steps * meter.flops / (args.device[1] * 1e12), "sending": sent / (args.device[2] * 1e9),
    }  # fmt: skip


def table(found: dict[str, Any], args: Namespace) -> str:
    """Format the result of `estimate` for people."""
    (memory, flops, bandwidth), computing, sending = args.device, found["computing"], found["sending"]
    shared = f"; {found['shards']} devices share one copy of the trained parameters" if args.world_size > 1 else ""
    lines = [
        f"{found['trained']:,} parameters trained, {found['frozen']:,} frozen",
        f"{args.world_size} devices with {memory:g} GB, {flops:g} TFLOP/s and {bandwidth:g} GB/s each{shared}",
        f"{found['micro_steps']} micro-steps per step, each of {found['rows']} rows of {found['length']} tokens "
        + "(the longest that prompts with one comparison can be)",
    ]
    for title, part in found["parts"].items():
        shown = [f"  {name:<46}{value / 1e9:>10,.3f}" for name, value in part.items() if value]
        lines += ["", f"{title}, GB", *shown] if shown else []
    share = found["peak"] / (memory * 1e9)
    less = "try more devices, --gradient_checkpointing, --gradient_accumulation_steps 1, --lora_rank or --cpu_offload"
    fits = f"IT DOES NOT FIT, because {1 - USABLE:.0%} should be left to CUDA; {less}" if share > USABLE else "it fits"
    seconds = f"{max(computing, sending):.3f} s if all of it overlaps, {computing + sending:.3f} s if none does"
    lines += [
        f"\nper step: {found['forward FLOP'] / 1e12:,.1f} TFLOP per device forward, {found['backward FLOP'] / 1e12:,.1f} backward",
        f"        {computing:.3f} s computing, {sending:.3f} s sending: {seconds}",
        f"memory: {found['peak'] / 1e9:,.1f} GB peak, {share:.0%} of a device: {fits}",
    ]
    return "\n".join(lines)


def show_plan(args: Namespace) -> None:
    """Print the estimated cost of a run with train.py's flags."""
    if not args.device:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else 80
        args.device = [memory, 400, 300]
    if args.world_size % (args.shard_size or 1):
        raise InputError(f"--shard_size {args.shard_size} must divide --world_size, which is {args.world_size}")
    args.train_data = []  # not needed
    use_demo(args)
    dtype = DTYPES[choose_precision(args.model, "cuda", True)[0] if args.precision == "auto" else args.precision]
    config, _ = load_config(args.model, args.chat_template)
    layout, _ = choose_layout(config, args.model, args.row_layout, args.max_length)
    with refusing(f"--model {args.model}: cannot be planned", (ValueError, RuntimeError)):  # experts in fp32
        found = estimate(config, args, dtype, layout)
    print(f"{printable(args.model)} in {dtype}".replace("torch.", ""), table(found, args), sep="\n")
