"""A run that is killed, stopped, out of disk or fed broken data ends cleanly and resumes exactly.

    pytest tests/test_faults.py        about 1.5 minutes on two cores; no network

tests/bench/crash.py and tests/bench/fuzz.py are the long versions.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, make_comparisons, make_model, mounted, read_metrics, write_jsonl
from safetensors.torch import load_file

from minirm.checkpoint import checkpoints, verify

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

from crash import compare, crash
from fuzz import make_chat_tokenizer, make_file, try_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def inputs(folder):
    """Flags of a run of 12 steps on a tiny GPT-J, without --output_dir."""
    return [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", 0.5, "--eval_steps", 3, "--max_steps", 12),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(64))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(5, seed=1))),
        *("--save_steps", 4, "--logging_steps", 1, "--learning_rate", 1e-3, "--warmup_steps", 3),
    ]


@pytest.fixture(scope="module")
def straight(server, inputs, folder):
    """Output folder of that run on two undisturbed processes."""
    assert server.run(*inputs, "--output_dir", folder / "straight", world=2).codes == [0, 0]
    return folder / "straight"


def training(output):
    return [row for row in read_metrics(output) if "loss" in row]


# -- Killed and stopped. -------------------------------------------------------------------------------------------------


def test_six_kills_at_random_moments_change_nothing(server, tmp_path):
    """fp16 with loss scaling on two processes; weights, optimizer and all rows of metrics.jsonl are bitwise equal."""
    report = crash(tmp_path, kills=6, precision="fp16", seed=2, server=server, steps=9, save_steps=2)
    assert report["differences"] == []
    assert sum(report["kills"].values()) == 6 and report["kills"]["saving, the first time"] >= 1


def test_a_signal_to_any_process_stops_all_after_the_step_with_a_checkpoint(server, inputs, straight, tmp_path):
    """Send each signal once during one run, also between the checkpoints of --save_steps."""
    output = tmp_path / "stopped"
    for number, ranks in ((signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1]), (signal.SIGHUP, [0])):
        run = server.start(*inputs, "--output_dir", output, world=2)
        before = len(training(output)) if (output / "metrics.jsonl").exists() else 0
        run.until(lambda: (output / "metrics.jsonl").exists() and len(training(output)) > before)  # noqa: B023
        run.kill(number, ranks=ranks)
        assert run.wait() == [128 + number] * 2, run.text()
        step = max(checkpoints(output))
        line = f"train.py: {number.name}: stopped after step {step} of 12; the same command goes on from there"
        assert line in run.text().splitlines()
        assert len(training(output)) == step < 12
    assert server.run(*inputs, "--output_dir", output, world=2).codes == [0, 0]
    assert compare(straight, output) == []


def test_when_one_process_is_killed_the_other_ends_too_and_says_why(server, inputs, tmp_path):
    run = server.start(*inputs, "--output_dir", tmp_path / "run", "--max_steps", 1000, world=2)
    run.until(lambda: checkpoints(tmp_path / "run"))
    run.kill(ranks=[1])
    start = time.monotonic()
    assert run.wait(60) == [1, -9]
    assert time.monotonic() - start < 60
    assert "train.py: process 0 ends, since another one was lost" in run.text()
    assert "Traceback" not in run.text()


# Holds a run where it is asked to, with a file as the sign that it has come there.
HOLD = """
import time
from pathlib import Path
original = {name}
def held(*arguments, **options):
    if rank == 0 and {when}:
        Path({sign!r}).touch()
        {wait}
    return original(*arguments, **options)
{name} = held
"""


@pytest.mark.parametrize(
    "name, number",
    [("train.prepare", signal.SIGHUP), ("train.load_weights", signal.SIGINT), ("train.export", signal.SIGTERM)],
)
def test_a_signal_outside_of_the_loop_ends_the_run_in_seconds_with_a_line(server, inputs, tmp_path, name, number):
    """Both processes get it, as from torchrun, while the second waits for the first in gloo. Then the run finishes."""
    flags = [*inputs, "--max_steps", 2, "--save_steps", 1, "--output_dir", tmp_path / "run"]
    stored = "train.stored_weights = lambda *_: None\n"  # so that the first process reads them for all
    patch = stored + HOLD.format(name=name, when=True, sign=str(tmp_path / "sign"), wait="time.sleep(60)")
    run = server.start(*flags, world=2, patch=patch)
    assert run.until(lambda: (tmp_path / "sign").exists())
    run.kill(number)
    start = time.monotonic()
    codes = run.wait(60)
    assert time.monotonic() - start < 30 and codes[0] == 128 + number and codes[1] in (1, 128 + number), run.text()
    line = f"train.py: {number.name}: stopped; no finished step is lost, and the same command goes on"
    assert line in run.text().splitlines() and "Traceback" not in run.text(), run.text()
    assert not (tmp_path / "run" / "config.json").exists()
    assert server.run(*flags, world=2).codes == [0, 0] and (tmp_path / "run" / "config.json").exists()


def test_a_process_that_is_stuck_in_a_library_ends_all_the_same(server, inputs, tmp_path):
    """The main thread waits where no signal wakes it, as in a collective that another process never enters."""
    mutex = "import ctypes\nC, MUTEX = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
    wait = "C.pthread_mutex_lock(MUTEX), C.pthread_mutex_lock(MUTEX)"  # locked twice: nothing ever wakes it up
    patch = mutex + HOLD.format(name="train.prepare", when=True, sign=str(tmp_path / "sign"), wait=wait)
    run = server.start(*inputs, "--output_dir", tmp_path / "run", patch=patch)
    assert run.until(lambda: (tmp_path / "sign").exists())
    run.kill(signal.SIGTERM)
    assert run.wait(30) == [143] and "SIGTERM: stopped" in run.text()


def test_a_signal_in_an_evaluation_cuts_it_short_and_the_resumed_run_makes_it_up(server, inputs, straight, tmp_path):
    output = tmp_path / "stopped"
    patch = """
