"""Finish a run: write the trained model, its card and its curves."""

import math
from argparse import Namespace
from pathlib import Path

from torch import Tensor

from minirm import checkpoint, run
from minirm.errors import one_line
from minirm.lora import merge, save_adapter
from minirm.model import LOADER
from minirm.plot import save_curves
from minirm.report.card import model_card
from minirm.start import Inputs
from minirm.weights import export


def write_model(args: Namespace, inputs: Inputs, gathered: dict[str, Tensor], result: dict, steps: int) -> None:
    """Write the model to --output_dir, whole or not at all, and mark the run as finished. Call on rank 0.

    gathered: see `shard.gather`; result: the evaluation of these weights; steps: those of the whole run.
    """
    output, state = Path(args.output_dir), merge(inputs.model, gathered)
    notes: dict = {"minirm": {"separator": args.separator, "max_length": args.max_length}}  # for minirm.score
    if math.isfinite(result["eval_reward_std"]):  # OpenRLHF's names; it divides by std
        notes |= {"mean": result["eval_reward_mean"], "std": max(result["eval_reward_std"], 1e-8)}
    with checkpoint.writing(output, sum(t.numel() * t.element_size() for t in state.values())):
        try:
            save_curves([output], output / "curves.png")
        except Exception as error:  # noqa: BLE001 - a missing or broken matplotlib must not prevent the export
            print(f"no curves.png: {one_line(error)}")
        with checkpoint.whole_model(output) as folder:
            export(state, inputs.config, inputs.tokenizer, folder, notes)
            if args.lora_rank:
                save_adapter(inputs.model, gathered, args.model, folder / "adapter")
            card = model_card(args, inputs.data.report, result, inputs.tokenizer, output, (folder / LOADER).exists())
            (folder / "README.md").write_text(card)
        run.finish(output, steps)
