"""Tiny models, tokenizers and data that the tests share. Nothing is downloaded."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

# datasets reads this once, on import. The tests prepare data in a temporary folder.
CACHES = tempfile.TemporaryDirectory(prefix="minirm-tests-")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_DATASETS_CACHE=CACHES.name)

import pytest
import torch
import transformers
from processes import Server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from minirm.checkpoint import checkpoints
from minirm.data.prepare import prepare
from minirm.errors import InputError
from minirm.model import empty_model, load_config, saved_tensors
from minirm.weights import load_weights, stored_weights

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real comparisons, beside a checkout on some machines only
WORDS = ["the", "a", "good", "bad", "answer", "question", "is", "was", "not", "very", "short", "long", "clear", "wrong"]
WORDS += ["right", "helpful", "it", "this", "that", "and", "or"]
NINE, ELEVEN = "a b c d e", "a b c d e f"  # five and six words, nine and eleven characters
# Comparisons to count, and an evaluation to report.
TRAIN = [
    {"prompt": "p", "chosen": ELEVEN, "rejected": NINE},
    {"prompt": "p", "chosen": NINE, "rejected": NINE + " f"},  # the same two answers, the other way round
    {"prompt": "q", "chosen": ELEVEN, "rejected": NINE},
    {"prompt": "r", "chosen": ELEVEN, "rejected": "a b c d f g"},  # as long as each other
    {"prompt": "s", "chosen": NINE, "rejected": NINE},
    {"prompt": "t", "chosen": NINE, "rejected": "one two"},
    {"prompt": "u", "chosen": NINE, "rejected": ELEVEN, "margin": 0},
]
EVAL = [{"prompt": "p", "chosen": NINE, "rejected": ELEVEN}, {"prompt": "v", "chosen": "yes", "rejected": "no"}]
EVALUATION = {
    "step": 1000, "eval_loss": 0.5, "eval_accuracy": 0.71234, "eval_accuracy_low": 0.68, "eval_accuracy_high": 0.742,
    "eval_pairs": 1320, "eval_ties": 2, "eval_length_accuracy": 0.55, "eval_calibration_error": 0.031,
    "eval_reward_mean": -0.25, "eval_reward_std": 1.5,
}  # fmt: skip

torch.set_num_threads(1)  # with tiny models, more threads only take longer

# Tiny configurations. Every family has its own names for the same dimensions.
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
CONFIGS = {
    "gptj": lambda v: transformers.GPTJConfig(vocab_size=v, n_embd=32, n_layer=4, n_head=4, rotary_dim=4, n_positions=1024),
    "gpt2": lambda v: transformers.GPT2Config(vocab_size=v, n_embd=32, n_layer=4, n_head=4),
    "llama": lambda v: transformers.LlamaConfig(vocab_size=v, intermediate_size=64, num_key_value_heads=2, **SMALL),
    "qwen2": lambda v: transformers.Qwen2Config(vocab_size=v, intermediate_size=64, num_key_value_heads=2, **SMALL),
    "gpt_neox": lambda v: transformers.GPTNeoXConfig(vocab_size=v, intermediate_size=64, **SMALL),
    "opt": lambda v: transformers.OPTConfig(
        vocab_size=v, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=1024, **SMALL
    ),
    "mistral": lambda v: transformers.MistralConfig(vocab_size=v, intermediate_size=64, num_key_value_heads=2, sliding_window=16, **SMALL),
    "qwen3": lambda v: transformers.Qwen3Config(vocab_size=v, intermediate_size=64, num_key_value_heads=2, head_dim=8, **SMALL),
    "gemma2": lambda v: transformers.Gemma2Config(
        vocab_size=v, intermediate_size=64, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, **SMALL
    ),
    "phi3": lambda v: transformers.Phi3Config(vocab_size=v, intermediate_size=64, num_key_value_heads=2, **SMALL),
}  # fmt: skip


def make_tokenizer(eos="<|endoftext|>", pad=None, bos=None, texts=None, size=400):
    """A byte-level BPE of a few hundred tokens that can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (eos, pad, bos) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts or [" ".join(WORDS)] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=bos)


def with_template(template, eos="</s>", bos="<s>", more=None):
    """A tokenizer without merges that adds BOS or EOS by itself, as in template "<s> $A </s>"."""
    tokenizer = make_tokenizer(eos=eos, bos=None if bos == eos else bos, pad=more, texts=["x"])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in {eos, bos, more} - {None}}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=list(ids.items()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos, bos_token=bos
    )


def make_model(folder: Path, family: str, seed: int = 0, **changes) -> Path:
    """Save a random causal language model with its tokenizer, as a user would have it."""
    tokenizer = make_tokenizer()
    config = CONFIGS[family](len(tokenizer))
    config.update({"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None, **changes})
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder, seed=0):
    """(RewardModel, config, tokenizer) as train.py makes them: an empty model, filled by name. Both readers must agree.

    The head is the published one: with rewards near zero, errors would be too small to notice.
    """
    config, tokenizer = load_config(str(folder))
    model = empty_model(config)
    read, weights = (
        stored_weights(str(folder), model, seed, True),
        load_weights(str(folder), config, seed, True),
    )
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    assert weights.keys() == dict(model.state_dict()).keys()
    with torch.no_grad():
        for name, target in saved_tensors(model):
            assert target.shape == weights[name].shape, name
            assert torch.equal(read(name), weights[name]) and read(name).dtype == weights[name].dtype, name
            target.copy_(weights[name])
    return model, config, tokenizer


def state(model):
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}


