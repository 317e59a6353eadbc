"""A checkpoint's content, the rejection of damaged ones, and exact resumption.

    pytest tests/test_checkpoint.py        about a minute on two cores; no network

Random kills are in tests/test_faults.py.
"""

import json
import random
import shutil
import signal

import pytest
from conftest import make_comparisons, make_model, mounted, read_metrics, write_jsonl
from safetensors.torch import load_file

from minirm.checkpoint import START, checkpoints, verify
from minirm.errors import InputError
from minirm.run import Run, accumulation, check_output, differences

SPEEDS = ("pairs_per_second", "tokens_per_second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@pytest.fixture(scope="module")
def inputs(folder):
    """Flags of a run of 8 steps on a tiny GPT-J, without --output_dir."""
    return [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", 0.5, "--eval_steps", 3, "--max_steps", 8),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(60))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(5, seed=1))),
        *("--save_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3, "--warmup_steps", 3),
        *("--head_learning_rate", 1e-3),
    ]


@pytest.fixture(scope="module")
def finished(server, inputs, folder):
    """A folder with a finished run that kept checkpoints 4, 6 and 8."""
    run = server.run(*inputs, "--save_total_limit", 3, "--output_dir", folder / "finished")
    assert run.codes == [0], run.text()
    return folder / "finished"


def rows(output):
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in read_metrics(output)]


def contents(output):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(output.rglob("*")) if path.is_file()}


def unfinished(finished, output, steps):
    """A copy of a finished run, in the state of one that was killed after this many steps."""
    shutil.copytree(finished, output)
    for step, path in checkpoints(output).items():
        if step > steps:
            shutil.rmtree(path)
    for path in [output / "config.json", *output.glob("*.safetensors")]:
        path.unlink()
    record = json.loads((output / "run.json").read_text())
    del record["finished"]
    (output / "run.json").write_text(json.dumps(record))
    return output


# -- Going on. ----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_finished_says_so_and_changes_nothing(server, inputs, finished):
    before = contents(finished)
    run = server.run(*inputs, "--save_total_limit", 3, "--output_dir", finished)
    assert run.codes == [0] and "finished after 8 steps; nothing is left to do" in run.text()
    assert contents(finished) == before


def test_a_damaged_checkpoint_is_named_and_passed_over_and_the_run_comes_to_the_same_end(
    server, inputs, finished, tmp_path
):
    output = unfinished(finished, tmp_path / "run", 6)
    damaged = next((output / "checkpoint-6").glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (output / "checkpoint-8.partial").mkdir()  # of a save that did not come to its end
    run = server.run(*inputs, "--save_total_limit", 3, "--output_dir", output)
    assert run.codes == [0], run.text()
    assert f"checkpoint-6 is not whole: {damaged.name}" in run.text()
    assert "goes on from" in run.text() and "checkpoint-4, step 4 of 8" in run.text()
    assert rows(output) == rows(finished)
    assert list(checkpoints(output)) == [8, 6, 4] and not list(output.glob("*.partial"))
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    for path in checkpoints(output).values():
        verify(path)


def test_no_whole_checkpoint_is_refused_and_nothing_is_thrown_away(server, inputs, finished, tmp_path):
    output = unfinished(finished, tmp_path / "run", 4)
    (output / "checkpoint-4" / "checkpoint.json").unlink()
    before = contents(output)
    run = server.run(*inputs, "--output_dir", output)
    assert run.codes == [2] and "checkpoint-4 is not whole: checkpoint.json: No such file" in run.text()
    assert contents(output) == before


def test_another_recipe_data_or_model_is_refused_with_all_differences(server, inputs, finished, folder, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(60, seed=7))
    before = contents(finished)
    changed = [*inputs, "--output_dir", finished, "--learning_rate", 2e-3, "--precision", "bf16", "--train_data", other]
    run = server.run(*changed, "--model", make_model(tmp_path / "model", "gptj", seed=5))
    assert run.codes == [2]
    (line,) = [line for line in run.text().splitlines() if "error:" in line]
    for words in (
        "--learning_rate was 0.001, is 0.002",
        "--precision was 'fp32', is 'bf16'",
        "--train_data: the content has changed",
        "weights of --model: the content has changed",
    ):
        assert words in line
    assert "warmup" not in line and "tokenizer" not in line
    assert contents(finished) == before


def test_processes_that_were_given_different_things_are_refused_with_all_differences(server, inputs, tmp_path):
    """This happens on two machines if one has older files or was started with another command."""
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(60, seed=7))
    patch = f"""
parse = train.parse_args
def parse_args(argv):
    args = parse(argv)
    if rank == 1:
        args.train_data, args.learning_rate = ["{other}"], 2e-3
    return args
train.parse_args = parse_args
"""
    run = server.run(*inputs, "--output_dir", tmp_path / "run", world=2, patch=patch)
    assert run.codes == [2, 2], run.text()[-3000:]
    (line,) = [line for line in run.text().splitlines() if "error:" in line]
    assert "process 1 was given another run than process 0: --train_data: the content has changed; --learn" in line
    assert not (tmp_path / "run").exists()


