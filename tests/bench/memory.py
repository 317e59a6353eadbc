"""Compare `train.py --plan` with measured memory: bytes of one process in fp32 on the CPU.

    OMP_NUM_THREADS=1 python tests/bench/memory.py [--width 512] [--layers 12] [--world_size 1 2] [--lora_rank 0]

Every case runs in its own process or processes and takes two optimizer steps over the rows that the plan assumes.
Parameters, gradients and moments are counted from the tensors. The peak is the kernel's count of resident memory (VmHWM)
above that before the model, from the moment when the weights are in place.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def make_config(family: str, width: int, layers: int):
    import transformers

    heads = {"gpt2": max(1, width // 64), "gptj": max(1, width // 256), "llama": max(1, width // 64)}[family]
    if family == "llama":
        return transformers.LlamaConfig(
            vocab_size=8000, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads,
        )  # fmt: skip
    kind = transformers.GPT2Config if family == "gpt2" else transformers.GPTJConfig
    return kind(
        vocab_size=8000, n_embd=width, n_layer=layers, n_head=heads, n_positions=2048, bos_token_id=0, eos_token_id=0
    )


def child(case: dict) -> None:
    """Print the bytes of this process as a JSON object."""
    import torch

    from minirm.attention import attention_mask, use_sdpa
    from minirm.freeze import freeze_bottom_layers
    from minirm.lora import add_lora
    from minirm.model import empty_model
    from minirm.shard import begin_micro_step, cast_frozen, checkpoint_trained_blocks, shard, start_processes

    torch.set_num_threads(1)
    device, mesh, *_ = start_processes()
    before = resident("VmRSS")
    model = empty_model(make_config(case["family"], case["width"], case["layers"]))
    use_sdpa(model.trunk)
    add_lora(model, case["lora_rank"], 2.0, freeze_bottom_layers(model, 0.7))
    if case["checkpointing"]:
        checkpoint_trained_blocks(model)
    cast_frozen(model, torch.float32)
    shard(model, mesh, torch.float32)
    model.to_empty(device=device)
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.nn.init.normal_(tensor, std=0.02) if tensor.is_floating_point() else tensor.zero_()
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def size(tensors) -> int:
        return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)

    found = {"frozen": size([*frozen, *model.buffers()]), "trained": size(trained)}
    answers = torch.tensor([1, 2]).repeat_interleave(case["max_length"])  # two answers without a prompt
    answers = answers.repeat(case["batch"], 1)
    places = torch.arange(case["max_length"]).repeat(case["batch"], 2)
    ids = torch.randint(1, 8000, answers.shape)
    for _ in range(2):  # the first step allocates the moments
        for micro_step in range(case["accumulation"]):
            begin_micro_step(model, last=micro_step == case["accumulation"] - 1)
            mask = attention_mask(answers, places, answers > 0, model.trunk.config, torch.float32)
            model(ids, mask, places).sum().backward()
        found["gradients"] = size(p.grad for p in trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    # Frozen units that were gathered once are kept whole beside the shards.
    found["frozen"] += size(p for p in model.parameters() if not p.requires_grad and all(p is not q for q in frozen))
    found["moments"] = size(v for state in optimizer.state.values() for v in state.values() if v.numel() > 1)
    found["peak"] = resident("VmHWM") - before
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure(case: dict) -> dict:
    """The result of `child` in the first of case["world_size"] processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Every tensor of 64 KiB or more is given back to the kernel as soon as it is freed.
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    world = case["world_size"]
    ranks = [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} if world > 1 else {} for r in range(world)
    ]
    processes = [
        subprocess.Popen([sys.executable, __file__, "--case", json.dumps(case)], env=env | rank, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]  # fmt: skip
    shown = [process.communicate(timeout=500)[0] for process in processes]
    assert not any(process.returncode for process in processes), f"{case}: a process failed"
    return json.loads(shown[0].splitlines()[-1])


def expected(case: dict) -> dict:
    """The same figures from `estimate`."""
    import torch

    import train
    from minirm.estimate import estimate

    flags = ["--model", "any", "--plan", "--world_size", case["world_size"], "--max_length", case["max_length"]]
    flags += ["--per_device_train_batch_size", case["batch"], "--gradient_accumulation_steps", case["accumulation"]]
    flags += ["--gradient_checkpointing"] if case["checkpointing"] else []
    flags += ["--lora_rank", case["lora_rank"]]
    args = train.parse_args([str(flag) for flag in [*flags, "--device", 1e6, 1, 1]])  # all frozen layers fit
    found = estimate(make_config(case["family"], case["width"], case["layers"]), args, torch.float32, "shared")
    frozen, trained, moments = found["parts"]["on a device, always"].values()
    return {"frozen": frozen, "trained": trained, "moments": moments, "gradients": found["parts"]["in the optimizer's step"]["gradients, fp32"], "peak": found["peak"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=550)
    parser.add_argument("--world_size", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lora_rank", type=int, default=0)
    args = parser.parse_args()
    if args.case:
        return child(args.case)
    print(f"{args.layers} layers of width {args.width}, {args.batch} rows of {2 * args.max_length} tokens, fp32; MB")
    print(f"{'':<44}{'plan':>9}{'measured':>10}{'ratio':>7}   of frozen and trained parameters, gradients, moments")
    for world in args.world_size:
        for family in ("gptj", "llama", "gpt2"):
            for accumulation in (1, 2):
                for checkpointing in (False, True):
                    case = {"family": family, "width": args.width, "layers": args.layers, "batch": args.batch,
                            "max_length": args.max_length, "accumulation": accumulation, "checkpointing": checkpointing,
                            "world_size": world, "lora_rank": args.lora_rank}  # fmt: skip
                    plan, found = expected(case), measure(case)
                    peak = found.pop("peak")
                    name = f"{family}, {world} devices, {accumulation} micro-steps{', checkpointing' if checkpointing else ''}"
                    keys = ("frozen", "trained", "gradients", "moments")
                    ratios = " ".join(f"{plan[key] / found[key]:.3f}" for key in keys)
                    print(f"{name:<44}{plan['peak'] / 1e6:>9,.0f}{peak / 1e6:>10,.0f}{plan['peak'] / peak:>7.2f}   {ratios}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
