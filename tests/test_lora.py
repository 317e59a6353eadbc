"""LoRA: adapters against a slow reference, on any number of processes, resumed, merged.

Run: pytest tests/test_lora.py. Needs no network and no GPU.
"""

import json

import pytest
import torch
from conftest import CONFIGS, flags, make_comparisons, read_metrics, refusal, write_jsonl
from processes import COLLECTIVES
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import train
from minirm import score
from minirm.freeze import freeze_bottom_layers
from minirm.lora import PREFIX, Adapter, add_lora, init_lora, merge, without_adapter
from minirm.model import RewardModel
from minirm.report.lines import freeze_line

QUICK = ["--max_length", 64, "--learning_rate", 1e-2, "--warmup_steps", 0]


def plain(family):
    torch.manual_seed(0)
    config = CONFIGS[family](100)
    config.update({"pad_token_id": None})
    return RewardModel(AutoModel.from_config(config, dtype=torch.float32)).eval()


def adapted(family, rank=4, alpha=8.0, ratio=0.5):
    """A model with random adapters, including B."""
    model = plain(family)
    add_lora(model, rank, alpha, freeze_bottom_layers(model, ratio))
    init_lora(model, 0)
    for adapter in model.lora.values():
        nn.init.normal_(adapter.B, std=0.2)
    return model


def test_an_adapter_and_its_gradients_agree_with_a_slow_reference():
    """y_o = sum_i W_oi x_i + alpha / r sum_k B_ok sum_i A_ki x_i, and by hand the gradients of sum_o g_o y_o."""
    torch.manual_seed(0)
    linear, adapter = nn.Linear(3, 5, bias=False), Adapter(3, 5, 2, 1.5, transposed=False)
    nn.init.normal_(adapter.A), nn.init.normal_(adapter.B)
    linear.register_forward_hook(adapter.hook)
    x, g = torch.randn(3), torch.randn(5)
    y = linear(x)
    (y * g).sum().backward()
    W, A, B = linear.weight.tolist(), adapter.A.tolist(), adapter.B.tolist()
    Ax = [sum(A[k][i] * x[i].item() for i in range(3)) for k in range(2)]
    for o in range(5):
        wanted = sum(W[o][i] * x[i].item() for i in range(3)) + 1.5 * sum(B[o][k] * Ax[k] for k in range(2))
        assert y[o].item() == pytest.approx(wanted, abs=1e-5)
        assert adapter.B.grad[o].tolist() == pytest.approx([1.5 * g[o].item() * Ax[k] for k in range(2)], abs=1e-5)
    for k in range(2):
        gB = sum(g[o].item() * B[o][k] for o in range(5))
        assert adapter.A.grad[k].tolist() == pytest.approx([1.5 * gB * x[i].item() for i in range(3)], abs=1e-5)


def test_at_full_rank_the_first_step_has_the_direction_of_full_training():
    """With B = 0, a step of B alone changes W by -rate scale^2 G A^T A: along the gradient G if A^T A = 1."""
    full, ids = plain("llama"), torch.arange(24).view(2, 12)
    freeze_bottom_layers(full, 0.5)
    weigh = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    (full(ids) * weigh).sum().backward()
    model = plain("llama")
    add_lora(model, 96, 96, freeze_bottom_layers(model, 0.5))  # no layer is wider
    for adapter in model.lora.values():
        nn.init.zeros_(adapter.B), nn.init.orthogonal_(adapter.A)
    (model(ids) * weigh).sum().backward()
    for key, adapter in model.lora.items():
        step = -(adapter.B.grad @ adapter.A)
        wanted = -full.get_submodule(key.replace("/", ".")).weight.grad
        torch.testing.assert_close(step, wanted, atol=1e-5, rtol=1e-4, msg=key)


