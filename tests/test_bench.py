"""tests/bench/gpu.py as a dry run on the CPU: `python -m pytest tests/test_bench.py`. About 40 s."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def gpu(monkeypatch):
    """The module tests/bench/gpu.py. No other test should import its neighbours rows and peers by accident."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    yield importlib.import_module("gpu")
    for name in ("gpu", "peers", "rows"):
        sys.modules.pop(name)


def test_the_gpu_benchmark_runs_on_the_cpu_and_writes_its_table_into_readme(gpu, tmp_path, monkeypatch):
    output = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "tests" / "bench" / "gpu.py", "--dry_run", "--output", output]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(output.read_text())
    assert list(results) == list(gpu.PARTS)
    assert '"error"' not in output.read_text(), run.stdout
    checks = gpu.checks_of(results["correctness"])
    assert len(checks) == 8 and checks.pop("--cpu_offload changes nothing") is None
    assert all(check["ok"] for check in checks.values()), checks
    assert len(results["profile"]["top"]) == 5
    for part, value in results.items():
        for _, method, figures in gpu.methods_of(value) if "_" in part else ():
            if (method, figures) != ("trl", "not installed"):
                assert figures["pairs_per_second"] > 0 and 0 < figures["of_card"], (part, method)
                assert (figures["plan_gb"] is None) == (method in ("published", "trl")), (part, method)
    methods = {method for part, value in results.items() if "_" in part for _, method, _ in gpu.methods_of(value)}
    assert methods == set(gpu.METHODS)

    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.main(["--write", str(output)])
    before, rest = (tmp_path / "README.md").read_text().split("<!-- gpu -->\n")
    table, after = rest.split("\n<!-- /gpu -->")
    assert (ROOT / "README.md").read_text().startswith(before) and (ROOT / "README.md").read_text().endswith(after)
    assert f"torch {results['profile']['torch']}" in table and gpu.COMMAND in table
    assert table.count("| shared rows | ") == 3 and table.count("| yes") == 7
    (tmp_path / "README.md").write_text(before)
    with pytest.raises(SystemExit, match="once each"):
        gpu.main(["--write", str(output)])
