"""train.py --plan, counted by hand for GPT-J-6B and measured on small models.

Run: pytest tests/test_estimate.py. Needs no network and no GPU. Literals are derived for GPT-J-6B's configuration (28
layers of width 4096, an MLP of 16384, 50400 embeddings), fp16, and the recipe: 8 of 28 layers trained, 4 micro-steps
of one row of 2 x 550 = 1100 tokens.

    a layer      q, k, v, out 4 x 4096^2; MLP 2 x 4096 x 16384, biases 16384 + 4096; norm 2 x 4096       201,355,264
    trained      8 layers, the last norm 2 x 4096, the head 4096                                       1,610,854,400
    frozen       20 layers, embeddings 50400 x 4096                                                    4,233,543,680
    matrices of a layer                                                                                  201,326,592
    places       of queries and keys that attention multiplies: 550 x 550 in the first answer, 550 x 1100 in the second,
                 together 907,500
    forward      a micro-step: 2 x 1100 x (28 matrices + head), attention 4 x 907,500 x 4096 x 28 layers: 12.8180e12 FLOP
    backward     8 layers, twice the FLOP of their matrices and the head; 2.5 times that of attention, which
                 recomputes its products: 8 x 2 x 2 x 1100 x 201,326,592 + 2 x 2 x 1100 x 4096 + 8 x 10 x 907,500 x 4096 = 7.3841e12 FLOP
    sent by each of S devices that share a copy: (S - 1)/S of 2 and of 4 bytes per trained parameter and step;
                 between R copies 2 (R - 1)/R of its fp32 gradients, 4 bytes x trained / S
"""

import importlib
import sys
from functools import partial

import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT

import train
from minirm.estimate import estimate

sys.path.insert(0, str(ROOT / "tests" / "bench"))
memory = importlib.import_module("memory")

SENT, ACTIVATIONS = "sent per device and step", "activations, gradients of a single micro-step"
TRAINED, FROZEN = 1_610_854_400, 4_233_543_680
FORWARD, BACKWARD = 4 * 12_818_044_518_400, 4 * 7_384_083_660_800


def gptj_6b(layers=28):
    sizes = {"n_embd": 4096, "n_layer": layers, "n_head": 16, "rotary_dim": 64, "n_positions": 2048}
    return transformers.GPTJConfig(vocab_size=50400, **sizes)


def planned(config, *flags, dtype=torch.float16, layout="shared"):
    args = train.parse_args(["--model", "any", "--plan", "--device", "80", "400", "300", *map(str, flags)])
    found = estimate(config, args, dtype, layout)
    assert len({name for part in found["parts"].values() for name in part}) == sum(map(len, found["parts"].values()))
    return found | {name: value for part in found["parts"].values() for name, value in part.items()}


@pytest.mark.parametrize("devices, shards, copies", [(1, 1, 1), (8, 8, 1), (64, 8, 8)])
def test_gpt_j_6b_by_hand(devices, shards, copies):
    found = planned(gptj_6b(), "--world_size", devices)
    assert (found["trained"], found["frozen"], found["shards"]) == (TRAINED, FROZEN, shards)
    assert (found["rows"], found["length"]) == (1, 1100)
    assert found["trained parameters, fp32"] == 4 * TRAINED / shards
    assert found["moments of AdamW, fp32"] == 8 * TRAINED / shards
    assert found["gradients, fp32"] == 4 * TRAINED / shards
    assert found["whole gradients of earlier micro-steps, fp32"] == 4 * TRAINED
    # Every device holds all of them, and a shard too if there are several devices. Rotary tables are buffers.
    weights = 2 * FROZEN * (1 if devices == 1 else 9 / 8)
    with torch.device("meta"):
        buffers = sum(b.nbytes for b in transformers.AutoModel.from_config(gptj_6b()).buffers())
    assert found["frozen parameters"] == pytest.approx(weights + buffers, rel=1e-6)
    assert list(found["parts"][SENT].values()) == pytest.approx(
        [
            2 * TRAINED * (1 - 1 / shards),
            0,
            4 * TRAINED * (1 - 1 / shards),
            2 * (1 - 1 / copies) * 4 * TRAINED / shards,
        ]
    )
    assert (found["a checkpoint"], found["--cache_trunk, a million tokens"]) == (12 * TRAINED, 8192e6)
    assert (found["forward FLOP"], found["backward FLOP"]) == (FORWARD, BACKWARD)
    assert found["computing"] == pytest.approx((FORWARD + BACKWARD) / 400e12)
    assert found["sending"] == pytest.approx(sum(found["parts"][SENT].values()) / 300e9)


