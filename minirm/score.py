"""Score data with a reward model: `python -m minirm.score --model DIR --data FILE [FILE ...] [--output scores.jsonl]`.

Comparisons give accuracy and calibration, by file and subset. Rows {"prompt", "completions"} are scored and ranked.
Prints one JSON object on stdout and a table on stderr. Works with any transformers sequence-classification model that
has one label. A decoder with a linear head computes each prompt only once for all its completions.
"""

import gc

gc.disable()  # while imports create objects that live on, as in train.py

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import pyarrow.compute as pc
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from minirm.attention import attention_mask, use_sdpa
from minirm.data.chat import set_chat_template, unescaped
from minirm.data.prepare import Texts, chunks, read_prompts, store
from minirm.data.schemas import column, renames
from minirm.data.sources import fingerprint
from minirm.data.tokens import tokenise
from minirm.errors import InputError, Parser, Stop, printable, refusing
from minirm.files import as_json, put, writing
from minirm.model import classifier
from minirm.probe import choose_layout
from minirm.report.benchmarks import best_of_n, reward_bench, reward_bench_2, rm_bench
from minirm.report.measure import agreement, by_name, calibration, file_names
from minirm.rows import collate
from minirm.shard import DTYPES
from minirm.weights import loading

gc.freeze()
gc.enable()

WORTH_SHARING = 0.9  # if a shared row has more than this share of the tokens, its mask costs as much as sharing saves


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m minirm.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--model", required=True, help="name or folder of a reward model")
    add("--data", required=True, nargs="+",
        help="files or datasets, as for train.py's --train_data; also rows with completions to rank")
    add("--output", type=Path, help="file for the scores: one JSON object per data row, in the same order")
    add("--columns", nargs="+", default=[], type=column, metavar="NAME=COLUMN",
        help="map nonstandard column names, as for train.py")
    add("--separator", type=unescaped,
        help="text between prompt and answer (default: as in training, else a line break)")
    add("--chat_template", help="Jinja file for chat data (default: the tokenizer's own)")
    add("--max_length", type=int, help="maximum tokens per text (default: as in training, else the model's positions)")
    add("--batch_size", type=int, default=8192,
        help="maximum tokens per forward pass, padding included; a longer row is computed alone (default: 8192)")
    add("--precision", default="auto", choices=["auto", *DTYPES],
        help="auto: on CUDA as the weights are stored, on CPU fp32 (default: auto)")
    # fmt: on
    return parser.parse_args(argv)


