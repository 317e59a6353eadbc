"""A run that is killed, out of disk or fed broken data ends cleanly and resumes exactly.

    pytest tests/test_faults.py        no network

tests/bench/crash.py and tests/bench/fuzz.py are the long versions.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import flags, mounted, training
from safetensors.torch import load_file

from minirm.checkpoint import checkpoints, verify

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

from crash import crash
from fuzz import make_chat_tokenizer, make_file, try_file


def test_six_kills_at_random_moments_change_nothing(server, tmp_path):
    """In fp16 on two processes, weights, optimizer states and all rows of metrics.jsonl are bitwise equal."""
    report = crash(tmp_path, kills=6, precision="fp16", seed=2, server=server, steps=9, save_steps=2)
    assert report["differences"] == []
    assert sum(report["kills"].values()) == 6 and report["kills"]["saving, the first time"] >= 1


# -- Non-finite numbers. -------------------------------------------------------------------------------------------------


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


def test_a_non_finite_loss_stops_all_processes_and_names_the_prompts(server, twelve_steps, tmp_path):
    """Process 1 gets the nan in the third of the four micro-steps of step 6."""
    patch = NOT_FINITE.format(value="nan", when="rank == 1 and len(calls) == 5 * 4 + 3")
    run = server.run(*twelve_steps, "--output_dir", tmp_path / "run", world=2, patch=patch)
    assert run.codes == [3, 3], run.text()
    (line,) = [line for line in run.text().splitlines() if line.startswith("train.py: ")]
    assert "step 6: the loss is not finite" in line and "training prompts " in line and "--learning_rate" in line
    assert "Traceback" not in run.text()
    assert list(checkpoints(tmp_path / "run")) == [4] and verify(tmp_path / "run" / "checkpoint-4")
    place = json.loads(f"[{line.partition('training prompts ')[2].partition(' (')[0]}]")
    assert len(place) == 1  # one prompt in a micro-step of one process
    run = server.run(*twelve_steps, "--output_dir", tmp_path / "run", world=2)
    assert run.codes == [0, 0] and "checkpoint-4, step 4 of 12" in run.text()


def test_an_fp16_run_stops_when_the_loss_scale_reaches_its_floor(server, twelve_steps, tmp_path):
    patch = NOT_FINITE.format(value="inf", when="True")
    given = [*twelve_steps, *flags(precision="fp16", max_steps=40, save_steps=5, output_dir=tmp_path / "run")]
    run = server.run(*given, world=2, patch=patch)
    assert run.codes == [3, 3], run.text()
    # 65536 = 2^16 is halved seventeen times.
    assert "step 17: the loss scale fell below 1.0" in run.text() and "--precision bf16" in run.text()
    assert [(row["loss_scale"], row["skipped_steps"]) for row in training(tmp_path / "run")] == [
        (2.0 ** (16 - n), n) for n in range(1, 17)
    ]
    # The run also resumes from a checkpoint whose optimizer has taken no step yet.
    run = server.run(*given, "--max_steps", 16, world=2)
    assert run.codes == [0, 0] and "checkpoint-15, step 15 of 16" in run.text(), run.text()
    assert training(tmp_path / "run")[-1]["skipped_steps"] == 15


def test_an_inf_in_the_gradient_of_one_process_is_skipped_by_all(server, twelve_steps, tmp_path):
    """The inf is in one process's shard of one parameter. At a scale of 2^8 no other gradient overflows. The skipped step
    leaves the loaded weights unchanged."""
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
        given = [*twelve_steps, *flags(precision="fp16", max_steps=1, warmup_steps=0, output_dir=output)]
        run = server.run(*given, world=2, patch=patch.replace("PLANT", str(plant)))
        assert run.codes == [0, 0], run.text()
        (row,) = training(output)
        state = verify(output / "checkpoint-1")
        shards = [load_file(path) for path in sorted((output / "checkpoint-1").glob("shard-*"))]
        weight = [shard["model.trunk.h.3.attn.q_proj.weight"] for shard in shards]
        found[plant] = (row["loss_scale"], row["skipped_steps"], state["schedule_steps"], weight)
    assert found[True][:3] == (128.0, 1, 0)
    assert found[False][:3] == (256.0, 0, 1)
    base = load_file(Path(twelve_steps[1]) / "model.safetensors")["transformer.h.3.attn.q_proj.weight"]
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
def test_a_full_disk_ends_all_processes_with_one_line_and_no_partial_files(server, twelve_steps, tmp_path, phase, size):
    with mounted(tmp_path / "small", f"size={size}") as place:
        given = [] if phase is DEMO else twelve_steps
        given = [*given, "--output_dir", (place if phase is METRICS else tmp_path) / "run"]
        patch = phase.format(place=str(place))
        run = server.run(*given, world=2, patch=patch, env={"MINIRM_CACHE": str(place)})
        assert run.codes == [3, 3], run.text()
        (line,) = [line for line in run.text().splitlines() if "could not be written" in line]
        assert str(place) in line and "No space left" in line and "are free" in line and "Traceback" not in run.text()
        assert not [*place.rglob("*.partial")]
    if phase is PREPARING:  # the same command works once there is room
        assert server.run(*given, "--max_steps", 1, world=2).codes == [0, 0]


# -- Broken data. --------------------------------------------------------------------------------------------------------


def test_broken_data_files_are_refused_or_accounted_for(tmp_path):
    """300 of the 2,000 files of tests/bench/fuzz.py. Both outcomes are common, so the test can fail either way."""
    tokenizer = make_chat_tokenizer()
    results = Counter(try_file(make_file(tmp_path, seed), tokenizer, tmp_path / "cache") for seed in range(300))
    assert min(results["refused"], results["trained on"]) > 50, results
