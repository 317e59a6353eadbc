"""A checkpoint's content, the rejection of damaged ones, and the best parameters.

    pytest tests/test_checkpoint.py        no network

Random kills are in tests/test_faults.py.
"""

import json
import random
import shutil

import pytest
from conftest import make_comparisons, make_model, rows_without_speeds, unfinished, write_jsonl
from safetensors.torch import load_file

from minirm.checkpoint import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


# -- The best model. ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worsening(eight_steps, folder):
    """Flags of a run of 8 steps whose held-out pairs are its training pairs with the sides swapped. Training raises the
    held-out loss, so of the evaluations at steps 2, 4, 6 and 8 the first has the lowest."""
    pairs = make_comparisons(24)
    turned = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    data = ["--train_data", write_jsonl(folder / "straight.jsonl", pairs)]
    data += ["--eval_data", write_jsonl(folder / "turned.jsonl", turned)]
    return [*eight_steps, *data, "--eval_steps", 2, "--save_total_limit", 0, "--gradient_accumulation_steps", 6]


@pytest.fixture(scope="module")
def worse(server, worsening, folder):
    """A finished run with the flags `worsening` on two processes."""
    assert server.run(*worsening, "--output_dir", folder / "worse", world=2).codes == [0, 0]
    return folder / "worse"


def weights(folder, part=""):
    """{name in RewardModel: bytes} of a model folder, or of part "model." or "best." of a checkpoint, with shards merged."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name.startswith(part):
                name = name.removeprefix(part).replace("transformer.", "trunk.")
                found[name] = found.get(name, b"") + tensor.numpy().tobytes()
    return found


def losses(output):
    return {row["step"]: row["eval_loss"] for row in rows_without_speeds(output) if row["step"] and "eval_loss" in row}


def test_the_exported_model_is_the_one_with_the_lowest_loss(server, worsening, worse, tmp_path):
    """The export equals that of a run that ends at the best step, and with --keep last the last checkpoint."""
    assert min(losses(worse), key=losses(worse).get) == 2
    run = server.run(*worsening, "--max_steps", 2, "--output_dir", tmp_path / "two", world=2)
    assert "loss was lowest" not in run.text()
    assert weights(worse) == weights(tmp_path / "two")
    run = server.run(*worsening, "--keep", "last", "--output_dir", tmp_path / "last", world=2)
    assert run.codes == [0, 0] and "loss was lowest" not in run.text()
    last, ends = weights(tmp_path / "last"), weights(worse / "checkpoint-8", "model.")
    assert len(ends) == 23 and {name: last[name] for name in ends} == ends
    assert all(last[name] != weights(worse)[name] for name in ends)
    assert losses(tmp_path / "last") == losses(worse)


def test_the_best_head_is_kept_although_one_of_two_processes_holds_it(server, worsening, tmp_path):
    flags = [*worsening, "--freeze_ratio", 1, "--head_learning_rate", 0.1]
    for steps in (2, 8):
        assert server.run(*flags, "--max_steps", steps, "--output_dir", tmp_path / str(steps), world=2).codes == [0, 0]
    assert min(losses(tmp_path / "8"), key=losses(tmp_path / "8").get) == 2
    assert weights(tmp_path / "8") == weights(tmp_path / "2")
    assert weights(tmp_path / "8" / "checkpoint-8", "best.").keys() == {"score.weight"}


def test_a_checkpoint_stores_the_best_parameters_unless_they_are_its_own(worse):
    assert weights(worse / "checkpoint-2", "best.") == {}
    for step in (4, 6, 8):
        assert weights(worse / f"checkpoint-{step}", "best.") == weights(worse / "checkpoint-2", "model.")


def test_the_last_line_and_the_card_report_the_best_and_the_last_evaluation(server, worsening, tmp_path):
    run = server.run(*worsening, "--max_steps", 4, "--output_dir", tmp_path / "run")
    two, four = [row for row in rows_without_speeds(tmp_path / "run") if row["step"] and "eval_loss" in row]
    assert (
        f"held-out accuracy {two['eval_accuracy']:.4f} on 24 pairs at step 2, which had the lowest loss, "
        f"{two['eval_loss']:.4f} (at the last step, 4: accuracy {four['eval_accuracy']:.4f}, loss {four['eval_loss']:.4f})"
    ) in run.text()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "The model is from step 2, which had the lowest held-out loss" in " ".join(card.split())
    for row in (two, four):
        assert f"| {row['step']} | {row['eval_loss']:.4f} | {row['eval_accuracy']:.4f} |" in card


def test_a_better_evaluation_replaces_the_previous_best(server, eight_steps, tmp_path):
    """At this high learning rate the loss goes up and down. Its minimum is neither at the first nor at the last step."""
    flags = [*eight_steps, "--learning_rate", 3e-2, "--warmup_steps", 0, "--eval_steps", 1]
    assert server.run(*flags, "--output_dir", tmp_path / "run").codes == [0]
    loss = losses(tmp_path / "run")
    best = min(loss, key=loss.get)
    assert 1 < best < 8 and loss[best] < loss[1]
    assert server.run(*flags, "--max_steps", best, "--output_dir", tmp_path / "best").codes == [0]
    assert weights(tmp_path / "run") == weights(tmp_path / "best")


def test_the_best_survives_other_numbers_of_processes_bitwise(server, worsening, worse, tmp_path):
    for world, steps in ((2, 3), (3, 5), (1, 7), (2, 8)):
        run = server.run(*worsening, "--max_steps", steps, "--output_dir", tmp_path / "run", world=world)
        assert run.codes == [0] * world, run.text()
    assert min(losses(tmp_path / "run"), key=losses(tmp_path / "run").get) == 2
    assert weights(tmp_path / "run") == weights(worse)


@pytest.mark.parametrize("step", [2, 8])
def test_a_run_stopped_before_an_evaluation_makes_up_for_it(server, worsening, worse, tmp_path, step):
    """A signal at the best or the last step saves a checkpoint and ends the run before the evaluation of that step."""
    signals = f"""
