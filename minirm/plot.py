"""Plot runs from their metrics.jsonl alone: `python -m minirm.plot RUN [RUN ...] [--output FILE.png]`.

One run gives RUN/curves.png, which train.py also writes at the end if matplotlib is installed. Several runs are
overlaid in curves.png. Metrics that were not recorded (by an older minirm or a killed run) are left out. To watch a run
remotely, use TensorBoard or Weights & Biases.
"""

import io
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from minirm.errors import InputError, Parser, printable, refusing
from minirm.files import put

# Okabe and Ito's colours, which colour-blind people can tell apart: https://jfly.uni-koeln.de/color/
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "os^Dvp"
GREY = "0.45"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8, "legend.framealpha": 0.8}  # fmt: skip
POINTS = 100  # maximum points of a training curve; if there are more rows, a point averages several


def read_rows(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. Skips invalid lines, because a killed run may leave one at the end."""
    rows = []
    with refusing(f"{run}: not the --output_dir of a run: its metrics.jsonl cannot be read", OSError):
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    if not rows:
        raise InputError(f"{run}: its metrics.jsonl has no rows yet; wait for the first evaluation")
    return rows


def best_evaluation(rows: list[dict]) -> dict:
    """The evaluation row with the lowest loss, ignoring step 0 unless it is the only one; {} if there is none."""
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    trained = [row for row in evaluations if row["step"] > 0]
    return min(trained or evaluations, key=lambda row: row["eval_loss"], default={})


def training_curve(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, at most POINTS of them. A point averages consecutive rows, weighted by their pairs."""
    rows = [row for row in rows if row.get(key) is not None and row.get("pairs")]
    size = math.ceil(len(rows) / POINTS) or 1
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    means = [sum(row[key] * row["pairs"] for row in part) / sum(row["pairs"] for row in part) for part in parts]
    return [part[-1]["step"] for part in parts], means


def column(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of all rows that have `key`."""
    rows = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def save_curves(folders: list[Path], picture: Path) -> None:
    """Draw the runs into `picture`. Raises InputError if matplotlib, a run or the picture's folder is missing."""
    names = [folder.resolve().name for folder in folders]
    names = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]
    runs = {name: read_rows(folder) for name, folder in zip(names, folders)}
    try:
        figure = draw(runs)
    except ModuleNotFoundError as error:
        command = f"python -m minirm.plot {' '.join(map(str, folders))}"
        raise InputError(f"{error.name} is not installed; run: pip install matplotlib && {command}") from None
    with refusing(f"{picture}: cannot be written", (OSError, ValueError)):  # ValueError: unknown image format
        os.stat(picture.parent)  # fails if the folder is missing, because put() would create it
        content = io.BytesIO()
        figure.savefig(content, format=picture.suffix[1:] or "png", dpi=144, metadata={"Software": None})
        put(picture, content.getvalue())
    print(f"the plots are in {printable(picture)}")


def draw(runs: dict[str, list[dict]]):
    """{name: rows of metrics.jsonl} -> a matplotlib Figure. It is made without pyplot, which sets a global backend."""
    import matplotlib
    from matplotlib.figure import Figure

    one, bests, lines = len(runs) == 1, [best_evaluation(rows) for rows in runs.values()], {}
    when = f"held-out, step {bests[0].get('step', 0):,}" if one else "held-out, best step of each"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 9.5), layout="constrained")
        loss, accuracy, rewards, calibration, position, scale = panels = list(figure.subplots(3, 2).flat)
        for panel, title, x, y in [
            (loss, "Loss", "optimizer step", "mean loss per pair"),
            (accuracy, "Accuracy", "optimizer step", "share of correct pairs"),
            (rewards, f"Rewards ({when})", "reward of an answer", "density (share of answers per unit)"),
            (calibration, f"Calibration ({when})", "sigmoid of the reward difference", "share of correct pairs"),
            (position, f"Along the answer ({when})", "tenth of the answer from the first difference", "accuracy"),
            (scale, "Loss scaling (fp16)", "optimizer step", "loss scale"),
        ]:
            panel.set(title=title, xlabel=x, ylabel=y)
        for n, (rows, best) in enumerate(zip(runs.values(), bests)):
            color = COLORS[n % len(COLORS)]
            other = COLORS[1] if one else color  # for the second curve: train, rejected
            dots = {"color": color, "marker": MARKERS[n % len(MARKERS)], "markersize": 4}
            for panel, key in ((loss, "loss"), (accuracy, "accuracy")):
                panel.plot(*training_curve(rows, key), "--", color=other, linewidth=1, label="train")
                lines[n] = panel.plot(*column(rows, f"eval_{key}"), **dots, label="held-out")[0]
                if best:
                    star = {"markersize": 11, "markeredgecolor": "black", "label": "lowest held-out loss"}
                    panel.plot(best["step"], best[f"eval_{key}"], "*", color=color, **star)
            (steps, low), (_, high) = column(rows, "eval_accuracy_low"), column(rows, "eval_accuracy_high")
            if steps:
                accuracy.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label="95 % interval")
            for side, style, shade in (("chosen", "-", color), ("rejected", "--", other)):
                if sum(counts := (best.get("eval_histogram") or {}).get(side, [])):
                    edges = best["eval_histogram"]["edges"]
                    heights = [c / sum(counts) / (b - a) for c, a, b in zip(counts, edges, edges[1:])]
                    rewards.stairs(heights, edges, color=shade, linestyle=style, linewidth=1.5, label=side)
            if bins := best.get("eval_calibration"):
                error = f", error {best['eval_calibration_error']:.3f}" if one else ""
                points = [of["predicted"] for of in bins], [of["observed"] for of in bins]
                calibration.plot(*points, **dots, label=f"measured{error}")
                calibration.axline((0.5, 0.5), slope=1, color=GREY, linestyle=":", linewidth=1, label="perfect")
            if shares := best.get("eval_accuracy_by_position"):
                position.plot(tenths := range(1, len(shares) + 1), shares, **dots, label="model")
                position.set_xticks(tenths)
                longer = best["eval_length_accuracy"]
                position.axhline(longer, color=other, linestyle=":", label="always the longer answer")
            (steps, scales), (_, skipped) = column(rows, "loss_scale"), column(rows, "skipped_steps")
            if any(skipped) or set(scales) - {1.0}:
                scale.plot(steps, scales, drawstyle="steps-post", color=color, label="loss scale")
                at = [i for i, count in enumerate(skipped) if count > (skipped[i - 1] if i else 0)]
                label = f"skipped steps: {skipped[-1]}" if one else "skipped steps"
                scale.plot([steps[i] for i in at], [scales[i] for i in at], "x", color=color, label=label)
                scale.set_yscale("log", base=2)
        for panel in panels:
            handles, labels = panel.get_legend_handles_labels()
            if handles:  # show every label once, in grey if colours distinguish runs
                kept = dict(zip(labels[::-1], handles[::-1]))
                legend = panel.legend([*kept.values()][::-1], [*kept][::-1])
                for handle in [] if one else legend.legend_handles:
                    handle.set_color(GREY)
            else:
                panel.set_axis_off()
                text = "not used with fp32 and bf16" if panel is scale else "not in metrics.jsonl"
                panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color=GREY)
        if not one:
            figure.legend(list(lines.values()), list(runs), loc="outside upper center", ncols=min(4, len(runs)))
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m minirm.plot", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--output_dir of a train.py run")
    parser.add_argument("--output", type=Path, help="image file (default: curves.png, for one run in its folder)")
    try:
        args = parser.parse_args(argv)
        save_curves(args.runs, args.output or (args.runs[0] if len(args.runs) == 1 else Path()) / "curves.png")
    except InputError as error:
        print(printable(f"minirm.plot: error: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
