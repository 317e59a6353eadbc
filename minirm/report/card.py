"""Write the README.md of a trained model."""

import json
import re
import shlex
from pathlib import Path

from minirm.data.prepare import totals
from minirm.errors import printable
from minirm.plot import read_rows
from minirm.report.lines import PUBLISHED, data_table, typed
from minirm.run import UNSAID

CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags: [reward-model]
{base_model}---

# A reward model

This model scores answers to a prompt; higher is better. Only differences between answers to the same prompt are
meaningful. It was trained from {model} with minirm.

| held out | |
| --- | --- |
| accuracy | {result[eval_accuracy]:.4f}, 95 % interval {result[eval_accuracy_low]:.4f} to {result[eval_accuracy_high]:.4f} |
| pairs | {result[eval_pairs]:,}, including {result[eval_ties]:,} ties (equal rewards), which count as wrong |
| accuracy of always choosing the longer answer | {result[eval_length_accuracy]:.4f} |
| loss | {result[eval_loss]:.4f} |
| calibration error | {result[eval_calibration_error]:.4f} |
| rewards | mean {result[eval_reward_mean]:.4f}, standard deviation {result[eval_reward_std]:.4f} (`mean`, `std` in config.json) |

## Use

The reward is read at {eos}, so every text must end with it. Pad on the right.{code}{published}

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder{remote}){half}

def reward(prompts, completions, **_):
    gap = lambda p, c: {args.separator!r} if p[-1:].strip() and c[:1].strip() else ""  # nothing if there is whitespace
    texts = [p + gap(p, c) + c{plus_eos} for p, c in zip(prompts, completions)]
    batch = tokenizer(texts, padding=True, truncation=True, max_length={args.max_length}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].tolist()
```

{chat}For TRL, pass this function: `RLOOTrainer(policy, reward_funcs=reward, ...)`. If you pass the folder instead, TRL
joins texts without BOS and EOS and reads the reward at another token.

vLLM:

```bash
vllm serve folder --runner pooling
curl localhost:8000/classify -H "Content-Type: application/json" \\
    -d {request}    # data[0].probs[0] is the reward
```

## Training

Trained on {counts[kept]:,} pairs from {counts[prompts]:,} prompts. The model is from step {result[step]:,}{best}.

```
train.py {recipe}

{table}
```

| step | held-out loss | accuracy |
| --- | --- | --- |
{curve}
"""
# Added if the tokenizer has a chat template.
CHAT = """For chat data, `tokenizer.apply_chat_template(messages, tokenize=False)` returns the text, and its last token is
scored. Tokenise it with `add_special_tokens=False`. TRL does the same with messages if you pass the folder,
`reward_funcs=folder`.

"""
# Added if transformers has no class for the family.
REMOTE = """

transformers has no sequence-classification class for this family. `modeling_reward.py`, beside the weights, defines one
in a few lines: read it, then load the model with `trust_remote_code=True`. vLLM and `minirm.score` need neither."""


def model_card(args, report: dict, result: dict, tokenizer, output: Path, remote: bool = False) -> str:
    """README.md of a trained model: how good it is, how to load it, what it was trained on and how.

    remote: whether code beside the weights loads it, instead of one of transformers' own classes.
    result: the evaluation of the exported model; output: the folder with metrics.jsonl and perhaps curves.png.
    """
    said = [(flag, v) for flag, v in sorted(vars(args).items()) if flag not in UNSAID and v not in (None, False, [])]
    rows = [row for row in read_rows(output) if row.get("eval_loss") is not None] or [result]  # null: it was not finite
    ten = sorted({round(i * (len(rows) - 1) / 9) for i in range(10)})  # including the first and the last
    curve = ["| {step:,} | {eval_loss:.4f} | {eval_accuracy:.4f} |".format_map(rows[i]) for i in ten]
    added = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # if the tokenizer adds EOS, the texts must not
    plain = args.model if re.fullmatch(r"[\w./-]+", args.model) else json.dumps(args.model)  # quoted for YAML
    text = f"prompt{args.separator}answer{'' if added else tokenizer.eos_token}"
    rounded = f"  # in {args.precision}; dtype=torch.float32 gives fewer ties"
    return CARD.format(
        base_model="" if Path(args.model).exists() else f"base_model: {plain}\n",
        model=code(typed(args.model)),
        args=args,
        remote=", trust_remote_code=True" if remote else "",
        code=REMOTE if remote else "",
        half="" if args.precision == "fp32" else rounded,
        chat=CHAT if tokenizer.chat_template else "",
        eos=code(tokenizer.eos_token),
        published=f"\n\n{PUBLISHED}" if args.loss == "trlx" else "",
        plus_eos="" if added else " + tokenizer.eos_token",
        request=shlex.quote(json.dumps({"input": [text], "use_activation": False})),
        result=result,
        counts=totals(report["train"]),
        recipe=" ".join(f"--{flag}" if value is True else f"--{flag} {typed(value)}" for flag, value in said),
        table=data_table(report, "separate").strip(),
        best=", which had the lowest held-out loss" if result["step"] < rows[-1]["step"] else "",
        curve="\n".join(curve) + ("\n\n![curves](curves.png)" if (output / "curves.png").exists() else ""),
    )


def code(text: str) -> str:
    """Markdown inline code, also for text that contains backticks."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
