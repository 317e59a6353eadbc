"""--profile: `python -m pytest tests/test_profile.py`. No network; one run of two processes."""

import gzip
import json
import re
from collections import Counter

import pytest
from conftest import make_comparisons, write_jsonl

from minirm.report.profile import profile_table


def test_waiting_is_time_in_collectives_beyond_the_minimum_over_processes():
    slow = Counter({"whole": 4000.0, "matrix products": 3000.0, "communication": 400.0})
    fast = Counter({"whole": 4000.0, "matrix products": 1000.0, "attention": 200.0, "communication": 2400.0})
    _, *rows = profile_table([slow, fast], steps=2).splitlines()
    assert [row.split() for row in rows] == [
        ["0", "2.0", "75.0%", "0.0%", "0.0%", "10.0%", "0.0%", "15.0%"],
        ["1", "2.0", "25.0%", "5.0%", "0.0%", "10.0%", "50.0%", "10.0%"],
    ]


def test_profile_writes_a_trace_per_process_and_one_table(server, model_folder, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(12))
    flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--max_length", 200]
    flags += ["--output_dir", tmp_path / "out", "--max_steps", 5, "--profile", 2]
    run = server.run(*flags, world=2)
    assert run.codes == [0, 0], run.text()[-3000:]
    for rank in (0, 1):
        trace = gzip.decompress((tmp_path / "out" / f"trace-rank{rank}.json.gz").read_bytes())
        names = {event.get("name") for event in json.loads(trace)["traceEvents"]}
        assert {"ProfilerStep#2", "ProfilerStep#3"} <= names  # the third and fourth steps, counted from 0
        assert "ProfilerStep#4" not in names and any("gloo:" in str(name) for name in names)
    rows = re.findall(r"^([01]) +[\d.]+ +(.*%)$", run.text(), re.MULTILINE)
    assert [rank for rank, _ in rows] == ["0", "1"]
    shares = [[float(share) for share in row.replace("%", "").split()] for _, row in rows]
    assert all(sum(row) == pytest.approx(100, abs=0.5) and row[0] > 0 and row[3] > 0 for row in shares)
    assert min(row[4] for row in shares) == 0  # the slower process never waits
    # The traces do not count as another run's files. With too few steps left, nothing is recorded.
    again = server.run(*flags, "--max_steps", 6, world=2, patch="import torch; torch.profiler.profile = None")
    assert again.codes == [0, 0] and "--profile 2 needs 4 steps, but only 1 remain" in again.text()
