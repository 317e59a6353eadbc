"""Kill a training run again and again, and compare its result with that of an undisturbed run.

    python tests/bench/crash.py --kills 100 --precision fp32

Two processes train a tiny GPT-J. SIGKILL hits both or one of them in a random phase: starting, training, saving (also the
first save) or writing the trained model. Then the same command is started again. In the end the last checkpoint, the
trained model and every row of metrics.jsonl have to be bitwise equal.
"""

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import make_comparisons, make_model, write_jsonl
from processes import Run, Server

SPEEDS = ("pairs_per_second", "tokens_per_second")
PHASES = {"starting": 1, "training": 3, "saving": 5, "writing the model": 1}  # {phase: weight}


def rows(output: Path) -> list[dict]:
    """metrics.jsonl without speeds and without the torn line that a killed run may leave."""
    found = []
    for line in (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []:
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in SPEEDS})
        except ValueError:
            pass
    return found


def newest(output: Path) -> int:
    steps = [int(p.name[11:]) for p in output.glob("checkpoint-*") if p.name[11:].isdigit()]
    return max(steps, default=0)


def weights(output: Path) -> dict[str, bytes]:
    """{name: bytes} of all tensors of the trained model and the last checkpoint.

    The files themselves may differ, because safetensors writes the entries of its header in any order.
    """
    found = {}
    for path in output.rglob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        found |= {f"{path.relative_to(output)} {k}": t.contiguous().numpy().tobytes() for k, t in tensors.items()}
    return found


def crash(folder: Path, kills: int, precision: str, seed: int, server: Server, steps: int, save_steps: int = 3) -> dict:
    """-> {"kills": {phase: count}, ..., "differences": [what differs]}."""
    rng = random.Random(seed)
    flags = [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", "0.5", "--precision", precision),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(90))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(7, seed=1))),
        *("--max_steps", steps, "--save_steps", save_steps, "--logging_steps", 1, "--eval_steps", 7),
        *("--gradient_accumulation_steps", 2, "--learning_rate", "1e-3", "--warmup_steps", 5),
    ]
    straight, output = folder / "straight", folder / "killed-1"
    run = server.run(*flags, "--output_dir", straight, world=2, timeout=600)
    assert run.codes == [0, 0], run.text()
    done, again, differences, rounds = collections.Counter(), 0, [], 1
    while done.total() < kills:
        # Always kill the first save of the first round, and the writing of the model in every round.
        phase = rng.choices(list(PHASES), list(PHASES.values()))[0] if done else "saving"
        if newest(output) >= steps - save_steps:
            phase = "writing the model"
        run = server.start(*flags, "--output_dir", output, world=2)
        kill(run, phase, output, rng, steps, save_steps)
        codes = run.wait(60)
        if -9 in codes:
            if "training:" not in run.text():
                done["starting"] += 1
            elif any(output.glob("checkpoint-*.partial")):
                done["saving" if newest(output) else "saving, the first time"] += 1
            else:
                done["writing the model" if newest(output) == steps else "training, evaluating"] += 1
            again += max((row["step"] for row in rows(output) if "loss" in row), default=0) - newest(output)
        elif codes == [0, 0]:  # the run finished before the kill, so start another round
            differences += compare(straight, output)
            rounds += 1
            output = folder / f"killed-{rounds}"
        else:
            raise AssertionError(f"exit codes {codes}: {run.text()}")
    run = server.run(*flags, "--output_dir", output, world=2, timeout=600)
    assert run.codes == [0, 0], run.text()
    return {
        "kills": dict(done),
        "runs that came to their end": rounds,
        "steps computed again": again,
        "steps skipped by the scaler": rows(straight)[-2]["skipped_steps"],
        "differences": differences + compare(straight, output),
    }


def kill(run: Run, phase: str, output: Path, rng: random.Random, steps: int, save_steps: int) -> None:
    """Wait until the run is in the phase, and some milliseconds more, then kill it. It may end before."""
    if phase == "starting":  # kill both: before the rendezvous only torchrun would end the other one
        time.sleep(rng.uniform(0, 1.5))
        run.kill()
        return
    alive = run.until(lambda: "training:" in run.text())
    if phase == "training":
        enough = len(rows(output)) + rng.randint(1, 4)
        alive = alive and run.until(lambda: len(rows(output)) >= enough)
        time.sleep(rng.uniform(0, 0.1))
    elif phase == "saving":
        passed = newest(output) + rng.choice([0, 1, 1]) * save_steps  # let this many saves pass
        alive = alive and run.until(lambda: newest(output) >= passed and any(output.glob("checkpoint-*.partial")))
        time.sleep(rng.uniform(0, 0.02))
    else:
        alive = alive and run.until(lambda: newest(output) == steps)
        time.sleep(rng.uniform(0, 0.1))
    if alive:
        run.kill(ranks=rng.choice([None, None, None, [0], [1]]))


def compare(straight: Path, output: Path) -> list[str]:
    """Everything in which the killed run differs from the other one."""
    then, now = weights(straight), weights(output)
    differences = [name for name in then.keys() | now.keys() if then.get(name) != now.get(name)]
    mine, theirs = rows(output), rows(straight)
    keys = collections.Counter((row["step"], "training" if "loss" in row else "evaluation") for row in mine)
    differences += [f"step {step} has {n} rows of {kind}" for (step, kind), n in keys.items() if n > 1]
    if mine != theirs:
        differences += [f"row {a} instead of {b}" for a, b in zip(mine, theirs) if a != b] or ["number of rows"]
    return differences + [f"{path.name} was left" for path in output.glob("*.partial")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--steps", type=int, default=90, help="steps of a run; after its end another run is started")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        server = Server(Path(folder))
        start = time.monotonic()
        report = crash(Path(folder), args.kills, args.precision, args.seed, server, args.steps)
        server.close()
    print(f"2 processes, {args.precision}, runs of {args.steps} steps, {time.monotonic() - start:.0f} s")
    for phase, count in sorted(report.pop("kills").items()):
        print(f"  killed while {phase:<26} {count:>5}")
    differences = report.pop("differences")
    for name, count in {**report, "differences": len(differences)}.items():
        print(f"  {name:<39} {count:>5}")
    print("\n".join(differences[:20]))


if __name__ == "__main__":
    main()
