"""--cache_trunk: cached and uncached runs are bitwise equal, and nothing stale or damaged is ever read.

Run: pytest tests/test_trunk_cache.py. Needs no network and no GPU; one and two gloo processes on the CPU.
Most runs have one prompt per micro-step, because rounding depends on the shape of the rows.
"""

import errno
import importlib
import json
import shutil
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CONFIGS, SMALL, make_comparisons, make_model, make_tokenizer, read_metrics, write_jsonl
from safetensors.torch import load_file, save_file

from minirm import probe, trunk_cache
from minirm.errors import InputError
from minirm.freeze import Frozen
from minirm.rows import collate
from minirm.trunk_cache import TrunkCache, group_names, probe_trunk_cache

MORE = {
    "gemma2": lambda v: transformers.Gemma2Config(
        vocab_size=v, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=8, **SMALL
    ),
    "falcon": lambda v: transformers.FalconConfig(vocab_size=v, alibi=False, **SMALL),
    "qwen2 with windows": lambda v: transformers.Qwen2Config(
        vocab_size=v, intermediate_size=64, num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
        max_window_layers=2, **SMALL,
    ),
}  # fmt: skip
FLAGS = ["--max_length", 200, "--warmup_steps", 0, "--learning_rate", 1e-3, "--logging_steps", 1, "--num_train_epochs", 2,
         "--eval_steps", 4]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 comparisons of 12 prompts for training, 9 of 5 prompts for evaluation: two epochs of 3 steps of 4 prompts."""
    folder = tmp_path_factory.mktemp("data")
    train = write_jsonl(folder / "train.jsonl", make_comparisons(23, per_prompt=2))
    return train, write_jsonl(folder / "eval.jsonl", make_comparisons(9, seed=3, per_prompt=2))


def outcome(output: Path) -> tuple[list, dict]:
    """(metrics that do not depend on time, final weights) of a run."""
    keys = ("step", "loss", "grad_norm", "accuracy", "eval_loss", "eval_reward_margin", "tokens")
    return [[row.get(key) for key in keys] for row in read_metrics(output)], load_file(output / "model.safetensors")


def assert_equal(got: tuple, wanted: tuple) -> None:
    """Assert that two outcomes are bitwise equal."""
    assert got[0] == wanted[0] and len(wanted[0]) > 5
    assert got[1].keys() == wanted[1].keys()
    assert all(torch.equal(got[1][name], value) for name, value in wanted[1].items())


@pytest.fixture
def trained(data, tmp_path):
    """trained(model, *flags) -> outcome of the command, run in this process."""
    count = 0

    def run(model, *flags) -> tuple[list, dict]:
        nonlocal count
        output = tmp_path / f"out-{(count := count + 1)}"
        code = importlib.import_module("train").main(argv(model, data, output, *flags))
        assert code == 0
        return outcome(output)

    yield run
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


def argv(model, data, output, *flags) -> list[str]:
    start = ["--model", model, "--train_data", data[0], "--eval_data", data[1], "--output_dir", output]
    return [str(flag) for flag in [*start, *FLAGS, *flags]]


def files(cache: Path) -> dict[str, tuple]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("*/*/*.safetensors")}


# ---------------------------------------------------------------------------------------------------------------------
# Bitwise equality


@pytest.mark.parametrize("family", ["gptj", "gpt2", "llama", "opt", "gpt_neox", *MORE])
def test_cached_and_uncached_runs_are_bitwise_equal(family, trained, tmp_path, monkeypatch):
    """The first cached run computes each of the 17 prompts once. The second one runs no frozen layer."""
    if family in MORE:
        monkeypatch.setitem(CONFIGS, family, MORE[family])
    model, cache = make_model(tmp_path / "model", family), tmp_path / "cache"
    wanted, computed, waiting = trained(model), [], []
    through = TrunkCache._through

    def counted(self, forward, last, *args, **kwargs):
        output = through(self, forward, last, *args, **kwargs)
        if self.folder:  # skip the probe's calls
            waiting[:] = self.waiting
            computed.extend([1] if last and self.kept is None else [])
        return output

    monkeypatch.setattr(TrunkCache, "_through", counted)
    assert_equal(trained(model, "--cache_trunk", cache), wanted)
    assert len(computed) == len(files(cache)) == 17 and not waiting
    assert_equal(trained(model, "--cache_trunk", cache), wanted)
    assert len(computed) == 17
    assert len(waiting) == 3  # the frozen layers were never moved to the device


@pytest.mark.parametrize(
    "flags",
    ["--row_layout separate", "--loss trlx", "--loss trlx --row_layout separate", "--freeze_ratio 1", "--gradient_checkpointing"],
)  # fmt: skip
def test_cached_and_uncached_runs_with_other_flags_are_bitwise_equal(flags, trained, model_folder, tmp_path):
    wanted = trained(model_folder("gptj"), *flags.split())
    for _ in range(2):
        assert_equal(trained(model_folder("gptj"), *flags.split(), "--cache_trunk", tmp_path / "cache"), wanted)


def test_a_thread_reads_cached_states_ahead(trained, model_folder, tmp_path, monkeypatch):
    """A micro-step reads a file itself only if it was missing when the thread looked, as in the first run."""
    readers, read = [], TrunkCache._read

    def noted(self, name):
        readers.append(threading.current_thread() is threading.main_thread())
        return read(self, name)

    monkeypatch.setattr(TrunkCache, "_read", noted)
    for all_cached in (False, True):
        readers.clear()
        trained(model_folder("gptj"), "--cache_trunk", tmp_path / "cache")
        assert len(readers) > 24 and any(readers) != all_cached


@pytest.mark.parametrize(
    "family, flags, tolerance",
    [
        ("gptj", "--precision fp16", 1e-2),
        ("gptj", "--precision bf16", 1e-2),
        ("llama", "--per_device_train_batch_size 3 --gradient_accumulation_steps 1", 1e-5),
    ],
)
def test_in_half_precision_and_with_several_prompts_losses_agree_to_rounding(
    family, flags, tolerance, trained, model_folder, tmp_path
):
    wanted = trained(model_folder(family), *flags.split())
    for _ in range(2):
        got = trained(model_folder(family), *flags.split(), "--cache_trunk", tmp_path / "cache")
        losses = [[row[1] or row[4] for row in rows] for rows, _ in (got, wanted)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)


@pytest.mark.parametrize("frozen", ["whole", "sharded"])
def test_two_processes_share_a_cache_although_one_finds_less_in_it(frozen, server, model_folder, data, tmp_path):
    """Ranks gather sharded frozen blocks in every forward pass, whether they skip the blocks or not. Otherwise they hang."""
    sharded = "import functools; train.shard.shard = functools.partial(train.shard.shard, frozen_share=0.0)"
    patch = sharded if frozen == "sharded" else ""
    results, cache = [], tmp_path / "cache"
    for turn in range(3):
        if turn == 2:  # a third of the files is lost, so in many steps only one rank can skip
            for path in sorted(cache.glob("*/*/*.safetensors"))[::3]:
                path.unlink()
        flags = argv(model_folder("llama"), data, tmp_path / f"out-{turn}", *(["--cache_trunk", cache] if turn else []))
        run = server.run(*flags, "--gradient_accumulation_steps", 2, world=2, patch=patch)
        assert run.codes == [0, 0], run.text()
        results.append(outcome(tmp_path / f"out-{turn}"))
    for got in results[1:]:
        assert_equal(got, results[0])


def test_a_resumed_run_reads_its_cache(trained, model_folder, data, tmp_path):
    train, output = importlib.import_module("train"), tmp_path / "out"
    wanted = trained(model_folder("gpt2"))
    flags = argv(model_folder("gpt2"), data, output, "--save_steps", 2, "--cache_trunk", tmp_path / "cache")
    assert train.main([*flags, "--max_steps", "4"]) == 0
    before = files(tmp_path / "cache")
    assert train.main(flags) == 0
    got = outcome(output)
    assert before == files(tmp_path / "cache")
    at_the_end = [[row for row in rows if row[0] == 6] for rows in (got[0], wanted[0])]
    assert at_the_end[0] == at_the_end[1] and all(torch.equal(got[1][k], v) for k, v in wanted[1].items())


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and stale files


def test_a_run_killed_while_writing_its_cache_resumes(server, model_folder, data, tmp_path):
    """SIGKILL with half of the eighth file on disk: the first seven are reused, and the result is the same."""
    patch = """
