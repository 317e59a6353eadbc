"""Running a function on all cores: `python -m pytest tests/test_workers.py`. Two processes; no network."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, make_comparisons, make_tokenizer, refusal, write_jsonl

import minirm.data.prepare
from minirm.data.prepare import prepare
from minirm.data.workers import on_all_cores
from minirm.errors import InputError, Stop

TASKS = [(i,) for i in range(40)]


def slower_at_first(i: int) -> tuple[int, int]:
    time.sleep(0.05 if i < 4 else 0)
    return i * i, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_arrive_in_order_from_any_number_of_processes(processes):
    results, pids = zip(*on_all_cores(slower_at_first, TASKS, processes))
    assert list(results) == [i * i for i in range(40)]
    assert (set(pids) == {os.getpid()}) == (processes == 1) and len(set(pids)) == processes
    assert list(on_all_cores(slower_at_first, [])) == []


def fails_at_7(i: int) -> int:
    if i >= 7:
        raise InputError(f"task {i}")
    return i


@pytest.mark.parametrize("processes", [1, 3])
def test_the_first_failing_task_is_the_one_that_is_named(processes):
    results = on_all_cores(fails_at_7, TASKS, processes)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(InputError, match="^task 7$"):
        next(results)


def killed_at_7(i: int) -> None:
    if i == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_whole_computation():
    with pytest.raises(Stop, match="was killed"):
        list(on_all_cores(killed_at_7, TASKS, 2))


def test_processes_end_with_their_parent(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from minirm.data.workers import on_all_cores
def held(i):
    Path({str(tmp_path)!r}, str(__import__("os").getpid())).touch()
    time.sleep(60)
list(on_all_cores(held, [(i,) for i in range(4)], 2))
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait(10)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """prepared(cores) -> (the bytes of all files made from 100 prompts, the report)."""
    rows = make_comparisons(100, per_prompt=2)
    rows[30] |= {"chosen": "long " * 150}
    data, tokenizer = [str(write_jsonl(tmp_path / "data.jsonl", rows))], make_tokenizer()
    monkeypatch.setattr(minirm.data.prepare, "CHUNK", 8)

    def run(cores: int, **options) -> tuple[dict, dict]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        cache = tmp_path / f"{cores} cores"
        report = prepare(tokenizer, data, cache_dir=cache, max_length=100, **options).report
        return {path.name: path.read_bytes() for path in cache.rglob("*.*")}, report

    return run


def test_any_number_of_processes_prepares_the_same_bytes(prepared):
    files, report = prepared(1)
    assert {"train.arrow", "eval.arrow", "report.json"} <= files.keys()
    assert report["train"][0]["dropped: answer alone longer than --max_length"] == 1
    for cores in (2, 3):
        assert prepared(cores) == (files, report)


def test_any_number_of_processes_refuses_the_same_row(prepared):
    messages = {refusal(prepared, cores, overlong="error") for cores in (1, 3)}
    assert len(messages) == 1 and "data.jsonl:" in messages.pop()
