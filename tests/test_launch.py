"""launch.sh on several machines: the command it makes of Slurm's variables, and training in two network namespaces.

Run: pytest tests/test_launch.py. Needs no network; the namespaces need root and `ip`, and are skipped without.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, make_comparisons, read_metrics, write_jsonl

SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames gpu[3-5]" ] && printf 'gpu3\\ngpu4\\ngpu5\\n'
"""
# Replaces Python: prints the command that launch.sh runs, and answers the questions it asks before.
PYTHON = """#!/bin/sh
case "$2" in
  *distributed.run*) shift 2; echo "torchrun $*" ;;
  *device_count*) echo 4 ;;
  *affinity*) echo 1 ;;
esac
[ "$1" = train.py ] && echo "python $*" || true
"""


@pytest.fixture
def launch(tmp_path):
    """launch(*flags, VARIABLE="...") -> the resulting command."""
    for name, text in (("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    names = ("SLURM", "MASTER", "NNODES", "NODE_RANK", "NPROC", "LOCAL")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(names)}

    def run(*flags, **variables):
        env = clean | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")} | variables
        return subprocess.run([ROOT / "launch.sh", *flags], env=env, capture_output=True, text=True, check=True).stdout

    return run


def test_slurm_variables_give_the_command_typed_without_slurm(launch):
    wanted = "torchrun --nnodes=3 --node_rank=2 --master_addr=gpu3 --master_port=23456 --nproc_per_node=4 train.py --seed 1\n"
    typed = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "gpu3", "MASTER_PORT": "23456"}
    slurm = {"SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[3-5]", "SLURM_JOB_ID": "993456"}
    assert launch("--seed", "1", **typed) == wanted
    assert launch("--seed", "1", **slurm, SLURM_NNODES="3") == wanted
    assert launch("--seed", "1", **slurm, SLURM_JOB_NUM_NODES="3") == wanted
    assert launch("--seed", "1", **slurm, SLURM_NNODES="9", **typed) == wanted  # typed values win


def test_a_slurm_job_on_one_machine_asks_for_no_hosts(launch):
    one = {"SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu7", "SLURM_JOB_ID": "5"}
    assert launch(**one) == "torchrun --standalone --nproc_per_node=4 train.py\n"
    assert launch(**one, NPROC="1") == "python train.py\n"


@pytest.fixture
def hosts():
    """The names of two network namespaces joined by a virtual cable. Both are always removed."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip")
    names = [f"minirm-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        commands = ["link add cable netns {0} type veth peer name cable netns {1}"]
        for i in range(2):
            commands += [f"-n {{{i}}} addr add 10.77.0.{i + 1}/24 dev cable"]
            commands += [f"-n {{{i}}} link set {device} up" for device in ("cable", "lo")]
        for command in commands:
            subprocess.run(["ip", *command.format(*names).split()], check=True)
        yield names
    finally:
        for name in names:  # this removes the cable too
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_hosts_with_one_process_each_train_like_one_process(hosts, server, model_folder, tmp_path):
    """They rendezvous over their own addresses. Each holds a full copy, the default for one process per machine."""
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(12))
    flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--max_steps", 4]
    flags += ["--max_length", 64, "--learning_rate", 1e-3, "--logging_steps", 1, "--warmup_steps", 0]
    one = server.run(*flags, "--output_dir", tmp_path / "one")
    assert one.codes == [0], one.text()
    flags += ["--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 2]
    runs = []
    try:
        for rank, host in enumerate(hosts):
            variables = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "NPROC": "1"}
            variables |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
            command = ["ip", "netns", "exec", host, ROOT / "launch.sh", *map(str, flags)]
            env = {**os.environ, **variables}
            with open(tmp_path / f"log-{rank}", "w") as log:
                runs.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        codes = [run.wait(180) for run in runs]
    finally:
        for run in runs:
            run.terminate()  # torchrun then ends its process
            run.wait(30)
    assert codes == [0, 0], "\n".join((tmp_path / f"log-{rank}").read_text()[-2000:] for rank in range(2))
    rows = [[row for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("one", "two")]
    assert len(rows[0]) == 4
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[1]] == pytest.approx([row[key] for row in rows[0]], abs=1e-5)
