"""Signals and lost processes end a run cleanly, and it resumes exactly: `pytest tests/test_signals.py`. No network."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, training

from minirm.checkpoint import checkpoints, verify

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

from crash import compare


@pytest.fixture(scope="module")
def straight(server, twelve_steps, tmp_path_factory):
    """Output folder of that run on two processes without any signal."""
    output = tmp_path_factory.mktemp("straight") / "run"
    assert server.run(*twelve_steps, "--output_dir", output, world=2).codes == [0, 0]
    return output


def test_a_signal_to_any_process_saves_the_step_and_stops_all(server, twelve_steps, straight, tmp_path):
    """Each signal stops the run once, also between two checkpoints of --save_steps."""
    output = tmp_path / "stopped"
    for number, ranks in ((signal.SIGUSR1, [1]), (signal.SIGTERM, [0, 1]), (signal.SIGHUP, [0])):
        run = server.start(*twelve_steps, "--output_dir", output, world=2)
        before = len(training(output)) if (output / "metrics.jsonl").exists() else 0
        run.until(lambda: (output / "metrics.jsonl").exists() and len(training(output)) > before)  # noqa: B023
        run.kill(number, ranks=ranks)
        assert run.wait() == [128 + number] * 2, run.text()
        step = max(checkpoints(output))
        line = f"train.py: {number.name}: stopped after step {step} of 12; run the same command again to resume"
        assert line in run.text().splitlines()
        assert len(training(output)) == step < 12
    assert server.run(*twelve_steps, "--output_dir", output, world=2).codes == [0, 0]
    assert compare(straight, output) == []


def test_if_one_process_is_killed_the_other_ends_and_says_why(server, twelve_steps, tmp_path):
    run = server.start(*twelve_steps, "--output_dir", tmp_path / "run", "--max_steps", 1000, world=2)
    run.until(lambda: checkpoints(tmp_path / "run"))
    run.kill(ranks=[1])
    start = time.monotonic()
    assert run.wait(60) == [1, -9]
    assert time.monotonic() - start < 60
    assert "train.py: process 0 ends, since another one was lost" in run.text()
    assert "Traceback" not in run.text()


# A patch that holds a run in function {name}; the file {sign} shows that it has arrived there.
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
    [
        ("minirm.start.prepare", signal.SIGHUP),
        ("minirm.start.load_weights", signal.SIGINT),
        ("minirm.finish.export", signal.SIGTERM),
    ],
)
def test_a_signal_outside_the_training_loop_ends_the_run_within_seconds(server, twelve_steps, tmp_path, name, number):
    """Both processes get the signal, as from torchrun, while the second waits for the first in gloo. The same command then
    finishes the run."""
    flags = [*twelve_steps, "--max_steps", 2, "--save_steps", 1, "--output_dir", tmp_path / "run"]
    stored = "minirm.start.stored_weights = lambda *_: None\n"  # so that rank 0 reads the weights for all
    patch = stored + HOLD.format(name=name, when=True, sign=str(tmp_path / "sign"), wait="time.sleep(60)")
    run = server.start(*flags, world=2, patch=patch)
    assert run.until(lambda: (tmp_path / "sign").exists())
    run.kill(number)
    start = time.monotonic()
    codes = run.wait(60)
    assert time.monotonic() - start < 30 and codes[0] == 128 + number and codes[1] in (1, 128 + number), run.text()
    line = f"train.py: {number.name}: stopped; no finished step is lost; run the same command again to resume"
    assert line in run.text().splitlines() and "Traceback" not in run.text(), run.text()
    assert not (tmp_path / "run" / "config.json").exists()
    assert server.run(*flags, world=2).codes == [0, 0] and (tmp_path / "run" / "config.json").exists()


def test_a_process_stuck_in_a_library_still_ends(server, twelve_steps, tmp_path):
    """The main thread waits where no signal wakes it, as in a collective that another rank never enters."""
    mutex = "import ctypes\nC, MUTEX = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
    wait = "C.pthread_mutex_lock(MUTEX), C.pthread_mutex_lock(MUTEX)"  # locked twice, so nothing ever wakes it
    patch = mutex + HOLD.format(name="minirm.start.prepare", when=True, sign=str(tmp_path / "sign"), wait=wait)
    run = server.start(*twelve_steps, "--output_dir", tmp_path / "run", patch=patch)
    assert run.until(lambda: (tmp_path / "sign").exists())
    run.kill(signal.SIGTERM)
    assert run.wait(30) == [143] and "SIGTERM: stopped" in run.text()


def test_a_signal_ends_an_evaluation_and_the_resumed_run_repeats_it(server, twelve_steps, straight, tmp_path):
    output = tmp_path / "stopped"
    patch = """
measured, agreed = [], train.run.agreed
def signalled(caught):
    measured.append(1)
    if rank == 1 and len(measured) == {calls}: caught.append(1)
    return agreed(caught)
train.run.agreed = signalled
"""  # an evaluation of five prompts on two processes takes three micro-steps
    for calls, step in ((2, None), (5, 3)):
        run = server.run(*twelve_steps, "--output_dir", output, world=2, patch=patch.format(calls=calls))
        assert run.codes == [129, 129], run.text()
        assert max(checkpoints(output), default=None) == step
    assert server.run(*twelve_steps, "--output_dir", output, world=2).codes == [0, 0]
    assert compare(straight, output) == []


# Kills this process's parent with SIGKILL and waits for the signal that follows. The names of the files in {pids} are the
# ids of the processes.
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

# train.py with a patch, for torchrun to start.
PATCHED = """
import os, sys
import minirm, train
exec(os.environ["PATCH"], {"train": train, "minirm": minirm, "rank": int(os.environ["RANK"])})
sys.exit(train.main())
"""

# Replaces train.main by torchrun's agent. It forks its two processes, so nothing is imported again.
AGENT = """
import os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
def work(argv):
    import minirm
    exec({patch!r}, {{"train": train, "minirm": minirm, "rank": int(os.environ["RANK"])}})
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


def running(pid: str) -> bool:
    """Whether a process still runs. It becomes a zombie only after it has released its locks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("launcher", ["torchrun", "agent"])
def test_a_run_whose_launcher_is_killed_saves_and_ends(server, twelve_steps, straight, tmp_path, launcher):
    """SIGKILL ends torchrun during training, and its agent during training, evaluation and saving. The same command then
    resumes the run, bitwise equal."""
    output, log, pids = tmp_path / "run", tmp_path / "log", tmp_path / "pids"
    pids.mkdir()
    (tmp_path / "patched.py").write_text(PATCHED)
    flags = [*twelve_steps, "--output_dir", output]
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
        while any(map(running, workers)):
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        assert "SIGTERM: stopped after step" in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
        step = max(checkpoints(output))
        assert verify(checkpoints(output)[step]) and len(training(output)) == step < 12
        assert len(workers) == 2 * (1 + moments.index((owner, name, call)))
    resumed = server.run(*flags, world=2)
    assert resumed.codes == [0, 0], resumed.text()
    assert compare(straight, output) == []


def test_torchrun_restarts_a_run_that_lost_a_process(server, twelve_steps, tmp_path):
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
    run = server.run(*twelve_steps, "--output_dir", tmp_path / "run", patch=agent)
    assert run.codes == [0] and "resuming from" in run.text(), run.text()
    assert [row["step"] for row in training(tmp_path / "run")] == list(range(1, 13))


def test_torchrun_ends_a_run_that_lost_a_process(twelve_steps, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    run = torchrun(ROOT / "train.py", [*twelve_steps, "--output_dir", output, "--max_steps", 1000], log)
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
