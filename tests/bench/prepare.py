"""Compare time and memory of preparing comparisons (read, filter, tokenise, group) with TRL's trainer.

    pip install -e ".[bench]"
    python tests/bench/prepare.py [--pairs 100000] [--threads 1] [--processes 1] [--repeat 3]

Both get the same file, tokenizer and number of threads, and take turns in new processes with empty caches. TRL's time is
that of reading the file with `datasets` and of making a RewardTrainer with a tiny model; --processes is its
dataset_num_proc. Memory is the peak (VmHWM) above the memory after the imports. It includes memory-mapped files; "own"
excludes them (RssAnon, sampled every 50 ms).
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import ROOT, WORDS, make_model, write_jsonl

START = """
import sys, threading, time
sys.path.insert(0, {root!r})
import datasets, transformers
datasets.disable_progress_bars()
def memory(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) / 1024
own = [0]
def watch():
    while True:
        own[0] = max(own[0], memory("RssAnon"))
        time.sleep(0.05)
"""
MINIRM = """
import gc
from minirm.data.prepare import prepare
gc.freeze()  # as train.py does
tokenizer = transformers.AutoTokenizer.from_pretrained({model!r})
before, anonymous, begin, cpu = memory("VmHWM"), memory("RssAnon"), time.perf_counter(), time.process_time()
threading.Thread(target=watch, daemon=True).start()
data = prepare(tokenizer, [{data!r}])
kept = sum(data.train["pairs"]) + sum(data.eval["pairs"])
"""
TRL = """
from trl import RewardConfig, RewardTrainer
tokenizer = transformers.AutoTokenizer.from_pretrained({model!r})
tokenizer.pad_token = tokenizer.eos_token
before, anonymous, begin, cpu = memory("VmHWM"), memory("RssAnon"), time.perf_counter(), time.process_time()
threading.Thread(target=watch, daemon=True).start()
data = datasets.load_dataset("json", data_files={data!r}, split="train")
config = RewardConfig(output_dir={out!r}, max_length=550, use_cpu=True, report_to="none", dataset_num_proc={processes})
kept = len(RewardTrainer(model={model!r}, processing_class=tokenizer, train_dataset=data, args=config).train_dataset)
"""
END = """
print("measured", time.perf_counter() - begin, time.process_time() - cpu, memory("VmHWM") - before, own[0] - anonymous, kept)
"""


def write_pairs(path: Path, count: int, prompt_words: int = 100, answer_words: int = 30) -> Path:
    """Write `count` pairs. Lengths vary from half to one and a half times the given ones."""
    rng = random.Random(0)

    def text(about: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(about // 2, about * 3 // 2)))

    sides = ("chosen", "rejected")
    row = lambda i: {"prompt": f"{i} {text(prompt_words)}"} | {side: text(answer_words) for side in sides}
    return write_jsonl(path, map(row, range(count)))


def measure(code: str, cache: Path, **names) -> tuple[float, ...]:
    """(seconds, CPU seconds, MiB, own MiB, pairs kept) of a new process."""
    code = (START + code + END).format(root=str(ROOT), out=str(cache / "out"), **names)
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, env=env, text=True, check=True, stdout=subprocess.PIPE)
    return tuple(map(float, run.stdout.rpartition("measured ")[2].split()))


def until_table(cache: Path, model: Path, data: Path, out: Path) -> float:
    """Seconds from the command to the first line after the table."""
    command = [sys.executable, "-u", ROOT / "train.py", "--model", model, "--train_data", data, "--output_dir", out]
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    begin = time.perf_counter()
    with subprocess.Popen([*map(str, command)], env=env, text=True, stdout=subprocess.PIPE) as run:
        next(line for line in run.stdout if line.startswith("padding in a micro-batch"))
        seconds = time.perf_counter() - begin
        run.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": str(args.threads > 1).lower()}
    os.environ |= {"RAYON_NUM_THREADS": str(args.threads), "OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = {"model": str(make_model(folder / "model", "llama"))}
        names["processes"] = args.processes if args.processes > 1 else None
        names["data"] = str(write_pairs(folder / "pairs.jsonl", args.pairs))
        results: dict[str, list] = {"minirm": [], "TRL": [], "minirm, from its cache": []}
        for turn in range(args.repeat):
            results["TRL"].append(measure(TRL, folder / f"trl-{turn}", **names))
            for name in ("minirm", "minirm, from its cache"):
                results[name].append(measure(MINIRM, folder / f"minirm-{turn}", **names))
        for name, runs in results.items():
            seconds, cpu, mib, own, kept = zip(*runs)
            print(
                f"{name:<24} {statistics.median(seconds):7.2f} s (from {min(seconds):.2f} to {max(seconds):.2f}), "
                f"{statistics.median(cpu):7.2f} s of CPU, {max(mib):5.0f} MiB (own {max(own):.0f}), {kept[0]:,.0f} pairs kept"
            )
        for what, of in (("seconds", 0), ("seconds of CPU", 1)):
            trl, ours = (statistics.median(run[of] for run in results[name]) for name in ("TRL", "minirm"))
            print(f"minirm takes {trl / ours:.2f}x fewer {what} than TRL")
        for count in (args.pairs // 2, args.pairs * 2):
            names["data"] = str(write_pairs(folder / f"{count}.jsonl", count))
            seconds, _, mib, own, _ = measure(MINIRM, folder / f"minirm-{count}", **names)
            print(f"minirm, {count:,} pairs: {seconds:.2f} s, {mib:.0f} MiB (own {own:.0f})")
        where = folder / "command", names["model"], folder / "pairs.jsonl"
        times = [until_table(*where, folder / f"out-{i}") for i in range(2)]
        print(f"train.py until the table is shown: {times[0]:.2f} s, again {times[1]:.2f} s")


if __name__ == "__main__":
    main()