def test_a_longer_run_goes_on_with_the_schedule_of_its_new_length(server, inputs, finished, tmp_path):
    """Linear, 3 steps of warm-up: after step s of n the rate is lr * (n - s) / (n - 3)."""
    flags = [*inputs, "--output_dir", tmp_path / "run", "--lr_scheduler_type", "linear", "--eval_steps", 0]
    assert server.run(*flags, "--max_steps", 5).codes == [0]
    run = server.run(*flags, "--max_steps", 11)
    assert run.codes == [0], run.text()
    rates = {row["step"]: row["learning_rate"] for row in rows(tmp_path / "run") if "loss" in row}
    assert rates[5] == 0
    assert [rates[s] for s in (6, 10, 11)] == pytest.approx([1e-3 * 5 / 8, 1e-3 * 1 / 8, 0])
    run = server.run(*flags, "--max_steps", 9)
    assert run.codes == [2] and "at step 11 already, 9 were asked for" in run.text()


def test_two_then_three_then_one_then_two_processes_train_as_two_do(server, inputs, tmp_path):
    """12 prompts a step: 2 x 1 x 6, 3 x 1 x 4, 1 x 1 x 12, 2 x 1 x 6. In fp32 to 1e-5: the order of sums differs."""
    flags = [*inputs, "--gradient_accumulation_steps", 6]
    assert server.run(*flags, "--output_dir", tmp_path / "straight", world=2).codes == [0, 0]
    for world, steps, micro_steps in ((2, 2, 6), (3, 4, 4), (1, 6, 12), (2, 8, 6)):
        run = server.run(*flags, "--max_steps", steps, "--output_dir", tmp_path / "changing", world=world)
        assert run.codes == [0] * world, run.text()
        assert f"--gradient_accumulation_steps {micro_steps}\n" in run.text()
    # Each of the four runs evaluated at its end, too.
    straight, changing = ({r["step"]: r for r in rows(tmp_path / o) if "loss" in r} for o in ("straight", "changing"))
    assert straight.keys() == changing.keys() == set(range(1, 9))
    for step, row in straight.items():
        assert changing[step] == pytest.approx(row, rel=1e-5, abs=1e-5)


def test_the_global_batch_is_kept_or_refused_with_both_numbers():
    run = Run(
        START | {"recipe": {"prompts a step": 8}, "processes": 2}, None, 0
    )  # begun as 2 processes x 1 prompt x 4 micro-steps
    assert accumulation(run, 2, 1, 4) == 4
    assert accumulation(run, 4, 1, 4) == 2
    assert accumulation(run, 1, 2, 4) == 4
    for processes, batch_size, asked in ((3, 1, 4), (2, 1, 8), (16, 1, 1)):
        with pytest.raises(InputError, match=f"8 prompts a step.* are {processes * batch_size * asked};"):
            accumulation(run, processes, batch_size, asked)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(server, inputs, finished, tmp_path):
    output = unfinished(finished, tmp_path / "run", 0)
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run = server.run(*inputs, "--output_dir", output)
    assert run.codes == [0] and "goes on from" not in run.text()
    assert rows(output) == rows(finished)


def test_a_checkpoint_folder_begins_another_output_folder(server, inputs, finished, tmp_path):
    run = server.run(*inputs, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", finished / "checkpoint-4")
    assert run.codes == [0], run.text()
    assert rows(tmp_path / "new") == [row for row in rows(finished) if row["step"] > 4]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("none", "holds a run"),
        ("checkpoint-4", "holds a run that has got further"),
        ("nowhere", "nowhere is not whole: SHA256SUMS: No such file"),
    ],
)
def test_what_cannot_be_resumed_from_is_refused(server, inputs, finished, choice, words):
    before = contents(finished)
    where = choice if choice == "none" else finished / choice
    run = server.run(*inputs, "--output_dir", finished, "--resume_from_checkpoint", where)
    assert run.codes == [2] and words in run.text(), run.text()
    assert contents(finished) == before