def test_matrices_without_an_adapter_are_named():
    """Only nn.Linear gets adapters, so experts stored in one tensor and their router get none."""
    config = CONFIG_MAPPING["mixtral"](
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = RewardModel(AutoModel.from_config(config))
    frozen = freeze_bottom_layers(model, 0.5)
    assert without_adapter(model, frozen) == []
    add_lora(model, 2, 4, frozen)
    assert without_adapter(model, frozen) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    assert "also frozen, because they have no adapters: mlp.experts.down_proj, mlp" in freeze_line(model, frozen)
    with torch.device("meta"):
        model = plain("llama")
    frozen = freeze_bottom_layers(model, 0.5)
    add_lora(model, 2, 4, frozen)
    assert "adapters" not in freeze_line(model, frozen)


@pytest.mark.parametrize("family", CONFIGS)
def test_merging_keeps_the_rewards_and_every_adapter_gets_a_gradient(family):
    """Two of four blocks train. An adapter would get no gradient if its module's weight were used without a call."""
    model, ids = adapted(family), torch.arange(24).view(2, 12)
    rewards = model(ids)
    rewards.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in model.state_dict() if name.startswith(PREFIX)} | {"score.weight"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    other = plain(family)
    other.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith(PREFIX)})
    assert (other(ids) - rewards).abs().max() > 1e-3
    other.load_state_dict(merge(model, model.state_dict()))
    torch.testing.assert_close(other(ids), rewards.detach(), atol=1e-5, rtol=1e-5)


def test_models_that_cannot_be_adapted_are_refused():
    model = plain("llama")
    frozen = freeze_bottom_layers(model, 0.5)
    first, last = model.trunk.layers[2].mlp, model.trunk.layers[3].mlp
    first.up_proj.weight = last.up_proj.weight
    with pytest.raises(ValueError, match="shares its weight"):
        add_lora(model, 4, 8, frozen)
    with pytest.raises(ValueError, match="no linear layers"):
        add_lora(model, 4, 8, freeze_bottom_layers(model, 1))
    assert "--train_embeddings cannot be combined" in refusal(
        train.parse_args, ["--lora_rank", "4", "--train_embeddings"]
    )
    assert "--lora_alpha must be positive" in refusal(train.parse_args, ["--lora_rank", "4", "--lora_alpha", "0"])


def test_lora_takes_the_same_steps_on_any_mesh_cached_and_resumed(server, model_folder, tmp_path):
    """1, 2, 4 and 2 x 2 processes agree, also with a cache and gradient checkpointing. A resumed run is bitwise equal."""
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(16))
    held_out = write_jsonl(tmp_path / "eval.jsonl", make_comparisons(4, seed=1))

    def run(name, *more, world=1, steps=4, patch=""):
        given = ["--model", model_folder("llama"), "--train_data", data, "--eval_data", held_out, *QUICK]
        given += ["--output_dir", tmp_path / name, "--lora_rank", 4, "--logging_steps", 1]
        given += ["--freeze_ratio", 0.5, "--gradient_accumulation_steps", 4 // world]
        done = server.run(*given, "--max_steps", steps, "--keep", "last", *more, world=world, patch=patch)
        assert done.codes == [0] * world, done.text()[-3000:]
        return [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]

    sharded = "import functools; train.shard.shard = functools.partial(train.shard.shard, frozen_share=0)"
    wanted = run("one")
    assert len(wanted) == 4 and wanted[0] != wanted[3]
    assert run("two", world=2) == pytest.approx(wanted, abs=1e-5)
    assert run("sharded", world=2, patch=sharded) == pytest.approx(wanted, abs=1e-5)
    assert run("hybrid", "--shard_size", 2, world=4) == pytest.approx(wanted, abs=1e-5)
    assert run("four", world=4) == pytest.approx(wanted, abs=1e-5)
    cached = run("cached", "--cache_trunk", tmp_path / "cache", "--gradient_checkpointing")
    assert cached == pytest.approx(wanted, abs=1e-5)
    run("resumed", steps=2)
    assert run("resumed") == wanted
    one, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in one.items())
    base = load_file(model_folder("llama") / "model.safetensors")
    changed = {n for n, t in one.items() if n in base and not torch.equal(t[: len(base[n])], base[n])}
    assert len(changed) == 2 * 7 and all(n.startswith(("model.layers.2.", "model.layers.3.")) for n in changed)
    [path] = (tmp_path / "one" / "checkpoint-4").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        sizes = [file.get_tensor(key).numel() for key in file.keys() if not key.endswith(".step")]  # noqa: SIM118
    # A layer: q, o 32 + 32; k, v 32 + 16; gate, up, down 32 + 64: 512 x rank 4 / layer; the head 32.
    assert 4 * sum(sizes) == 12 * (2 * 4 * (2 * 64 + 2 * 48 + 3 * 96) + 32)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    row = [row for row in read_metrics(tmp_path / "one") if "eval_loss" in row][-1]
    assert loaded.config.mean == pytest.approx(row["eval_reward_mean"])
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    adapter = {path.name for path in (tmp_path / "one" / "adapter").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}


