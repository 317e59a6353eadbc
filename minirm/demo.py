"""The embedded demo: real English comparisons and a tiny GPT-J, made on the spot without network or GPU.

The English is the docstrings of Python's own standard library, read with `ast`; nothing is imported. The prompt is the
signature of a function or class and the beginning of what its docstring goes on to say, the chosen answer is the first
sentence of the docstring, and the rejected answer is a worse one of as many words (see REJECTED), so that length gives
nothing away. The model is warmed up as a language model on the training prompts and their chosen answers, because most
of its layers are frozen afterwards and have to hold something worth reading.
"""

import ast
import hashlib
import json
import os
import platform
import random
import re
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

# Flags of train.py that suit a model this small; with `--model demo` they replace the recipe's defaults.
DEMO_DEFAULTS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 20,
    "num_train_epochs": 2,
    "eval_steps": 250,
    "logging_steps": 20,
    "max_length": 256,
}

# How the rejected answer is made, in shares of all comparisons. The order of words is what a model this small can
# judge; whether an answer belongs to its prompt is nearly beyond it, so that the last two are few.
REJECTED = {
    "shuffled": 0.80,  # the same words in another order, except for the first and last: no capital or full stop inside
    "swapped": 0.12,  # the same words, about half of the inner ones swapped with their neighbour
    "spliced": 0.04,  # the first half of the sentence, continued by the second half of another
    "other": 0.04,  # the first sentence of another docstring
}
TWO_COMPARISONS = 0.8  # share of the prompts that have two rejected answers: more of them teach more than more epochs

EOS, PAD = "<|endoftext|>", "<|pad|>"  # distinct, so that the end of a text is never mistaken for padding
LAYERS = 7  # the fewest of which the recipe's 30 % trains two, int(0.3 * 7)
WARMUP_STEPS = 800
EVAL_PROMPTS = 300
MIN_PROMPTS = 1000  # below this there is too little English for the model to learn from

# No part of the library, or tests, whose docstrings are not about what the code does.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class DemoPaths(NamedTuple):
    """Where the demo lies: a folder for `from_pretrained`, and two files of {prompt, chosen, rejected, subset}."""

    model: Path
    train: Path
    eval: Path


