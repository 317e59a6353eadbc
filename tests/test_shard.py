"""Sharding from outside: which parameters are sharded, in which precision, and that it changes no number.

Run: pytest tests/test_shard.py. Needs no network and no GPU; two gloo processes on the CPU.
"""

import pytest
import torch
from conftest import make_comparisons, read_metrics, write_jsonl
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from minirm.freeze import freeze_bottom_layers
from minirm.model import empty_model, load_config, load_weights
from minirm.shard import cast_frozen, fill, gather, shard, start_processes


@pytest.fixture
def one_process():
    yield start_processes()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["gptj", "opt", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_trained_parameters_are_fp32_shards_and_frozen_ones_whole_in_the_compute_precision(
    family, dtype, model_folder, one_process
):
    device, mesh = one_process
    config, _ = load_config(str(model_folder(family)))
    model = empty_model(config)
    frozen = set(freeze_bottom_layers(model, 0.7).parameters)
    cast_frozen(model, dtype)
    assert shard(model, mesh, dtype)
    weights = load_weights(str(model_folder(family)), config, seed=0)
    fill(model, weights, device)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (name not in frozen), name
        assert parameter.dtype == (dtype if name in frozen else torch.float32), name
    state = gather(model, torch.float32)
    assert state.keys() == dict(model.state_dict()).keys()
    for name, tensor in state.items():
        wanted = weights[name].to(dtype) if name in frozen else weights[name]
        assert torch.equal(tensor, wanted.float()), name


def test_frozen_parameters_that_do_not_fit_are_sharded_and_nothing_else_changes(server, model_folder, tmp_path):
    """frozen_share=0 leaves no memory for whole frozen parameters. Two processes, fp32 and bf16, equal to the bit."""
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
