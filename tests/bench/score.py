"""Compare the speed of `python -m minirm.score` with a plain batched AutoModelForSequenceClassification loop.

    OMP_NUM_THREADS=1 python tests/bench/score.py [--pairs 1000] [--rounds 3] [--data FILE]

A random Llama of 12 layers and width 512 scores the real comparisons beside the checkout, of which only those under 1,024
tokens are used, so that nothing is cut. Both start from the file and end with a reward per completion; loading the model
is not counted. The loop takes the texts in the order of the file, 16 at a time, padded to the longest. The two take turns.
Medians, the spread from fastest to slowest and the largest difference are shown.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import SHARED_DATA, make_tokenizer, write_jsonl

from minirm import score
from minirm.data.chat import join


def save_model(folder: Path, texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(pad="<pad>", texts=texts, size=8000)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=2048, num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.inference_mode()
def plain(folder: Path, rows: list[dict], size: int) -> tuple[list[float], float]:
    """[chosen, rejected, chosen, ...] rewards, seconds."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = time.perf_counter()
    parts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    texts = [join(*part, "\n") + tokenizer.eos_token for part in parts]
    rewards = []
    for i in range(0, len(texts), size):
        rewards += model(**tokenizer(texts[i : i + size], padding=True, return_tensors="pt")).logits[:, 0].tolist()
    return rewards, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16, help="batch size of the loop")
    parser.add_argument("--data", type=Path, default=SHARED_DATA / "comparisons_train.jsonl")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()]
    seconds: dict[str, list[float]] = {"plain": [], "minirm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = save_model(folder / "model", [row["prompt"] + row["chosen"] for row in rows])
        length = lambda row, side: len(tokenizer(row["prompt"] + row[side])["input_ids"])
        rows = [row for row in rows if max(length(row, "chosen"), length(row, "rejected")) < 1024][: args.pairs]
        data = write_jsonl(folder / "data.jsonl", rows)
        for _ in range(args.rounds):
            wanted, took = plain(folder / "model", rows, args.size)
            seconds["plain"].append(took)
            flags = ["--model", folder / "model", "--data", data, "--output", folder / "out.jsonl"]
            seconds["minirm"].append(score.run(score.parse_args([str(flag) for flag in flags]))["seconds"])
            found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
            rewards = [row[side] for row in found for side in ("chosen", "rejected")]
            difference = max(abs(a - b) for a, b in zip(wanted, rewards))
            last = {name: round(took[-1], 2) for name, took in seconds.items()}
            print(last, f"difference {difference:.1e}", file=sys.stderr)
    median = {name: statistics.median(took) for name, took in seconds.items()}
    for name, took in seconds.items():
        spread = (max(took) - min(took)) / median[name]
        print(f"{name:<8} {len(rows) / median[name]:7.2f} pairs/s, spread {spread:.0%}")
    print(f"ratio {median['plain'] / median['minirm']:.2f}, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
