"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers compute W x + (alpha / rank) B A x; only A and B train.

The adapters are outside the trunk, in `model.lora`, and act on its linear layers through forward hooks. So names in the
trunk stay the same, and FSDP gathers and reduces all adapters with the head, in fp32, without a collective per matrix.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minirm.freeze import Frozen, find_blocks
from minirm.shard import own_rows

PREFIX = "lora."


class Adapter(nn.Module):
    """A [rank, in] and B [out, rank] of one linear layer, in fp32, and the scale of their product."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, transposed: bool):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.empty(outputs, rank))
        self.scale, self.transposed = scale, transposed

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        # Look up A and B on every call, because FSDP swaps the parameters.
        return output + self.scale * F.linear(F.linear(inputs[0], self.A), self.B)


def add_lora(model: nn.Module, rank: int, alpha: float, frozen: Frozen) -> None:
    """Freeze the whole trunk of an empty RewardModel and add adapters to the linear layers of the unfrozen blocks.

    rank 0 changes nothing. Raises ValueError if there are no linear layers, or if one shares its weight with another.
    """
    if not rank:
        return
    path, blocks = find_blocks(model)
    model.trunk.requires_grad_(False)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = {*names} - {name for name, _ in model.named_parameters()}
    model.lora = nn.ModuleDict()
    for i, block in list(enumerate(blocks))[len(frozen.layers) :]:
        for name, module in block.named_modules(prefix=f"{path}.{i}", remove_duplicate=False):
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            if f"{name}.weight" in shared:
                raise ValueError(f"{name} shares its weight with another layer and cannot have its own adapter")
            transposed = isinstance(module, Conv1D)
            outputs, inputs = module.weight.T.shape if transposed else module.weight.shape
            with torch.device(module.weight.device):
                adapter = Adapter(inputs, outputs, rank, alpha / rank, transposed)
            model.lora[name.replace(".", "/")] = adapter
            module.register_forward_hook(adapter.hook)
            block.has_adapters = True
    if not model.lora:
        raise ValueError("the blocks to train have no linear layers; omit --lora_rank or lower --freeze_ratio")


def without_adapter(model: nn.Module, frozen: Frozen) -> list[str]:
    """Names (within a block) of matrices in adapted blocks without an adapter: fused experts, routers, convolutions."""
    if not hasattr(model, "lora"):
        return []
    path, blocks = find_blocks(model)
    covered = {key.replace("/", ".") + ".weight" for key in model.lora}
    adapted = list(enumerate(blocks))[len(frozen.layers) :]
    matrices = [(i, name) for i, block in adapted for name, p in block.named_parameters() if p.dim() > 1]
    return sorted({name for i, name in matrices if f"{path}.{i}.{name}" not in covered})


@torch.no_grad()
def init_lora(model: nn.Module, seed: int) -> None:
    """Set B to zero and A as `nn.Linear` does. The values do not depend on the number of processes."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in getattr(model, "lora", {}).values():
        bound = 1 / math.sqrt(adapter.A.shape[1])
        whole = torch.empty(adapter.A.shape).uniform_(-bound, bound, generator=generator)
        for target, value in ((adapter.A, whole), (adapter.B, torch.zeros(adapter.B.shape))):
            mine, start = own_rows(target)
            mine.copy_(value[start : start + len(mine)])


def merge(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapters into full tensors {name: tensor}. Products are added in fp32 and then rounded."""
    merged = {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}
    for key, adapter in getattr(model, "lora", {}).items() if state else ():  # only rank 0 has it
        name = key.replace("/", ".") + ".weight"
        product = adapter.scale * state[f"{PREFIX}{key}.B"] @ state[f"{PREFIX}{key}.A"]
        weight = merged[name]
        merged[name] = (weight.float() + (product.T if adapter.transposed else product)).to(weight.dtype)
    return merged


def save_adapter(model: nn.Module, state: dict[str, Tensor], base: str, folder: Path) -> None:
    """Write adapters and head in peft's format, for `PeftModel.from_pretrained(base model with one label, folder)`.

    state: full tensors by their names in RewardModel, including adapters; base: name or folder of the base model.
    """
    prefix = f"{model.trunk.base_model_prefix}."
    names = {key: key.replace("/", ".").replace("trunk.", prefix, 1) for key in model.lora}
    tensors = {f"{name}.lora_{x}.weight": state[f"{PREFIX}{key}.{x}"] for key, name in names.items() for x in "AB"}
    tensors["score.weight"] = state["score.weight"]
    tensors = {f"base_model.model.{name}": tensor.float().contiguous() for name, tensor in tensors.items()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = next(iter(model.lora.values()))
    about = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": len(adapter.A), "lora_alpha": adapter.scale * len(adapter.A), "lora_dropout": 0.0, "fan_in_fan_out": adapter.transposed,
        "target_modules": list(names.values()), "modules_to_save": ["score"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
