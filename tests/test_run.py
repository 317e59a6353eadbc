"""Resuming a run, and refusing to: `python -m pytest tests/test_run.py`. No network.

Random kills are in tests/test_faults.py.
"""

import shutil
import signal

import pytest
from conftest import flags, make_comparisons, make_model, mounted, rows_without_speeds, unfinished, write_jsonl

from minirm.checkpoint import START, checkpoints, verify
from minirm.errors import InputError
from minirm.run import Run, accumulation, check_output, differences


def contents(output):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(output.rglob("*")) if path.is_file()}


# -- Resuming. ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changes_nothing(server, eight_steps, finished):
    before = contents(finished)
    run = server.run(*eight_steps, "--save_total_limit", 3, "--output_dir", finished)
    assert run.codes == [0] and "finished after 8 steps; nothing to do" in run.text()
    assert contents(finished) == before


def test_a_damaged_checkpoint_is_named_and_skipped_with_the_same_result(server, eight_steps, finished, tmp_path):
    output = unfinished(finished, tmp_path / "run", 6)
    damaged = next((output / "checkpoint-6").glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (output / "checkpoint-8.partial").mkdir()  # left by an unfinished save
    run = server.run(*eight_steps, "--save_total_limit", 3, "--output_dir", output)
    assert run.codes == [0], run.text()
    assert f"checkpoint-6 is not an intact checkpoint: {damaged.name}" in run.text()
    assert "resuming from" in run.text() and "checkpoint-4, step 4 of 8" in run.text()
    assert rows_without_speeds(output) == rows_without_speeds(finished)
    assert list(checkpoints(output)) == [8, 6, 4] and not list(output.glob("*.partial"))
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    for path in checkpoints(output).values():
        verify(path)


def test_a_run_without_a_whole_checkpoint_is_refused_and_kept(server, eight_steps, finished, tmp_path):
    output = unfinished(finished, tmp_path / "run", 4)
    (output / "checkpoint-4" / "checkpoint.json").unlink()
    before = contents(output)
    run = server.run(*eight_steps, "--output_dir", output)
    assert run.codes == [2] and "checkpoint-4 is not an intact checkpoint: checkpoint.json: No such file" in run.text()
    assert contents(output) == before


def test_another_recipe_data_or_model_is_refused_with_all_differences(server, eight_steps, finished, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", make_comparisons(60, seed=7))
    before = contents(finished)
    changed = flags(learning_rate=2e-3, precision="bf16", train_data=other)
    changed += flags(model=make_model(tmp_path / "model", "gptj", seed=5), output_dir=finished)
    run = server.run(*eight_steps, *changed)
    assert run.codes == [2]
    (line,) = [line for line in run.text().splitlines() if "error:" in line]
    for words in (
        "--learning_rate was 0.001, is 0.002",
        "--precision was 'fp32', is 'bf16'",
        "--train_data: its content has changed",
        "weights of --model: its content has changed",
    ):
        assert words in line
    assert "warmup" not in line and "tokenizer" not in line
    assert contents(finished) == before


def test_processes_with_different_inputs_are_refused_with_all_differences(server, eight_steps, tmp_path):
    """On two machines, one may have older files or another command line."""
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
    run = server.run(*eight_steps, "--output_dir", tmp_path / "run", world=2, patch=patch)
    assert run.codes == [2, 2], run.text()[-3000:]
    (line,) = [line for line in run.text().splitlines() if "error:" in line]
    assert (
        "process 1 was started with other flags or files than process 0: --train_data: its content has changed; --learn"
        in line
    )
    assert not (tmp_path / "run").exists()


def test_a_longer_run_resumes_with_the_schedule_of_its_new_length(server, eight_steps, finished, tmp_path):
    """Linear schedule, 3 warm-up steps: after step s of n the rate is lr * (n - s) / (n - 3)."""
    given = [*eight_steps, *flags(output_dir=tmp_path / "run", lr_scheduler_type="linear", eval_steps=0)]
    assert server.run(*given, "--max_steps", 5).codes == [0]
    run = server.run(*given, "--max_steps", 11)
    assert run.codes == [0], run.text()
    rates = {row["step"]: row["learning_rate"] for row in rows_without_speeds(tmp_path / "run") if "loss" in row}
    assert rates[5] == 0
    assert [rates[s] for s in (6, 10, 11)] == pytest.approx([1e-3 * 5 / 8, 1e-3 * 1 / 8, 0])
    run = server.run(*given, "--max_steps", 9)
    assert run.codes == [2] and "already reached step 11, but it should end at step 9" in run.text()


def test_a_run_on_two_three_one_and_two_processes_equals_one_on_two(server, eight_steps, tmp_path):
    """12 prompts a step: 2 x 1 x 6, 3 x 1 x 4, 1 x 1 x 12, 2 x 1 x 6. Equal to 1e-5, because the order of sums differs."""
    given = [*eight_steps, "--gradient_accumulation_steps", 6]
    assert server.run(*given, "--output_dir", tmp_path / "straight", world=2).codes == [0, 0]
    for world, steps, micro_steps in ((2, 2, 6), (3, 4, 4), (1, 6, 12), (2, 8, 6)):
        run = server.run(*given, "--max_steps", steps, "--output_dir", tmp_path / "changing", world=world)
        assert run.codes == [0] * world, run.text()
        assert f"--gradient_accumulation_steps {micro_steps}\n" in run.text()
    # Each of the four runs evaluated at its end, too.
    straight, changing = (
        {r["step"]: r for r in rows_without_speeds(tmp_path / o) if "loss" in r} for o in ("straight", "changing")
    )
    assert straight.keys() == changing.keys() == set(range(1, 9))
    for step, row in straight.items():
        assert changing[step] == pytest.approx(row, rel=1e-5, abs=1e-5)


def test_the_global_batch_is_kept_or_refused_with_both_numbers():
    # Begun as 2 processes x 1 prompt x 4 micro-steps.
    run = Run(START | {"recipe": {"prompts a step": 8}, "processes": 2}, None, 0)
    assert accumulation(run, 2, 1, 4) == 4
    assert accumulation(run, 4, 1, 4) == 2
    assert accumulation(run, 1, 2, 4) == 4
    for processes, batch_size, asked in ((3, 1, 4), (2, 1, 8), (16, 1, 1)):
        with pytest.raises(InputError, match=f"8 prompts per step.* are {processes * batch_size * asked};"):
            accumulation(run, processes, batch_size, asked)


def test_a_run_killed_before_its_first_checkpoint_starts_over(server, eight_steps, finished, tmp_path):
    output = unfinished(finished, tmp_path / "run", 0)
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run = server.run(*eight_steps, "--output_dir", output)
    assert run.codes == [0] and "resuming from" not in run.text()
    assert rows_without_speeds(output) == rows_without_speeds(finished)


def test_a_checkpoint_can_start_a_run_in_another_folder(server, eight_steps, finished, tmp_path):
    run = server.run(
        *eight_steps, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", finished / "checkpoint-4"
    )
    assert run.codes == [0], run.text()
    assert rows_without_speeds(tmp_path / "new") == [row for row in rows_without_speeds(finished) if row["step"] > 4]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("none", "holds a run"),
        ("checkpoint-4", "holds a run that is ahead of"),
        ("nowhere", "nowhere is not an intact checkpoint: SHA256SUMS: No such file"),
    ],
)
def test_impossible_resumptions_are_refused(server, eight_steps, finished, choice, words):
    before = contents(finished)
    where = choice if choice == "none" else finished / choice
    run = server.run(*eight_steps, "--output_dir", finished, "--resume_from_checkpoint", where)
    assert run.codes == [2] and words in run.text(), run.text()
    assert contents(finished) == before