def make_comparisons(count: int, seed: int = 0, per_prompt: int = 1) -> list[dict]:
    """Comparisons of random words, 3 to 30 in a prompt and 5 to 20 in an answer."""
    generator = torch.Generator().manual_seed(seed)

    def text(low, high):
        n = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    rows = []
    while len(rows) < count:
        prompt, best = f"{len(rows)} {text(3, 30)}", text(5, 20)
        rows += [{"prompt": prompt, "chosen": best, "rejected": text(5, 20) + " x"} for _ in range(per_prompt)]
    return rows[:count]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(call, *arguments, **options) -> str:
    """The one-line message of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        list(call(*arguments, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def run_train(*flags, processes: int = 0, env: dict | None = None, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run the real command: `python train.py flags`, under torchrun if `processes` > 0."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    threads = str(max(1, (os.cpu_count() or 1) // max(1, processes)))
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": threads, **(env or {})},
    )


@contextmanager
def mounted(folder: Path, options: str):
    """Mount an in-memory file system with options "size=100k" or "ro". Skips the test if mounting fails."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=False).returncode:
        pytest.skip("needs root, to mount a file system of its own")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


# The tests that depend most on torch and transformers. `-m core` runs them at both ends of the tested ranges.
CORE = ["attention", "estimate", "export", "families", "model", "probe", "shard", "train", "trunk_cache", "versions"]
CORE += ["weights"]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in CORE:
            item.add_marker("core")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Keep runs within a test from drawing curves.png, which takes longer than the run. test_plot.py tests the drawing."""
    with pytest.MonkeyPatch.context() as patch:
        if item.path.name != "test_plot.py":
            patch.setitem(sys.modules, "matplotlib", None)
        return (yield)


def pytest_configure(config):
    config.addinivalue_line("markers", "core: passes at both ends of the tested ranges of torch and transformers")


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def flags(**values) -> list:
    """flags(max_steps=3) -> ["--max_steps", 3]"""
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def rows_without_speeds(output):
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in read_metrics(output)]


def training(output):
    return [row for row in read_metrics(output) if "loss" in row]


def unfinished(finished, output, steps):
    """Copy a finished run and take the copy back to a run that was killed after this many steps."""
    shutil.copytree(finished, output)
    for step, path in checkpoints(output).items():
        if step > steps:
            shutil.rmtree(path)
    for path in [output / "config.json", *output.glob("*.safetensors")]:
        path.unlink()
    record = json.loads((output / "run.json").read_text())
    del record["finished"]
    (output / "run.json").write_text(json.dumps(record))
    return output


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder("llama") -> a folder with that tiny model, made once per session."""
    made = {}

    def get(family: str, **changes) -> Path:
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs train.py in processes that start in milliseconds and can be killed; see processes.py."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def characters():
    """A tokenizer without merges: one token per character."""
    return make_tokenizer(texts=["x"])


@pytest.fixture(scope="session")
def small_data(characters, tmp_path_factory):
    """TRAIN and EVAL, prepared."""
    folder = tmp_path_factory.mktemp("report")
    sources = [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in (("train", TRAIN), ("eval", EVAL))]
    return prepare(characters, *([source] for source in sources), separator="|", cache_dir=folder)


@pytest.fixture(scope="session")
def eight_steps(tmp_path_factory):
    """Flags of a run of 8 steps on a tiny GPT-J, without --output_dir."""
    folder = tmp_path_factory.mktemp("eight_steps")
    return [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", 0.5, "--eval_steps", 3, "--max_steps", 8),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(60))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(5, seed=1))),
        *("--save_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-3, "--warmup_steps", 3),
        *("--head_learning_rate", 1e-3),
    ]


@pytest.fixture(scope="session")
def finished(server, eight_steps, tmp_path_factory):
    """The folder of a finished run with checkpoints 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    run = server.run(*eight_steps, "--save_total_limit", 3, "--output_dir", folder / "run")
    assert run.codes == [0], run.text()
    return folder / "run"


@pytest.fixture(scope="session")
def twelve_steps(tmp_path_factory):
    """Flags of a run of 12 steps on a tiny GPT-J, without --output_dir."""
    folder = tmp_path_factory.mktemp("twelve_steps")
    return [
        *("--model", make_model(folder / "model", "gptj"), "--freeze_ratio", 0.5, "--eval_steps", 3, "--max_steps", 12),
        *("--train_data", write_jsonl(folder / "train.jsonl", make_comparisons(64))),
        *("--eval_data", write_jsonl(folder / "eval.jsonl", make_comparisons(5, seed=1))),
        *("--save_steps", 4, "--logging_steps", 1, "--learning_rate", 1e-3, "--warmup_steps", 3),
    ]
