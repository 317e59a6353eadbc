"""Measure how much to freeze: train.py with 0, 30, 50, 70, 90 and 100 % of the layers frozen, several seeds each.

    pip install -e ".[plot]"
    OMP_NUM_THREADS=1 python tests/bench/freeze_sweep.py [--seeds 3] [--write] [flags of train.py]

It runs on the demo and, with the demo's model, on ../shared/data/comparisons_{train,eval}.jsonl if those exist. With
--train_data among the flags it runs on that data alone, with your model and your recipe. A seed changes the order of the
data and the head, not the data or the model. Ratios take turns, so a busy machine slows all of them. Every run has its own
process.

After Ctrl-C it shows the complete seeds, and the same command resumes: finished runs are stored in --folder and reused if
their flags are the same.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from readme import write_between
from transformers import AutoConfig

from minirm.data.demo import DEMO_DEFAULTS, build_demo
from minirm.freeze import trained_layer_count
from minirm.plot import COLORS, STYLE, best_evaluation, read_rows

ROOT = Path(__file__).resolve().parents[2]
RATIOS = [0.0, 0.3, 0.5, 0.7, 0.9, 1.0]
MARKS = "<!-- sweep -->", "<!-- /sweep -->"
COLUMNS = ["frozen", "layers trained", "held-out accuracy", "95 % interval", "over seeds", "at the end", "train, last epoch", "ms a pair",
           "memory"]  # fmt: skip


def data_sets(flags: list[str]) -> dict[str, list[str]]:
    """{name: flags of train.py}."""
    if "--train_data" in flags:
        return {"your data": flags}
    demo, shared = build_demo(), ROOT.parent / "shared" / "data"
    defaults = DEMO_DEFAULTS | {"model": demo.model}
    tiny = [str(part) for name, value in defaults.items() for part in (f"--{name}", value)]
    short = ["--num_train_epochs", "1", "--eval_steps", "300"]
    sets = {"demo": [*tiny, "--train_data", str(demo.train), "--eval_data", str(demo.eval), *short, *flags]}
    train, held_out = (str(shared / f"comparisons_{part}.jsonl") for part in ("train", "eval"))
    if Path(train).exists():  # answers of several hundred tokens, and an evaluation after every epoch
        longer = ["--max_length", "384", "--num_train_epochs", "2", "--eval_steps", "33", "--logging_steps", "5"]
        sets["real comparisons"] = [*tiny, "--train_data", train, "--eval_data", held_out, *longer, *flags]
    return sets


def peak_memory(command: list, **options) -> int:
    """Peak memory of a command in bytes."""
    process = subprocess.Popen(list(map(str, command)), **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}: {' '.join(map(str, command))}")
    return usage.ru_maxrss * 1024


def run(folder: Path, flags: list[str], before: int) -> dict:
    """The result of a run, read from its folder if it is finished. before: bytes of a process that does not train."""
    done = folder / "result.json"
    if done.exists() and (known := json.loads(done.read_text()))["flags"] == flags:
        return known
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    with open(folder / "log", "w") as log:
        command = [sys.executable, ROOT / "train.py", *flags, "--save_steps", 0, "--output_dir", folder / "run"]
        peak = peak_memory(command, stdout=log, stderr=log)
    took, rows = time.perf_counter() - begin, read_rows(folder / "run")
    training, evaluations = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    last = [r for r in training if r["epoch"] > training[-1]["epoch"] - 1]
    best = best_evaluation(rows)
    result = {
        "flags": flags, "took": took, "memory": peak - before, "best": best["eval_accuracy"], "low": best["eval_accuracy_low"], "high": best["eval_accuracy_high"],
        "best step": best["step"], "last": evaluations[-1]["eval_accuracy"], "last step": evaluations[-1]["step"], "epochs": training[-1]["epoch"],
        "eval pairs": best["eval_pairs"], "longer": best["eval_length_accuracy"], "train": sum(r["accuracy"] * r["pairs"] for r in last) / sum(r["pairs"] for r in last),
        "seconds": [1 / r["tokens_per_second"] for r in training], "tokens": sum(r["tokens"] for r in training) / sum(r["pairs"] for r in training),
    }  # fmt: skip
    done.write_text(json.dumps(result))
    return result


def summary(results: list[dict]) -> dict:
    """Means over a ratio's seeds, the largest memory, and seconds per pair in the fastest tenth of the rows of
    metrics.jsonl, because other programs slow the rest.
    """
    keys = ("best", "low", "high", "last", "train", "tokens")
    mean = {key: statistics.fmean(of[key] for of in results) for key in keys}
    a_token = sorted(second for of in results for second in of["seconds"])
    more = {"bests": [of["best"] for of in results], "memory": max(of["memory"] for of in results)}
    return {**results[0], **mean, **more, "seconds": a_token[len(a_token) // 10] * mean["tokens"]}


def table(sets: dict[str, dict[float, dict]], layers: int) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|-" * len(COLUMNS) + "|"]
    for name, rows in sets.items():
        lines.append(f"| **{name}** |" + " |" * (len(COLUMNS) - 1))
        for ratio, row in rows.items():
            spread = f"{min(row['bests']):.3f} to {max(row['bests']):.3f}"
            cells = [f"{ratio:.0%}", f"{trained_layer_count(layers, ratio)} of {layers}", f"{row['best']:.3f}",
                     f"{row['low']:.3f} to {row['high']:.3f}", spread, f"{row['last']:.3f}", f"{row['train']:.3f}",
                     f"{1000 * row['seconds']:.1f}", f"{row['memory'] / 1e6:.0f} MB"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(sets: dict[str, dict[float, dict]]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, len(sets), sharex=True, squeeze=False, height_ratios=[3, 2])
        for (accuracy, cost), (name, rows) in zip(panels.T, sets.items()):
            x = [100 * ratio for ratio in rows]
            of = {key: [row[key] for row in rows.values()] for key in ("best", "low", "high", "last", "train")}
            below = [b - low for b, low in zip(of["best"], of["low"])]
            above = [high - b for b, high in zip(of["best"], of["high"])]
            label = "held-out, 95 % interval over prompts"
            accuracy.errorbar(x, of["best"], [below, above], fmt="o-", color=COLORS[0], capsize=3, label=label)
            for n in range(min(len(row["bests"]) for row in rows.values())):
                each, label = [row["bests"][n] for row in rows.values()], "_" * n + "held-out, each seed"
                accuracy.plot(x, each, "_", color="black", label=label)
            accuracy.plot(x, of["last"], "s:", color=COLORS[2], markersize=4, label="held-out, last evaluation")
            accuracy.plot(x, of["train"], "^--", color=COLORS[1], markersize=4, label="train, last epoch")
            if (longer := rows[x[0] / 100]["longer"]) > 0.5:
                label = "the longer answer is the chosen one"
                accuracy.axhline(longer, color="black", linestyle=":", linewidth=1, label=label)
            accuracy.set(title=name, ylabel="share of pairs right")
            lines = ("seconds", "o-", COLORS[0], "time per pair"), ("memory", "s--", COLORS[4], "memory")
            for key, style, color, label in lines:
                shares = [row[key] / rows[min(rows)][key] for row in rows.values()]
                cost.plot(x, shares, style, color=color, markersize=4, label=label)
            cost.set(xlabel="share of the layers frozen, %", ylabel="share of what no freezing takes")
            cost.set(ylim=(0, None), xticks=x)
        panels[1, 0].legend()
        labelled = {label: of for panel in panels[0] for of, label in zip(*panel.get_legend_handles_labels())}
        figure.legend(labelled.values(), labelled, loc="outside upper center", ncols=3)
    return figure


def write(text: str, figure: Figure) -> None:
    """Write the text between its two marks in README.md, and the plot beside this file."""
    shown = "![accuracy and cost by freeze ratio](tests/bench/freeze_sweep.png)"
    write_between(MARKS, f"{shown}\n\n{text}", ROOT / "README.md")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=144, metadata={"Software": None})


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--seeds", type=int, default=3)
    add(
        "--folder", type=Path, default=ROOT / "runs" / "freeze_sweep", help="folder of the runs and of freeze_sweep.png"
    )
    add("--write", action="store_true", help="write the table into README.md and the plot beside this file")
    args, flags = parser.parse_known_args()
    sets = data_sets(flags)
    results: dict = {name: {ratio: [] for ratio in RATIOS} for name in sets}
    begin, before = time.perf_counter(), peak_memory([sys.executable, "-c", "import train"], cwd=ROOT)
    try:
        for seed, (name, of_set), ratio in product(range(args.seeds), sets.items(), RATIOS):
            folder = args.folder / name.replace(" ", "_") / f"ratio-{ratio}-seed-{seed}"
            done = run(folder, [*of_set, "--freeze_ratio", str(ratio), "--seed", str(seed)], before)
            results[name][ratio].append(done)
            print(f"{name}, seed {seed}, {ratio:.0%} frozen: held-out {done['best']:.3f} after {done['best step']} steps, "
                  f"{time.perf_counter() - begin:.0f} s so far", flush=True)  # fmt: skip
    except KeyboardInterrupt:
        print("stopped; the same command goes on. Seeds with all ratios:")
    for name in sets:
        whole = min(map(len, results[name].values()))
        results[name] = {ratio: of[:whole] for ratio, of in results[name].items()}
        if not whole:
            del results[name]
    if not results:
        return
    config = AutoConfig.from_pretrained(next(iter(sets.values()))[next(iter(sets.values())).index("--model") + 1])
    rows = {name: {ratio: summary(of) for ratio, of in by_ratio.items()} for name, by_ratio in results.items()}
    minutes = sum(of["took"] for by_ratio in results.values() for ofs in by_ratio.values() for of in ofs) / 60
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    counts = [
        f"{name}: {len(row[0.0]['bests'])} seeds, {row[0.0]['epochs']:g} epoch(s), {row[0.0]['last step']:,} steps, "
        f"{row[0.0]['eval pairs']} held-out pairs" for name, row in rows.items()
    ]  # fmt: skip
    layers = f"{config.model_type}, {config.num_hidden_layers} layers of width {config.hidden_size}"
    text = f"{layers}, {device}, {minutes:.0f} minutes in all; {'; '.join(counts)}\n\n{table(rows, config.num_hidden_layers)}"
    print(text)
    figure = picture(rows)
    figure.savefig(args.folder / "freeze_sweep.png", dpi=144)
    if args.write:
        write(text, figure)


if __name__ == "__main__":
    main()
