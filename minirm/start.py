"""Start a run: read its inputs, check them, and load the model's weights into its processes."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from minirm import run, shard
from minirm.attention import use_sdpa
from minirm.data.demo import use_demo
from minirm.data.prepare import Prepared, prepare, totals
from minirm.data.schemas import renames
from minirm.errors import refusing
from minirm.freeze import Frozen, find_blocks, freeze_bottom_layers
from minirm.lora import add_lora, init_lora
from minirm.model import RewardModel, check_fit, empty_model, load_config
from minirm.probe import choose_layout
from minirm.trunk_cache import TrunkCache, open_folder, probe_trunk_cache
from minirm.weights import brings_head, choose_precision, load_weights, stored_weights

HEAD_RATE = 10  # multiple of --learning_rate: a new head has further to go than pre-trained layers


class Inputs(NamedTuple):
    """Everything a run needs before weights are loaded."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    model: RewardModel  # on the meta device: shapes without memory
    frozen: Frozen
    data: Prepared
    layout: str  # row layout: "shared" or "separate"
    not_shared: str | None  # why shared rows were refused, if they were requested
    extras: int | None  # see `probe_trunk_cache`
    why: str  # reason for the precision that --precision auto chose


def read_inputs(args: Namespace, processes: shard.Processes) -> Inputs:
    """Read all inputs, freeze the empty model, replace "auto" and None in `args`. Raises InputError on every rank."""
    shard.on_first_process(processes.patient, run.check_output, Path(args.output_dir), args.resume_from_checkpoint)
    with shard.first_process_first(processes.patient):
        use_demo(args)
        config, tokenizer = load_config(args.model, args.chat_template)
        why = ""
        if args.precision == "auto":
            device = processes.device.type
            has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision, why = choose_precision(args.model, device, has_bf16)
        if args.head_learning_rate is None:
            like_the_rest = args.loss == "trlx" or brings_head(args.model)
            args.head_learning_rate = args.learning_rate * (1 if like_the_rest else HEAD_RATE)
        model = empty_model(config)
        use_sdpa(model.trunk)
        with refusing(f"--model {args.model}: its layers cannot be frozen", ValueError):
            frozen = freeze_bottom_layers(model, args.freeze_ratio, embeddings=not args.train_embeddings)
            add_lora(model, args.lora_rank, args.lora_alpha, frozen)
        data = prepare(
            tokenizer, args.train_data, args.eval_data, eval_fraction=args.eval_fraction, separator=args.separator,
            max_length=args.max_length, overlong=args.overlong, seed=args.seed, columns=renames(args.columns),
        )  # fmt: skip
        check_fit(args, config, totals(data.report["train"] + data.report["eval"]))
    # Shared rows are used only if they give identical results; a small model of the same architecture decides.
    layout, not_shared = choose_layout(config, args.model, args.row_layout, args.max_length)
    extras = probe_trunk_cache(args, config, frozen) if args.cache_trunk else None
    return Inputs(config, tokenizer, model, frozen, data, layout, not_shared, extras, why)


def load_model(args: Namespace, inputs: Inputs, processes: shard.Processes) -> TrunkCache | None:
    """Shard the empty model, then let every rank load its own shard. Returns the --cache_trunk cache."""
    config, model, frozen, dtype = inputs.config, inputs.model, inputs.frozen, shard.DTYPES[args.precision]
    if args.gradient_checkpointing:
        shard.checkpoint_trained_blocks(model)
    if args.compile:  # cached frozen blocks are skipped, so do not compile them
        for block in find_blocks(model)[1][len(frozen.layers) if args.cache_trunk else 0 :]:
            block.compile(dynamic=True)
    shard.cast_frozen(model, dtype)
    shard.shard(model, processes.mesh, dtype, args.cpu_offload)
    with shard.first_process_first(processes.patient):  # one process per machine downloads, if necessary
        read = stored_weights(args.model, model, args.seed, args.loss == "trlx")
    load = partial(load_weights, args.model, config, args.seed, args.loss == "trlx")
    read = shard.fill(model, processes.device, args.cpu_offload, processes.patient, read, load)
    init_lora(model, args.seed)
    if not args.cache_trunk:
        return None
    about = (config, inputs.tokenizer, read, frozen, inputs.data.report, inputs.layout, processes.device.type)
    folder = shard.on_first_process(processes.patient, open_folder, args, *about)
    return TrunkCache(list(find_blocks(model)[1])[: len(frozen.layers)], inputs.extras, dtype, folder)
