"""What a person reads when a run starts: what became of the data, what is frozen, and one pair as the model sees it."""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minirm.checkpoint import UNSAID
from minirm.data import Prepared, common_prefix, totals
from minirm.freeze import Frozen
from minirm.plot import read_rows
from minirm.rows import Batch

# README.md of a trained model; see model_card.
CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
{base_model}---

# A reward model

Scores how good an answer to a prompt is. Higher is better, and only differences between answers to the same prompt mean
anything. Trained from `{model}` with minirm.

| held out | |
| --- | --- |
| accuracy | {result[eval_accuracy]:.4f}, 95 % interval {result[eval_accuracy_low]:.4f} to {result[eval_accuracy_high]:.4f} |
| pairs | {result[eval_pairs]:,}, of them {result[eval_ties]:,} with equal rewards, which count as wrong |
| accuracy of choosing the longer answer | {result[eval_length_accuracy]:.4f} |
| loss | {result[eval_loss]:.4f} |
| calibration error | {result[eval_calibration_error]:.4f} |
| rewards | mean {result[eval_reward_mean]:.4f}, standard deviation {result[eval_reward_std]:.4f} (`mean`, `std` in config.json) |

## Use

The reward is read at `{eos}`, so every text ends with it. Pad on the right.{published}

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder){half}

def reward(prompts, completions, **_):
    gap = lambda p, c: {args.separator!r} if p[-1:].strip() and c[:1].strip() else ""  # none where whitespace stands
    texts = [p + gap(p, c) + c{plus_eos} for p, c in zip(prompts, completions)]
    batch = tokenizer(texts, padding=True, truncation=True, max_length={args.max_length}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].tolist()
```

{chat}TRL takes that function: `RLOOTrainer(policy, reward_funcs=reward, ...)`. Given the folder instead, TRL joins texts
without BOS and EOS and reads the reward at another token.

vLLM:

```bash
vllm serve folder --runner pooling
curl localhost:8000/classify -H "Content-Type: application/json" \\
    -d '{{"input": [{text}], "use_activation": false}}'    # data[0].probs[0] is the reward
```

## Training

{counts[kept]:,} pairs of {counts[prompts]:,} prompts; the model of step {result[step]:,}{best}.

```
train.py {recipe}

