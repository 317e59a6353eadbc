"""What a person reads when a run starts: what became of the data, what is frozen, and one pair as the model sees it."""

from pathlib import Path

from torch import nn

from minirm.data import Prepared, common_prefix, totals
from minirm.freeze import Frozen
from minirm.rows import Batch


def start_report(
    data: Prepared, tokenizer, model: nn.Module, frozen: Frozen, row_layout: str, sample: list[Batch]
) -> str:
    """Three paragraphs: the table of comparisons, the share that is trained, the marked pair.

    `sample` is some micro-batches of one process, to tell how much of a batch is padding.
    """
    padding = 1 - sum(batch.tokens for batch in sample) / sum(batch.input_ids.numel() for batch in sample)
    return "\n".join(
        [
            "",
            data_table(data.report, row_layout),
            "",
            f"padding in a micro-batch: {padding:.1%} of its places (mean of {len(sample)})",
            freeze_line(model, frozen),
            "",
            marked_pair(data.train[0], tokenizer),
            "",
        ]
    )


def data_table(report: dict[str, list[dict]], row_layout: str) -> str:
    """Comparisons read, dropped and kept, a column for each source; tokens; and how far mere length would get."""
    parts = [("train", row) for row in report["train"]] + [("held out", row) for row in report["eval"]]
    counts = [totals([row]) for _, row in parts]
    lines = [("comparisons", *(part for part, _ in parts))]
    if len(parts) > 2:
        lines.append(("", *(Path(row["source"]).name[:24] if "schema" in row else "" for _, row in parts)))

    def line(name: str, key: str | None = None) -> None:
        values = [count[key or name] for count in counts]
        if any(values) or name in ("read", "kept"):
            lines.append((name, *(f"{value:,}" for value in values)))

    line("read")
    line("held out")
    for reason in sorted({key for count in counts for key in count if key.startswith("dropped")}):
        line(reason)
    line("kept")
    line("of them with the prompt cut", "kept, prompt cut")
    line("of them with an answer cut", "kept, answer cut")
    line("of them with a prompt of the training data", "prompt also in the training data")
    line("prompts")
    line("tokens, each answer with its prompt", "separate tokens")
    if row_layout == "shared":
        line("tokens, each prompt once", "shared tokens")
        saved = (1 - count["shared tokens"] / max(1, count["separate tokens"]) for count in counts)
        lines.append(("saved", *(f"{share:.1%}" for share in saved)))
    for which in ("longer", "shorter"):
        shares = (count[f"{which} answer chosen"] / max(1, count["kept"]) for count in counts)
        lines.append((f"the {which} answer is the chosen one", *(f"{share:.1%}" for share in shares)))
    width, wide = max(len(line[0]) for line in lines), max(12, *(len(cell) for line in lines for cell in line[1:]))
    schemas = [f"{part}: {row['source']}, read as {row['schema']}" for part, row in parts if "schema" in row]
    return "\n".join(
        [*schemas, "", *(f"{name:<{width}}" + "".join(f"  {c:>{wide}}" for c in cells) for name, *cells in lines)]
    )


def freeze_line(model: nn.Module, frozen: Frozen) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = "no layer" if not frozen.layers else f"layers 0-{len(frozen.layers) - 1} of {frozen.total_layers}"
    return f"frozen: {layers}; trained: {trained:,} of {total:,} parameters ({trained / total:.1%})"


def marked_pair(group: dict, tokenizer, context: int = 300) -> str:
    """The first comparison as decoded from its ids, scored tokens in [[ ]]; the end reward is read at the last one."""
    prefix, chosen, rejected = (
        group["prefix"],
        *(group["completions"][group[side][0]] for side in ("chosen", "rejected")),
    )
    same = common_prefix([chosen, rejected])
    shown = tokenizer.decode(prefix + chosen[:same])
    lines = ["the first pair; what is scored stands in [[ ]], the reward of an answer is read at its last token:"]
    lines.append(f"  both      {('...' if len(shown) > context else '') + shown[-context:]!r}")
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        text = tokenizer.decode(ids[same:])
        text = text if len(text) <= context else f"{text[: context // 2]} ... {text[-context // 2 :]}"
        lines.append(
            f"  {name:<8}  [[{text!r}]] {len(prefix) + len(ids)} tokens, the last is {tokenizer.decode(ids[-1:])!r}"
        )
    return "\n".join(lines)


def model_card(args, report: dict, result: dict, last: dict) -> str:
    """README.md of a trained model: what it is, what it was trained on, how good it is, how to load it.

    result, last: evaluation rows, of the model that is exported and of the run's end.
    """
    beside = ""
    if result["step"] < last["step"]:
        beside = (
            f"\n| the run's last step, {last['step']:,} | held-out accuracy {last['eval_accuracy']:.4f}, loss "
            f"{last['eval_loss']:.4f}; the model is that of step {result['step']:,} |"
        )
    counts = totals(report["train"])
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
---

# A reward model

Scores how good an answer to a prompt is; higher is better, and only differences between answers to one prompt mean
anything. Trained with minirm from `{args.model}`.

| | |
| --- | --- |
| held-out accuracy | {result["eval_accuracy"]:.4f} on {result["eval_pairs"]:,} pairs ({result["eval_ties"]} ties, counted as wrong) |
| held-out loss | {result["eval_loss"]:.4f} |
| trained on | {counts["kept"]:,} pairs, {counts["prompts"]:,} prompts, {result["step"]:,} optimizer steps |{beside}
| recipe | `--loss {args.loss} --freeze_ratio {args.freeze_ratio} --learning_rate {args.learning_rate}` in {args.precision} |

The reward is read at the EOS token, so end every text with it:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
text = prompt + {args.separator!r} + answer + tokenizer.eos_token
with torch.no_grad():
    reward = model(**tokenizer(text, return_tensors="pt")).logits[0, 0]
```
"""
