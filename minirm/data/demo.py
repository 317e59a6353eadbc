"""The built-in demo: real English comparisons and a tiny GPT-J, made locally without network or GPU.

The English comes from docstrings of Python's standard library, read with `ast`; nothing is imported. The chosen answer
is a docstring's first sentence. The prompt is the signature of the function or class, followed by the beginning of the
rest of the docstring. Rejected answers have the same number of words, so that length reveals nothing:

    shuffled   the same words in another order; the first and last stay, so that capital and full stop reveal nothing
    other      the first sentence of another docstring; few, because so small a model can barely judge content

The model is pre-trained as a language model on the training prompts and their chosen answers, because most of its
layers are frozen afterwards and must have learned something useful before.
"""

import ast
import hashlib
import json
import os
import platform
import random
import re
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from minirm.errors import InputError
from minirm.files import whole_folder

# train.py flags for a model this small; with `--model demo` they replace the recipe's defaults.
DEMO_DEFAULTS = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "warmup_steps": 20,
    "num_train_epochs": 2, "eval_steps": 250, "logging_steps": 20, "max_length": 256,
}  # fmt: skip
SHUFFLES = 2  # per prompt, because more shuffles teach more than more epochs
OTHER = 0.08  # share of the prompts that also get another prompt's answer
EOS, PAD = "<|endoftext|>", "<|pad|>"  # distinct, so that the end of a text is never mistaken for padding
LAYERS = 7  # the smallest number for which the recipe trains two layers: int(0.3 * 7)
WARM_UP_STEPS = 800  # language-model steps of 4 x 128 tokens; no time limit, so that the seed determines the model
EVAL_PROMPTS = 300
MIN_PROMPTS = 1000  # fewer are too little English to learn from
# Folders outside the library, and tests, whose docstrings do not describe code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class DemoPaths(NamedTuple):
    """Paths of the demo: a folder for `from_pretrained`, and two files of {prompt, chosen, rejected, subset}."""

    model: Path
    train: Path
    eval: Path


