"""Scores with a trained reward model: `python -m minirm.score --model DIR --data FILE [FILE ...] [--output scores.jsonl]`.

Comparisons are measured: accuracy, calibration, by file and subset. Rows {"prompt", "completions"} are scored and ranked.
One JSON object on stdout, a table on stderr. Takes any sequence-classification model of transformers with one label; of
those that are a decoder and a linear head, completions of a prompt are computed behind one copy of it.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import datasets
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from minirm.attention import attention_mask, probe_shared_rows, use_sdpa
from minirm.data import Texts, by_prompt, set_chat_template, store, tokenise
from minirm.measure import agreement, by_name, calibration
from minirm.model import RewardModel
from minirm.rows import collate
from minirm.sources import InputError, fingerprint, one_line

DTYPES = {"auto": "auto", "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WORTH_SHARING = (
    0.9  # of the tokens: a row of several completions has a mask to look at, which costs as much as it saves
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minirm.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = _refuse  # argparse prints the whole usage; one line says what is wrong
    add = parser.add_argument
    add("--model", required=True, help="name or folder of a reward model")
    add(
        "--data",
        required=True,
        nargs="+",
        help="files or datasets as for --train_data of train.py, or with completions to rank",
    )
    add("--output", help="file for the scores, one JSON object for each row of the data, in its order")
    add("--separator", help="between prompt and answer; default: what the model was trained with, else a line break")
    add("--chat_template", help="Jinja file, for messages; default: the model's own")
    add("--max_length", type=int, help="tokens; default: what the model was trained with, else its positions")
    add("--batch_size", type=int, default=8192, help="tokens in a forward pass, padding included (8192)")
    add("--precision", default="auto", choices=[*DTYPES], help="auto: as the weights are stored on CUDA, fp32 on CPU")
    args = parser.parse_args(argv)
    for name in ("max_length", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} must be positive, got {value}")
    return args


def _refuse(message: str) -> None:
    raise InputError(message)


def load(name: str, dtype) -> tuple:
    """(classifier in evaluation mode, config, tokenizer). Raises InputError for what is not a reward model with one label."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - of many kinds, huggingface_hub's among them
        raise InputError(f"--model {name}: no model folder or name that can be loaded ({one_line(error)})") from None
    (kind, *_) = config.architectures or ["a model without a head"]
    if not kind.endswith("ForSequenceClassification"):
        raise InputError(f"--model {name}: {kind}, not a sequence-classification model; give a trained reward model")
    if config.num_labels != 1:
        raise InputError(f"--model {name}: a classifier with {config.num_labels} labels; a reward model has one")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - no weights there, half a file, other shapes than in config.json
        raise InputError(f"--model {name}: its weights cannot be loaded ({one_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"--model {name}: weights missing: {', '.join(missing[:5])} ({len(missing)})")
    return model.eval().requires_grad_(False), config, tokenizer


def as_reward_model(classifier, config) -> RewardModel | None:
    """The same as trunk and head, if it is a decoder and one linear head on the last token; else None."""
    prefix = classifier.base_model_prefix + "."
    heads = {name for name in classifier.state_dict() if not name.startswith(prefix)}
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    if heads != {"score.weight"} or not decoder or config.is_encoder_decoder:
        return None
    model = RewardModel(classifier.base_model)
    model.score.weight = torch.nn.Parameter(classifier.score.weight.float(), requires_grad=False)
    return model.eval()


Scores = Iterator[tuple[int, int, float]]  # (number of the example, of the completion, its reward)


def decoder_scorer(model: RewardModel, config, tokenizer, args, counts: list[Counter], device) -> Callable[..., Scores]:
    """prompts, each a list of its examples -> Scores, in rows like those of training."""
    if reason := probe_shared_rows(config, max_length=args.max_length):
        print(
            f"every completion gets a row of its own, since shared rows would not be exact: {reason}", file=sys.stderr
        )
    use_sdpa(model.trunk)
    dtype, limit = next(model.trunk.parameters()).dtype, 2 * args.max_length

    def rows_of(group: dict, layout: str) -> tuple[int, int]:
        """(tokens of the longest row, number of rows)"""
        if layout == "shared" and group["shared_tokens"] <= limit:
            return group["shared_tokens"], 1
        longest = len(group["prefix"]) + max(map(len, group["completions"]))
        return (limit if layout == "shared" else longest), len(group["completions"])

    def score(prompts: list[list[dict]]) -> Scores:
        by_layout: dict[str, list] = {"shared": [], "separate": []}
        for group, places in tokenise(
            prompts, tokenizer, counts, max_length=args.max_length, overlong="truncate", keep="all", end_turn=False
        ):
            separate = group["shared_tokens"] + len(group["prefix"]) * (len(group["completions"]) - 1)
            layout = "shared" if not reason and group["shared_tokens"] < WORTH_SHARING * separate else "separate"
            by_layout[layout].append((*rows_of(group, layout), group, places))
        for layout, found in by_layout.items():
            found.sort(key=lambda item: item[0], reverse=True)  # the longest first: what does not fit shows at once
            for some in batches(found, args.batch_size):
                batch = collate([group for *_, group, _ in some], row_layout=layout, pad_id=0, row_limit=limit)
                mask = attention_mask(
                    batch.segments, batch.position_ids, batch.visible, model.trunk.config, dtype, device
                )
                batch = batch.to(device)
                rewards = model(batch.input_ids, mask, batch.position_ids)
                ends, first = rewards.flatten()[batch.places[:, -1]].tolist(), 0
                for *_, group, places in some:
                    for example, place in places:
                        yield from ((example["number"], k, ends[first + index]) for k, index in place.items())
                    first += len(group["completions"])

    return score


def classifier_scorer(classifier, tokenizer, args, device) -> Callable[..., Scores]:
    """The same for all other models: a text a row, with the tokenizer's own special tokens."""
    if tokenizer.pad_token_id is None:
        raise InputError(f"--model {args.model}: its tokenizer has no pad token; set pad_token")

    def score(prompts: list[list[dict]]) -> Scores:
        texts = [
            (e["number"], k, text, e["chat"]) for prompt in prompts for e in prompt for k, text in enumerate(e["texts"])
        ]
        options = {"truncation": True, "max_length": args.max_length}
        ids = [tokenizer(text, add_special_tokens=not chat, **options) for *_, text, chat in texts]
        found = [(len(row["input_ids"]), 1, row, text) for row, text in zip(ids, texts)]
        found.sort(key=lambda item: item[0], reverse=True)
        for some in batches(found, args.batch_size):
            batch = tokenizer.pad([row for *_, row, _ in some], return_tensors="pt").to(device)
            rewards = classifier(**batch).logits[:, 0].tolist()
            yield from ((number, k, reward) for (*_, (number, k, *_)), reward in zip(some, rewards))

    return score


def batches(found: list[tuple], tokens: int) -> Iterator[list[tuple]]:
    """Cuts a list of (length of a row, rows, ...), the longest first, so that rows x the longest is at most `tokens`."""
    start, rows = 0, 0
    for i, (_, more, *_) in enumerate(found):
        if rows and (rows + more) * found[start][0] > tokens:
            yield found[start:i]
            start, rows = i, 0
        rows += more
    if rows:
        yield found[start:]


def measured(texts: Texts, rewards: list[list[float]], sources: list[str]) -> dict:
    """Figures of all comparisons, by the names that metrics.jsonl has behind eval_; {} without any."""
    columns = texts.rows.select_columns(["chosen", "rejected", "subset", "source"])
    pairs = [(r[c], r[j], k, (row["subset"], Path(sources[row["source"]]).stem if len(sources) > 1 else ""))
             for r, row, k in zip(rewards, columns, texts.keys.tolist()) for c, j in zip(row["chosen"], row["rejected"])]  # fmt: skip
    if not pairs:
        return {}
    chosen, rejected = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    prompt = torch.tensor([pair[2] for pair in pairs])

    def some(i: Tensor) -> dict:
        return agreement(chosen[i], rejected[i], prompt[i])

    figures = some(torch.arange(len(pairs))) | {"reward_margin": (chosen - rejected).mean().item()}
    figures |= calibration(chosen, rejected)
    return figures | {"by_name": {name: some(i) for name, i in by_name(pair[3] for pair in pairs).items()}}


def table(result: dict) -> str:
    """For people."""
    done = f"{result['completions']:,} completions of {result['prompts']:,} prompts in {result['seconds']:.1f} s"
    lines = [f"{done}; rewards {result['reward_mean']:.4f} +- {result['reward_std']:.4f}"]
    if "accuracy" in result:
        names = {"all": result, **result["by_name"]}
        wide = max(map(len, names))
        lines.append(f"{'':<{wide}}  accuracy  95 % interval     pairs    ties")
        for name, row in names.items():
            interval = f"{row['accuracy_low']:.4f}-{row['accuracy_high']:.4f}"
            lines.append(f"{name:<{wide}}  {row['accuracy']:>8.4f}  {interval}  {row['pairs']:>8,}  {row['ties']:>6,}")
        lines.append(f"calibration error {result['calibration_error']:.4f}\n  predicted  observed   pairs")
        lines += [
            f"  {row['predicted']:>9.3f}  {row['observed']:>8.3f}  {row['pairs']:>6,}" for row in result["calibration"]
        ]
    if best := result.get("best_of_n"):
        lines.append(
            f"best of n: {best['reward_mean']:.4f} on average, of {best['prompts']:,} rows with {best['completions']:,}"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    for source in args.data:
        fingerprint(source)  # refuses what is not there, before the model is loaded
    output = args.output and Path(args.output)
    if output and not output.parent.is_dir():
        raise InputError(f"--output {output}: there is no folder {output.parent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "fp32" if args.precision == "auto" and device.type == "cpu" else args.precision
    classifier, config, tokenizer = load(args.model, DTYPES[precision])
    trained = getattr(config, "minirm", {})
    separator = args.separator.replace(r"\n", "\n") if args.separator is not None else trained.get("separator", "\n")
    positions = min(getattr(config, "max_position_embeddings", math.inf), tokenizer.model_max_length)
    args.max_length = args.max_length or trained.get("max_length") or int(min(positions, 1 << 20))
    if args.max_length > positions:
        raise InputError(f"--max_length {args.max_length}: {args.model} has {positions} positions; choose no more")
    if args.chat_template:
        set_chat_template(tokenizer, args.chat_template)

    with tempfile.TemporaryDirectory() as folder:
        texts = store(Path(folder) / "texts", args.data, tokenizer, separator, "all")
        if not len(texts.rows):
            raise InputError(f"{', '.join(args.data)}: no rows")
        counts = [Counter() for _ in args.data]
        if model := as_reward_model(classifier, config):
            score = decoder_scorer(model.to(device), config, tokenizer, args, counts, device)
        else:
            score = classifier_scorer(classifier.to(device), tokenizer, args, device)
        sizes = [len(row) for row in texts.rows["texts"]]
        start = [0]
        for size in sizes:
            start.append(start[-1] + size)
        rewards = torch.full((start[-1],), math.nan, dtype=torch.float64)
        numbered = texts._replace(rows=texts.rows.add_column("number", list(range(len(sizes)))))
        since = time.perf_counter()
        with tqdm(total=start[-1], desc="scoring", unit=" completions", file=sys.stderr) as bar:
            for prompts in by_prompt(numbered, torch.ones(len(sizes), dtype=torch.bool)):
                for number, k, reward in score(prompts):
                    rewards[start[number] + k] = reward
                    bar.update()
        seconds = time.perf_counter() - since
        of = [rewards[a:b].tolist() for a, b in pairwise(start)]
        result = {
            "model": args.model,
            "data": args.data,
            "prompts": len(texts.keys.unique()),
            "completions": len(rewards),
        }
        result |= {"seconds": seconds, "completions_per_second": len(rewards) / seconds}
        result |= {"reward_mean": rewards.mean().item(), "reward_std": rewards.std().item()}
        result |= {"dropped_ties": sum(row.get("dropped: tie", 0) for row in texts.report)}
        result |= measured(texts, of, args.data)
        ranked = [row["schema"].startswith("ranked") for row in texts.report]
        lists = [r for r, source in zip(of, texts.rows["source"]) if ranked[source]]
        if lists:
            best = sum(map(max, lists)) / len(lists)
            result["best_of_n"] = {"prompts": len(lists), "completions": sum(map(len, lists)), "reward_mean": best}
        if output:
            partial = output.with_name(output.name + ".partial")
            with open(partial, "w") as file:
                for row, r in zip(texts.rows.select_columns(["where", "chosen", "rejected", "source"]), of):
                    line: dict = {"where": row["where"]}
                    if ranked[row["source"]] or not row["chosen"]:
                        line |= {"scores": r, "ranking": sorted(range(len(r)), key=lambda k: (-r[k], k))}
                    else:
                        line |= {"chosen": r[row["chosen"][0]], "rejected": r[row["rejected"][0]]}
                    file.write(json.dumps(line) + "\n")
            os.replace(partial, output)
    return json.loads(json.dumps(result), parse_constant=lambda _: None)  # what is not finite becomes null


def main(argv: list[str] | None = None) -> int:
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        result = run(parse_args(argv))
    except InputError as error:
        print(f"minirm.score: error: {error}", file=sys.stderr)
        return 2
    print(table(result), file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