def test_a_run_that_began_from_a_checkpoint_elsewhere_and_was_killed_begins_there_again(
    server, inputs, finished, tmp_path
):
    """It was killed before its first own checkpoint; earlier rows of metrics.jsonl are removed."""
    flags = [*inputs, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", finished / "checkpoint-4"]
    kill = "import os; train.checkpoint.save = lambda *_: os.kill(os.getpid(), 9)"
    assert server.run(*flags, patch=kill).codes == [-9] and rows(tmp_path / "new")
    run = server.run(*flags)
    assert run.codes == [0], run.text()
    assert rows(tmp_path / "new") == [row for row in rows(finished) if row["step"] > 4]


# -- The best is kept. --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worsening(inputs, folder):
    """Flags of a run of 8 steps whose held-out pairs are its training pairs with the sides swapped. Training makes the
    held-out loss worse, so among the evaluations at 2, 4, 6 and 8 the first has the lowest loss."""
    pairs = make_comparisons(24)
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    data = ["--train_data", write_jsonl(folder / "straight.jsonl", pairs)]
    data += ["--eval_data", write_jsonl(folder / "turned.jsonl", turned)]
    return [*inputs, *data, "--eval_steps", 2, "--save_total_limit", 0, "--gradient_accumulation_steps", 6]


@pytest.fixture(scope="module")
def worse(server, worsening, folder):
    """A finished run with those flags on two processes."""
    assert server.run(*worsening, "--output_dir", folder / "worse", world=2).codes == [0, 0]
    return folder / "worse"


def weights(folder, part=""):
    """{name in RewardModel: bytes} of a trained model, or of a checkpoint's "model." or "best.", with shards merged."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.startswith(part):
                name = name.removeprefix(part).replace("transformer.", "trunk.")
                found[name] = found.get(name, b"") + tensor.numpy().tobytes()
    return found


def losses(output):
    return {row["step"]: row["eval_loss"] for row in rows(output) if row["step"] and "eval_loss" in row}


def test_the_exported_model_is_that_of_the_lowest_loss(server, worsening, worse, tmp_path):
    """It is compared with a run that ends there and, for --keep last, with the last checkpoint."""
    assert min(losses(worse), key=losses(worse).get) == 2
    run = server.run(*worsening, "--max_steps", 2, "--output_dir", tmp_path / "two", world=2)
    assert "loss was lowest" not in run.text()
    assert weights(worse) == weights(tmp_path / "two")
    run = server.run(*worsening, "--keep", "last", "--output_dir", tmp_path / "last", world=2)
    assert run.codes == [0, 0] and "loss was lowest" not in run.text()
    last, ends = weights(tmp_path / "last"), weights(worse / "checkpoint-8", "model.")
    assert len(ends) == 23 and {name: last[name] for name in ends} == ends
    assert all(last[name] != weights(worse)[name] for name in ends)
    assert losses(tmp_path / "last") == losses(worse)


def test_the_best_is_kept_where_the_head_alone_is_trained_and_lies_on_one_of_two_processes(server, worsening, tmp_path):
    flags = [*worsening, "--freeze_ratio", 1, "--head_learning_rate", 0.1]
    for steps in (2, 8):
        assert server.run(*flags, "--max_steps", steps, "--output_dir", tmp_path / str(steps), world=2).codes == [0, 0]
    assert min(losses(tmp_path / "8"), key=losses(tmp_path / "8").get) == 2
    assert weights(tmp_path / "8") == weights(tmp_path / "2")
    assert weights(tmp_path / "8" / "checkpoint-8", "best.").keys() == {"score.weight"}


def test_a_checkpoint_has_the_best_parameters_unless_they_are_its_own(worse):
    assert weights(worse / "checkpoint-2", "best.") == {}
    for step in (4, 6, 8):
        assert weights(worse / f"checkpoint-{step}", "best.") == weights(worse / "checkpoint-2", "model.")


def test_the_last_line_and_the_model_card_have_the_figures_of_both(server, worsening, tmp_path):
    run = server.run(*worsening, "--max_steps", 4, "--output_dir", tmp_path / "run")
    two, four = [row for row in rows(tmp_path / "run") if row["step"] and "eval_loss" in row]
    assert (
        f"held-out accuracy {two['eval_accuracy']:.4f} on 24 pairs at step 2, where the loss was lowest, "
        f"{two['eval_loss']:.4f} (at the last, step 4: accuracy {four['eval_accuracy']:.4f}, loss {four['eval_loss']:.4f})"
    ) in run.text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "the model of step 2, where the held-out loss was lowest" in " ".join(card.split())
    for row in (two, four):
        assert f"| {row['step']} | {row['eval_loss']:.4f} | {row['eval_accuracy']:.4f} |" in card


def test_a_better_evaluation_takes_the_place_of_the_best_before_it(server, inputs, tmp_path):
    """At this high learning rate the loss rises and falls; it is lowest neither at the first nor at the last step."""
    flags = [*inputs, "--learning_rate", 3e-2, "--warmup_steps", 0, "--eval_steps", 1]
    assert server.run(*flags, "--output_dir", tmp_path / "run").codes == [0]
    loss = losses(tmp_path / "run")
    best = min(loss, key=loss.get)
    assert 1 < best < 8 and loss[best] < loss[1]
    assert server.run(*flags, "--max_steps", best, "--output_dir", tmp_path / "best").codes == [0]
    assert weights(tmp_path / "run") == weights(tmp_path / "best")


def test_the_best_comes_through_other_numbers_of_processes_to_the_bit(server, worsening, worse, tmp_path):
    for world, steps in ((2, 3), (3, 5), (1, 7), (2, 8)):
        run = server.run(*worsening, "--max_steps", steps, "--output_dir", tmp_path / "run", world=world)
        assert run.codes == [0] * world, run.text()
    assert min(losses(tmp_path / "run"), key=losses(tmp_path / "run").get) == 2
    assert weights(tmp_path / "run") == weights(worse)


@pytest.mark.parametrize("step", [2, 8])
def test_a_run_stopped_before_the_evaluation_of_its_step_makes_it_up(server, worsening, worse, tmp_path, step):
    """A signal saves the step and ends the run before the evaluation, once at the best step and once at the last."""
    signals = f"""
import os
agree, calls = train.run.agree, []
def signalled(caught, losses):
    calls.append(1)
    if len(calls) == {step}: caught.append(15)
    return agree(caught, losses)
train.run.agree = signalled
"""
    run = server.run(*worsening, "--output_dir", tmp_path / "run", patch=signals, world=2)
    assert run.codes == [143, 143] and f"stopped after step {step} of 8" in run.text()
    assert server.run(*worsening, "--output_dir", tmp_path / "run", world=2).codes == [0, 0]
    assert losses(tmp_path / "run") == losses(worse)
    assert weights(tmp_path / "run") == weights(worse)


# -- The folder. ---------------------------------------------------------------------------------------------------------


def test_an_output_folder_with_other_files_or_that_is_a_file_is_refused(tmp_path):
    check_output(tmp_path, "auto")
    (tmp_path / "run.json.partial").touch()  # of a run killed in its first moment
    check_output(tmp_path, "auto")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="another run's files"):
        check_output(tmp_path, "auto")
    for path in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(InputError, match="thesis.tex is not a folder that can be written"):
            check_output(path, "auto")


def test_a_folder_that_cannot_be_written_is_refused_before_the_data_is_read(server, inputs, tmp_path):
    with mounted(tmp_path / "small", "ro") as place:
        run = server.run(*inputs, "--output_dir", place / "run", patch="train.prepare = None")
        assert run.codes == [2] and f"{place} is not a folder that can be written" in run.text(), run.text()


def test_a_full_disk_ends_the_run_with_path_and_bytes_and_leaves_the_earlier_checkpoint(server, inputs, tmp_path):
    """A checkpoint takes 0.31 MB here, so two fit beside the rest, but not three."""
    with mounted(tmp_path / "small", "size=800k") as place:
        output = place / "run"
        run = server.run(*inputs, "--output_dir", output, "--keep", "last", "--save_total_limit", 3, world=2)
        assert run.codes == [3, 3], run.text()
        (line,) = [line for line in run.text().splitlines() if "could not be written" in line]
        assert f"{output}/checkpoint-6" in line and "bytes" in line and "checkpoint-4 is whole" in line
        assert list(checkpoints(output)) == [4, 2] and not list(output.glob("*.partial"))
        shutil.rmtree(output / "checkpoint-2")
        run = server.run(*inputs, "--output_dir", output, "--keep", "last", "--save_total_limit", 1, world=2)
        assert run.codes == [0, 0] and "checkpoint-4, step 4 of 8" in run.text(), run.text()


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_it(server, inputs, tmp_path):
    first = server.start(*inputs, "--output_dir", tmp_path / "run")
    first.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    first.kill(signal.SIGSTOP)
    second = server.run(*inputs, "--output_dir", tmp_path / "run")
    first.kill(signal.SIGCONT)
    assert second.codes == [2] and "another run is writing there" in second.text()
    assert first.wait() == [0]


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_record_that_was_edited_into_something_else_is_refused(server, inputs, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    run = server.run(*inputs, "--output_dir", tmp_path / "run")
    assert run.codes == [2] and "run.json cannot be read; give a whole checkpoint" in run.text()


# -- The files. ----------------------------------------------------------------------------------------------------------


def test_every_flip_and_every_cut_of_a_checkpoint_is_noticed(finished, tmp_path):
    rng, whole = random.Random(0), finished / "checkpoint-8"
    assert verify(whole)["step"] == 8
    for number in range(200):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        path = rng.choice(sorted(copy.iterdir()))
        data = bytearray(path.read_bytes())
        kind, place = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(data[:place])
        else:
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            verify(copy)
        assert type(error.value) is ValueError and "\n" not in str(error.value), f"{path.name}, byte {place}"


def test_a_checkpoint_from_a_stranger_is_refused_if_its_parts_do_not_fit_together(finished, tmp_path):
    """The digests are right but the contents are not; none of this may end in a traceback."""
    from minirm.files import file_digest

    for number, change in enumerate(
        [
            lambda state: state.pop("scaler"),
            lambda state: state.update(step="8"),
            lambda state: state.update(recipe=[]),
            lambda state: state.update(result={}),
            lambda state: state.update(best={"step": 6}),
            lambda state: state.update(best={"step": 6, "eval_loss": "low"}),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(finished / "checkpoint-8", copy)
        state = json.loads((copy / "checkpoint.json").read_text())
        change(state)
        (copy / "checkpoint.json").write_text(json.dumps(state))
        names = sorted(path.name for path in copy.iterdir() if path.name != "SHA256SUMS")
        (copy / "SHA256SUMS").write_text("".join(f"{file_digest(copy / name)}  {name}\n" for name in names))
        with pytest.raises(ValueError):
            verify(copy)
    (copy / "SHA256SUMS").write_text(f"{'0' * 64}  ../../secret\n" + (copy / "SHA256SUMS").read_text())
    with pytest.raises(ValueError, match="../../secret or its line in SHA256SUMS"):
        verify(copy)


def test_no_pickle_is_written_or_read(server, inputs, finished, tmp_path):
    """Unpickling is forbidden, then a run resumes from a checkpoint."""
    output = unfinished(finished, tmp_path / "run", 4)
    run = server.run(
        *inputs,
        *("--output_dir", output),
        patch="""
import pickle, torch
def forbidden(*arguments, **options): raise AssertionError("a pickle")
pickle.load = pickle.loads = torch.load = torch.save = torch.serialization.load = torch.serialization.save = forbidden
""",
    )
    assert run.codes == [0] and "goes on from" in run.text(), run.text()
    kinds = {path.suffix for path in output.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".md", ""}
    assert {p.name for p in output.rglob("*") if p.is_file() and not p.suffix} == {"SHA256SUMS"}


def test_a_checkpoint_takes_twelve_bytes_for_each_trained_parameter(server, inputs, tmp_path):
    """GPT-J's 28 layers, 8 of them trained: an fp32 parameter and Adam's two moments, within 5 %.

    With width h a layer has 4 h^2 + 8 h^2 + 5 h + h + h = 12 h^2 + 7 h parameters, the final norm 2 h, the head h.
    """
    h = 64
    model = make_model(tmp_path / "model", "gptj", n_embd=h, n_layer=28)
    run = server.run(
        *inputs, "--model", model, "--freeze_ratio", 0.7, "--max_steps", 1, "--output_dir", tmp_path / "run"
    )
    assert run.codes == [0], run.text()
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").iterdir())
    assert size == pytest.approx(12 * (8 * (12 * h * h + 7 * h) + 3 * h), rel=0.05)
    assert f"checkpoint-1: {size / 1e6:.1f} MB in " in run.text()


def test_differences_leaves_out_what_one_side_does_not_know():
    assert (
        differences({"loss": "last", "old": 1, "prompts a step": 4}, {"loss": "last", "new": 2, "prompts a step": 8})
        == []
    )