def build_demo(seed: int = 0) -> DemoPaths:
    """Make the demo's model, tokenizer and comparisons unless they exist, and return their paths.

    They are in demo-<digest of everything that determines the content>, in $MINIRM_CACHE or else in ~/.cache/minirm.
    seed: for the split, the rejected answers and the model. Raises InputError as `make_comparisons` does.
    """
    versions = [platform.python_version(), *(m.__version__.split(".")[0] for m in (torch, transformers))]
    digest = hashlib.sha256(repr([versions, seed, WARM_UP_STEPS]).encode() + Path(__file__).read_bytes()).hexdigest()
    cache = Path(os.environ.get("MINIRM_CACHE", "~/.cache/minirm")).expanduser().absolute()
    folder = cache / f"demo-{digest[:12]}"
    paths = DemoPaths(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")
    if folder.exists():
        return paths
    train, held_out, texts = make_comparisons(seed)
    with whole_folder(folder) as new:
        tokenizer = train_tokenizer(texts)
        warm_up(texts, tokenizer, seed).save_pretrained(new / "model")
        tokenizer.save_pretrained(new / "model")
        for path, rows in ((paths.train, train), (paths.eval, held_out)):
            (new / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def use_demo(args) -> None:
    """Replace `demo` in train.py's flags by the demo's paths."""
    if args.model == "demo" or args.train_data == ["demo"]:
        demo = build_demo(args.seed)
        if args.train_data == ["demo"]:
            args.train_data, args.eval_data = [str(demo.train)], args.eval_data or [str(demo.eval)]
        if args.model == "demo":
            args.model = str(demo.model)


def make_comparisons(seed: int = 0, library: Path | None = None) -> tuple[list[dict], list[dict], list[str]]:
    """Make comparisons from the docstrings below the folder `library` (default: this Python's standard library).

    Returns: training rows, held-out rows, training texts (prompt, newline, chosen answer). Training and held-out rows
    share no prompt and no chosen answer, and each part's rejected answers come from its own sentences.
    Raises InputError if there are too few docstrings.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    entries = sorted(read_docstrings(library).items())
    if len(entries) < MIN_PROMPTS:
        expected = f"expected at least {MIN_PROMPTS} usable docstrings in Python's standard library"
        advice = "use a Python installed with its .py sources, or another --model"
        raise InputError(f"--model demo: {expected}, found {len(entries)} in {library}; {advice}")
    rng = random.Random(seed)
    rng.shuffle(entries)
    held_out, train = entries[:EVAL_PROMPTS], entries[EVAL_PROMPTS:]
    texts = [f"{prompt}\n{sentence}" for sentence, prompt in train]
    return add_rejected(train, rng), add_rejected(held_out, rng), texts


def read_docstrings(library: Path) -> dict[str, str]:
    """{first sentence of a docstring: prompt} for the functions and classes in library/**/*.py, with unique prompts.

    Takes only sentences of 5 to 25 words that begin with a capital and end with a full stop.
    """
    prompts = {}  # keyed by prompt here and by sentence in the result, so that both are unique
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library).parts
        if SKIPPED_FOLDERS & set(place):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # unreadable, or broken on purpose (templates, test data)
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            docstring = " ".join((ast.get_docstring(node) or "").split())
            # A full stop ends the sentence only before a capital, so not in "e.g. this".
            sentence, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", docstring, maxsplit=1)
            inside = node.bases if isinstance(node, ast.ClassDef) else [node.args]
            signature = f"{place[0].removesuffix('.py')}.{node.name}({', '.join(map(ast.unparse, inside))})"
            prompt = "\n".join([signature, *(" ".join(text.split()[:12]) for text in rest)])
            plain = re.fullmatch(r"[A-Z].*\.", sentence) and 5 <= len(sentence.split()) <= 25
            if plain and len(sentence) < 200 and len(prompt) < 200:  # characters; excludes tables and long names
                prompts.setdefault(prompt, sentence)
    return {sentence: prompt for prompt, sentence in prompts.items()}


def add_rejected(entries: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    """Rows of prompt, chosen, rejected and subset (the kind of rejected answer, see the top of this file)."""
    by_words = defaultdict(list)
    for sentence, _ in entries:
        by_words[len(sentence.split())].append(sentence)
    rows = []
    for sentence, prompt in entries:
        first, *inner, last = sentence.split()
        orders = (rng.sample(inner, len(inner)) for _ in range(SHUFFLES))
        subset_of = {" ".join([first, *order, last]): "shuffled" for order in orders}
        if rng.random() < OTHER:
            subset_of[rng.choice(by_words[len(inner) + 2])] = "other"
        subset_of.pop(sentence, None)  # a shuffle may give the chosen answer by chance
        rows += [{"prompt": prompt, "chosen": sentence, "rejected": r, "subset": s} for r, s in subset_of.items()]
    return rows


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 2,048 tokens including EOS and pad. It adds no special tokens to a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": 2048, "special_tokens": [EOS, PAD], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**sizes, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def warm_up(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> GPTJForCausalLM:
    """A small GPT-J after WARM_UP_STEPS of language modelling. Leaves torch's global random state unchanged."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sizes = {"vocab_size": len(tokenizer), "n_positions": 512, "n_embd": 128, "n_layer": LAYERS, "n_head": 4}
    config = GPTJConfig(**sizes, rotary_dim=16, bos_token_id=eos, eos_token_id=eos, pad_token_id=pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTJForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    stream = torch.tensor(tokenizer(EOS.join(texts))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=WARM_UP_STEPS + 1, pct_start=0.1)
    bar = tqdm(range(WARM_UP_STEPS), desc="demo: pre-training a tiny GPT-J (only once)", unit="step")
    for _ in bar:
        # Small batches, because with so few tokens many noisy steps teach more than a few smooth ones.
        starts = torch.randint(len(stream) - 128, (4,), generator=generator).tolist()
        ids = torch.stack([stream[start : start + 128] for start in starts])
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()
