"""Exported models in the programs that load them: `python -m pytest tests/test_export.py`. Tiny models, no network.

train.py trains ten families. A patch records the rewards of the held-out answers in the last evaluation, and every
program that loads the exported folder has to reproduce them.
"""

import itertools
import json
import os
import re
import shutil
import warnings

import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, load, make_comparisons, read_metrics, state, write_jsonl
from safetensors.torch import load_file

from minirm import checkpoint, score
from minirm.data.chat import join
from minirm.weights import export

FAMILIES = sorted(CONFIGS)

# GPT-2 ignores the mask when it numbers positions, so padding on the left moves every token. OPT respects the mask.
LEFT = [family for family in FAMILIES if family != "gpt2"]

# Writes [[ids of a held-out answer with its prompt, the trainer's reward], ...] of the last evaluation to $NOTED.
NOTE_REWARDS = """
import json, os, torch
collate, comparison_loss, noted, groups = train.collate, train.comparison_loss, {}, {}

def collate_and_note(some, **options):  # in a thread, ahead of the evaluation
    batch = collate(some, **options)
    groups[id(batch.input_ids)] = some, batch  # kept, so that no other tensor gets this id
    return batch

def compare_and_note(args, batch, rewards):
    if not torch.is_grad_enabled():  # an evaluation
        here = groups[id(batch.input_ids)][0]  # on a CPU the batch is not copied
        pairs = [(g, g[side][i]) for side in ("chosen", "rejected") for g in here for i in range(len(g["chosen"]))]
        for (group, k), reward in zip(pairs, torch.cat(batch.end_rewards(rewards)).tolist()):
            noted[tuple(group["prefix"] + group["completions"][k])] = reward
        with open(os.environ["NOTED"], "w") as file:
            json.dump(list(noted.items()), file)
    return comparison_loss(args, batch, rewards)

train.collate, train.comparison_loss = collate_and_note, compare_and_note
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    rows = make_comparisons(4, seed=1) + make_comparisons(4, seed=2, per_prompt=2)
    return [
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(12))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", rows)),
    ]


@pytest.fixture(scope="session")
def trained(server, model_folder, data, tmp_path_factory):
    """trained("llama") -> (folder, {text: the trainer's reward}) of a run of three steps."""
    made = {}

    def get(family, *flags):
        if (family, flags) not in made:
            folder = tmp_path_factory.mktemp(f"trained-{family}")
            run = server.run(
                *("--model", model_folder(family), "--output_dir", folder / "out", *data, "--max_steps", 3),
                *("--learning_rate", 1e-2, "--warmup_steps", 0, "--save_steps", 0, "--keep", "last", *flags),
                patch=NOTE_REWARDS,
                env={"NOTED": str(folder / "noted.json")},
            )
            assert run.codes == [0], run.text()
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
            noted = {
                tokenizer.decode(ids): (ids, reward) for ids, reward in json.loads((folder / "noted.json").read_text())
            }
            made[family, flags] = folder / "out", noted
        return made[family, flags]

    return get


# -- The trainer's rewards in other programs. ---------------------------------------------------------------------------


@pytest.fixture
def load_elsewhere(caplog, capfd):
    """load_elsewhere(folder) -> (model loaded by plain transformers, its loading info, everything it printed)."""

    def get(folder):
        transformers.utils.logging.set_verbosity_info()
        transformers.utils.logging.enable_propagation()  # so that caplog sees it
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                other, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                    folder, output_loading_info=True
                )
        finally:
            transformers.utils.logging.disable_propagation()
            transformers.utils.logging.set_verbosity_warning()
        said = caplog.text + "".join(capfd.readouterr()) + "".join(str(w.message) for w in caught)
        return other, info, said

    return get


def test_transformers_warns_about_a_plain_language_model(load_elsewhere, model_folder):
    """So the absence of warnings in the next test means something."""
    _, info, said = load_elsewhere(model_folder("gptj"))
    assert "newly initialized" in said and info["missing_keys"] == {"score.weight"}


def in_batches(model, tokenizer, texts, size):
    """{text: reward}, computed in batches of `size` texts that the tokenizer pads."""
    rewards = {}
    for i in range(0, len(texts), size):
        batch = tokenizer(texts[i : i + size], padding=True, return_tensors="pt")
        with torch.no_grad():
            rewards |= dict(zip(texts[i : i + size], model(**batch).logits[:, 0].tolist()))
    return rewards


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_folder_gives_the_trainers_rewards(load_elsewhere, trained, family):
    folder, noted = trained(family)
    wanted = pytest.approx({text: reward for text, (_, reward) in noted.items()}, abs=1e-4, rel=0)
    rewards = [reward for _, reward in noted.values()]
    assert len(rewards) == 8 + 6 and max(rewards) - min(rewards) > 0.1
    model, info, said = load_elsewhere(folder)
    assert "newly initialized" not in said
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 1

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert all(tokenizer(text)["input_ids"] == ids for text, (ids, _) in noted.items())
    assert all(text.endswith(tokenizer.eos_token) for text in noted)
    texts = list(noted)
    assert tokenizer.padding_side == "right"
    assert in_batches(model, tokenizer, texts, 1) == wanted
    assert in_batches(model, tokenizer, texts, 8) == wanted
    tokenizer.padding_side = "left"
    left = in_batches(model, tokenizer, texts, 8)
    assert left == wanted if family in LEFT else left != wanted

    # The function in the model card, verbatim.
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(code, card := {"folder": folder})  # noqa: S102 - of our own making
    prompts, answers = zip(*(text.removesuffix(tokenizer.eos_token).split("\n") for text in texts))
    assert dict(zip(texts, card["reward"](prompts, answers))) == wanted

    classify = transformers.pipeline("text-classification", model=str(folder))
    answers = classify(texts, batch_size=8)
    assert {text: answer["score"] for text, answer in zip(texts, answers)} == wanted
    assert {answer["label"] for answer in answers} == {"LABEL_0"}


def test_the_code_in_card_and_readme_joins_prompt_and_answer_as_training_does(trained):
    folder, _ = trained("llama")
    parts = [("a", "b"), ("a question:", " an answer"), ("a\n", "an answer"), ("", "an answer"), ("a", "")]
    texts = [join(*part, "\n") + "<|endoftext|>" for part in parts]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    wanted = in_batches(model, transformers.AutoTokenizer.from_pretrained(folder), texts, 1)
    for page in (folder / "README.md", ROOT / "README.md"):
        code = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0]
        exec(code.replace("runs/mine", str(folder)), names := {"folder": folder})  # noqa: S102 - of our own making
        assert names["reward"](*zip(*parts)) == pytest.approx([wanted[text] for text in texts], abs=1e-4), page