{table}
```

| step | held-out loss | accuracy |
| --- | --- | --- |
{curve}
"""

# What it says besides if the tokenizer has a chat template.
CHAT = """Of messages, `tokenizer.apply_chat_template(messages, tokenize=False)` is the text, its last token the one that is scored;
it is tokenised with `add_special_tokens=False`. That is what TRL does with messages if given the folder, `reward_funcs=folder`.

"""


# What it says besides, and the start, with --loss trlx.
PUBLISHED = """--loss trlx, as published, reads both rewards at the place before the longer answer's EOS, for held-out figures as
well. Whoever loads the model reads them at EOS; python -m minirm.score says how good it is there."""


def start_report(
    args, data: Prepared, tokenizer, model, frozen: Frozen, layout: str, not_shared: str | None, sample: list[Batch]
) -> str:
    """All flags, the table of comparisons, the share that is trained, the marked pair, and what has no effect.

    not_shared: why rows are not shared; sample: some micro-batches of one process, to tell how much of a batch is padding.
    """
    padding = 1 - sum(batch.tokens for batch in sample) / sum(batch.input_ids.numel() for batch in sample)
    lines = [f"  --{name} {value!r}" for name, value in sorted(vars(args).items())]
    lines += ["", data_table(data.report, layout), ""]
    lines += [f"padding in a micro-batch: {padding:.1%} of its places (mean of {len(sample)})"]
    lines += [freeze_line(model, frozen), "", marked_pair(data.train[0], tokenizer), ""]
    margins = (args.loss == "trlx" or args.margin_scale != 1) and any(map(any, data.train["margin"]))
    alone = args.pair_weight == "prompt" and max(data.train["prompt_pairs"]) == 1
    for said, line in (
        (not_shared, f"every completion gets a row of its own, since shared rows would not be exact: {not_shared}"),
        (args.loss == "trlx", PUBLISHED),
        (margins and args.loss == "trlx", "warning: --loss trlx is as published: the data's margins have no effect"),
        (args.margin_scale != 1 and not margins, "warning: no margins in the data: --margin_scale has no effect"),
        (alone, "warning: one comparison a prompt: --pair_weight has no effect"),
    ):
        lines += [line, ""] if said else []
    return "\n".join(lines)


def data_table(report: dict[str, list[dict]], row_layout: str) -> str:
    """What every source was read as, what became of its comparisons, its tokens, and how far mere length would get."""
    rows = [("train", row) for row in report["train"]] + [("held out", row) for row in report["eval"]]
    counts = [totals([row]) for _, row in rows]
    total = sum(counts, Counter())
    keys = ["read", "held out", *sorted(key for key in total if key.startswith("dropped")), "kept", "kept, prompt cut"]
    keys += ["kept, answer cut", "prompt also in the training data", "prompts", "separate tokens"]
    keys += ["shared tokens"] if row_layout == "shared" else []
    clear = {"separate tokens": "tokens, each answer with its prompt", "shared tokens": "tokens, each prompt once"}
    lines = [("comparisons", *(part for part, _ in rows))]
    if len(rows) > 2:
        lines.append(("", *(Path(row["source"]).name[-24:] for _, row in rows)))
    for key in keys:
        if total[key] or key in ("read", "kept"):
            lines.append((clear.get(key, key), *(f"{count[key]:,}" for count in counts)))
    if row_layout == "shared":
        saved = ((c["separate tokens"] - c["shared tokens"]) / max(1, c["separate tokens"]) for c in counts)
        lines.append(("saved", *(f"{share:.1%}" for share in saved)))
    for which in ("longer", "shorter"):
        shares = (count[f"{which} answer chosen"] / max(1, count["kept"]) for count in counts)
        lines.append((f"the {which} answer is the chosen one", *(f"{share:.1%}" for share in shares)))
    width, wide = max(len(line[0]) for line in lines), max(12, *(len(cell) for line in lines for cell in line[1:]))
    table = [f"{name:<{width}}" + "".join(f"  {cell:>{wide}}" for cell in cells) for name, *cells in lines]
    schemas = [f"{part:<8}  {_typed(row['source'])}: {row['schema']}" for part, row in rows if "schema" in row]
    return "\n".join([*schemas, "", *table])


def freeze_line(model: nn.Module, frozen: Frozen) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = "no layer" if not frozen.layers else f"layers 0-{len(frozen.layers) - 1} of {frozen.total_layers}"
    return f"frozen: {layers}; trained: {trained:,} of {total:,} parameters ({trained / total:.1%})"


def marked_pair(group: dict, tokenizer) -> str:
    """The first comparison as decoded from its ids, scored tokens in [[ ]]; the end reward is read at the last one."""
    prefix, sides = group["prefix"], {side: group["completions"][group[side][0]] for side in ("chosen", "rejected")}
    same = common_prefix([*sides.values()])
    shown = tokenizer.decode(prefix + sides["chosen"][:same])
    lines = ["the first pair; what is scored stands in [[ ]], the reward of an answer is read at its last token:"]
    lines.append(f"  both      {('...' if len(shown) > 300 else '') + shown[-300:]!r}")
    for side, ids in sides.items():
        text = tokenizer.decode(ids[same:])
        text = text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
        end = f"{len(prefix) + len(ids)} tokens, the last is {tokenizer.decode(ids[-1:])!r}"
        lines.append(f"  {side:<8}  [[{text!r}]] {end}")
    return "\n".join(lines)


def model_card(args, report: dict, result: dict, tokenizer, output: Path) -> str:
    """README.md of a trained model: how good it is, how to load it, what it was trained on and how.

    result: the evaluation of what is exported; output: the folder that has metrics.jsonl, and perhaps curves.png.
    """
    said = [(flag, v) for flag, v in sorted(vars(args).items()) if flag not in UNSAID and v not in (None, False, [])]
    rows = [row for row in read_rows(output) if row.get("eval_loss") is not None] or [result]  # null: not finite
    ten = sorted({round(i * (len(rows) - 1) / 9) for i in range(10)})  # the first and the last among them
    curve = ["| {step:,} | {eval_loss:.4f} | {eval_accuracy:.4f} |".format_map(rows[i]) for i in ten]
    added = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # by the tokenizer itself: in no text then
    rounded = f"  # {args.precision}; with dtype=torch.float32 fewer rewards are equal"
    return CARD.format(
        base_model="" if Path(args.model).exists() else f"base_model: {args.model}\n",
        model=_typed(args.model),
        args=args,
        half="" if args.precision == "fp32" else rounded,
        chat=CHAT if tokenizer.chat_template else "",
        eos=tokenizer.eos_token,
        published=f"\n\n{PUBLISHED}" if args.loss == "trlx" else "",
        plus_eos="" if added else " + tokenizer.eos_token",
        text=json.dumps(f"prompt{args.separator}answer{'' if added else tokenizer.eos_token}"),
        result=result,
        counts=totals(report["train"]),
        recipe=" ".join(f"--{flag}" if value is True else f"--{flag} {_typed(value)}" for flag, value in said),
        table=data_table(report, "separate").strip(),
        best=", where the held-out loss was lowest" if result["step"] < rows[-1]["step"] else "",
        curve="\n".join(curve) + ("\n\n![curves](curves.png)" if (output / "curves.png").exists() else ""),
    )


def _typed(value) -> str:
    """As on a command line; of a path its name alone, since the card may leave this machine."""
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    text = str(value).replace("\n", r"\n").replace("\t", r"\t")
    return shlex.quote(Path(text).name if Path(text).is_absolute() else text)


PROFILED = ("matrix products", "attention", "other operations", "communication", "waiting", "the rest: gaps")


def profiler(steps: int, coming: int, output: Path, group: dist.ProcessGroup) -> Callable[[], None]:
    """A function to call after every step. From the third on it profiles `steps` of the `coming` ones; 0: none.

    Then every process writes its Chrome trace to `output`, and the first one prints where the time went.
    """
    rank = dist.get_rank()
    if not steps or coming < steps + 2:
        if steps and rank == 0:
            print(f"--profile {steps} needs {steps + 2} steps, only {coming} are to come: nothing is profiled")
        return lambda: None

    def done(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(output / f"trace-rank{rank}.json.gz"))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, time_shares(profile.events()), group=group)
        if rank == 0:
            print(f"{steps} steps profiled, traces in {output}/trace-rank*.json.gz; shares of the time of each process")
            print(profile_table(everyone, steps))

    schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1, skip_first=1)
    profile = torch.profiler.profile(schedule=schedule, on_trace_ready=done)
    profile.start()
    return profile.step


def time_shares(events) -> Counter[str]:
    """Microseconds by kind, and of the whole: on the GPU where there is one, else on this process's CPU thread."""
    times: Counter[str] = Counter()
    cuda, end = torch.cuda.is_available(), 0.0
    for event in sorted(events, key=lambda event: event.time_range.start):
        name, span = event.name, event.time_range
        if name.startswith("ProfilerStep"):
            times["whole"] += 0 if event.device_type == torch.autograd.DeviceType.CUDA else span.elapsed_us()
        elif name.startswith(("ncclDevKernel", "ncclKernel") if cuda else "gloo:"):  # several at a time count once
            times["communication"] += max(0.0, span.end - max(span.start, end))
            end = max(end, span.end)
        elif name.startswith("aten::"):
            matrices = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
            kind = PROFILED[0 if matrices else 1 if "scaled_dot_product" in name or "_attention_" in name else 2]
            times[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return times


def profile_table(everyone: list[Counter[str]], steps: int) -> str:
    """By process. Waiting is what a process spends in collectives beyond the one that spends the least."""
    least = min(times["communication"] for times in everyone)
    lines = [f"{'process':<9}{'ms a step':>10}" + "".join(f"{name:>18}" for name in PROFILED)]
    for rank, times in enumerate(everyone):
        times["waiting"], times["communication"] = times["communication"] - least, least
        times[PROFILED[-1]] = max(0, times["whole"] - sum(times[name] for name in PROFILED[:-1]))
        shares = "".join(f"{times[name] / times['whole']:>18.1%}" for name in PROFILED)
        lines.append(f"{rank:<9}{times['whole'] / steps / 1000:>10.1f}{shares}")
    return "\n".join(lines)
