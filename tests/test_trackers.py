"""--report_to: `python -m pytest tests/test_trackers.py`. A fake wandb, and tensorboard if installed; no network."""

import json
import sys
from argparse import Namespace

import pytest
from conftest import make_comparisons, read_metrics, write_jsonl

import train
from minirm.errors import InputError
from minirm.report.trackers import MetricsLog

WANDB = """# The part of Weights & Biases that minirm uses. It writes everything it is told into a file in the run's folder.
import json, os
from pathlib import Path

class Error(Exception): pass

class Run:
    def define_metric(self, *names, **options): self.write("define", [names, options])
    def log(self, numbers): self.write("log", numbers)
    def write(self, what, content):
        with open(self.folder / "told.jsonl", "a") as file: file.write(json.dumps([what, content]) + "\\n")

def init(dir, id=None, **options):
    if os.environ.get("WANDB_REFUSES"): raise Error("no key\\n(log in)")
    run, number = Run(), len(list(Path(dir).glob("wandb/*")))
    run.folder = Path(dir) / "wandb" / f"run-{number}-{id or 'a-run-c'}"
    run.folder.mkdir(parents=True)
    run.write("init", {"id": id, "rank": os.environ.get("RANK"), **options})
    return run
"""

SENT = {"train/loss": 0.5, "train/epoch": 1.0, "train/global_step": 7}


@pytest.fixture()
def wandb(tmp_path, monkeypatch):
    """The folder of a fake wandb package. told(output) reads what its runs received."""
    package = tmp_path / "site" / "wandb" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text(WANDB)
    monkeypatch.syspath_prepend(str(package.parent.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield package.parent.parent
    sys.modules.pop("wandb", None)


def told(output):
    files = sorted(output.glob("wandb/*/told.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def opened(tracker: str, output, start: int = 0) -> MetricsLog:
    log = MetricsLog(output, Namespace(report_to=[tracker], freeze_ratio=0.7), start)
    log.open()
    return log


def test_wandb_gets_the_usual_names_and_resumes_the_same_run(wandb, tmp_path):
    arguments = {"report_to": ["wandb"], "freeze_ratio": 0.7}
    opened("wandb", tmp_path)({"step": 7, "loss": 0.5, "epoch": 1.0, "grad_norm": float("nan"), "list": [1, 2]})
    opened("wandb", tmp_path, 7)({"step": 8, "eval_loss": 0.4, "eval_accuracy/code": 1.0})
    first, second = told(tmp_path)
    begun = {"rank": None, "project": "minirm", "config": arguments, "allow_val_change": True, "resume": "allow"}
    assert first[0] == ["init", {"id": None, **begun}] and second[0] == ["init", {"id": "a-run-c", **begun}]
    steps = [["define", [["train/global_step"], {}]]]
    steps += [["define", [["*"], {"step_metric": "train/global_step", "step_sync": True}]]]
    assert first[1:] == [*steps, ["log", SENT]]
    assert second[1:] == [*steps, ["log", {"eval/loss": 0.4, "eval/accuracy/code": 1.0, "train/global_step": 8}]]


def test_a_wandb_error_ends_the_run_with_one_line(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_REFUSES", "1")
    with pytest.raises(InputError, match=r"^--report_to wandb: no key.*log in") as error:
        opened("wandb", tmp_path)
    assert "\n" not in str(error.value)


def test_only_rank_0_reports_every_row_and_resumes_the_same_run(wandb, server, model_folder, tmp_path):
    data, output = write_jsonl(tmp_path / "data.jsonl", make_comparisons(8)), tmp_path / "run"
    flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--logging_steps", 1]
    flags += ["--save_steps", 2, "--output_dir", output, "--report_to", "none", "wandb"]
    patch = f"import sys; sys.path.insert(0, {str(wandb)!r})"
    assert server.run(*flags, "--max_steps", 2, world=2, patch=patch).codes == [0, 0]
    assert server.run(*flags, "--max_steps", 3, world=2, patch=patch).codes == [0, 0]
    first, second = told(output)
    assert [(run[0][1]["id"], run[0][1]["rank"]) for run in (first, second)] == [(None, "0"), ("a-run-c", "0")]
    assert first[0][1]["config"]["freeze_ratio"] == 0.7
    logged = [content for what, content in first + second if what == "log"]
    rows = read_metrics(output)
    assert [row["train/global_step"] for row in logged] == [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
    losses = [row.get("loss", row.get("eval_loss")) for row in rows]
    assert [row.get("train/loss", row.get("eval/loss")) for row in logged] == losses


def test_a_missing_tracker_is_refused_with_the_command_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # wandb itself leaves such a folder behind; it is not the package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="--report_to wandb: wandb is not installed; run: pip install wandb"):
        train.parse_args(["--report_to", "wandb"])
    assert train.parse_args([]).report_to == ["none"]


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path):
    """The run was killed after step 4 with a checkpoint of step 2. Steps 3 and 4 must not appear twice."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send = opened("tensorboard", tmp_path)
    for step in range(5):
        send({"step": step, "loss": float(step), "name": "text", "eval_histogram": {"edges": []}})
    send({"step": 2, "eval_accuracy": 0.5})
    send = opened("tensorboard", tmp_path, 2)
    for step in (3, 4, 5):
        send({"step": step, "loss": 10.0 + step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/accuracy", "train/loss"]
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 15)]
    assert [(e.step, e.value) for e in events.Scalars("eval/accuracy")] == [(2, 0.5)]