@pytest.mark.parametrize("family", FAMILIES)
def test_minirm_score_gives_the_trainers_rewards_and_accuracy(trained, data, capsys, tmp_path, family):
    folder, noted = trained(family)
    flags = ["--model", folder, "--data", data[-1], "--output", tmp_path / "scores.jsonl"]
    assert score.main([str(flag) for flag in flags]) == 0
    result = json.loads(capsys.readouterr().out)
    rows, scores = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (data[-1], tmp_path / "scores.jsonl")
    )
    sides = [(row["prompt"], row[side], of[side]) for row, of in zip(rows, scores) for side in ("chosen", "rejected")]
    found = {f"{prompt}\n{answer}<|endoftext|>": reward for prompt, answer, reward in sides}
    assert len(rows) == len(scores) == 8
    assert found == pytest.approx({text: reward for text, (_, reward) in noted.items()}, abs=1e-4, rel=0)
    last = read_metrics(folder)[-1]
    assert (result["accuracy"], result["ties"], result["pairs"]) == (last["eval_accuracy"], last["eval_ties"], 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_keeps_its_contract(trained, family):
    folder, _ = trained(family)
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert (config["id2label"], config["label2id"]) == ({"0": "LABEL_0"}, {"LABEL_0": 0})
    assert config["problem_type"] == "regression"
    assert config["minirm"] == {"separator": "\n", "max_length": 550}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(config["pad_token_id"]) is int
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id == config["eos_token_id"]
    assert 0 <= config["pad_token_id"] < config["vocab_size"]
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    weights = load_file(folder / "model.safetensors")
    width = config.get("hidden_size", config.get("n_embd"))
    assert weights["score.weight"].shape == (1, width) and {w.dtype for w in weights.values()} == {torch.float32}
    prefix = getattr(transformers, architecture).base_model_prefix + "."
    assert [name for name in weights if not name.startswith(prefix)] == ["score.weight"]
    assert {path.stat().st_mode & 0o444 for path in folder.iterdir() if path.is_file()} == {0o444}
    assert not list(folder.glob("*.partial"))


def test_a_truncated_text_keeps_its_eos(trained):
    folder, noted = trained("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text, (ids, _) = max(noted.items(), key=lambda item: len(item[1][0]))
    assert tokenizer(text, truncation=True, max_length=10)["input_ids"] == ids[-10:]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_given_as_model_keeps_its_head_and_rewards(trained, family):
    folder, noted = trained(family)
    again, config, tokenizer = load(folder, seed=99)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(again.score.weight, weights["score.weight"])
    assert config.vocab_size == again.trunk.get_input_embeddings().num_embeddings == 327  # 326 tokens and a pad token
    assert len(tokenizer) == 327
    for ids, reward in list(noted.values())[:3]:
        with torch.no_grad():
            assert again(torch.tensor([ids]))[0, -1].item() == pytest.approx(reward, abs=1e-4)


# -- All or nothing. ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Only `except BaseException` catches it, and any file operation there raises it again."""


CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")


def killed_before(monkeypatch, number):
    """Let `number` calls that change a folder or wait for the disk pass, and make all later ones raise Killed."""
    count = 0

    def guarded(name):
        original = getattr(os, name)

        def call(*args, **options):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return original(*args, **options)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, guarded(name))


@pytest.fixture(scope="module")
def versions(model_folder):
    """Two models to export: {mean in the config: (weights, config, tokenizer, rewards of IDS)}."""
    made = {}
    for mean in (1.0, 2.0):
        model, config, tokenizer = load(model_folder("llama"), seed=int(mean))
        with torch.no_grad():
            made[mean] = state(model), config, tokenizer, model(IDS)[:, -1]
    return made


IDS = torch.arange(10, 30)[None]

SHARDED, SINGLE = "50KB", "5GB"


def write(output, versions, mean, size):
    weights, config, tokenizer, _ = versions[mean]
    output.mkdir(exist_ok=True)
    with checkpoint.whole_model(output) as folder:
        export(weights, config, tokenizer, folder, {"mean": mean}, max_shard_size=size)


def loaded(output, versions):
    """The version that loads from the folder, by its config's mean; None if none does."""
    try:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    except ValueError as error:
        assert "Should have a `model_type` key in its config.json" in str(error)
        return None
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits[:, 0], versions[model.config.mean][3])
    transformers.AutoTokenizer.from_pretrained(output)
    return model.config.mean


