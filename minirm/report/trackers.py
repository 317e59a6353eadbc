"""TensorBoard and Weights & Biases."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from minirm.errors import InputError, one_line


def open_trackers(names: list[str], output: Path, arguments: dict, start: int) -> Callable[[dict], None]:
    """Open the trackers of --report_to. Returns a function that logs the numbers of a metrics.jsonl row to them.

    Metrics have the names that transformers' Trainer uses: `train/loss`, `eval/accuracy`. A run that resumes after
    `start` steps continues in the same TensorBoard folder, which hides rows of later steps, and in the same Weights &
    Biases run, which shows those rows twice. Raises InputError if Weights & Biases fails (no key, no network).
    """
    writer = run = None
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        # The checkpoint of step `start` was written after its evaluation, so keep that row; step 0 is evaluated again.
        writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1 if start else 0)
        writer.add_text("args", json.dumps(arguments, indent=1), start)
    if "wandb" in names:
        import wandb

        earlier = [path.name for path in (output / "wandb").glob("*run-*-*")]  # [offline-]run-<time>-<id>
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "minirm"), dir=output, config=arguments, allow_val_change=True,
                id=earlier[0].partition("run-")[2].partition("-")[2] if earlier else None, resume="allow",
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(f"--report_to wandb: {one_line(error)}") from None
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def send(row: dict) -> None:
        numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float)) and math.isfinite(v)}
        numbers = {f"eval/{k[5:]}" if k[:5] == "eval_" else f"train/{k}": v for k, v in numbers.items()}
        if writer:
            for name, value in numbers.items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()
        if run:
            run.log({**numbers, "train/global_step": row["step"]})

    return send