def test_adapters_need_no_additional_collectives(server, model_folder, tmp_path):
    """With 14 adapted matrices, a step has as many collectives as one that trains the head alone: they share its collectives."""
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))

    def collectives(name, steps, *more):
        given = ["--model", model_folder("llama"), "--train_data", data, "--eval_data", data, "--max_steps", steps]
        given += ["--output_dir", tmp_path / name, "--max_length", 64, "--eval_steps", 0, "--save_steps", 0, *more]
        run = server.run(*given, "--logging_steps", 0, world=2, patch=COLLECTIVES)
        assert run.codes == [0, 0], run.text()[-3000:]
        return len(json.loads((tmp_path / name / "collectives-0.json").read_text()))

    lora, head = flags(lora_rank=4, freeze_ratio=0.5), flags(freeze_ratio=1)
    of_a_step = lambda name, more: collectives(f"{name}3", 3, *more) - collectives(f"{name}1", 1, *more)
    assert of_a_step("lora", lora) == of_a_step("head", head) > 0


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_the_best_adapters_are_exported(server, model_folder, tmp_path, precision):
    """Held-out answers are preferred the other way round, so the best evaluation is not the last. The exported model has
    its mean reward."""
    rows = make_comparisons(8)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    train_data, data = (write_jsonl(tmp_path / f"{n}.jsonl", of) for n, of in (("train", rows), ("eval", swapped)))
    given = flags(model=model_folder("llama"), train_data=train_data, eval_data=data, output_dir=tmp_path / "out")
    given += [*QUICK, *flags(learning_rate=0.01, lora_rank=4, max_steps=8, eval_steps=1, freeze_ratio=0.5)]
    run = server.run(*given, "--precision", precision)
    assert run.codes == [0], run.text()[-3000:]
    rows = [row for row in read_metrics(tmp_path / "out") if "eval_loss" in row][1:]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["step"] < 8
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert loaded.config.mean == pytest.approx(best["eval_reward_mean"])
    scores = tmp_path / "scores.jsonl"
    given = ["--model", tmp_path / "out", "--data", data, "--output", scores, "--precision", precision]
    assert score.main(list(map(str, given))) == 0
    rewards = [row[side] for row in map(json.loads, scores.read_text().splitlines()) for side in ("chosen", "rejected")]
    spread = max(1.0, best["eval_reward_std"])
    assert sum(rewards) / len(rewards) == pytest.approx(best["eval_reward_mean"], abs=0.05 * spread)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_the_adapter_and_gives_the_same_rewards(server, model_folder, tmp_path, family):
    peft = pytest.importorskip("peft")
    data = write_jsonl(tmp_path / "x.jsonl", make_comparisons(8))
    given = flags(model=model_folder(family), train_data=data, eval_data=data, output_dir=tmp_path / "out")
    run = server.run(*given, *QUICK, *flags(lora_rank=4, max_steps=2, keep="last", save_steps=0))
    assert run.codes == [0], run.text()[-3000:]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(family), num_labels=1)
    base.config.pad_token_id = merged.config.pad_token_id  # a token that does not occur in the texts
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