def test_a_large_model_is_exported_in_shards_with_an_index(versions, tmp_path):
    write(tmp_path, versions, 1.0, SHARDED)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert {name for path in shards for name in load_file(path)} == set(index["weight_map"])
    assert loaded(tmp_path, versions) == 1.0


@pytest.mark.parametrize("before, after", [(SINGLE, SINGLE), (SINGLE, SHARDED), (SHARDED, SINGLE), (SHARDED, "70KB")])
def test_a_killed_export_leaves_the_old_model_the_new_one_or_none(versions, tmp_path, before, after):
    """Kill between any two calls that change the folder, then export again."""
    write(tmp_path / "before", versions, 1.0, before)
    (tmp_path / "before" / "metrics.jsonl").write_text("{}\n")
    assert loaded(tmp_path / "before", versions) == 1.0
    seen = []
    for number in itertools.count():
        output = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "before", output)
        with pytest.MonkeyPatch.context() as monkeypatch:
            killed_before(monkeypatch, number)
            try:
                write(output, versions, 2.0, after)
                killed = False
            except Killed:
                killed = True
        seen.append(loaded(output, versions))
        if not killed:
            break
        shutil.rmtree(output / "model.partial", ignore_errors=True)  # as begin() does when a run starts
        write(output, versions, 2.0, after)
        assert loaded(output, versions) == 2.0
    assert seen[0] == 1.0 and seen[-1] == 2.0 and None in seen
    assert seen == sorted(seen, key=[1.0, None, 2.0].index)  # the old one, then none, then the new one
    assert not list(output.glob("*.partial")) and (output / "metrics.jsonl").read_text() == "{}\n"
    write(tmp_path / "alone", versions, 2.0, after)
    assert {path.name for path in output.iterdir()} - {"metrics.jsonl"} == {
        p.name for p in (tmp_path / "alone").iterdir()
    }


@pytest.fixture(scope="module")
def runs(server, model_folder, data, tmp_path_factory):
    """(flags without --max_steps, folder after 2 steps, folder after 4 steps), with checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--model", model_folder("gptj"), *data, "--learning_rate", 1e-2, "--save_steps", 2, "--keep", "last"]
    for steps in (2, 4):
        assert server.run(*flags, "--max_steps", steps, "--output_dir", folder / f"{steps}").codes == [0]
    return flags, folder / "2", folder / "4"


@pytest.mark.parametrize("stage", ["writing", "moving", "full disk"])
def test_an_interrupted_export_of_a_longer_run_is_completed_by_the_same_command(server, runs, tmp_path, stage):
    flags, short, long = runs
    output = tmp_path / "out"
    shutil.copytree(short, output)
    flags = [*flags, "--max_steps", 4, "--output_dir", output]
    patches = {
        "writing": "def export(*_): os.kill(os.getpid(), 9)\ntrain.export = export",
        "full disk": "def export(*_): raise OSError(28, 'No space left')\ntrain.export = export",
        "moving": "replace = os.replace\n"
        "def kill(a, b): os.kill(os.getpid(), 9) if str(b).endswith('config.json') else replace(a, b)\nos.replace = kill",
    }
    run = server.run(*flags, patch=f"import os\n{patches[stage]}")
    assert run.codes == [3 if stage == "full disk" else -9], run.text()
    if stage == "full disk":
        assert f"{output}: could not be written ([Errno 28] No space left): needs " in run.text()
    exported = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
    if stage == "moving":
        assert not (output / "config.json").exists()
    else:
        assert all((output / name).read_bytes() == (short / name).read_bytes() for name in exported)
    assert (output / "checkpoint-4").is_dir()
    assert server.run(*flags).codes == [0]
    assert all((output / name).read_bytes() == (long / name).read_bytes() for name in exported[:3])
    assert (long / "model.safetensors").read_bytes() != (short / "model.safetensors").read_bytes()
    assert not list(output.glob("*.partial"))