import os, signal
replace, written = os.replace, []
def dies(source, target):
    if str(target).endswith(".safetensors"):
        written.append(target)
        if len(written) == 8:
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = dies
"""
    cache = tmp_path / "cache"
    run = server.run(*argv(model_folder("llama"), data, tmp_path / "out", "--cache_trunk", cache), patch=patch)
    assert run.codes == [-9]
    before = files(cache)
    assert len(before) == 7 and len(list(cache.glob("*/*/*.partial"))) == 1
    run = server.run(*argv(model_folder("llama"), data, tmp_path / "out", "--cache_trunk", cache))
    assert run.codes == [0], run.text()
    assert before.items() <= files(cache).items() and len(files(cache)) == 17
    run = server.run(*argv(model_folder("llama"), data, tmp_path / "plain"))
    assert_equal(outcome(tmp_path / "out"), outcome(tmp_path / "plain"))


def test_damaged_files_are_computed_again(trained, model_folder, tmp_path):
    """As after a power failure, one file is truncated, one is empty, one ends in zeros, and one has another bit."""
    cache = tmp_path / "cache"
    wanted = trained(model_folder("llama"), "--cache_trunk", cache)
    paths = sorted(cache.glob("*/*/*.safetensors"))
    whole = [path.read_bytes() for path in paths]
    paths[0].write_bytes(whole[0][:-64])
    paths[1].write_bytes(b"")
    paths[2].write_bytes(whole[2][:-64] + bytes(64))
    paths[3].write_bytes(whole[3][:-1] + bytes([whole[3][-1] ^ 1]))
    assert_equal(trained(model_folder("llama"), "--cache_trunk", cache), wanted)
    assert [path.read_bytes() for path in paths] == whole


def test_two_concurrent_runs_share_a_cache(server, model_folder, data, tmp_path):
    runs = [
        server.start(*argv(model_folder("gpt2"), data, tmp_path / f"out-{i}", "--cache_trunk", tmp_path / "cache"))
        for i in range(2)
    ]
    assert [run.wait() for run in runs] == [[0], [0]], runs[0].text() + runs[1].text()
    assert_equal(outcome(tmp_path / "out-0"), outcome(tmp_path / "out-1"))
    assert len(files(tmp_path / "cache")) == 17


def changed_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][0, 0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_entries_of_other_models_data_and_flags_are_not_read(trained, tmp_path):
    """Each change gives a new key, and the result of an uncached run with the same change."""
    model, cache = make_model(tmp_path / "model", "llama"), tmp_path / "cache"
    trained(model, "--cache_trunk", cache)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    one_weight, config, tokenizer = copy("one weight"), copy("config"), copy("tokenizer")
    changed_weight(one_weight, "model.layers.2.mlp.up_proj.weight")
    text = json.loads((config / "config.json").read_text())
    text["rope_parameters"]["rope_theta"] = 500.0
    (config / "config.json").write_text(json.dumps(text))
    make_tokenizer(texts=["other words make other tokens of the same number " * 9] * 4).save_pretrained(tokenizer)
    changes = [
        (one_weight,),
        (config,),
        (tokenizer,),
        (model, "--max_length", 40),
        (model, "--freeze_ratio", 0.5),
        (model, "--precision", "bf16"),
        (model, "--row_layout", "separate"),
        (model, "--per_device_train_batch_size", 2),
    ]
    for number, (folder, *flags) in enumerate(changes, start=2):
        wanted = trained(folder, *flags)
        got = trained(folder, *flags, "--cache_trunk", cache)
        assert len(list(cache.iterdir())) == number, (folder, flags)
        if flags != ["--per_device_train_batch_size", 2]:
            assert_equal(got, wanted)


def test_a_retrained_model_with_the_same_frozen_layers_uses_the_same_cache(trained, tmp_path):
    model, cache = make_model(tmp_path / "model", "llama"), tmp_path / "cache"
    trained(model, "--cache_trunk", cache)
    before = files(cache)
    changed_weight(model, "model.layers.3.mlp.up_proj.weight")
    wanted = trained(model)
    assert_equal(trained(model, "--cache_trunk", cache), wanted)
    assert files(cache) == before


def test_different_groups_have_different_names():
    def names(*groups, **options):
        options = {"row_layout": "shared", "pad_id": 0, "row_limit": 99, **options}
        return group_names(collate([{"prefix": p, "completions": c} for p, c in groups], **options))

    group, longer = ([1, 2], [[3, 4], [5]]), ([7], [[8, 9, 10, 11, 12]])
    assert names(group, longer) == names(group) + names(longer)  # padding and neighbours do not matter
    others = [
        names(([1, 2], [[3, 4], [6]])),
        names(([1, 2], [[3], [4, 5]])),  # the same ids, split elsewhere
        names(([1], [[2, 3, 4], [5]])),
        names(group, row_layout="separate"),  # repeats the prefix
    ]
    assert len({*map(tuple, others), tuple(names(group))}) == 5
    assert names(group, row_limit=4) == others[-1]  # too long for one row, so again two rows


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and warnings


def refusal(capsys, *flags) -> str:
    code = importlib.import_module("train").main([str(flag) for flag in flags])
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: error: ")]
    assert code == 2 and len(lines) == 1
    return lines[0]


def test_runs_that_cannot_be_cached_are_refused_with_the_reason(model_folder, data, tmp_path, capsys, monkeypatch):
    flags = argv(model_folder("llama"), data, tmp_path / "out", "--cache_trunk", tmp_path / "cache")
    assert "freezes no layer" in refusal(capsys, *flags, "--freeze_ratio", 0)
    assert "--train_embeddings" in refusal(capsys, *flags, "--train_embeddings")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, *flags, "--cache_trunk", tmp_path / "file")
    monkeypatch.setattr(trunk_cache.shutil, "disk_usage", lambda _: Namespace(free=1000))
    assert "0.0 MB are free; choose another folder" in refusal(capsys, *flags)


def test_layers_that_pass_on_more_than_hidden_states_are_refused(monkeypatch):
    """One model's last block adds the first block's attention output. Another model trains a layer below the first block."""
    config, args = CONFIGS["llama"](99), Namespace(train_embeddings=False, max_length=100)
    frozen, small, kept = Frozen([0, 1, 2], [], 4), probe.small_model, {}

    def leaky(*arguments):
        model = small(*arguments)
        model.layers[0].self_attn.register_forward_hook(lambda module, inputs, output: kept.update(output=output[0]))
        model.layers[-1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + kept["output"],))
        return model

    assert probe_trunk_cache(args, config, frozen) is None
    monkeypatch.setattr(probe, "small_model", leaky)
    with pytest.raises(InputError, match="not possible for llama .its layers pass on more than hidden states"):
        probe_trunk_cache(args, config, frozen)

    def trains_below(*arguments):
        model = small(*arguments)
        model.before = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size)
        model.layers[0].register_forward_pre_hook(lambda module, inputs: (model.before(inputs[0]),))
        return model

    monkeypatch.setattr(probe, "small_model", trains_below)
    with pytest.raises(InputError, match="below the first trained layer"):
        probe_trunk_cache(args, config, frozen)


def test_a_full_disk_stops_the_writing_but_not_the_run(trained, model_folder, tmp_path, monkeypatch, capsys):
    wanted, cache, written = trained(model_folder("llama")), tmp_path / "cache", []
    write_bytes = Path.write_bytes

    def full(self, content):
        if cache not in self.parents:
            return write_bytes(self, content)
        written.append(self)
        if len(written) > 7:  # about.json and six others
            write_bytes(self, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_equal(trained(model_folder("llama"), "--cache_trunk", cache), wanted)
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert len(written) == 8 and len(files(cache)) == 6 and not list(cache.glob("*/*/*.partial"))