measured, agreed = [], train.run.agreed
def signalled(caught):
    measured.append(1)
    if rank == 1 and len(measured) == {calls}: caught.append(1)
    return agreed(caught)
train.run.agreed = signalled
"""  # five held-out prompts on two processes: three micro-steps of an evaluation
    for calls, step in ((2, None), (5, 3)):
        run = server.run(*inputs, "--output_dir", output, world=2, patch=patch.format(calls=calls))
        assert run.codes == [129, 129], run.text()
        assert max(checkpoints(output), default=None) == step
    assert server.run(*inputs, "--output_dir", output, world=2).codes == [0, 0]
    assert compare(straight, output) == []


# kill -9 of the process that started this one, and some time for the signal that follows. A file tells each process's id.
ORPHAN = """
import os, time
from pathlib import Path
from minirm import checkpoint
Path({pids!r}, str(os.getpid())).touch()
owner, name = {{"run": train.run, "checkpoint": checkpoint, "train": train}}[{owner!r}], {name!r}
original, calls = getattr(owner, name), []
def killed(*arguments, **options):
    calls.append(1)
    if rank == 0 and len(calls) == {call}:
        os.kill(os.getppid(), 9)
        time.sleep(1.5)
    return original(*arguments, **options)
setattr(owner, name, killed)
"""
# What torchrun starts: train.py, with a patch before.
PATCHED = """
import os, sys
import train
exec(os.environ["PATCH"], {"train": train, "rank": int(os.environ["RANK"])})
sys.exit(train.main())
"""
# In place of train.py: torchrun's agent, whose two processes are forked, so that nothing is imported again.
AGENT = """
import os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def work(argv):
    exec({patch!r}, {{"train": train, "rank": int(os.environ["RANK"])}})
    sys.exit(main(argv))
def launch(argv):
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts={restarts}, start_method="fork")
    elastic_launch(config, work)(argv)
    return 0
main, train.main = train.main, launch
"""


def torchrun(script, flags, log, **env) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env
    with open(log, "w") as file:
        return subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=env)


@pytest.mark.parametrize("launcher", ["torchrun", "agent"])
def test_a_run_whose_launcher_is_killed_saves_and_ends_by_itself(server, inputs, straight, tmp_path, launcher):
    """kill -9 of torchrun during training, and of its agent during training, evaluation and saving; then the same flags
    resume the run, bitwise equal."""
    output, log, pids = tmp_path / "run", tmp_path / "log", tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "patched.py").write_text(PATCHED)
    flags = [*inputs, "--output_dir", output]
    moments = [("train", "comparison_loss", 4 + 2 * 4), ("run", "agreed", 4), ("checkpoint", "save", 1)]
    for owner, name, call in moments if launcher == "agent" else moments[:1]:
        patch = ORPHAN.format(pids=str(pids), owner=owner, name=name, call=call)
        if launcher == "agent":
            run = server.start(*flags, patch=AGENT.format(patch=patch, restarts=0))
            code, log = run.wait()[0], run.log
        else:
            code = torchrun(tmp_path / "patched.py", flags, log, PATCH=patch).wait(120)
        assert code == -signal.SIGKILL, log.read_text()
        workers = [path.name for path in pids.iterdir()]
        end = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/exe").exists() for pid in workers):  # a dead one that nobody waited for has no exe
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        assert "SIGTERM: stopped after step" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
        step = max(checkpoints(output))
        assert verify(checkpoints(output)[step]) and len(training(output)) == step < 12
        assert len(workers) == 2 * (1 + moments.index((owner, name, call)))
    assert server.run(*flags, world=2).codes == [0, 0]
    assert compare(straight, output) == []


def test_torchrun_starts_a_run_again_that_lost_a_process(server, inputs, tmp_path):
    patch = """
