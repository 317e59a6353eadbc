"""Measure weak scaling: pairs per second and process on 1, 2 and 4 processes, and the bytes they send.

    python tests/bench/scaling.py [--width 256] [--layers 12] [--repeat 5] [--processes 1 2 4]

It runs train.py with every process pinned to its own core, one thread and 4 prompts a step, with 70 % of the layers
frozen. The numbers of processes take turns. Run it on an idle machine: the load is printed.

"of one" compares with a single process alone on the machine, "of apart" with as many independent processes at the same
time. The difference between the two is what busy cores cost each other in memory bandwidth and clock rate.

Bytes are those that a ring sends for the collectives of a step: (n - 1)/n of the gathered or scattered bytes. They should
equal those of `train.py --plan`.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Collectives that FSDP calls on CPUs, and which of their tensors is the whole one.
KINDS = {"c10d::_allgather_base_": ("gathered", 0), "c10d::alltoall_base_": ("reduced", 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()

    import torch
    import transformers
    from conftest import WORDS, make_tokenizer, read_metrics, write_jsonl
    from processes import COLLECTIVES, Server

    import train
    from minirm.estimate import estimate

    folder = Path(tempfile.mkdtemp(prefix="minirm-scaling-"))
    tokenizer = make_tokenizer()
    config = transformers.GPTJConfig(
        vocab_size=len(tokenizer), n_embd=args.width, n_layer=args.layers, n_head=max(1, args.width // 64), rotary_dim=64,
        n_positions=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())

    count = 4 * max(args.processes) * (args.steps + 1)
    data = [{"prompt": f"{i} {text(300)}", "chosen": text(34), "rejected": text(34) + " x"} for i in range(count)]
    train_data, eval_data = write_jsonl(folder / "train.jsonl", data), write_jsonl(folder / "eval.jsonl", data[:2])
    server = Server(folder)

    fixed = ["--model", folder / "model", "--train_data", train_data, "--eval_data", eval_data]
    fixed += ["--logging_steps", args.steps, "--eval_steps", 0, "--save_steps", 0, "--precision", "fp32"]

    def start(world: int, steps: int, patch: str, *more) -> tuple:
        output = folder / f"{world}-{steps}-{server.count}"
        flags = [*fixed, "--output_dir", output, "--max_steps", steps, *more]
        return server.start(*flags, world=world, patch=patch), output

    def end(run, output: Path) -> Path:
        assert not any(run.wait(500)), run.text()[-3000:]
        return output

    def rate(output: Path) -> float:
        """Pairs per second in the last row; the first row contains the warm-up."""
        return [row for row in read_metrics(output) if "pairs_per_second" in row][-1]["pairs_per_second"]

    cores = sorted(os.sched_getaffinity(0))
    pin = f"import os, torch; os.sched_setaffinity(0, {{{cores}[(rank + FIRST) % {len(cores)}]}}); torch.set_num_threads(1)"
    print(f"gptj, {args.layers} layers of width {args.width}, 4 prompts a step and process, fp32, "
          f"{len(cores)} cores; load {os.getloadavg()}")  # fmt: skip
    rates: dict[tuple, list[float]] = {(world, way): [] for world in args.processes for way in ("together", "apart")}
    try:
        for _ in range(args.repeat):
            for world in args.processes:
                output = end(*start(world, 2 * args.steps, pin.replace("FIRST", "0")))
                rates[world, "together"].append(rate(output) / world)
                runs = [start(1, 2 * args.steps, pin.replace("FIRST", str(first))) for first in range(world)]
                rates[world, "apart"].append(statistics.mean([rate(end(*run)) for run in runs]))
        middle = {key: statistics.median(values) for key, values in rates.items()}
        base = middle[args.processes[0], "apart"]
        print(f"load afterwards {os.getloadavg()}; pairs per second and process:")
        print(f"{'processes':>9}{'together':>12}{'from':>8}{'to':>8}{'apart':>12}{'of one':>8}{'of apart':>10}")
        for world in args.processes:
            values, mine = rates[world, "together"], middle[world, "together"]
            apart = middle[world, "apart"]
            print(f"{world:>9}{mine:>12.2f}{min(values):>8.2f}{max(values):>8.2f}{apart:>12.2f}", end="")
            print(f"{mine / base:>8.3f}{mine / apart:>10.3f}")
        print(f"{'processes':>9}{'':>12}{'MB a step counted':>20}{'planned':>10}")
        for world in [world for world in args.processes if world > 1]:
            totals = []
            for steps in (2, 4):  # evaluations gather too, so take the difference of two steps
                output = end(*start(world, steps, COLLECTIVES))
                sent = {"gathered": 0.0, "reduced": 0.0}
                for path in output.glob("collectives-*.json"):
                    for name, sizes in json.loads(path.read_text()):
                        if name in KINDS:
                            key, whole = KINDS[name]
                            sent[key] += (1 - 1 / world) * sizes[whole] / world
                totals.append(sent)
            flags = ["--model", str(folder / "model"), "--plan", "--world_size", str(world), "--device", "80", "1", "1"]
            found = estimate(config, train.parse_args(flags), torch.float32, "shared")["parts"]
            found = found["sent per device and step"]
            gathered = sum(v for k, v in found.items() if "gathered" in k)
            for key, value in (("gathered", gathered), ("reduced", found["gradients reduced, fp32"])):
                counted = (totals[1][key] - totals[0][key]) / 2
                print(f"{world:>9}{key:>12}{counted / 1e6:>20.3f}{value / 1e6:>10.3f}")
        last = start(max(args.processes), 6, pin.replace("FIRST", "0"), "--profile", 3)
        end(*last)
        print("\n" + re.search(r"profiled 3 steps.*(\n(process|\d).*)+", last[0].text())[0])
    finally:
        server.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
