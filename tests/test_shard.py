"""Sharding: which parameters are sharded, in which precision, and that it changes no result.

Run: pytest tests/test_shard.py. Needs no network and no GPU; two to eight gloo processes on the CPU.
"""

import shutil

import pytest
import torch
from conftest import make_comparisons, read_metrics, write_jsonl
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from minirm.freeze import freeze_bottom_layers
from minirm.model import empty_model, init_head, load_config
from minirm.shard import cast_frozen, fill, gather, shard, start_processes
from minirm.weights import load_weights


@pytest.fixture
def one_process():
    yield start_processes()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["gptj", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trained_parameters_are_fp32_shards_and_frozen_ones_unsharded(family, dtype, model_folder, one_process):
    device, mesh, *_ = one_process
    config, _ = load_config(str(model_folder(family)))
    model = empty_model(config)
    frozen = set(freeze_bottom_layers(model, 0.7).parameters)
    cast_frozen(model, dtype)
    assert shard(model, mesh, dtype)
    weights = load_weights(str(model_folder(family)), config, seed=0, published=True)
    fill(model, device, False, None, None, lambda: weights)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (name not in frozen), name
        assert parameter.dtype == (dtype if name in frozen else torch.float32), name
    state = gather(model, torch.float32)
    assert state.keys() == dict(model.state_dict()).keys()
    for name, tensor in state.items():
        wanted = weights[name].to(dtype) if name in frozen else weights[name]
        assert torch.equal(tensor, wanted.float()), name


COUNT = """
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as units
count, gather, begin = [], units.foreach_all_gather, train.shard.begin_micro_step
def counted(*args, **options):
    count.append(1)
    return gather(*args, **options)
def shown(model, last):
    if rank == 0:
        print("\\ngathered so far:", len(count), flush=True)
    begin(model, last)
units.foreach_all_gather, train.shard.begin_micro_step = counted, shown
"""


def test_frozen_units_are_gathered_once_and_trained_ones_once_a_step(server, model_folder, tmp_path):
    """Three of four layers are frozen, so 4 units are frozen (with the embeddings) and 2 are trained (a block, the head).

    The evaluation at step 0 gathers all 6 and the first step reuses them. Each later step of 2 micro-steps gathers 2.
    """
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(30))
    flags = ["--model", model_folder("llama"), "--train_data", data, "--eval_data", data, "--max_steps", 3]
    flags += ["--gradient_accumulation_steps", 2, "--output_dir", tmp_path / "run"]
    run = server.run(*flags, world=2, patch=COUNT)
    assert run.codes == [0, 0], run.text()[-3000:]
    shown = [int(line.split()[-1]) for line in run.text().splitlines() if line.startswith("gathered so far")]
    assert shown == [6, 6, 6, 8, 8, 10]


LONG_ROWS = """
import torch.nn.functional as F
train.attention_mask.__defaults__ = (None, 1)  # every row is long
attend, unmasked = F.scaled_dot_product_attention, []
def counted(query, key, value, mask=None, *args, **options):
    mask = options.pop("attn_mask", mask)
    unmasked.append(mask is None)
    return attend(query, key, value, mask, *args, **options)
F.scaled_dot_product_attention = counted
load, original = train.load_model, train.train
def loaded(*arguments):
    unmasked.clear()  # before, a small model was tried
    return load(*arguments)
def shown(*arguments):
    original(*arguments)
    print("\\nparts:", sum(unmasked), "of", len(unmasked), flush=True)
train.load_model, train.train = loaded, shown
"""


@pytest.mark.parametrize("family, precision", [("llama", "bf16"), ("gptj", "fp32")])
def test_attention_in_two_parts_gives_equal_results(family, precision, server, model_folder, tmp_path):
    """The parts are told by an attribute of the mask, which FSDP, autocast and checkpointing must not lose."""
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(16))
    rows = []
    for name, patch in (("whole", ""), ("parts", LONG_ROWS)):
        flags = ["--model", model_folder(family), "--train_data", data, "--eval_data", data, "--precision", precision]
        flags += ["--max_steps", 3, "--learning_rate", 1e-3, "--warmup_steps", 0, "--logging_steps", 1]
        flags += ["--per_device_train_batch_size", 2, "--gradient_checkpointing", "--output_dir", tmp_path / name]
        run = server.run(*flags, world=2, patch=patch)
        assert run.wait() == [0, 0], run.text()[-3000:]
        rows.append([row.get("loss", row.get("eval_loss")) for row in read_metrics(tmp_path / name)])
    parts = [line.split()[1::2] for line in run.text().splitlines() if line.startswith("parts:")]
    assert len(parts) == 2 and all(0 < 2 * int(first) == int(calls) for first, calls in parts)
    assert rows[1] == pytest.approx(rows[0], abs=1e-5 if precision == "fp32" else 5e-3)
    assert rows[0][0] - rows[0][-1] > 0.01