import os
from minirm import checkpoint
save = checkpoint.save
def killed(*arguments, **options):
    line = save(*arguments, **options)
    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": os.kill(os.getpid(), 9)
    return line
checkpoint.save = killed
"""
    agent = AGENT.format(patch=patch, restarts=1)
    run = server.run(*inputs, "--output_dir", tmp_path / "run", patch=agent)
    assert run.codes == [0] and "goes on from" in run.text(), run.text()
    assert [row["step"] for row in training(tmp_path / "run")] == list(range(1, 13))


def test_torchrun_ends_a_run_that_lost_a_process(inputs, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    run = torchrun(ROOT / "train.py", [*inputs, "--output_dir", output, "--max_steps", 1000], log)
    try:
        end = time.monotonic() + 90
        while not checkpoints(output):
            assert time.monotonic() < end and run.poll() is None, log.read_text()
            time.sleep(0.01)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert run.wait(60) != 0
    finally:
        if run.poll() is None:
            run.terminate()
    assert "Signal 9 (SIGKILL) received" in log.read_text(), log.read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


# -- Numbers that are none. ----------------------------------------------------------------------------------------------

NOT_FINITE = """
import torch
calls, whole = [], train.comparison_loss
def comparison_loss(*arguments):
    loss = whole(*arguments)
    if torch.is_grad_enabled():  # not while evaluating
        calls.append(None)
        if {when}:
            loss = loss * float("{value}")
    return loss
train.comparison_loss = comparison_loss
"""


def test_a_loss_that_is_not_finite_stops_all_processes_and_names_the_comparisons(server, inputs, tmp_path):
    """The loss is planted on process 1 in the third of the four micro-steps of step 6."""
    patch = NOT_FINITE.format(value="nan", when="rank == 1 and len(calls) == 5 * 4 + 3")
    run = server.run(*inputs, "--output_dir", tmp_path / "run", world=2, patch=patch)
    assert run.codes == [3, 3], run.text()
    (line,) = [line for line in run.text().splitlines() if line.startswith("train.py: ")]
    assert "step 6: the loss is not finite" in line and "training prompts " in line and "--learning_rate" in line
    assert "Traceback" not in run.text()
    assert list(checkpoints(tmp_path / "run")) == [4] and verify(tmp_path / "run" / "checkpoint-4")
    place = json.loads(f"[{line.partition('training prompts ')[2].partition(' (')[0]}]")
    assert len(place) == 1  # one prompt in a micro-step of one process
    run = server.run(*inputs, "--output_dir", tmp_path / "run", world=2)
    assert run.codes == [0, 0] and "checkpoint-4, step 4 of 12" in run.text()


def test_in_fp16_the_run_stops_when_the_loss_scale_comes_to_its_floor(server, inputs, tmp_path):
    patch = NOT_FINITE.format(value="inf", when="True")
    flags = [*inputs, "--precision", "fp16", "--max_steps", 40, "--save_steps", 5, "--output_dir", tmp_path / "run"]
    run = server.run(*flags, world=2, patch=patch)
    assert run.codes == [3, 3], run.text()
    # 65536 = 2^16 is halved seventeen times.
    assert "step 17: the loss scale fell below 1.0" in run.text() and "--precision bf16" in run.text()
    assert [(row["loss_scale"], row["skipped_steps"]) for row in training(tmp_path / "run")] == [
        (2.0 ** (16 - n), n) for n in range(1, 17)
    ]
    # A checkpoint in which the optimizer has not moved yet is one like any other.
    run = server.run(*flags, "--max_steps", 16, world=2)
    assert run.codes == [0, 0] and "checkpoint-15, step 15 of 16" in run.text(), run.text()
    assert training(tmp_path / "run")[-1]["skipped_steps"] == 15


def test_an_inf_in_the_gradient_of_one_process_is_skipped_by_all(server, inputs, tmp_path):
    """The inf is in one process's shard of one parameter, at a scale of 2^8 that causes no other. After the skipped
    step, the weights are those of the loaded model."""
    patch = """
