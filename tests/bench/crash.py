"""Kills a training run again and again, and compares what it comes to with a run that nobody killed.

    python tests/bench/crash.py --kills 100 --precision fp32

Two processes, a tiny GPT-J. Killed with SIGKILL are both at once, or one of them, in a phase chosen beforehand: while
starting, training, saving (the first save included) and writing the trained model; then the same command is started
again. At the end the last checkpoint, the trained model and every row of metrics.jsonl have to be equal to the bit.
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
from processes import Server

SPEEDS = ("pairs_per_second", "tokens_per_second")
PHASES = {"starting": 1, "training": 3, "saving": 5, "writing the model": 1}  # and their weights


def rows(output: Path) -> list[dict]:
    """metrics.jsonl without what may differ; half a line, as a killed run leaves it, is no row."""
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
    """All parameters and optimizer state, of the trained model and the last checkpoint, as bytes.

    Not the files' bytes: safetensors writes its header's entries in any order.
    """
    found = {}
    for path in output.rglob("*.safetensors"):
        tensors = safetensors.torch.load_file(path)
        found |= {f"{path.relative_to(output)} {k}": t.contiguous().numpy().tobytes() for k, t in tensors.items()}
    return found


def crash(folder: Path, kills: int, precision: str, seed: int, server: Server, steps: int, save_steps: int = 3) -> dict:
    """Returns {"kills": {phase: n}, "restarts": n, "lost steps": n, "differences": [what differs]}."""
    rng = random.Random(seed)
    flags = [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", "0.5", "--precision", precision),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(90))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(7, seed=1))),
        *("--max_steps", steps, "--save_steps", save_steps, "--logging_steps", 1, "--eval_steps", 7),
        *("--gradient_accumulation_steps", 2, "--learning_rate", "1e-3", "--warmup_steps", 5),
    ]
    straight, output = folder / "straight", folder / "killed"
    run = server.run(*flags, "--output_dir", straight, world=2, timeout=600)
    assert run.codes == [0, 0], run.text()
    # The phases are drawn beforehand, so that the first save and the end of the run come up, too.
    plan = ["saving"] + rng.choices(list(PHASES), list(PHASES.values()), k=kills - 1)
    plan = [phase for phase in plan if phase != "writing the model"] + ["writing the model"] * plan.count(
        "writing the model"
    )
    done, restarts, lost = collections.Counter(), 0, 0
    for phase in plan:
        run = server.start(*flags, "--output_dir", output, world=2)
        alive = phase == "starting" or run.until(lambda: "training:" in run.text())
        if phase == "starting":
            time.sleep(rng.uniform(0, 1.5))
        elif phase == "training":
            before, wanted = len(rows(output)), rng.randint(1, 4)
            first = newest(output)
            alive = alive and run.until(lambda: len(rows(output)) >= before + wanted or newest(output) > first)
            time.sleep(rng.uniform(0, 0.1))
        elif phase == "saving":
            first = newest(output) + rng.choice([0, 1, 1]) * save_steps  # so many saves are let pass
            alive = alive and run.until(lambda: newest(output) >= first and any(output.glob("checkpoint-*.partial")))
            time.sleep(rng.uniform(0, 0.04))
        else:
            alive = alive and run.until(
                lambda: (output / "config.json").exists() or (output / f"checkpoint-{steps}").exists()
            )
            time.sleep(rng.uniform(0, 0.1))
        if alive:  # one alone only when the two have met: before that it is torchrun that ends the other
            run.kill(ranks=None if phase == "starting" else rng.choice([None, None, None, [0], [1]]))
        codes = run.wait(60)
        restarts += 1
        if codes == [0, 0]:
            done["none: it was finished already"] += 1
            continue
        assert -9 in codes, run.text()
        if "training:" not in run.text():
            where = "starting"
        elif any(output.glob("checkpoint-*.partial")):
            where = "saving" if newest(output) else "saving, the first time"
        elif newest(output) == steps:
            where = "writing the model"
        else:
            where = "training, evaluating"
        done[where] += 1
        training = [row["step"] for row in rows(output) if "loss" in row]
        lost += max(training, default=0) - newest(output)
    run = server.run(*flags, "--output_dir", output, world=2, timeout=600)
    restarts += 1
    assert run.codes == [0, 0], run.text()

    differences = []
    then, now = weights(straight), weights(output)
    differences += [name for name in then.keys() | now.keys() if then.get(name) != now.get(name)]
    mine, theirs = rows(output), rows(straight)
    keys = [(row["step"], "loss" in row) for row in mine]
    differences += [f"step {key} counted {n} times" for key, n in collections.Counter(keys).items() if n > 1]
    if mine != theirs:
        differences += [f"row {a} instead of {b}" for a, b in zip(mine, theirs) if a != b] or ["number of rows"]
    leftovers = [p.name for p in output.glob("*.partial")]
    return {
        "kills": dict(done),
        "restarts": restarts - 1,
        "lost steps": lost,
        "skipped by the scaler": theirs[-2]["skipped_steps"],
        "differences": differences + leftovers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--steps", type=int, help="default: three a kill, so that kills do not run out of steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        server = Server(Path(folder))
        start = time.monotonic()
        steps = args.steps or 3 * args.kills
        report = crash(Path(folder), args.kills, args.precision, args.seed, server, steps)
        server.close()
    print(f"2 processes, {args.precision}, {steps} steps, {time.monotonic() - start:.0f} s")
    for phase, count in sorted(report["kills"].items()):
        print(f"  killed while {phase:<24} {count:>5}")
    print(f"  restarts                              {report['restarts']:>5}")
    print(f"  steps computed again                  {report['lost steps']:>5}")
    print(f"  steps skipped by the scaler           {report['skipped by the scaler']:>5}")
    print(f"  differences                           {len(report['differences']):>5}")
    print("\n".join(report["differences"][:20]))


if __name__ == "__main__":
    main()