import os
agree, calls = train.run.agree, []
def signalled(caught, losses):
    calls.append(1)
    if len(calls) == {step}: caught.append(15)
    return agree(caught, losses)
train.run.agree = signalled
"""
    run = server.run(*worsening, "--output_dir", tmp_path / "run", patch=signals, world=2)
    assert run.codes == [143, 143] and f"stopped after step {step} of 8" in run.text()
    assert server.run(*worsening, "--output_dir", tmp_path / "run", world=2).codes == [0, 0]
    assert losses(tmp_path / "run") == losses(worse)
    assert weights(tmp_path / "run") == weights(worse)


# -- The files. ----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_truncation_of_a_checkpoint_is_noticed(finished, tmp_path):
    rng, whole = random.Random(0), finished / "checkpoint-8"
    assert verify(whole)["step"] == 8
    for number in range(200):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        path = rng.choice(sorted(copy.iterdir()))
        data = bytearray(path.read_bytes())
        kind, place = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(data[:place])
        else:
            data[place] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            verify(copy)
        assert type(error.value) is ValueError and "\n" not in str(error.value), f"{path.name}, byte {place}"


def test_an_inconsistent_checkpoint_with_valid_digests_is_refused(finished, tmp_path):
    """The digests match, but the contents are wrong. Every case is refused without a traceback."""
    from minirm.files import file_digest

    for number, change in enumerate(
        [
            lambda state: state.pop("scaler"),
            lambda state: state.update(step="8"),
            lambda state: state.update(recipe=[]),
            lambda state: state.update(result={}),
            lambda state: state.update(best={"step": 6}),
            lambda state: state.update(best={"step": 6, "eval_loss": "low"}),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(finished / "checkpoint-8", copy)
        state = json.loads((copy / "checkpoint.json").read_text())
        change(state)
        (copy / "checkpoint.json").write_text(json.dumps(state))
        names = sorted(path.name for path in copy.iterdir() if path.name != "SHA256SUMS")
        (copy / "SHA256SUMS").write_text("".join(f"{file_digest(copy / name)}  {name}\n" for name in names))
        with pytest.raises(ValueError):
            verify(copy)
    (copy / "SHA256SUMS").write_text(f"{'0' * 64}  ../../secret\n" + (copy / "SHA256SUMS").read_text())
    with pytest.raises(ValueError, match="../../secret does not match SHA256SUMS"):
        verify(copy)


def test_no_pickle_is_written_or_read(server, eight_steps, finished, tmp_path):
    """A run resumes from a checkpoint while pickle and torch.save are forbidden."""
    output = unfinished(finished, tmp_path / "run", 4)
    patch = """
import pickle, torch
def forbidden(*arguments, **options): raise AssertionError("a pickle")
pickle.load = pickle.loads = torch.load = torch.save = torch.serialization.load = torch.serialization.save = forbidden
"""
    run = server.run(*eight_steps, "--output_dir", output, patch=patch)
    assert run.codes == [0] and "goes on from" in run.text(), run.text()
    kinds = {path.suffix for path in output.rglob("*") if path.is_file()}
    assert kinds == {".json", ".jsonl", ".safetensors", ".md", ""}
    assert {p.name for p in output.rglob("*") if p.is_file() and not p.suffix} == {"SHA256SUMS"}


def test_a_checkpoint_takes_twelve_bytes_per_trained_parameter(server, eight_steps, tmp_path):
    """8 of GPT-J's 28 layers are trained: an fp32 parameter and Adam's two moments each, within 5 %.

    With width h, a layer has 4 h^2 + 8 h^2 + 5 h + h + h = 12 h^2 + 7 h parameters, the final norm 2 h, the head h.
    """
    h = 64
    model = make_model(tmp_path / "model", "gptj", n_embd=h, n_layer=28)
    run = server.run(
        *eight_steps, "--model", model, "--freeze_ratio", 0.7, "--max_steps", 1, "--output_dir", tmp_path / "run"
    )
    assert run.codes == [0], run.text()
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").iterdir())
    assert size == pytest.approx(12 * (8 * (12 * h * h + 7 * h) + 3 * h), rel=0.05)
    assert f"checkpoint-1: {size / 1e6:.1f} MB in " in run.text()