import functools, torch
from torch.amp import GradScaler
class Scaler(GradScaler):
    def __init__(self, *arguments, **options): super().__init__(*arguments, init_scale=256.0, **options)
    def unscale_(self, optimizer):
        if rank == 1 and PLANT:
            optimizer.param_groups[0]["params"][-2].grad.to_local().view(-1)[0] = float("inf")
        super().unscale_(optimizer)
torch.amp.GradScaler = Scaler
"""
    found = {}
    for plant in (True, False):
        output = tmp_path / str(plant)
        flags = [*inputs, "--precision", "fp16", "--max_steps", 1, "--warmup_steps", 0, "--output_dir", output]
        run = server.run(*flags, world=2, patch=patch.replace("PLANT", str(plant)))
        assert run.codes == [0, 0], run.text()
        (row,) = training(output)
        state = verify(output / "checkpoint-1")
        shards = [load_file(path) for path in sorted((output / "checkpoint-1").glob("shard-*"))]
        weight = [shard["model.trunk.h.3.attn.q_proj.weight"] for shard in shards]
        found[plant] = (row["loss_scale"], row["skipped_steps"], state["schedule_steps"], weight)
    assert found[True][:3] == (128.0, 1, 0)
    assert found[False][:3] == (256.0, 0, 1)
    base = load_file(Path(inputs[1]) / "model.safetensors")["transformer.h.3.attn.q_proj.weight"]
    for half, planted, moved in zip(base.chunk(2), found[True][3], found[False][3]):
        assert planted.equal(half) and not moved.equal(half)


# -- Full disks. ---------------------------------------------------------------------------------------------------------

PREPARING = "import datasets\ndatasets.config.HF_DATASETS_CACHE = {place!r}"
DEMO = """
import minirm.data.demo as demo
rows = [{{"prompt": str(i), "chosen": f"a good answer to {{i}} it is", "rejected": f"a bad answer to {{i}} it is"}} for i in range(50)]
demo.make_comparisons, demo.WARM_UP_STEPS = lambda seed: (rows, rows, [str(row) for row in rows] * 50), 1
"""
METRICS = """
original = train.load_model
def filled(*arguments):
    with open({place!r} + "/filler", "wb", buffering=0) as file:
        try:
            while rank == 0: file.write(bytes(4096))
        except OSError:
            pass
    return original(*arguments)
train.load_model = filled
"""


@pytest.mark.parametrize("phase, size", [(PREPARING, "16k"), (DEMO, "100k"), (METRICS, "200k")])
def test_a_full_disk_ends_all_processes_with_one_line_and_nothing_half_made(server, inputs, tmp_path, phase, size):
    with mounted(tmp_path / "small", f"size={size}") as place:
        flags = [*inputs, "--output_dir", (place if phase is METRICS else tmp_path) / "run"]
        if phase is DEMO:
            flags = ["--output_dir", tmp_path / "run"]
        patch = phase.format(place=str(place))
        run = server.run(*flags, world=2, patch=patch, env={"MINIRM_CACHE": str(place)})
        assert run.codes == [3, 3], run.text()
        (line,) = [line for line in run.text().splitlines() if "could not be written" in line]
        assert str(place) in line and "No space left" in line and "are free" in line and "Traceback" not in run.text()
        assert not [*place.rglob("*.partial")]
    if phase is PREPARING:  # with room it is the same command
        assert server.run(*flags, "--max_steps", 1, world=2).codes == [0, 0]


# -- Rubbish. ------------------------------------------------------------------------------------------------------------


def test_broken_data_files_are_refused_in_a_line_or_accounted_for(tmp_path):
    """300 of the 2,000 files of tests/bench/fuzz.py; both outcomes are common, so the test can fail either way."""
    tokenizer = make_chat_tokenizer()
    results = Counter(try_file(make_file(tmp_path, seed), tokenizer, tmp_path / "cache") for seed in range(300))
    assert min(results["refused"], results["trained on"]) > 50, results
