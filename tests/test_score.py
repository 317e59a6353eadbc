"""Scoring with a trained model: `python -m pytest tests/test_score.py`. Tiny random models, no network.

The slow reference is AutoModelForSequenceClassification, one text at a time, without padding.
"""

import json

import pytest
import torch
import transformers
from conftest import CONFIGS, load, make_comparisons, make_tokenizer, state, write_jsonl

from minirm import score
from minirm.data.chat import join
from minirm.weights import export


@pytest.fixture(scope="session")
def exported(model_folder, tmp_path_factory):
    """exported("llama") -> a folder as train.py exports it, with random weights."""
    made = {}

    def get(family):
        if family not in made:
            model, config, tokenizer = load(model_folder(family))
            made[family] = tmp_path_factory.mktemp(f"exported-{family}")
            notes = {"minirm": {"separator": "\n", "max_length": 60}}
            export(state(model), config, tokenizer, made[family], notes)
        return made[family]

    return get


def scored(capsys, model, rows, folder, *flags):
    """(the object on stdout, the rows of --output); rows: one list per file."""
    files = [write_jsonl(folder / f"{name}.jsonl", of_file) for name, of_file in zip("abc", rows)]
    flags = ["--model", model, "--data", *files, "--output", folder / "scores.jsonl", *flags]
    capsys.readouterr()
    assert score.main([str(flag) for flag in flags]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1  # one object and nothing else
    return json.loads(out), [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def one_by_one(folder, texts, add_special_tokens=True):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rewards = []
    for text in texts:
        batch = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
        with torch.no_grad():
            rewards.append(model(**batch).logits.item())
    return rewards


def texts_of(rows, eos="<|endoftext|>"):
    return [join(row["prompt"], row[side], "\n") + eos for row in rows for side in ("chosen", "rejected")]


def close(values):
    return pytest.approx(values, abs=1e-5, rel=0)


@pytest.mark.parametrize("batch_size", [1, 300, 8192])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_scores_are_those_of_the_plain_model_for_any_batch_size(exported, capsys, tmp_path, family, batch_size):
    rows = make_comparisons(3, per_prompt=2)[:3] + make_comparisons(9, seed=1)
    _, out = scored(capsys, exported(family), [rows], tmp_path, "--batch_size", batch_size)
    assert [row["where"] for row in out] == [f"{tmp_path}/a.jsonl:{n}" for n in range(1, 13)]
    rewards = [row[side] for row in out for side in ("chosen", "rejected")]
    assert rewards == close(one_by_one(exported(family), texts_of(rows)))


def test_shared_and_separate_rows_give_the_same_scores(exported, capsys, tmp_path, monkeypatch):
    """Sharing pays off for long prompts with short answers. One bound forbids it, the other forces it."""
    rows = make_comparisons(12, per_prompt=3)
    sizes, collate, found = set(), score.collate, []

    def noted(rows, **options):
        sizes.update(len(row["places"]) for row in rows)
        return collate(rows, **options)

    monkeypatch.setattr(score, "collate", noted)
    for bound, expected in ((0.0, {1}), (1.1, {4})):  # completions of a row
        monkeypatch.setattr(score, "WORTH_SHARING", bound)
        sizes.clear()
        _, out = scored(capsys, exported("llama"), [rows], tmp_path)
        assert sizes == expected
        found.append([row[side] for row in out for side in ("chosen", "rejected")])
    assert found[1] == close(found[0])


def test_all_statistics_follow_from_the_scores(exported, capsys, tmp_path):
    rows = [{**row, "subset": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(make_comparisons(10))]
    rows[4]["rejected"] = rows[4]["chosen"]  # a tie, which is not correct
    labelled_tie = {**rows[0], "prompt": "other", "margin": 0}
    result, out = scored(capsys, exported("llama"), [rows[:7] + [labelled_tie], rows[7:]], tmp_path)
    rewards = one_by_one(exported("llama"), texts_of(rows))
    right = [c > r for c, r in zip(rewards[::2], rewards[1::2])]
    assert result["pairs"] == 10 and result["ties"] == 1 and result["dropped_ties"] == 1
    assert result["accuracy"] == sum(right) / 10 and 0 < sum(right) < 9
    assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"]
    for name, some in (("even", right[::2]), ("odd", right[1::2]), ("a", right[:7]), ("b", right[7:])):
        assert result["by_name"][name]["accuracy"] == pytest.approx(sum(some) / len(some)), name
        assert result["by_name"][name]["pairs"] == len(some)
    assert sum(bucket["pairs"] for bucket in result["calibration"]) == 10
    assert result["reward_margin"] == close(sum(c - r for c, r in zip(rewards[::2], rewards[1::2])) / 10)
    assert set(out[7]) == {"where", "scores", "ranking"}  # a tie has no chosen answer
    assert len(out) == 11 and result["completions"] == 22


def test_completions_are_ranked_and_compared_with_the_order_in_the_data(exported, capsys, tmp_path):
    answers = ["good", "very bad", "a long and clear answer", "not that"]
    rows = [
        {"prompt": "it is", "completions": answers},
        {"prompt": "it is", "completions": answers[:3], "scores": [3, 1, 2]},
        {"prompt": "it was", "completions": ["alone"]},
    ]
    result, out = scored(capsys, exported("qwen3"), [rows], tmp_path)
    rewards = one_by_one(exported("qwen3"), [f"it is\n{answer}<|endoftext|>" for answer in answers])
    assert out[0]["scores"] == close(rewards) and out[1]["scores"] == close(rewards[:3])
    assert out[0]["ranking"] == sorted(range(4), key=lambda k: -rewards[k])
    right = [rewards[i] > rewards[j] for i, j in ((0, 1), (0, 2), (2, 1))]
    assert (result["pairs"], result["accuracy"]) == (3, sum(right) / 3)
    assert out[2]["ranking"] == [0]
    best = [max(row["scores"]) for row in out]
    assert result["best_of_n"] == {"prompts": 3, "completions": 8, "reward_mean": close(sum(best) / 3)}
    result, _ = scored(capsys, exported("qwen3"), [rows[:1]], tmp_path)
    assert "accuracy" not in result


def test_overlong_texts_lose_the_beginning_of_the_prompt(exported, capsys, tmp_path):
    row = {"prompt": "the " * 90 + "question", "chosen": "a good answer", "rejected": "very bad"}
    folder = exported("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [tokenizer(text)["input_ids"] for text in texts_of([row])]
    cut = max(map(len, ids)) - 60  # both sides lose the same tokens, so their prompts stay equal
    with torch.no_grad():
        wanted = [model(torch.tensor([row[cut:]])).logits.item() for row in ids]
    _, out = scored(capsys, folder, [[row]], tmp_path)
    assert [out[0]["chosen"], out[0]["rejected"]] == close(wanted)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"


def test_messages_use_the_models_own_template_unchanged(exported, capsys, tmp_path):
    """A line break after the last turn, as in other trainers' models, is scored. minirm's exports have none."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported("llama"))
    tokenizer.chat_template = TEMPLATE
    transformers.AutoModelForSequenceClassification.from_pretrained(exported("llama")).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    turns = [[{"role": "user", "content": "it is"}, {"role": "assistant", "content": a}] for a in ("good", "very bad")]
    _, out = scored(capsys, tmp_path / "m", [[{"chosen": turns[0], "rejected": turns[1]}]], tmp_path)
    texts = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
    assert texts[0].endswith("\n")
    wanted = one_by_one(tmp_path / "m", texts, add_special_tokens=False)
    assert [out[0]["chosen"], out[0]["rejected"]] == close(wanted)


def make_encoder(folder, **changes):
    tokenizer = make_tokenizer(pad="<pad>", bos="<s>")
    tokenizer.model_max_length = 64
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=1, pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_with_one_label_is_scored_with_its_own_special_tokens(capsys, tmp_path):
    folder = make_encoder(tmp_path / "m")
    rows = make_comparisons(6)
    _, out = scored(capsys, folder, [rows], tmp_path, "--batch_size", 200)
    wanted = one_by_one(folder, texts_of(rows, eos=""))
    assert [r for row in out for r in (row["chosen"], row["rejected"])] == close(wanted)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such"], "--model no/such: not a model folder or name that transformers can load"),
        (
            ["--model", "{plain}"],
            "LlamaForCausalLM with 2 labels; expected a reward model: sequence classification with",
        ),
        (["--model", "{two}"], "LlamaForSequenceClassification with 2 labels; expected a reward model"),
        (["--data", "{tmp}/none.jsonl"], "none.jsonl: No such file or directory"),
        (["--data", "{tmp}/bad.jsonl"], "bad.jsonl:1: no column 'chosen'"),
        (["--output", "{tmp}/no/x.jsonl"], "no/x.jsonl: cannot be written"),
        (["--output", "{tmp}/two"], "two: cannot be written"),
        (["--max_length", "0"], "--max_length must lie in 1..2048 ("),
        (["--max_length", "99999"], "--max_length must lie in 1..2048 ("),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line_before_the_weights_are_read(
    exported, model_folder, capsys, monkeypatch, tmp_path, flags, message
):
    monkeypatch.setattr(score, "load_model", None)
    two = transformers.LlamaConfig(num_labels=2, architectures=["LlamaForSequenceClassification"])
    two.save_pretrained(tmp_path / "two")
    make_tokenizer().save_pretrained(tmp_path / "two")
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x", "rejected": "y"}])
    good = write_jsonl(tmp_path / "good.jsonl", make_comparisons(1))
    places = {"plain": model_folder("llama"), "two": tmp_path / "two", "tmp": tmp_path}
    flags = [flag.format(**places) for flag in flags]
    assert score.main(["--model", str(exported("llama")), "--data", str(good), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err.splitlines()[-1] and "Traceback" not in said.err
    assert said.err.splitlines()[-1].startswith("minirm.score: error: ")


def test_hostile_subset_and_file_names_reach_the_terminal_escaped(exported, capsys, tmp_path):
    rows = [{"prompt": "a", "chosen": "good answer", "rejected": "bad", "subset": "\x1b[2J\n|x"}]
    name = "\x1b[31m\n.jsonl"
    paths = [str(write_jsonl(tmp_path / name, rows)), str(write_jsonl(tmp_path / "b.jsonl", rows))]
    assert score.main(["--model", str(exported("gpt2")), "--data", *paths]) == 0
    said = capsys.readouterr()
    assert "\x1b[2J" not in said.err and "\x1b[31m" not in said.err
    assert sum(line.startswith(r"\x1b[2J\n|x ") for line in said.err.splitlines()) == 1
    assert set(json.loads(said.out)["by_name"]) == {"\x1b[2J\n|x", "\x1b[31m\n", "b"}
    assert score.main(["--model", str(exported("gpt2")), "--data", "\x1b[2J.jsonl"]) == 2
    assert capsys.readouterr().err.startswith(r"minirm.score: error: \x1b[2J.jsonl: ")
