"""metrics.jsonl, TensorBoard and Weights & Biases."""

import json
import math
import os
from argparse import Namespace
from pathlib import Path

from minirm.checkpoint import METRICS, writing
from minirm.errors import InputError, one_line
from minirm.files import as_json


class MetricsLog:
    """Append rows to metrics.jsonl and send their numbers to the trackers of --report_to.

    Metrics are named as by transformers' Trainer: `train/loss`, `eval/accuracy`. A run resumed after `start` steps
    continues in the same TensorBoard folder, which hides the rows that came after, and in the same Weights & Biases
    run, which shows them twice.
    """

    def __init__(self, output: Path, args: Namespace, start: int) -> None:
        self.output, self.args, self.start = output, args, start
        self.writer = self.run = None

    def open(self) -> None:
        """Open the trackers. Call on rank 0. Raises InputError if Weights & Biases refuses (no key, no network)."""
        if "tensorboard" in self.args.report_to:
            from torch.utils.tensorboard import SummaryWriter

            # The evaluation of step `start` preceded its checkpoint; that of step 0 is about to run (again).
            purge = self.start + 1 if self.start else 0
            self.writer = SummaryWriter(str(self.output / "tensorboard"), purge_step=purge)
            self.writer.add_text("args", json.dumps(vars(self.args), indent=1), self.start)
        if "wandb" in self.args.report_to:
            import wandb

            earlier = [path.name for path in (self.output / "wandb").glob("*run-*-*")]  # [offline-]run-<time>-<id>
            try:
                self.run = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "minirm"), dir=self.output, config=vars(self.args),
                    id=earlier[0].partition("run-")[2].partition("-")[2] if earlier else None, resume="allow",
                    allow_val_change=True,
                )  # fmt: skip
            except wandb.Error as error:
                raise InputError(f"--report_to wandb: {one_line(error)}") from None
            self.run.define_metric("train/global_step")
            self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def __call__(self, row: dict) -> None:
        """Log a row. Call on rank 0."""
        line, path = as_json(row) + "\n", self.output / METRICS
        with writing(path, len(line)), open(path, "a") as file:
            file.write(line)
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)}
        numbers = {f"eval/{k[5:]}" if k[:5] == "eval_" else f"train/{k}": v for k, v in numbers.items()}
        if self.writer:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, row["step"])
            self.writer.flush()
        if self.run:
            self.run.log({**numbers, "train/global_step": row["step"]})
