"""What a run prints: at the start, how the data was read and one pair as the model sees it; at the end, the quality."""

import os
import shlex
import sys
from collections import Counter
from pathlib import Path

from torch import nn
from tqdm import tqdm

from minirm.data.prepare import totals
from minirm.data.tokens import common_prefix
from minirm.errors import printable
from minirm.freeze import Frozen
from minirm.lora import without_adapter
from minirm.rows import Batch
from minirm.start import Inputs

# AdamW moves a weight by about the learning rate per step. Runs with a shorter total path than this stayed at chance.
LEAST_PATH = 1e-3
# With --loss trlx, printed at the start and added to the model card.
PUBLISHED = """--loss trlx follows the published code: it reads both rewards just before the longer answer's EOS, in held-out
figures too. Programs that load the model read the reward at EOS; python -m minirm.score measures the accuracy there."""
# What the table calls the counts whose names do not explain themselves.
LABELS = {"separate tokens": "tokens, each answer with its prompt", "shared tokens": "tokens, each prompt once"}


def print0(line: str) -> None:
    """Print on rank 0 to stderr without breaking the progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)


def start_report(args, inputs: Inputs, sample: list[Batch], total_steps: int) -> str:
    """All flags, the data's table, padding (measured in `sample`), the trained share, the marked pair, and warnings."""
    data, layout, not_shared = inputs.data, inputs.layout, inputs.not_shared
    padding = 1 - sum(batch.tokens for batch in sample) / sum(batch.input_ids.numel() for batch in sample)
    lines = [f"  --{name} {value!r}" for name, value in sorted(vars(args).items())]
    lines += ["", data_table(data.report, layout), ""]
    lines += [f"padding: {padding:.1%} of the tokens in a micro-batch (mean of {len(sample)})"]
    lines += [freeze_line(inputs.model, inputs.frozen), "", marked_pair(data.train[0], inputs.tokenizer), ""]
    margins = (args.loss == "trlx" or args.margin_scale != 1) and any(map(any, data.train["margin"]))
    alone = args.pair_weight == "prompt" and max(data.train["prompt_pairs"]) == 1
    for said, line in (
        (not_shared, f"each completion gets its own row, because shared rows would not be exact: {not_shared}"),
        (args.loss == "trlx", PUBLISHED),
        (margins and args.loss == "trlx", "warning: --loss trlx ignores the margins in the data"),
        (args.margin_scale != 1 and not margins, "warning: --margin_scale has no effect: the data has no margins"),
        (alone, "warning: --pair_weight has no effect: every prompt has one comparison"),
        *rate_warnings(args, total_steps),
    ):
        lines += [line, ""] if said else []
    return "\n".join(lines)


def rate_warnings(args, total_steps: int) -> list[tuple[bool, str]]:
    """(whether to print it, warning) for flags with which the weights move too little to learn anything."""
    rate, warm_up = args.learning_rate, args.warmup_steps if args.lr_scheduler_type != "constant" else 0
    path = rate * total_steps
    unreached = f"--warmup_steps {warm_up} takes all {total_steps} steps, so --learning_rate is never reached"
    little = f"{total_steps} steps at --learning_rate {rate:g} move a weight by at most {path:.1g}"
    advice = "but weights are about 0.02; raise --learning_rate (1e-4 for a model below 1B), or train longer"
    return [
        (warm_up >= total_steps > 0, f"warning: {unreached}; warm up for a tenth of the steps"),
        (0 < path < LEAST_PATH and args.freeze_ratio < 1, f"warning: {little}, {advice}"),
    ]


def data_table(report: dict[str, list[dict]], row_layout: str) -> str:
    """Each source's schema, the numbers of its comparisons and tokens, and how often the chosen answer is longer."""
    rows = [("train", row) for row in report["train"]] + [("held out", row) for row in report["eval"]]
    counts = [totals([row]) for _, row in rows]
    total = sum(counts, Counter())
    keys = ["read", "held out", *sorted(key for key in total if key.startswith("dropped"))]
    keys += ["kept", "kept, prompt truncated", "kept, answer truncated", "prompt also in the training data"]
    keys += ["special tokens in the text", "prompts with only one answer", "prompts", "separate tokens"]
    keys += ["shared tokens"] if row_layout == "shared" else []
    lines = [("comparisons", *(part for part, _ in rows))]
    if len(rows) > 2:
        lines.append(("", *(printable(Path(row["source"]).name)[-24:] for _, row in rows)))
    for key in keys:
        if total[key] or key in ("read", "kept"):
            lines.append((LABELS.get(key, key), *(f"{count[key]:,}" for count in counts)))
    if row_layout == "shared":
        saved = ((c["separate tokens"] - c["shared tokens"]) / max(1, c["separate tokens"]) for c in counts)
        lines.append(("saved", *(f"{share:.1%}" for share in saved)))
    for which in ("longer", "shorter"):
        shares = (count[f"{which} answer chosen"] / max(1, count["kept"]) for count in counts)
        lines.append((f"the chosen answer is {which}", *(f"{share:.1%}" for share in shares)))
    width, wide = max(len(line[0]) for line in lines), max(12, *(len(cell) for line in lines for cell in line[1:]))
    table = [f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell in cells) for name, *cells in lines]
    schemas = [f"{part:<8}  {source_line(row)}" for part, row in rows if "schema" in row]
    return "\n".join([*schemas, "", *table])


