"""Compare time and host memory of loading a checkpoint on several processes with plain from_pretrained in one.

    OMP_NUM_THREADS=1 python tests/bench/loading.py [--gib 2] [--processes 4]

It makes a Llama of that size in fp32, as safetensors (every process reads its own rows) and as .bin (the first process
reads everything and sends it on). Memory is the peak of resident pages while loading, mapped files included, above those
after the imports. The cases take turns, and the median time of --repeat turns is shown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def resident(what: str) -> float:
    """GiB of VmRSS, the current memory, or VmHWM, the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 2**20


def load(folder: str) -> None:
    """Load in one of several processes, or with from_pretrained if there is only one. Prints [seconds, GiB]."""
    import torch
    import torch.distributed as dist
    import transformers

    from minirm import shard
    from minirm.freeze import freeze_bottom_layers
    from minirm.model import empty_model, load_config
    from minirm.weights import load_weights, stored_weights

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    several = "RANK" in os.environ
    config, _ = load_config(folder)
    if several:
        device, mesh, *_ = shard.start_processes()
        patient = torch.distributed.new_group(backend="gloo", timeout=shard.START_TIMEOUT)
        dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    if several:
        model = empty_model(config)
        freeze_bottom_layers(model, 0.7)
        shard.shard(model, mesh, torch.float32)
        read = stored_weights(folder, model, 0)
        shard.fill(model, device, False, patient, read, lambda: load_weights(folder, config, 0))
    else:
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        for parameter in model.parameters():  # reads the mapped file
            parameter.sum()
    print(json.dumps([time.perf_counter() - start, resident("VmHWM") - before]))
    if several:
        dist.destroy_process_group()


def run(folder: Path, processes: int, port: int) -> list[list[float]]:
    """[seconds, GiB] of each rank."""
    ranks = []
    for rank in range(processes):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        where |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **(where if processes > 1 else {})}
        command = [sys.executable, __file__, "--load", str(folder)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        return load(args.load)

    import torch
    from conftest import make_model
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        width = 2048
        layers = round(args.gib * 2**30 / 4 / (16 * width**2))  # 4 width^2 in attention, 12 in the MLP
        shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
        shape |= {"num_key_value_heads": 4, "head_dim": width // 4}
        whole = make_model(Path(temporary) / "safetensors", "llama", **shape)
        pickled = Path(temporary) / "bin"
        pickled.mkdir()
        for path in whole.iterdir():
            if path.suffix != ".safetensors":
                (pickled / path.name).write_bytes(path.read_bytes())
        torch.save(load_file(whole / "model.safetensors"), pickled / "pytorch_model.bin")
        size = (whole / "model.safetensors").stat().st_size / 2**30
        print(f"llama, {layers} layers of width {width}, fp32, {size:.2f} GiB; {args.processes} processes\n")
        kinds = {
            "from_pretrained, one process": (whole, 1),
            "minirm, safetensors": (whole, args.processes),
            "from_pretrained, one process, .bin": (pickled, 1),
            "minirm, .bin": (pickled, args.processes),
        }
        results = {kind: [] for kind in kinds}
        for turn in range(args.repeat):
            for number, (kind, (folder, processes)) in enumerate(kinds.items()):
                results[kind].append(run(folder, processes, 29600 + 10 * turn + number))
    print("| | seconds | GiB, rank 0 | GiB, most of the other ranks |\n|-|-|-|-|")
    for kind, turns in results.items():
        seconds = statistics.median(max(rank[0] for rank in ranks) for ranks in turns)
        first = max(ranks[0][1] for ranks in turns)
        others = max((rank[1] for ranks in turns for rank in ranks[1:]), default=None)
        print(f"| {kind} | {seconds:.1f} | {first:.2f} | {'' if others is None else f'{others:.2f}'} |")


if __name__ == "__main__":
    main()
