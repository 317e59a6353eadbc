"""Plots of runs: `python -m pytest tests/test_plot.py`. Needs matplotlib; no network. Tiny train.py runs.

The tests read the drawing back from matplotlib's objects. The rows of `RUN` are made up to be easy to check: the lowest
evaluation loss is at step 20, neither before training nor at the last step.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, make_comparisons, write_jsonl

from minirm import plot
from minirm.errors import InputError

matplotlib = pytest.importorskip("matplotlib")


def evaluation(step, loss, accuracy):
    return {
        "step": step, "eval_loss": loss, "eval_accuracy": accuracy, "eval_accuracy_low": accuracy - 0.1,
        "eval_accuracy_high": accuracy + 0.05, "eval_pairs": 8, "eval_length_accuracy": 0.25,
        "eval_histogram": {"edges": [-2.0, 0.0, 2.0, 4.0], "chosen": [0, 2, 6], "rejected": [6, 2, 0]},
        "eval_calibration": [{"predicted": 0.6, "observed": 0.5, "pairs": 4}, {"predicted": 0.9, "observed": 1.0, "pairs": 4}],
        "eval_calibration_error": 0.1, "eval_accuracy_by_position": [0.1 * k for k in range(10)],
    }  # fmt: skip


def training(step, loss, accuracy, pairs, scale=1.0, skipped=0):
    row = {"step": step, "loss": loss, "accuracy": accuracy, "pairs": pairs}
    return row | {"loss_scale": scale, "skipped_steps": skipped}


RUN = [
    evaluation(0, 0.1, 0.5), training(10, 0.9, 0.5, 4, 65536.0), evaluation(20, 0.4, 0.75),
    training(20, 0.6, 0.7, 4, 32768.0, 2), training(30, 0.3, 0.9, 4, 32768.0, 2), evaluation(30, 0.7, 0.7),
]  # fmt: skip

OLD_KEYS = ("step", "loss", "accuracy", "pairs", "eval_loss", "eval_accuracy")
OLD = [{key: row[key] for key in OLD_KEYS if key in row} for row in RUN]


def lines(panel):
    """{label: (x values, y values)} of a panel's lines."""
    return {line.get_label(): tuple(map(list, line.get_data())) for line in panel.get_lines()}


def write_run(folder, rows, end=""):
    folder.mkdir()
    write_jsonl(folder / "metrics.jsonl", rows).open("a").write(end)
    return folder


def command(*arguments):
    argv = [sys.executable, "-m", "minirm.plot", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)


def test_a_panel_shows_the_values_of_metrics_jsonl():
    loss, accuracy, rewards, calibration, position, scale = plot.draw({"run": RUN}).axes
    assert lines(loss) == {
        "train": ([10, 20, 30], [0.9, 0.6, 0.3]),
        "held-out": ([0, 20, 30], [0.1, 0.4, 0.7]),
        "lowest held-out loss": ([20], [0.4]),
    }
    assert lines(accuracy)["held-out"] == ([0, 20, 30], [0.5, 0.75, 0.7])
    assert lines(accuracy)["lowest held-out loss"] == ([20], [0.75])
    (band,) = accuracy.collections
    ends = sorted(tuple(point) for point in band.get_paths()[0].vertices if point[0] == 20)
    assert ends[0] == pytest.approx((20, 0.65)) and ends[-1] == pytest.approx((20, 0.80))
    # 2 and 6 of 8 answers, in bins of width 2: densities 2 / 8 / 2 and 6 / 8 / 2.
    heights = {patch.get_label(): list(patch.get_data().values) for patch in rewards.patches}
    assert heights == {"chosen": [0, 0.125, 0.375], "rejected": [0.375, 0.125, 0]}
    assert lines(calibration)["measured, error 0.100"] == ([0.6, 0.9], [0.5, 1.0])
    assert lines(position)["model"] == ([*range(1, 11)], RUN[2]["eval_accuracy_by_position"])
    assert lines(position)["always the longer answer"][1] == [0.25, 0.25]
    assert lines(scale)["loss scale"] == ([10, 20, 30], [65536.0, 32768.0, 32768.0])
    assert lines(scale)["skipped steps: 2"] == ([20], [32768.0])