def load_config(name: str) -> tuple:
    """(config, tokenizer). Raises InputError unless `name` is a reward model with one label."""
    with refusing(f"--model {name}: not a model folder or name that transformers can load"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = (config.architectures or ["a model without a head"])[0]
    if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
        kind += f" with {config.num_labels} labels"
        raise InputError(f"--model {name}: {kind}; expected a reward model: sequence classification with one label")
    with refusing(f"--model {name}: its tokenizer cannot be loaded"):
        return config, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model(name: str, config, dtype):
    """Load the model in evaluation mode. Raises InputError if weights are missing or cannot be loaded."""
    with loading(name):
        model, info = classifier(config).from_pretrained(name, config=config, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        more = f"{', '.join(missing[:5])} ({len(missing)})"
        raise InputError(f"--model {name}: weights missing from the checkpoint: {more}")
    return model.eval()


# Rows of a forward pass are groups without comparisons (see prepare.py). "places" holds each completion's indices in
# the data; there are several if examples of a prompt have an answer in common.
def decoder_rows(prompts: list[list[dict]], tokenizer, args, share: bool) -> Iterator[dict]:
    """Turn prompts, each a list of its examples, into rows like those of training."""
    rules = {"max_length": args.max_length, "overlong": "truncate", "keep": "all"}
    for group, examples in tokenise(prompts, tokenizer, [Counter() for _ in args.data], **rules):
        prefix, tails = group["prefix"], group["completions"]
        places: list[list[int]] = [[] for _ in tails]
        for example, index in examples:
            for k, i in index.items():
                places[i].append(example["first"] + k)
        size, separate = 1, len(prefix) * len(tails) + sum(map(len, tails))
        if share and group["shared_tokens"] < WORTH_SHARING * separate:  # as many as fit into two full texts
            size = (2 * args.max_length - len(prefix)) // max(map(len, tails))
        for i in range(0, len(tails), size):
            yield {"prefix": prefix, "completions": tails[i : i + size], "places": places[i : i + size]}


@torch.no_grad()
def decoder_rewards(rows: list[dict], model, tokenizer) -> Tensor:
    """Rewards [K] of all completions, row by row."""
    trunk, device = model.base_model, model.device
    batch = collate(rows, row_layout="shared", pad_id=tokenizer.pad_token_id or 0, row_limit=sys.maxsize)
    mask = attention_mask(batch.segments, batch.position_ids, batch.visible, trunk.config, trunk.dtype, device)
    batch = batch.to(device)
    inputs = {"attention_mask": mask, "position_ids": batch.position_ids, "use_cache": False}
    hidden = trunk(batch.input_ids, **inputs).last_hidden_state.flatten(0, 1)[batch.places[:, -1]]  # [K, H]
    return hidden.float() @ model.score.weight[0].float()


def other_rows(prompts: list[list[dict]], tokenizer, args) -> Iterator[dict]:
    """Turn prompts into rows of one text each, with the tokenizer's own special tokens."""
    for e in chain.from_iterable(prompts):
        rules = {"add_special_tokens": not e["chat"], "truncation": True, "max_length": args.max_length}
        for k, ids in enumerate(tokenizer(e["texts"], **rules)["input_ids"]):
            yield {"prefix": [], "completions": [ids], "places": [[e["first"] + k]]}


@torch.no_grad()
def other_rewards(rows: list[dict], model, tokenizer) -> Tensor:
    batch = tokenizer.pad({"input_ids": [row["completions"][0] for row in rows]}, return_tensors="pt")
    return model(**batch.to(model.device)).logits[:, 0]


def score(texts: Texts, count: int, model, tokenizer, args: argparse.Namespace) -> Tensor:
    """Rewards [count] of all completions in fp64; those of example i begin at texts.rows[i]["first"]."""
    heads = [name for name in model.state_dict() if not name.startswith(model.base_model_prefix + ".")]
    if heads == ["score.weight"]:  # a decoder with a linear head; no encoder in transformers has only this
        layout, reason = choose_layout(model.config, args.model, "shared", args.max_length)
        if reason:
            line = f"each completion gets its own row, because shared rows would not be exact: {reason}"
            print(line, file=sys.stderr)
        use_sdpa(model.base_model)
        to_rows, compute = partial(decoder_rows, share=layout == "shared"), decoder_rewards
    else:
        to_rows, compute = other_rows, other_rewards
        if tokenizer.pad_token_id is None:
            raise InputError(f"--model {args.model}: its tokenizer has no pad token; set pad_token")
    length = lambda row: len(row["prefix"]) + sum(map(len, row["completions"]))
    rewards = torch.full((count,), math.nan, dtype=torch.float64)
    with tqdm(total=count, desc="scoring", unit=" completions", file=sys.stderr) as bar:
        for chunk in chunks(texts, torch.ones(len(texts.rows), dtype=torch.bool)):
            # Longest first, so that a lack of memory shows at once.
            rows = sorted(to_rows(read_prompts(texts, *chunk), tokenizer, args), key=length, reverse=True)
            while rows:
                size = max(1, args.batch_size // length(rows[0]))
                some, rows = rows[:size], rows[size:]
                places = [(place, i) for i, of in enumerate(p for row in some for p in row["places"]) for place in of]
                place, i = zip(*places)
                rewards[[*place]] = compute(some, model, tokenizer).double().cpu()[[*i]]
                bar.update(len(places))
    return rewards


def measured(texts: Texts, rewards: Tensor, first: Tensor, sources: list[str]) -> dict:
    """Metrics over all comparisons, named as in metrics.jsonl without eval_; {} if there are no comparisons."""
    example = torch.arange(len(first)).repeat_interleave(texts.pairs)  # [P] each pair's example
    if not len(example):
        return {}
    index = lambda side: torch.tensor(pc.list_flatten(texts.rows.data.column(side)).to_numpy())
    chosen, rejected = (rewards[first[example] + index(side)] for side in ("chosen", "rejected"))
    prompt, file = texts.keys[example], file_names(sources)
    columns = texts.rows.select_columns(["subset", "source", "chosen"])
    names = by_name((row["subset"], file[row["source"]]) for row in columns for _ in row["chosen"])
    return {
        **agreement(chosen, rejected, prompt),
        "reward_margin": (chosen - rejected).mean().item(),
        **calibration(chosen, rejected),
        "by_name": {name: agreement(chosen[i], rejected[i], prompt[i]) for name, i in names.items()},
    }


def benchmarks(texts: Texts, rewards: Tensor, sizes: Tensor, schemas: list[str], by_subset: dict) -> dict:
    """Scores of the benchmarks in the data, and in how many rows with three or more answers a right one ranks first."""
    found: dict[str, list[dict]] = {"reward_bench_2": [], "rm_bench": []}
    wins = []
    columns = texts.rows.select_columns(["id", "subset", "source", "chosen", "rejected"])
    for row, own in zip(columns, rewards.split(sizes.tolist())):
        right, scores = set(row["chosen"]) - set(row["rejected"]), own.tolist()
        correct, wrong = ([r for k, r in enumerate(scores) if (k in right) == side] for side in (True, False))
        if len(own) < 3 or not correct or not wrong:
            continue
        entry = {"id": row["id"], "subset": row["subset"], "correct": correct, "wrong": wrong}
        wins.append(best_of_n(entry))
        if schemas[row["source"]] == "RewardBench 2":
            found["reward_bench_2"].append(entry)
        elif schemas[row["source"]] == "answers in lists" and len(correct) == len(wrong) == 3:
            found["rm_bench"].append(entry)
    result: dict = {"best_of_n_accuracy": {"prompts": len(wins), "accuracy": sum(wins) / len(wins)}} if wins else {}
    if found["reward_bench_2"]:
        with refusing("RewardBench 2", ValueError):
            result["reward_bench_2"] = reward_bench_2(found["reward_bench_2"])
    if found["rm_bench"]:
        result["rm_bench"] = rm_bench(found["rm_bench"])
    if sections := reward_bench({name: row["accuracy"] for name, row in by_subset.items()}):
        result["reward_bench"] = sections
    return result


def table(result: dict) -> str:
    """Format the result for people."""
    done = "scored {completions:,} completions of {prompts:,} prompts in {seconds:.1f} s"
    lines = [(done + "; rewards have mean {reward_mean:.4f}, standard deviation {reward_std:.4f}").format_map(result)]
    if "accuracy" in result:
        names = {"all": result, **{printable(name): row for name, row in result["by_name"].items()}}
        wide = max(map(len, names))
        figures = "  {accuracy:>8.4f}  {accuracy_low:.4f}-{accuracy_high:.4f}  {pairs:>8,}  {ties:>6,}"
        lines.append(" " * wide + "  accuracy  95 % interval     pairs    ties")
        lines += [f"{name:<{wide}}" + figures.format_map(row) for name, row in names.items()]
        lines.append(f"calibration error {result['calibration_error']:.4f}\n  predicted  observed   pairs")
        lines += ["  {predicted:>9.3f}  {observed:>8.3f}  {pairs:>6,}".format_map(row) for row in result["calibration"]]
    if "best_of_n" in result:
        line = "best of n: mean highest reward {reward_mean:.4f} in {prompts:,} rows with {completions:,} completions"
        lines.append(line.format_map(result["best_of_n"]))
    if "best_of_n_accuracy" in result:
        line = "best of n: a best answer has the highest reward in {accuracy:.1%} of {prompts:,} rows"
        lines.append(line.format_map(result["best_of_n_accuracy"]))
    for name, title in (("reward_bench", "RewardBench"), ("reward_bench_2", "RewardBench 2"), ("rm_bench", "RM-Bench")):
        if name in result:
            parts = (f"{printable(part)} {score:.4f}" for part, score in result[name].items())
            lines.append(f"{title}: {', '.join(parts)}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    """Score the data and return the object for stdout."""
    for source in args.data:
        fingerprint(source)  # refuse missing data before the model is loaded
    if args.output and (args.output.is_dir() or not ((p := args.output.parent).is_dir() and os.access(p, os.W_OK))):
        raise InputError(f"--output {args.output}: cannot be written; choose a file in an existing, writable folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = "auto" if device.type == "cuda" else torch.float32
    config, tokenizer = load_config(args.model)
    positions = min(getattr(config, "max_position_embeddings", 1 << 20), tokenizer.model_max_length, 1 << 20)
    trained = {"separator": "\n", "max_length": positions} | getattr(config, "minirm", {})
    separator = trained["separator"] if args.separator is None else args.separator
    args.max_length = trained["max_length"] if args.max_length is None else args.max_length
    if not 0 < args.max_length <= positions:
        raise InputError(f"--max_length must lie in 1..{positions} (positions of {args.model}), got {args.max_length}")
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template)

    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as folder:
        texts = store(Path(folder) / "texts", args.data, tokenizer, separator, "all", renames(args.columns))
        if not len(texts.rows):
            raise InputError(f"{', '.join(args.data)}: found no rows")
        sizes = torch.tensor(pc.list_value_length(texts.rows.data.column("texts")).to_numpy()).long()  # [N] completions
        first = sizes.cumsum(0) - sizes
        texts = texts._replace(rows=texts.rows.add_column("first", first.numpy()))
        model = load_model(args.model, config, DTYPES.get(args.precision, auto)).to(device)
        since = time.perf_counter()
        rewards = score(texts, int(sizes.sum()), model, tokenizer, args)
        seconds = time.perf_counter() - since
        result = {
            "model": args.model, "data": args.data, "prompts": len(texts.keys.unique()), "completions": len(rewards),
            "seconds": seconds, "completions_per_second": len(rewards) / seconds,
            "reward_mean": rewards.mean().item(), "reward_std": rewards.std().item(),
            "dropped_ties": sum(row.get("dropped: tie", 0) for row in texts.report),
            **measured(texts, rewards, first, args.data),
        }  # fmt: skip
        schemas = [row.get("schema", "") for row in texts.report]
        result |= benchmarks(texts, rewards, sizes, schemas, result.get("by_name", {}))
        ranked = torch.tensor([schema.startswith("ranked") for schema in schemas])[texts.sources]  # [N]
        if n := int(ranked.sum()):
            best = torch.segment_reduce(rewards, "max", lengths=sizes)[ranked].mean().item()
            result["best_of_n"] = {"prompts": n, "completions": int(sizes[ranked].sum()), "reward_mean": best}
        if args.output:
            lines = []
            columns = texts.rows.select_columns(["where", "chosen", "rejected"])
            for row, own, in_order in zip(columns, rewards.split(sizes.tolist()), ranked):
                r = own.tolist()
                if in_order or not row["chosen"]:
                    found: dict = {"scores": r, "ranking": sorted(range(len(r)), key=lambda k: (-r[k], k))}
                else:
                    found = {side: r[row[side][0]] for side in ("chosen", "rejected")}
                lines.append(as_json({"where": row["where"], **found}) + "\n")
            with writing(args.output):
                put(args.output, "".join(lines).encode())
    return result


def main(argv: list[str] | None = None) -> int:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        result = run(parse_args(argv))
    except Stop as stop:
        line, code = stop.args
    except KeyboardInterrupt:
        line, code = "interrupted; nothing was written", 128 + signal.SIGINT
    except InputError as error:
        line, code = f"error: {error}", 2
    else:
        print(table(result), file=sys.stderr)
        print(as_json(result))
        return 0
    print(printable(f"minirm.score: {line}"), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