def source_line(row: dict) -> str:
    """A source's schema, the columns it reads, the text columns it ignores, and the files it skips."""
    line = f"{typed(row['source'])}: {printable(row['schema'])}"
    for key, what in (("columns", "columns"), ("not used", "ignored columns"), ("not read", "skipped files")):
        if names := row.get(key):
            more = f", ... ({len(names)} in all)" if len(names) > 9 else ""
            line += f"; {what}: {', '.join(map(printable, names[:9]))}{more}"
    return line


def freeze_line(model: nn.Module, frozen: Frozen) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = "no layers" if not frozen.layers else f"layers 0-{len(frozen.layers) - 1} of {frozen.total_layers}"
    line = f"frozen: {layers}; trained: {trained:,} of {total:,} parameters ({trained / total:.1%})"
    if bare := without_adapter(model, frozen):
        line += f"; also frozen, because they have no adapters: {', '.join(bare)}"
    return line


def marked_pair(group: dict, tokenizer) -> str:
    """The first comparison, decoded from its ids, with scored tokens in [[ ]]. The last one has the end reward."""
    prefix, sides = group["prefix"], {side: group["completions"][group[side][0]] for side in ("chosen", "rejected")}
    same = common_prefix([*sides.values()])
    shown = tokenizer.decode(prefix + sides["chosen"][:same])
    lines = ["the first pair, with scored tokens in [[ ]]; the reward of an answer is read at its last token:"]
    lines.append(f"  both      {('...' if len(shown) > 300 else '') + shown[-300:]!r}")
    for side, ids in sides.items():
        text = tokenizer.decode(ids[same:])
        text = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
        end = f"{len(prefix) + len(ids)} tokens, the last is {tokenizer.decode(ids[-1:])!r}"
        lines.append(f"  {side:<8}  [[{text!r}]] {end}")
    return "\n".join(lines)


def headline(row: dict) -> str:
    """Format an evaluation's row of metrics.jsonl for people."""
    accuracy = "accuracy {eval_accuracy:.4f} ({eval_accuracy_low:.3f} to {eval_accuracy_high:.3f})"
    rest = "loss {eval_loss:.4f}, reward margin {eval_reward_margin:.4f} ({eval_pairs} pairs, {eval_ties} ties)"
    return f"step {{step}}: held-out {accuracy}, {rest}".format_map(row)


def last_words(exported: dict, last: dict, output: Path) -> str:
    """The last line of a run: the quality of the exported model and of the last one, from two evaluation rows."""
    line = "held-out accuracy {eval_accuracy:.4f} on {eval_pairs} pairs".format_map(exported)
    if exported["step"] < last["step"]:
        line += " at step {step}, which had the lowest loss, {eval_loss:.4f}".format_map(exported)
        line += " (at the last step, {step}: accuracy {eval_accuracy:.4f}, loss {eval_loss:.4f})".format_map(last)
    which, alone = length_alone(exported)
    if exported["eval_accuracy_low"] <= 0.5:
        line += f", no better than chance (its 95 % interval starts at {exported['eval_accuracy_low']:.3f})"
    elif exported["eval_accuracy_low"] <= alone:
        line += f", no better than always choosing the {which} answer ({alone:.4f})"
    advice = "load it with AutoModelForSequenceClassification.from_pretrained"
    return f"{line}; the model is in {printable(output)}: {advice}"


def length_alone(row: dict) -> tuple[str, float]:
    """("longer" or "shorter", accuracy of always choosing that answer), whichever is more accurate."""
    longer = row["eval_length_accuracy"]
    shorter = sum(bucket["pairs"] for bucket in row["eval_by_length"] if bucket["high"] < 0) / row["eval_pairs"]
    return ("longer", longer) if longer >= shorter else ("shorter", shorter)


def final_report(row: dict) -> str:
    """Details of an evaluation: whether length explains the accuracy, where in the answer it arises, calibration."""
    which, alone = length_alone(row)
    model = "{eval_accuracy:.1%} ({eval_accuracy_low:.1%} to {eval_accuracy_high:.1%})".format_map(row)
    by_length = []
    for bucket in row["eval_by_length"]:
        span = "{low:+}..{high:+}" if bucket["low"] < bucket["high"] else "{low:+}"
        by_length.append((span + ": {accuracy:.2f} ({pairs})").format_map(bucket))
    by_tenth = " ".join(f"{share:.2f}" for share in row["eval_accuracy_by_position"])
    lines = [
        f"correct          {model} of the held-out pairs; always choosing the {which} answer: {alone:.1%}",
        f"by length        {', '.join(by_length)}: accuracy (pairs) by chosen minus rejected tokens",
        f"along the answer {by_tenth}: accuracy by tenths of the answer",
        f"calibration      sigmoid(|difference|) differs from accuracy by {row['eval_calibration_error']:.3f} on average",
    ]
    if alone >= row["eval_accuracy_low"]:
        what = f"always choosing the {which} answer gets {alone:.1%} right"
        lines.append(f"Length alone does as well as this model: {what}.")
    return "\n".join(lines)


def typed(value) -> str:
    """Format a value as typed on a command line. Absolute paths lose their folders, since the card may be published."""
    if isinstance(value, list):
        return " ".join(map(typed, value))
    text = printable(value)
    return shlex.quote(Path(text).name if Path(text).is_absolute() else text)