def build_demo(
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    warmup_steps: int = WARMUP_STEPS,
) -> DemoPaths:
    """Makes the demo's model, tokenizer and comparisons in a cache folder; if they are there already, only says where.

    Args:
        seed: of the split, the rejected answers, and the model.
        cache_dir: folder to make them in: a new one, an empty one or a finished demo. Default: demo-<digest> in
            $MINIRM_CACHE, or else in ~/.cache/minirm. The digest covers all that determines the content.
        progress: show a progress bar on stderr.
        warmup_steps: optimizer steps of language modelling, each on 4 x 128 tokens.
    Returns: DemoPaths(model, train, eval).
    Raises ValueError if the folder holds something else, or if the standard library's sources are not there or have no
    docstrings.
    """
    if cache_dir is None:
        majors = [module.__version__.split(".")[0] for module in (torch, transformers)]
        determines = (
            repr([platform.python_version(), majors, seed, warmup_steps]).encode() + Path(__file__).read_bytes()
        )
        digest = hashlib.sha256(determines).hexdigest()
        cache_dir = Path(os.environ.get("MINIRM_CACHE", "~/.cache/minirm")) / f"demo-{digest[:12]}"
    folder = Path(cache_dir).expanduser().absolute()
    paths = DemoPaths(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")
    occupied = folder.exists() and any(folder.iterdir())  # asked first: another process may complete it in between
    if paths.model.is_dir():
        return paths
    if occupied:
        raise ValueError(f"{folder} holds something else than a demo: empty it or name another folder")
    train, held_out, texts = make_comparisons(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed at the end: a build that is killed leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(prefix=folder.name + ".partial-", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        for path, rows in ((paths.train, train), (paths.eval, held_out)):
            (new / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokenizer = train_tokenizer(texts)
        model = warm_up(texts, tokenizer, warmup_steps, seed, progress)
        tokenizer.save_pretrained(new / paths.model.name)
        model.save_pretrained(new / paths.model.name)
        try:
            new.rename(folder)
        except OSError:  # another process built the same demo meanwhile and was first: its one is as good
            if not paths.model.is_dir():
                raise
    return paths


def make_comparisons(seed: int = 0, library: str | Path | None = None) -> tuple[list[dict], list[dict], list[str]]:
    """The comparisons, made from the docstrings below the folder `library` (default: this Python's standard library).

    Returns: train rows, held-out rows, training texts (prompt, newline, chosen answer). The two sides share no prompt
    and no chosen answer, and their rejected answers are made of their own sentences alone.
    Raises ValueError if there are too few docstrings.
    """
    root = Path(library or sysconfig.get_paths()["stdlib"])
    entries = sorted(read_docstrings(root).items())
    if len(entries) < MIN_PROMPTS:
        raise ValueError(
            f"--model demo is made from the docstrings of Python's standard library, but {root} has {len(entries)} that "
            f"can be used and {MIN_PROMPTS} are needed: use a Python installed with its .py sources, or another --model"
        )
    rng = random.Random(seed)
    rng.shuffle(entries)
    held_out, train = entries[:EVAL_PROMPTS], entries[EVAL_PROMPTS:]
    texts = [f"{prompt}\n{sentence}" for sentence, prompt in train]
    return _add_rejected(train, rng), _add_rejected(held_out, rng), texts


def read_docstrings(root: Path) -> dict[str, str]:
    """{first sentence of a docstring: prompt} of the functions and classes in root/**/*.py, no prompt twice.

    Only sentences of 5 to 25 words that begin with a capital and end with a full stop are taken.
    """
    prompts = {}  # by prompt first, then by sentence: both become unique
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # broken on purpose (templates, test data) or unreadable
            continue
        for signature, docstring in _documented(tree, path.parent.name if path.stem == "__init__" else path.stem):
            # The first full stop that a capital follows ends the sentence: "e.g. this" does not.
            sentence, *rest = re.split(r"(?<=[.!?])\s+(?=[A-Z])", docstring, maxsplit=1)
            prompt = "\n".join([signature, *(" ".join(text.split()[:12]) for text in rest)])
            plain = re.fullmatch(r"[A-Z].*\.", sentence) and 5 <= len(sentence.split()) <= 25
            if plain and len(sentence) < 200 and len(prompt) < 200:  # characters: it keeps out tables and long names
                prompts.setdefault(prompt, sentence)
    return {sentence: prompt for prompt, sentence in prompts.items()}


def _documented(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring on one line) of each function and class inside `node`; `owner` is the name of node."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _documented(child, owner)  # inside an if or a try
            continue
        if isinstance(child, ast.ClassDef):
            arguments = [base.id for base in child.bases if isinstance(base, ast.Name)]
        else:
            arguments = [argument.arg for argument in child.args.args if argument.arg != "self"]
        docstring = " ".join((ast.get_docstring(child) or "").split())
        if docstring:
            yield f"{owner}.{child.name}({', '.join(arguments[:8])})", docstring
        yield from _documented(child, child.name)


def _add_rejected(entries: list[tuple[str, str]], rng: random.Random) -> list[dict]:
    by_words = defaultdict(list)
    for sentence, _ in entries:
        by_words[len(sentence.split())].append(sentence)
    rows = []
    for sentence, prompt in entries:
        taken = {sentence}  # never equal to the chosen answer, nor twice the same comparison
        for _ in range(1 + (rng.random() < TWO_COMPARISONS)):
            subset = rng.choices(list(REJECTED), list(REJECTED.values()))[0]
            tries = (_worse(subset, sentence, by_words, rng) for _ in range(8))
            rejected = next((answer for answer in tries if answer not in taken), None)
            if rejected is not None:
                taken.add(rejected)
                rows.append({"prompt": prompt, "chosen": sentence, "rejected": rejected, "subset": subset})
    return rows


def _worse(subset: str, sentence: str, by_words: dict[int, list[str]], rng: random.Random) -> str:
    """A rejected answer with as many words as `sentence`; see REJECTED. May come out the same by chance."""
    first, *inner, last = sentence.split()
    if subset == "shuffled":
        # Of some random orders the one that keeps the fewest neighbours: a short sentence would often come out right.
        neighbours = set(pairwise([first, *inner, last]))
        orders = [[first, *rng.sample(inner, len(inner)), last] for _ in range(8)]
        return " ".join(min(orders, key=lambda order: sum(pair in neighbours for pair in pairwise(order))))
    if subset == "swapped":
        for i in rng.sample(range(0, len(inner) - 1, 2), max(1, len(inner) // 4)):
            inner[i], inner[i + 1] = inner[i + 1], inner[i]
        return " ".join([first, *inner, last])
    words, other = sentence.split(), rng.choice(by_words[len(inner) + 2]).split()
    cut = len(words) // 2 if subset == "spliced" else 0
    return " ".join(words[:cut] + other[cut:])


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 2,048 tokens, EOS and pad included. It adds no token of its own to a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def warm_up(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 0, progress: bool = True
) -> GPTJForCausalLM:
    """A small GPT-J after `steps` optimizer steps of language modelling on `texts`, each on 4 rows of 128 tokens.

    A number of steps and not of seconds: the same seed gives the same model on a slower machine. The state of torch's
    global random numbers is left as it was.
    """
    rows, context = 4, 128  # small batches: with so few tokens to see, more steps teach more than smoother ones
    rng = random.Random(seed)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=128,
        n_layer=LAYERS,
        n_head=4,
        rotary_dim=16,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTJForCausalLM(config)
    documents = tokenizer([text + EOS for text in texts])["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1, pct_start=0.1)
    bar = tqdm(range(steps), desc="demo: teaching a tiny GPT-J English, once", unit="step", disable=not progress)
    stream = []  # token ids of the texts, one after the other, in another order each time around
    for _ in bar:
        while len(stream) < rows * context:
            rng.shuffle(documents)
            stream += [token for document in documents for token in document]
        ids = torch.tensor(stream[: rows * context]).view(rows, context)
        del stream[: rows * context]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()