def test_flags_change_the_expected_entries():
    """7 layers of the same size, two of them trained."""
    seven = partial(gptj_6b, layers=7)
    usual, few = planned(seven()), planned(seven(), "--gradient_accumulation_steps", 1)
    assert few["whole gradients of earlier micro-steps, fp32"] == 0
    assert few["forward FLOP"] == usual["forward FLOP"] / 4 and few["peak"] < usual["peak"]
    twice = planned(seven(), "--per_device_train_batch_size", 2)
    assert twice["forward FLOP"] == 2 * usual["forward FLOP"]
    assert 1.8 < twice[ACTIVATIONS] / usual[ACTIVATIONS] < 2.1
    saving = planned(seven(), "--gradient_checkpointing")
    assert saving[ACTIVATIONS] < 0.7 * usual[ACTIVATIONS]  # one of two layers remains
    # The trained layers run forward again, except for the last matrix product of each layer.
    again = 4 * 2 * (2 * 1100 * (201_326_592 - 4096 * 16384) + 4 * 907_500 * 4096)
    assert saving["backward FLOP"] - usual["backward FLOP"] == again
    single = planned(seven(), dtype=torch.float32)
    assert single["frozen parameters"] == pytest.approx(2 * usual["frozen parameters"], rel=1e-2)
    separate = planned(seven(), layout="separate")
    assert (separate["rows"], separate["length"]) == (2, 550)
    embeddings = planned(seven(), "--train_embeddings")
    assert embeddings["trained"] - usual["trained"] == 50400 * 4096
    assert embeddings["backward FLOP"] > 1.9 * usual["backward FLOP"]  # backward runs through the frozen layers
    copies = planned(seven(), "--world_size", 8, "--shard_size", 2)
    assert copies["gradients summed over copies, fp32"] == 2 * 3 / 4 * 4 * usual["trained"] / 2
    hosted = planned(seven(), "--world_size", 8, "--cpu_offload")
    assert hosted["trained parameters, fp32"] == hosted["moments of AdamW, fp32"] == 0
    assert hosted["parameters, gradients, moments"] == (16 * usual["trained"] + 2 * usual["frozen"]) / 8
    assert not hosted["gradients, fp32"]
    assert planned(seven(), "--freeze_ratio", 0)["frozen"] == 0
    head = planned(seven(), "--freeze_ratio", 1)
    assert head["trained"] == 4096 and head[ACTIVATIONS] < usual[ACTIVATIONS]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype, layout", [(torch.float32, "separate"), (torch.float16, "shared")])
def test_operations_are_those_of_matrices_and_attention_in_every_family(family, dtype, layout):
    """4 layers of width 32: 2 FLOP per token and matrix element, 4 L^2 x 32 per layer in attention, and the head."""
    config = CONFIGS[family](400)
    config.update({"pad_token_id": None})
    found = planned(config, "--max_length", 64, "--gradient_accumulation_steps", 1, dtype=dtype, layout=layout)
    rows, length = {"shared": (1, 128), "separate": (2, 64)}[layout]
    assert (found["rows"], found["length"]) == (rows, length)
    model = transformers.AutoModel.from_config(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "emb" not in name)
    matrices -= sum(p.numel() for name, p in model.named_parameters() if name in ("wte.weight", "wpe.weight"))
    expected = 2 * rows * length * (matrices + 32) + 4 * rows * length**2 * 32 * 4
    assert found["forward FLOP"] == pytest.approx(expected, rel=0.02)  # rotary embeddings are products too
    assert 0 < found["backward FLOP"] < 2.5 * found["forward FLOP"] / 2
    assert found[ACTIVATIONS] > 0


@pytest.mark.parametrize(
    "family, micro_steps, checkpointing, rank", [("gptj", 1, False, 0), ("gpt2", 2, True, 0), ("llama", 2, False, 16)]
)
def test_planned_memory_agrees_with_the_measured_memory(family, micro_steps, checkpointing, rank):
    """Measured in a separate process. tests/bench/memory.py has more cases, including processes that share a copy."""
    case = {"family": family, "accumulation": micro_steps, "checkpointing": checkpointing, "lora_rank": rank}
    case |= {"width": 256, "layers": 4, "batch": 2, "max_length": 300, "world_size": 1}
    plan, found = memory.expected(case), memory.measure(case)
    for name in ("frozen", "trained", "gradients", "moments"):
        assert plan[name] == pytest.approx(found[name], rel=0.05), name
    # Libraries take 17 MB for themselves, which weigh more in smaller cases.
    assert plan["peak"] == pytest.approx(found["peak"], rel=0.3 if rank else 0.2)
    assert found["peak"] > 1.3 * sum(found[name] for name in ("frozen", "trained", "moments"))  # activations matter


def test_plan_needs_no_weights_and_no_data_and_writes_nothing(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder("gptj").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert train.main(["--plan", "--model", str(folder), "--world_size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 devices with 80 GB" in shown and "float16" in shown and "it fits" in shown
    assert train.main(["--plan", "--model", str(folder), "--device", "0.001", "1", "1", "--precision", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "IT DOES NOT FIT" in shown and "bfloat16" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not torch.distributed.is_initialized()
    for flags in (["--device", "80", "0", "1"], ["--world_size", "0"], ["--model", "nowhere"], ["--shard_size", "3"]):
        assert train.main(["--plan", "--model", str(folder), *flags]) == 2
        assert capsys.readouterr().err.startswith("train.py: error: --")
