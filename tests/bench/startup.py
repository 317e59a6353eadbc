"""Compare the time from the command to the first optimizer step on 1,000 comparisons with TRL's trainer.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=1 python tests/bench/startup.py [--repeat 5]

The two take turns in new processes with empty caches. Both print the time after the first optimizer step. minirm's time
includes the evaluation of 50 pairs at step 0, which TRL does not have.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, make_comparisons, make_model, write_jsonl

MINIRM = """
import sys, time, torch
sys.path.insert(0, {root!r})
import train
done = torch.amp.GradScaler.update
torch.amp.GradScaler.update = lambda *args, **options: (done(*args, **options), print("first step", time.time()))[0]
train.main(["--model", {model!r}, "--train_data", {train!r}, "--eval_data", {eval!r}, "--max_steps", "1",
            "--output_dir", {out!r}])
"""
TRL = """
import time, datasets, transformers
from trl import RewardConfig, RewardTrainer
class Clock(transformers.TrainerCallback):
    def on_step_end(self, *args, **options):
        print("first step", time.time())
data = datasets.load_dataset("json", data_files={train!r}, split="train")
tokenizer = transformers.AutoTokenizer.from_pretrained({model!r})
tokenizer.pad_token = tokenizer.eos_token
RewardTrainer(
    model={model!r}, processing_class=tokenizer, train_dataset=data, callbacks=[Clock()],
    args=RewardConfig(output_dir={out!r}, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4,
                      use_cpu=True, report_to="none", save_strategy="no"),
).train()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = {
            "root": str(ROOT),
            "model": str(make_model(folder / "model", "llama")),
            "train": str(write_jsonl(folder / "train.jsonl", make_comparisons(1000))),
            "eval": str(write_jsonl(folder / "eval.jsonl", make_comparisons(50, seed=1))),
        }
        seconds: dict[str, list[float]] = {"minirm": [], "TRL": []}
        for turn in range(repeat):
            for name, code in (("minirm", MINIRM), ("TRL", TRL)):
                code = code.format(**paths, out=str(folder / f"{name}{turn}"))
                env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{name}{turn}")}
                begin = time.time()
                command = [sys.executable, "-W", "ignore", "-c", code]
                shown = subprocess.run(command, env=env, text=True, check=True, capture_output=True).stdout
                seconds[name].append(float(shown.partition("first step ")[2].split()[0]) - begin)
    for name, values in seconds.items():
        print(f"{name:<8} {statistics.median(values):.2f} s (from {min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
