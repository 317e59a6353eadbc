"""Do TRL's trainers compute the same rewards with a trained model as minirm's trainer?

    pip install -e ".[bench]"
    python tests/bench/consumers.py [--families llama gpt2 ...]

train.py trains tiny models of ten families for three steps, on strings and on messages. The rewards of the held-out
answers in its last evaluation are compared with

    function    RLOOTrainer(reward_funcs=the function of the model card), strings
    folder      RLOOTrainer(reward_funcs=folder), messages
    a step      a whole training step of the latter: the policy's answers against one text at a time without padding
    training    RewardTrainer(model=folder), an evaluation on strings and on messages
    misread     RLOOTrainer(reward_funcs=folder), strings: TRL adds no EOS, which is why the card has a function

Prints the largest differences. The exit code is 1 unless all but the last are below 1e-4.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import CONFIGS, make_comparisons, make_model, write_jsonl
from processes import Server
from test_export import NOTE_REWARDS

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
Rewards = dict[tuple[int, ...], float]  # by token ids


def messages(row: dict) -> dict:
    sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **sides}


def train(server: Server, model: Path, folder: Path, rows: list[dict], *flags) -> Rewards:
    """Run the real command and return the rewards of the held-out answers in its last evaluation."""
    parts = (("t", rows[8:]), ("e", rows[:8]))
    data = [write_jsonl(folder.with_suffix(f".{part}.jsonl"), part_rows) for part, part_rows in parts]
    noted = folder.with_suffix(".json")
    run = server.run(
        *("--model", model, "--output_dir", folder, "--train_data", data[0], "--eval_data", data[1], "--max_steps", 3),
        *("--learning_rate", 1e-2, "--warmup_steps", 0, "--save_steps", 0, "--keep", "last", *flags),
        patch=NOTE_REWARDS,
        env={"NOTED": str(noted)},
    )
    assert run.codes == [0], run.text()
    return {tuple(ids): reward for ids, reward in json.loads(noted.read_text())}


def watch(model: torch.nn.Module) -> list[tuple[tuple[int, ...], float]]:
    """A list that collects (ids without padding, reward) of every text that the model gets from now on."""
    seen = []

    def note(module, args, inputs, output):
        for ids, mask, reward in zip(inputs["input_ids"], inputs["attention_mask"], output.logits[:, 0]):
            seen.append((tuple(ids[mask.bool()].tolist()), reward.item()))

    model.register_forward_hook(note, with_kwargs=True)
    return seen


def rloo(policy: Path, reward, prompts: list, work: Path) -> RLOOTrainer:
    config = RLOOConfig(
        str(work), per_device_train_batch_size=4, num_generations=2, max_completion_length=8, max_steps=1, report_to="none",
        use_cpu=True, bf16=False, logging_steps=10, save_strategy="no", disable_tqdm=True, beta=0.0,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, TEMPLATE
    return RLOOTrainer(str(policy), reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer)


def rewards_by_rloo(trainer: RLOOTrainer, prompts: list, answers: list) -> list[float]:
    """The call that its training step makes between generation and the update of the policy."""
    rewards = trainer._calculate_rewards([{}] * len(prompts), prompts, answers, [[0]] * len(prompts))
    return rewards[:, 0].tolist()


def by_reward_trainer(folder: Path, rows: list[dict], work: Path) -> list[tuple[tuple[int, ...], float]]:
    config = RewardConfig(
        str(work), per_device_eval_batch_size=8, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    trainer = RewardTrainer(str(folder), args=config, train_dataset=data, eval_dataset=data)
    seen = watch(trainer.model)
    trainer.evaluate()
    return seen


def compare(family: str, server: Server, work: Path) -> dict[str, float]:
    policy = make_model(work / "policy", family)
    (work / "chat.jinja").write_text(TEMPLATE)
    rows = [{**row, "prompt": row["prompt"] + "\n"} for row in make_comparisons(20, seed=1)]  # TRL adds no separator
    chats = [messages(row) for row in rows]
    strings, chat = work / "strings", work / "chat"
    of_strings = train(server, policy, strings, rows)
    of_chat = train(server, policy, chat, chats, "--chat_template", work / "chat.jinja")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    found = {}

    def difference(seen, wanted: Rewards) -> float:
        assert {ids for ids, _ in seen} == set(wanted) and len(wanted) == 16
        return max(abs(reward - wanted[ids]) for ids, reward in seen)

    pairs = [(row["prompt"], row[side]) for row in rows[:8] for side in ("chosen", "rejected")]
    prompts, answers = map(list, zip(*pairs))
    ids = [tuple(tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]) for prompt, answer in pairs]
    (code,) = re.findall(r"```python\n(.*?)```", (strings / "README.md").read_text(), re.DOTALL)
    exec(code.replace(" + '\\n' + c", " + c"), card := {"folder": strings})  # noqa: S102 - minirm wrote it
    trainer = rloo(policy, card["reward"], prompts, work / "rloo")
    found["function"] = difference(list(zip(ids, rewards_by_rloo(trainer, prompts, answers))), of_strings)
    trainer = rloo(policy, str(strings), prompts, work / "rloo")
    found["misread"] = difference(list(zip(ids, rewards_by_rloo(trainer, prompts, answers))), of_strings)

    pairs = [(row["prompt"], row[side]) for row in chats[:8] for side in ("chosen", "rejected")]
    prompts, answers = map(list, zip(*pairs))
    texts = [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for prompt, answer in pairs]
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    trainer = rloo(policy, str(chat), prompts, work / "rloo")
    found["folder"] = difference(list(zip(ids, rewards_by_rloo(trainer, prompts, answers))), of_chat)

    model = transformers.AutoModelForSequenceClassification.from_pretrained(chat)
    seen = watch(trainer.reward_funcs[0])
    trainer.train()
    assert seen and all(ids[-1] == tokenizer.eos_token_id for ids, _ in seen)
    with torch.no_grad():
        found["a step"] = max(abs(model(torch.tensor([ids])).logits.item() - reward) for ids, reward in seen)

    found["training"] = max(
        difference(by_reward_trainer(strings, rows[:8], work / "reward"), of_strings),
        difference(by_reward_trainer(chat, chats[:8], work / "reward"), of_chat),
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=sorted(CONFIGS), choices=sorted(CONFIGS))
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    columns, worst = ("function", "folder", "a step", "training", "misread"), 0.0
    print(f"{'':<10}" + "".join(f"{column:>12}" for column in columns))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        for family in args.families:
            (work := Path(folder) / family).mkdir()
            with contextlib.redirect_stdout(io.StringIO()):  # hide TRL's logs
                found = compare(family, server, work)
            print(f"{family:<10}" + "".join(f"{found[column]:>12.1e}" for column in columns), flush=True)
            worst = max(worst, *(found[column] for column in columns[:-1]))
        server.close()
    return int(worst >= 1e-4)


if __name__ == "__main__":
    sys.exit(main())
