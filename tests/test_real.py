"""minirm against TRL on the same input: `pip install -e ".[bench]"; pytest tests/test_real.py`. Skipped without TRL."""

import pytest
import torch
import transformers
from conftest import CONFIGS, make_comparisons, make_tokenizer, read_metrics, write_jsonl

import train
from minirm.data.prepare import prepare
from minirm.plan import make_plan

STEPS, BATCH, RATE = 20, 4, 1e-3


def test_trl_and_minirm_have_the_same_loss_at_every_step(tmp_path):
    """Weights, head, pairs and order are the same, in fp32. So if other runs differ, the step is not the cause."""
    trl = pytest.importorskip("trl")
    import datasets

    model = tmp_path / "model"
    tokenizer = make_tokenizer(pad="<|pad|>")
    config = CONFIGS["llama"](len(tokenizer))
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config.update({**ids, "num_labels": 1})
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    # The last word of the answer says which one is better, so there is something to learn.
    rows = [row | {"chosen": row["chosen"] + " right"} for row in make_comparisons(STEPS * BATCH)]
    data = [str(write_jsonl(tmp_path / f"{part}.jsonl", rows[:n])) for part, n in (("train", None), ("eval", 4))]

    flags = {
        "model": model, "train_data": data[0], "eval_data": data[1], "output_dir": tmp_path / "out", "loss": "last",
        "freeze_ratio": 0, "learning_rate": RATE, "head_learning_rate": RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1,
        "num_train_epochs": 1, "logging_steps": 1, "eval_steps": 0, "save_steps": 0, "precision": "fp32",
    }  # fmt: skip
    assert train.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)]) == 0
    ours = [row["loss"] for row in read_metrics(tmp_path / "out") if "loss" in row]

    groups = prepare(tokenizer, data[:1], data[1:]).train
    plan = make_plan(groups["shared_tokens"][:], groups["pairs"][:], world_size=1, batch_size=BATCH)
    ordered = [groups[g] for step in plan for g in step.micro_steps[0][0]]
    columns = {
        f"{side}_ids": [g["prefix"] + g["completions"][g[side][0]] for g in ordered] for side in ("chosen", "rejected")
    }
    trainer = trl.RewardTrainer(
        model=str(model),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(columns),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=RATE,
            lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_steps=1, bf16=False, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        ),
    )  # fmt: skip
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(ours) == STEPS and ours[-1] < ours[0] - 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)