def test_every_panel_has_a_title_axis_labels_and_a_legend():
    for runs in ({"run": RUN}, {"a": RUN, "b": RUN}):
        figure = plot.draw(runs)
        for panel in figure.axes:
            assert panel.get_xlabel() and panel.get_ylabel() and panel.get_title()
            labels = [text.get_text() for text in panel.get_legend().get_texts()]
            assert labels and len(labels) == len(set(labels))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_several_runs_differ_in_colour_and_marker():
    figure = plot.draw({"a": RUN, "b": OLD, "c": RUN})
    held_out = [line for line in figure.axes[0].get_lines() if line.get_label() == "held-out"]
    assert len({line.get_color() for line in held_out}) == len({line.get_marker() for line in held_out}) == 3


def test_missing_metrics_are_left_out():
    panels = plot.draw({"run": [*OLD, {**RUN[-1], "step": 40, "eval_loss": None, "eval_accuracy": None}]}).axes
    assert lines(panels[0])["held-out"][0] == [0, 20, 30]  # a non-finite loss is null in metrics.jsonl
    texts = [[text.get_text() for text in panel.texts] for panel in panels]
    assert texts == [[], [], *[["not in metrics.jsonl"]] * 3, ["not used with fp32 and bf16"]]
    assert not plot.draw({"run": [training(10, 1.0, 0.5, 4)]}).axes[1].collections  # killed before any evaluation


def test_a_long_training_curve_is_averaged_over_pairs():
    """250 rows are drawn as 84 points of 3 rows, the last of 1. The first is (1*1 + 2*2 + 3*3) / (1 + 2 + 3) = 14/6."""
    rows = [training(i, float(i), 0.5, i) for i in range(1, 251)]
    steps, values = plot.training_curve(rows, "loss")
    assert len(steps) == 84 and steps[:2] == [3, 6] and steps[-1] == 250
    assert values[0] == pytest.approx(14 / 6) and values[-1] == 250


def test_a_torn_last_line_is_skipped(tmp_path):
    run = write_run(tmp_path / "run", RUN, end='{"step": 40, "los')
    assert plot.read_rows(run) == RUN


@pytest.mark.parametrize("content", [None, "", "not JSON\n", '[1]\n{"step": "x"}\n'])
def test_a_folder_without_a_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=f"{tmp_path}: .*metrics.jsonl"):
        plot.read_rows(tmp_path)


def test_the_command_draws_one_run_into_its_folder_and_several_to_output(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", RUN), write_run(tmp_path / "b", OLD)
    assert plot.main([str(a)]) == plot.main([str(a), str(b), "--output", str(tmp_path / "both.png")]) == 0
    for picture in (a / "curves.png", tmp_path / "both.png"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 50_000
    result = command(a, tmp_path)
    assert (
        result.returncode == 2
        and len(result.stderr.splitlines()) == 1
        and "not the --output_dir of a run" in result.stderr
    )
    assert plot.main([str(a), "--output", str(tmp_path / "curves.nothing")]) == 2
    assert plot.main([str(a), "--output", str(tmp_path / "nowhere" / "curves.png")]) == 2
    capsys.readouterr()
    assert plot.main([]) == 2
    assert capsys.readouterr().err == "minirm.plot: error: the following arguments are required: RUN\n"


def test_drawing_leaves_the_global_backend_alone(tmp_path):
    code = "import sys; from minirm import plot; plot.draw({'a': [{'step': 0, 'eval_loss': 1.0, 'eval_accuracy': 0.5}]}); import "
    code += "matplotlib; print(matplotlib.rcParams._get_backend_or_none(), 'matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == ["None", "False"]


def test_train_py_writes_the_plot_or_says_how_to_get_it(server, model_folder, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", make_comparisons(8))
    flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--max_steps", 2]
    flags += ["--logging_steps", 1, "--output_dir"]
    run = server.run(*flags, tmp_path / "without")  # processes.py hides matplotlib
    assert run.codes == [0] and not (tmp_path / "without" / "curves.png").exists()
    wanted = "no curves.png: matplotlib is not installed; run: pip install matplotlib && python -m minirm.plot "
    assert wanted + str(tmp_path / "without") in run.text()
    run = server.run(*flags, tmp_path / "broken", patch="train.save_curves = None")  # not callable
    assert run.codes == [0] and (tmp_path / "broken" / "config.json").exists()
    assert "no curves.png: 'NoneType'" in run.text()
    run = server.run(*flags, tmp_path / "with", world=2, patch="import sys; del sys.modules['matplotlib']")
    assert run.codes == [0, 0] and (tmp_path / "with" / "curves.png").exists()
    assert json.loads((tmp_path / "with" / "run.json").read_text())["finished"] == 2