def test_processes_with_different_memory_gather_the_same_units_together(server, model_folder, tmp_path):
    """The second of two processes has no room to keep units, so the first keeps none either. Otherwise both would hang."""
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(8))
    flags = ["--model", model_folder("llama"), "--train_data", data, "--eval_data", data, "--max_steps", 2]
    small = """
import os
asked = os.sysconf
os.sysconf = lambda name: 1 if rank == 1 and name == "SC_PHYS_PAGES" else asked(name)
"""
    run = server.run(*flags, "--output_dir", tmp_path / "run", world=2, patch=small, timeout=60)
    assert run.codes == [0, 0], run.text()[-3000:]


def test_frozen_parameters_that_do_not_fit_are_sharded_with_equal_results(server, model_folder, tmp_path):
    """frozen_share=0 leaves no memory for unsharded frozen parameters. In fp32 and bf16 the results are bitwise equal."""
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(12))
    sharded = "import functools; train.shard.shard = functools.partial(train.shard.shard, frozen_share=0)"
    for precision in ("fp32", "bf16"):
        rows, weights = [], []
        for patch in ("", sharded):
            output = tmp_path / f"{precision}{len(patch)}"
            flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--output_dir", output]
            flags += ["--precision", precision, "--max_steps", 3, "--learning_rate", 1e-3, "--logging_steps", 1]
            run = server.run(*flags, "--max_length", 200, "--warmup_steps", 0, world=2, patch=patch)
            assert run.wait() == [0, 0], run.text()[-3000:]
            rows.append([{k: v for k, v in row.items() if "second" not in k} for row in read_metrics(output)])
            weights.append(load_file(output / "model.safetensors"))
        assert rows[0] == rows[1]
        assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_weights_arrive_the_same_whether_rank_0_or_each_rank_reads_them(server, model_folder, tmp_path):
    """On 2 x 2 processes: safetensors, of which each process reads half; .bin files; safetensors that one process cannot
    read. All processes refuse a wrong checkpoint."""
    model, data = model_folder("qwen2"), write_jsonl(tmp_path / "train.jsonl", make_comparisons(8))
    weights = load_file(model / "model.safetensors")
    for name, changes in (("bin", {}), ("wrong", {"model.layers.7.extra": torch.ones(2)})):
        shutil.copytree(model, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(weights | changes, tmp_path / name / "pytorch_model.bin")
    blind = "read = minirm.start.stored_weights; minirm.start.stored_weights = lambda *all: None if rank == 3 else read(*all)"
    own = """
stored_weights, fill, sizes = minirm.start.stored_weights, train.shard.fill, []
def counting(*all):
    read = stored_weights(*all)
    def rows(*place):
        sizes.append((tensor := read(*place)).numel())
        return tensor
    return rows
def checked(model, *all):
    fill(model, *all)
    assert 0 < sum(sizes) < 0.51 * sum(p.numel() for p in model.parameters())
minirm.start.stored_weights, train.shard.fill, minirm.start.load_weights = counting, checked, lambda *all: 1 / 0
"""
    for i, (folder, patch) in enumerate(
        ((model, own), (tmp_path / "bin", ""), (model, blind), (tmp_path / "wrong", ""))
    ):
        output = tmp_path / f"out{i}"
        flags = ["--model", folder, "--train_data", data, "--eval_data", data, "--output_dir", output, "--max_steps", 0]
        run = server.run(*flags, "--max_length", 200, "--shard_size", 2, "--freeze_ratio", 0.5, world=4, patch=patch)
        if i == 3:
            assert (
                run.codes == [2] * 4 and "unexpected weights in the checkpoint: model.layers.7.extra (1)" in run.text()
            )
            continue
        assert run.codes == [0] * 4, run.text()[-3000:]
        trained = load_file(output / "model.safetensors")
        for name, value in trained.items():
            if name == "model.embed_tokens.weight":
                value = value[: len(weights[name])]  # without the added pad token
            wanted = weights[name] if name != "score.weight" else init_head(32, seed=0)
            assert torch.equal(value, wanted), (i, name)


def test_a_shard_size_that_does_not_divide_the_processes_is_refused_first(server, tmp_path):
    run = server.run("--train_data", tmp_path / "missing", "--shard_size", 2, world=3)
    assert run.codes == [2, 2, 2]
    assert run.text() == "train.py: error: --shard_size 2 must divide the number of processes, which is 3\n"


def losses(server, model, data, output, parts, *flags, patch=""):
    """Training rows of a run resumed with each part's (processes, --shard_size, steps). A step has 8 prompts."""
    held_out = write_jsonl(data.with_name("eval.jsonl"), make_comparisons(2, seed=1))
    flags = ["--model", model, "--train_data", data, "--eval_data", held_out, "--output_dir", output, *flags]
    flags += ["--max_length", 64, "--learning_rate", 1e-4, "--logging_steps", 1, "--warmup_steps", 0]
    for world, size, steps in parts:
        cut = ["--max_steps", steps, "--gradient_accumulation_steps", 8 // world, "--shard_size", size]
        run = server.run(*flags, *cut, world=world, patch=patch, timeout=300)
        assert run.wait() == [0] * world, run.text()[-3000:]
    return [row for row in read_metrics(output) if "loss" in row]


def assert_close(got, wanted, tolerance):
    assert [row["step"] for row in got] == [row["step"] for row in wanted]
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [r[key] for r in got] == pytest.approx([r[key] for r in wanted], abs=tolerance), key


def test_eight_processes_and_hybrid_meshes_take_the_same_steps_as_one(server, model_folder, tmp_path):
    """2 x 2 and 2 x 4 are two copies on two or four processes each."""
    model, data = model_folder("gptj", n_layer=8), write_jsonl(tmp_path / "train.jsonl", make_comparisons(16))
    shapes = {"one": (1, 0), "eight": (8, 0), "2 x 2": (4, 2), "2 x 4": (8, 4)}
    wanted = None
    for name, (world, size) in shapes.items():
        got = losses(server, model, data, tmp_path / name, [(world, size, 10)], "--save_steps", 0)
        assert len(got) == 10
        assert_close(got, wanted := wanted or got, 1e-5)


def test_a_run_resumes_with_another_shard_size_and_number_of_processes(server, model_folder, tmp_path):
    """First 2 x 2, then a copy on each of two processes, then one copy on four, with --cpu_offload."""
    model, data = model_folder("llama"), write_jsonl(tmp_path / "train.jsonl", make_comparisons(16))
    wanted = losses(server, model, data, tmp_path / "one", [(1, 0, 6)])
    got = losses(server, model, data, tmp_path / "many", [(4, 2, 2), (2, 1, 4)], "--save_steps", 2)
    got = losses(server, model, data, tmp_path / "many", [(4, 0, 6)], "--save_steps", 2, "--cpu_offload")
    assert_close(got, wanted, 1e-5)


def test_an_overflow_in_one_shard_is_skipped_by_all_copies(server, model_folder, tmp_path):
    """The overflow is in step 2, in the second shard: on one of two processes, or on two of 2 x 2."""
    model, data = model_folder("gptj"), write_jsonl(tmp_path / "train.jsonl", make_comparisons(16))
    patch = """
import torch
class Scaler(torch.amp.GradScaler):
    steps = 0
    def __init__(self, *arguments, **options): super().__init__(*arguments, init_scale=256.0, **options)
    def unscale_(self, optimizer):
        self.steps += 1
        if rank % 2 and self.steps == 2:
            optimizer.param_groups[0]["params"][-2].grad.to_local().view(-1)[0] = float("inf")
        super().unscale_(optimizer)
torch.amp.GradScaler = Scaler
"""
    flags, wanted = ["--precision", "fp16", "--save_steps", 0], None
    for name, part, more in (("a", (2, 0, 4), []), ("b", (4, 2, 4), []), ("c", (2, 0, 4), ["--cpu_offload"])):
        rows = losses(server, model, data, tmp_path / name, [part], *flags, *more, patch=patch)
        got = [row["loss"] for row in rows]
        assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
        assert got == pytest.approx(wanted := wanted or got, abs=1e-3)
