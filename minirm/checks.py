"""Check the flags of train.py before anything is read: their ranges, what excludes what, what has no effect."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import transformers
from packaging.specifiers import SpecifierSet

from minirm import TESTED
from minirm.errors import InputError
from minirm.report.lines import print0


def check_flags(args: Namespace, parser: ArgumentParser, words: Sequence[str]) -> None:
    """Raise InputError for values out of range and flags that exclude each other; warn about flags without effect.

    words: the command line, which tells given flags from defaults. Sets args.lora_alpha if it was not given.
    """
    # fmt: off
    for what, holds, names in (
        ("be positive", lambda value: 0 < value < math.inf,
         "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_length world_size device"),
        ("not be negative", lambda value: 0 <= value < math.inf,
         """learning_rate head_learning_rate warmup_steps weight_decay max_grad_norm eval_steps logging_steps save_steps
         save_total_limit shard_size center_rewards_coefficient margin_scale profile lora_rank
         micro_batch_tokens"""),
        ("lie in 0..1", lambda value: 0 <= value <= 1, "freeze_ratio"),
        ("lie in 0..2**63 - 1", lambda value: 0 <= value < 2**63, "seed"),
    ):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not all(map(holds, value if isinstance(value, list) else [value])):
                raise InputError(f"--{name} must {what}, got {value}")
    # fmt: on
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    elif not 0 < args.lora_alpha < math.inf:
        raise InputError(f"--lora_alpha must be positive, got {args.lora_alpha}")
    if args.lora_rank and args.train_embeddings:
        why = "--lora_rank, which trains only adapters in the blocks"
        raise InputError(f"--train_embeddings cannot be combined with {why}; omit one of them")
    if args.loss == "trlx":  # must stay as published
        for name in ("pair_weight", "center_rewards_coefficient", "margin_scale"):
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name} cannot be combined with --loss trlx; omit it, or choose another --loss")
    for name in set(args.report_to) - {"none"}:
        if not getattr(find_spec(name), "origin", None):  # None: only a folder with that name
            raise InputError(f"--report_to {name}: {name} is not installed; run: pip install {name}")
    idle = {
        "--eval_fraction": args.eval_data, "--num_train_epochs": args.max_steps >= 0,
        "--warmup_steps": args.lr_scheduler_type == "constant", "--train_embeddings": args.freeze_ratio == 0,
        "--keep": args.eval_steps == 0, "--cpu_offload": not torch.cuda.is_available() and not args.plan,
        "--lora_alpha": args.lora_rank == 0, "--world_size": not args.plan, "--device": not args.plan,
    }  # fmt: skip
    given = {word.partition("=")[0] for word in words}
    for flag in [flag for flag, without_effect in idle.items() if without_effect and flag in given]:
        beside = "without a GPU" if flag == "--cpu_offload" else "in combination with the other flags"
        print0(f"train.py: warning: {flag} has no effect {beside}")


def warn_untested() -> None:
    """Warn about installed versions outside the tested ranges. The run continues."""
    for module in (torch, transformers):
        name, version = module.__name__, module.__version__
        if not SpecifierSet(TESTED[name]).contains(version, prereleases=True):
            print0(f"train.py: warning: {name} {version} is installed, but minirm is tested with {name}{TESTED[name]}")
