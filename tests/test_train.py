"""train.py on tiny models: one and several processes, the published procedure, refusals.

Run: pytest tests/test_train.py. Needs no network and no GPU; two to four gloo processes on the CPU.
"""

import importlib
import json
import resource

import pytest
import torch
import transformers
from conftest import (
    SHARED_DATA,
    flags,
    make_comparisons,
    make_model,
    make_tokenizer,
    read_metrics,
    run_train,
    write_jsonl,
)
from safetensors.torch import load_file
from test_attention import FAMILIES, REFUSED

from minirm.data.prepare import prepare
from minirm.model import init_head
from minirm.plan import make_plan

QUICK = ["--max_length", 200, "--warmup_steps", 0, "--learning_rate", 1e-3, "--logging_steps", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 comparisons of 23 prompts for training and 11 of 8 prompts for evaluation; 11 is divisible by neither 2 nor 3."""
    folder = tmp_path_factory.mktemp("data")
    rows = make_comparisons(7, seed=2, per_prompt=2)[:7] + make_comparisons(4, seed=3)
    return write_jsonl(folder / "train.jsonl", make_comparisons(23)), write_jsonl(folder / "eval.jsonl", rows)


def trained(data, output, model, *more, processes=0, server=None):
    """Run the command to its end and return its metrics.jsonl.

    A single process runs in this one, several run in the server or under torchrun, which has to import everything.
    """
    given = [*flags(model=model, train_data=data[0], eval_data=data[1], output_dir=output), *QUICK, *more]
    if server:
        run = server.run(*given, world=processes)
        assert set(run.codes) == {0}, run.text()[-3000:]
    elif processes:
        result = run_train(*given, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    else:
        assert importlib.import_module("train").main([str(flag) for flag in given]) == 0
    return read_metrics(output)


def test_importing_train_does_nothing():
    module = importlib.import_module("train")
    assert module.parse_args(["--model", "x"]).learning_rate == 1e-5


def test_defaults_are_the_recipe_except_in_the_demo():
    train = importlib.import_module("train")
    args = train.parse_args(["--model", "some/decoder"])
    assert (args.learning_rate, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1e-5, 1, 4)
    assert (args.num_train_epochs, args.warmup_steps, args.freeze_ratio, args.max_length) == (5, 100, 0.7, 550)
    assert train.parse_args([]).learning_rate > 1e-5  # a tiny model needs a higher rate
    assert train.parse_args(["--learning_rate", "1e-5"]).learning_rate == 1e-5


@pytest.mark.parametrize("family", ["gptj", "gpt2", "llama", "qwen2"])
def test_two_processes_train_in_fp16_and_count_every_held_out_pair_once(family, model_folder, data, server, tmp_path):
    real = [SHARED_DATA / "comparisons_train.jsonl", SHARED_DATA / "comparisons_eval.jsonl"]
    use_real = family == "gptj" and all(path.exists() for path in real)
    pairs = 320 if use_real else 11
    options = flags(precision="fp16", max_steps=6, max_length=100)
    forked = {} if family == "gptj" else {"server": server}  # GPT-J runs under torchrun
    rows = trained(real if use_real else data, tmp_path / "out", model_folder(family), *options, processes=2, **forked)
    train_rows, eval_rows = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [r["eval_pairs"] for r in eval_rows] == [pairs, pairs]
    assert [r["step"] for r in train_rows] == [1, 2, 3, 4, 5, 6]
    # The scale starts at 2**16 and halves with every skipped step.
    assert all(r["loss_scale"] == 2.0 ** (16 - r["skipped_steps"]) for r in train_rows)
    assert all(0 < r["loss"] < 5 and 0 <= r["accuracy"] <= 1 and r["tokens"] > 0 for r in train_rows)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """41 comparisons of 21 prompts with margins 0.5, 1 and 2. With 40 tokens a row, some prompts form two groups."""
    rows = make_comparisons(30, seed=6, per_prompt=3) + make_comparisons(13, seed=7)[2:]
    rows = [row | {"margin": [0.5, 1.0, 2.0][i % 3]} for i, row in enumerate(rows)]
    return [write_jsonl(tmp_path_factory.mktemp("uneven") / "train.jsonl", rows)] * 2


ALL_OPTIONS = ["--pair_weight", "prompt", "--center_rewards_coefficient", 0.1, "--margin_scale", 0.7]


@pytest.mark.parametrize("options", [[], ALL_OPTIONS])
def test_steps_depend_only_on_the_global_batch(options, model_folder, uneven, server, tmp_path):
    """21 prompts form more groups. A step has 4: processes x groups per micro-step x micro-steps. The last has fewer."""
    runs = {}
    data = ["--train_data", uneven[0], "--eval_data", uneven[1], *QUICK, "--max_length", 40]
    for processes, batch, accumulation in ((1, 1, 4), (2, 1, 2), (4, 1, 1), (1, 4, 1)):
        output = tmp_path / f"{processes}-{batch}"
        cut = flags(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=1)
        run = server.run(*flags(model=model_folder("llama"), output_dir=output), *data, *options, *cut, world=processes)
        assert set(run.codes) == {0}, run.text()[-3000:]
        runs[processes, batch] = (read_metrics(output), load_file(output / "model.safetensors"))
    rows, weights = runs.pop((1, 1))
    steps = [row for row in rows if "loss" in row]
    assert sum(row["pairs"] for row in steps) == 41 and len({row["pairs"] for row in steps}) > 2
    for name, (other_rows, other_weights) in runs.items():
        assert [row["step"] for row in other_rows] == [row["step"] for row in rows]
        for key in ("loss", "grad_norm", "accuracy", "reward_margin", "pairs", "tokens", "eval_loss", "eval_accuracy"):
            got, wanted = [[r[key] for r in some if key in r] for some in (other_rows, rows)]
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6), (name, key)
        for key, tensor in weights.items():
            torch.testing.assert_close(other_weights[key], tensor, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("kind", ["divergence", "last"])
def test_combined_loss_options_agree_with_a_loop_over_prompts(kind, model_folder, uneven, tmp_path, monkeypatch):
    """One step over all data trains the head alone. Loss and gradient norm are recomputed pair by pair."""
    monkeypatch.setattr("minirm.model.HEAD_SCALE", 1.0)
    model = model_folder("llama")
    one = flags(loss=kind, max_length=40, freeze_ratio=1, max_steps=1, max_grad_norm=0, gradient_accumulation_steps=99)
    rows = trained(uneven, tmp_path / "out", model, *ALL_OPTIONS, *one)
    (row,) = (row for row in rows if "loss" in row)

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    trunk = transformers.AutoModel.from_pretrained(model)
    head = init_head(32, seed=0).requires_grad_()
    groups = list(prepare(tokenizer, [str(uneven[0])], [str(uneven[1])], max_length=40).train)
    assert any(group["pairs"] < group["prompt_pairs"] for group in groups)
    per_prompt = {}
    for group in groups:
        for c, r, margin in zip(group["chosen"], group["rejected"], group["margin"]):
            texts = [group["prefix"] + group["completions"][side] for side in (c, r)]
            with torch.no_grad():
                hidden = [trunk(torch.tensor([text])).last_hidden_state[0] for text in texts]
            rewards = [(h @ head[0]) for h in hidden]
            start = next(t for t, (a, b) in enumerate(zip(*texts)) if a != b)
            places = range(start, max(map(len, texts))) if kind == "divergence" else [-1]
            at = [[side[min(t, len(side) - 1)] for t in places] for side in rewards]
            losses = [-torch.nn.functional.logsigmoid(a - b - 0.7 * margin) for a, b in zip(*at)]
            loss = sum(losses) / len(losses) + 0.1 * (rewards[0][-1] + rewards[1][-1]) ** 2
            # All of a prompt's texts share the end of the prompt, even where it was truncated.
            key = tokenizer.decode(group["prefix"][-12:])
            per_prompt.setdefault(key, []).append(loss)
    assert len(per_prompt) == 21 and {len(losses) for losses in per_prompt.values()} == {1, 3}
    wanted = sum(sum(losses) / len(losses) for losses in per_prompt.values()) / 21
    assert row["loss"] == pytest.approx(wanted.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(wanted, head)
    assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert rows[0]["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)  # the same pairs, before the step


def flat(value):
    """{path: number} of nested lists and dicts."""
    if isinstance(value, dict):
        return {f"{k} {name}": number for k, v in value.items() for name, number in flat(v).items()}
    return {"": value} if not isinstance(value, list) else flat(dict(enumerate(value)))


def test_evaluation_is_the_same_on_one_two_and_three_processes(model_folder, data, server, tmp_path):
    """All metrics agree, with subsets and two files."""
    subsets = tmp_path / "other.jsonl"
    write_jsonl(subsets, [row | {"subset": name} for row, name in zip(make_comparisons(5, seed=8), "xxyyy")])
    rows = []
    for n in (1, 2, 3):
        files = ["--train_data", data[0], "--eval_data", data[1], subsets, "--output_dir", tmp_path / f"{n}"]
        run = server.run("--model", model_folder("gpt2"), *files, *QUICK, "--max_steps", 0, world=n)
        assert set(run.codes) == {0}, run.text()[-3000:]
        rows += read_metrics(tmp_path / f"{n}")
    assert [row["eval_pairs"] for row in rows] == [16, 16, 16]
    assert {name for name in rows[0] if "/" in name} == {
        f"eval_accuracy/{name}" for name in ("eval", "other", "x", "y")
    }
    parts = 11 * rows[0]["eval_accuracy/eval"] + 5 * rows[0]["eval_accuracy/other"]
    assert 16 * rows[0]["eval_accuracy"] == pytest.approx(parts)
    for row in rows[1:]:
        assert flat(row) == pytest.approx(flat(rows[0]), rel=1e-6)


def test_data_whose_longer_answer_always_wins_is_reported(model_folder, tmp_path, capsys):
    rows = make_comparisons(24, seed=9)
    rows = [{**row, "chosen": f"{row['chosen']} {row['rejected']} and more"} for row in rows]
    data = [write_jsonl(tmp_path / "train.jsonl", rows[:12]), write_jsonl(tmp_path / "eval.jsonl", rows[12:])]
    last = trained(data, tmp_path / "out", model_folder("gptj"), "--max_steps", 6)[-1]
    assert last["eval_length_accuracy"] == 1.0 and all(bucket["low"] > 0 for bucket in last["eval_by_length"])
    shown = capsys.readouterr().out
    assert "Length alone does as well as this model: always choosing the longer answer gets 100.0% right." in shown


@pytest.mark.parametrize("layout", ["separate", "shared"])
def test_the_published_procedure_gives_the_same_ten_losses(layout, tmp_path):
    """The reference restates CarperAI/trlx's trainer: two full sequences padded to --max_length, a loop over pairs.

    GPT-J, 4 layers of which int(0.3 * 4) = 1 is trained, trained embeddings, AdamW, clipping at 1, four pairs per step.
    """
    model, length, steps = make_model(tmp_path / "model", "gptj"), 96, 10
    data = [write_jsonl(tmp_path / f"{name}.jsonl", make_comparisons(n)) for name, n in (("train", 40), ("eval", 3))]
    published = ["--train_embeddings", *flags(loss="trlx", max_length=length, max_steps=steps, row_layout=layout)]
    got = [r["loss"] for r in trained(data, tmp_path / "out", model, *published) if "loss" in r]

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    eos = tokenizer.eos_token_id
    trunk = transformers.AutoModel.from_pretrained(model)
    head = torch.nn.Parameter(init_head(32, seed=0, published=True))
    trunk.h[:3].requires_grad_(False)
    parameters = [*(p for p in trunk.parameters() if p.requires_grad), head]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    groups = prepare(tokenizer, [str(data[0])], [str(data[1])], max_length=length).train
    plan = make_plan(groups["shared_tokens"][:], groups["pairs"][:], world_size=1, batch_size=1, accumulation=4)
    wanted = []
    for step in plan[:steps]:
        losses = []
        for ((index,),) in step.micro_steps:
            group = groups[index]
            texts = [group["prefix"] + group["completions"][group[side][0]] for side in ("chosen", "rejected")]
            ids = torch.tensor([text + [eos] * (length - len(text)) for text in texts])
            mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
            rewards = trunk(ids, attention_mask=mask).last_hidden_state @ head[0]
            end = max(int((row == eos).nonzero()[0]) for row in ids)  # pad = EOS: the first EOS ends the text
            start = int((ids[0] != ids[1]).nonzero()[0])
            loss = -torch.log(torch.sigmoid(rewards[0, start:end] - rewards[1, start:end])).mean()
            (loss / 4).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(sum(losses) / 4)
    assert len(got) == steps and got == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) - min(wanted) > 1e-2  # the losses differ between steps, so equal losses mean equal steps


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Six prompts with four comparisons each that share the chosen answer: five completions of different lengths."""
    folder = tmp_path_factory.mktemp("ranked")
    rows = make_comparisons(24, seed=5, per_prompt=4)
    return write_jsonl(folder / "train.jsonl", rows), write_jsonl(folder / "eval.jsonl", rows[:8])


def in_both_layouts(data, folder, model, *more):
    """metrics.jsonl of the same command with shared and with separate rows. The weights stay as they are."""
    more = [*more, *flags(learning_rate=0, max_steps=2, per_device_train_batch_size=2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minirm.model.HEAD_SCALE", 1.0)  # errors in rewards near zero would be too small to notice
        return [trained(data, folder / way, model, *more, "--row_layout", way) for way in ("shared", "separate")]


def assert_same_metrics(shared, separate):
    for key in ("loss", "reward_margin", "accuracy", "eval_loss", "eval_reward_margin", "eval_accuracy", "pairs"):
        got, wanted = [[row[key] for row in rows if key in row] for rows in (shared, separate)]
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mpt"])
def test_shared_and_separate_rows_give_the_same_metrics_in_every_family(family, ranked, tmp_path, capfd):
    kind, values = {**FAMILIES, **REFUSED}[family]
    tokenizer = make_tokenizer()
    values = values | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    config = transformers.CONFIG_MAPPING[kind](**values, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # move biases and attention away from their initial zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capfd.readouterr()
    shared, separate = in_both_layouts(ranked, tmp_path, tmp_path / "model", "--freeze_ratio", 0.5)
    assert_same_metrics(shared, separate)
    saved = [row["tokens_saved"] for row in shared if "loss" in row]
    shown = capfd.readouterr().out
    if family in ("bloom", "mpt"):
        assert max(saved) == 0 and f"shared rows would not be exact: {family}" in shown
    else:
        assert min(saved) > 0.2 and "would not be exact" not in shown


@pytest.mark.parametrize("loss", ["divergence", "last", "trlx"])
def test_shared_and_separate_rows_give_the_same_metrics_for_every_loss(loss, model_folder, ranked, tmp_path):
    assert_same_metrics(*in_both_layouts(ranked, tmp_path, model_folder("gptj"), "--loss", loss))


def test_gradient_checkpointing_changes_nothing(model_folder, data, tmp_path):
    rows = trained(data, tmp_path / "a", model_folder("llama"), "--max_steps", 3)
    again = trained(data, tmp_path / "b", model_folder("llama"), "--max_steps", 3, "--gradient_checkpointing")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in again if key in r] == pytest.approx([r[key] for r in rows if key in r], rel=1e-6)


def test_a_row_of_8192_tokens_trains_within_4_gib(tmp_path):
    """One prompt of 7,900 tokens with two answers. It runs in a process of its own, whose peak memory is checked."""
    model = make_model(tmp_path / "model", "gptj", n_positions=8192)
    rows = make_comparisons(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    word = len(tokenizer(" answer")["input_ids"])
    rows[0]["prompt"] = " ".join(["answer"] * (7900 // word))
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    given = [*flags(model=model, train_data=data, eval_data=data, output_dir=tmp_path / "out"), *QUICK]
    result = run_train(*given, "--max_length", 8192, "--max_steps", 1)
    assert result.returncode == 0, result.stderr[-3000:]
    (row,) = (row for row in read_metrics(tmp_path / "out") if "loss" in row)
    assert 7900 < row["tokens"] <= 8192 and row["tokens_saved"] > 0.45
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 2**20  # KiB


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.fixture(scope="module")
def refused(model_folder, data, tmp_path_factory):
    """refused(capsys, *flags) -> the command's one-line error. Runs in this process to save the imports."""
    train = importlib.import_module("train")

    def run(capsys, *more, **changes):
        folder = tmp_path_factory.mktemp("refused")
        settings = {"train_data": data[0], "eval_data": data[1], "output_dir": folder / "out", **changes}
        code = train.main([str(x) for x in (*flags(**{"model": model_folder("gpt2")} | settings), *more)])
        out, err = capsys.readouterr()
        assert code == 2 and out == "", (code, out)
        lines = err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if line.strip() and "it/s" not in line and "?" not in line]  # no progress bars
        assert len(lines) == 1 and lines[0].startswith("train.py: error: "), err
        assert not (folder / "out").exists() or "output_dir" in changes
        return lines[0]

    return run


def test_bad_data_is_refused_by_file_and_line(refused, capsys, tmp_path):
    good = json.dumps(make_comparisons(1)[0])
    assert "missing.jsonl: No such file" in refused(capsys, train_data=tmp_path / "missing.jsonl")
    (tmp_path / "a.jsonl").write_text(good + "\n{not json\n")
    assert "a.jsonl:2: not JSON" in refused(capsys, train_data=tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "chosen": "a b c d e", "answer": "x"}\n')
    line = refused(capsys, train_data=tmp_path / "b.jsonl")
    assert "b.jsonl:1: no column 'rejected'" in line and "found prompt, chosen, answer" in line
    (tmp_path / "c.jsonl").write_text(good + '\n{"prompt": "p", "chosen": 3, "rejected": "x"}\n')
    assert "c.jsonl:2: 'chosen' must be a string, got int 3" in refused(capsys, train_data=tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text('{"prompt": "p", "chosen": "a b c", "rejected": "x y"}\n')
    line = refused(capsys, train_data=tmp_path / "d.jsonl")
    assert "nothing left to train on" in line and "answer under 5 words" in line
    assert "no/such-dataset: neither" in refused(capsys, train_data="no/such-dataset")


def test_models_that_cannot_become_reward_models_are_refused(refused, capsys, tmp_path):
    assert "no/such-model" in refused(capsys, model="no/such-model")

    def saved(name, config, tokenizer=None):
        config.save_pretrained(tmp_path / name)
        (tokenizer or make_tokenizer()).save_pretrained(tmp_path / name)
        return tmp_path / name

    assert "bert is not a decoder" in refused(capsys, model=saved("bert", transformers.BertConfig()))
    assert "t5 is not a decoder" in refused(capsys, model=saved("t5", transformers.T5Config()))
    silent = make_tokenizer()
    silent.eos_token = None
    assert "no EOS token" in refused(capsys, model=saved("silent", transformers.GPT2Config(), silent))


def test_flags_out_of_range_are_refused(refused, capsys):
    assert "--freeze_ratio must lie in 0..1, got 1.5" in refused(capsys, "--freeze_ratio", 1.5)
    assert "--gradient_accumulation_steps must be positive" in refused(capsys, "--gradient_accumulation_steps", 0)
    assert "--seed must lie in" in refused(capsys, "--seed", -1)
    assert "--learn_rate" in refused(capsys, "--learn_rate", 1)


@pytest.mark.parametrize(
    "flag, value", [("pair_weight", "prompt"), ("center_rewards_coefficient", 0.01), ("margin_scale", 0)]
)
def test_loss_options_are_refused_with_the_published_loss(flag, value, refused, capsys):
    assert f"--{flag} does not go with --loss trlx" in refused(capsys, "--loss", "trlx", f"--{flag}", value)
    assert f"--{flag}" in refused(capsys, f"--{flag}", -1)


@pytest.mark.parametrize(
    "options, with_margins, warning",
    [
        (["--loss", "trlx"], True, "--loss trlx ignores the margins in the data"),
        (["--loss", "trlx"], False, ""),
        (["--margin_scale", 0.5], False, "--margin_scale has no effect: the data has no margins"),
        (["--margin_scale", 0.5, "--pair_weight", "prompt"], True, ""),
        (["--pair_weight", "prompt"], False, "--pair_weight has no effect: every prompt has one comparison"),
    ],
)
def test_flags_that_the_data_leaves_without_effect_are_named(
    options, with_margins, warning, model_folder, data, uneven, tmp_path, capsys
):
    trained(uneven if with_margins else data, tmp_path / "out", model_folder("gpt2"), *options, "--max_steps", 0)
    shown = [line.partition("warning: ")[2] for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert shown == ([warning] if warning else [])


def test_only_the_flag_without_effect_is_named(capsys):
    train = importlib.import_module("train")
    for epochs in (["--num_train_epochs", "3"], ["--num_train_epochs=3"]):
        train.parse_args(["--model", "x", "--max_steps", "5", *epochs, "--warmup_steps", "3"])
        assert capsys.readouterr().err == "train.py: warning: --num_train_epochs has no effect beside the other flags\n"


def test_another_runs_folder_is_left_alone(refused, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "holds another run's files" in refused(capsys, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_micro_batch_tokens_changes_no_step_and_no_evaluation(data, model_folder, tmp_path, server):
    """Micro-steps of one prompt, several, a whole step; two and three processes; resumed with another budget."""

    def run(name, *more, world=1, steps=4):
        given = flags(model=model_folder("gptj"), train_data=data[0], eval_data=data[1], output_dir=tmp_path / name)
        given += [*QUICK, *flags(max_steps=steps, max_length=96, save_steps=2, keep="last")]
        done = server.run(*given, "--gradient_accumulation_steps", 12 // world, *more, world=world)
        assert done.codes == [0] * world, done.text()[-2000:]
        keys, rows = ("loss", "grad_norm", "eval_loss"), read_metrics(tmp_path / name)
        return [row[key] for row in rows for key in keys if row.get(key) is not None]

    wanted = run("count")
    assert len(wanted) >= 10
    runs = ("one", 1, 1), ("some", 150, 1), ("all", 100_000, 1), ("two", 150, 2), ("three", 300, 3)
    for name, tokens, world in runs:
        assert run(name, "--micro_batch_tokens", tokens, world=world) == pytest.approx(wanted, abs=1e-5), name
    run("resumed", "--micro_batch_tokens", 150, steps=2)
    resumed = run("resumed", "--micro_batch_tokens", 400)
    assert resumed[-3:] == pytest.approx(wanted[-3:], abs=1e-5)


def test_compile_compiles_each_block_once(data, model_folder, tmp_path, server):
    """Compiling is torch's business, so a function that only records its calls replaces it."""
    patch = """
import torch
compiled = []
torch.nn.Module.compile = lambda self, *_, **options: compiled.append((type(self).__name__, options))
original = train.train
def shown(*arguments):
    original(*arguments)
    print("compiled:", compiled, flush=True)
train.train = shown
"""
    given = flags(model=model_folder("gptj"), train_data=data[0], eval_data=data[1], output_dir=tmp_path / "out")
    run = server.run(*given, *flags(max_steps=1, max_length=96), "--compile", patch=patch)
    assert run.codes == [0] and f"compiled: {[('GPTJBlock', {'dynamic': True})] * 4}" in run.text(), run.text()[-2000:]