def test_a_killed_run_that_started_from_another_checkpoint_starts_there_again(server, eight_steps, finished, tmp_path):
    """It was killed before its first checkpoint. The rows it had logged are removed."""
    given = [*eight_steps, *flags(output_dir=tmp_path / "new", resume_from_checkpoint=finished / "checkpoint-4")]
    kill = "import os; train.checkpoint.save = lambda *_: os.kill(os.getpid(), 9)"
    assert server.run(*given, patch=kill).codes == [-9] and rows_without_speeds(tmp_path / "new")
    run = server.run(*given)
    assert run.codes == [0], run.text()
    assert rows_without_speeds(tmp_path / "new") == [row for row in rows_without_speeds(finished) if row["step"] > 4]


# -- The folder. ---------------------------------------------------------------------------------------------------------


def test_an_output_folder_with_other_files_or_that_is_a_file_is_refused(tmp_path):
    check_output(tmp_path, "auto")
    (tmp_path / "run.json.partial").touch()  # left by a run killed right at its start
    check_output(tmp_path, "auto")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="files of another run"):
        check_output(tmp_path, "auto")
    for path in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        with pytest.raises(InputError, match="thesis.tex is not a folder that can be written"):
            check_output(path, "auto")


def test_a_read_only_output_folder_is_refused_before_the_data_is_read(server, eight_steps, tmp_path):
    with mounted(tmp_path / "small", "ro") as place:
        run = server.run(*eight_steps, "--output_dir", place / "run", patch="minirm.start.prepare = None")
        assert run.codes == [2] and f"{place} is not a folder that can be written" in run.text(), run.text()


def test_a_full_disk_ends_the_run_with_a_line_and_keeps_earlier_checkpoints(server, eight_steps, tmp_path):
    """A checkpoint takes 0.31 MB, so the disk has room for two, but not for three."""
    with mounted(tmp_path / "small", "size=800k") as place:
        output = place / "run"
        run = server.run(*eight_steps, "--output_dir", output, "--keep", "last", "--save_total_limit", 3, world=2)
        assert run.codes == [3, 3], run.text()
        (line,) = [line for line in run.text().splitlines() if "could not be written" in line]
        assert f"{output}/checkpoint-6" in line and "bytes" in line and "checkpoint-4 is intact" in line
        assert list(checkpoints(output)) == [4, 2] and not list(output.glob("*.partial"))
        shutil.rmtree(output / "checkpoint-2")
        run = server.run(*eight_steps, "--output_dir", output, "--keep", "last", "--save_total_limit", 1, world=2)
        assert run.codes == [0, 0] and "checkpoint-4, step 4 of 8" in run.text(), run.text()


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(server, eight_steps, tmp_path):
    first = server.start(*eight_steps, "--output_dir", tmp_path / "run")
    first.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    first.kill(signal.SIGSTOP)
    second = server.run(*eight_steps, "--output_dir", tmp_path / "run")
    first.kill(signal.SIGCONT)
    assert second.codes == [2] and "another run is writing there" in second.text()
    assert first.wait() == [0]


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_corrupt_run_record_is_refused(server, eight_steps, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    run = server.run(*eight_steps, "--output_dir", tmp_path / "run")
    assert run.codes == [2] and "run.json cannot be read; give an intact checkpoint" in run.text()


def test_differences_skips_flags_that_only_one_side_knows():
    old, new = {"loss": "last", "old": 1, "prompts a step": 4}, {"loss": "last", "new": 2, "prompts a step": 8}
    assert differences(old, new) == []
