"""Freeze the bottom layers of a decoder: they keep what they learned in pre-training and need no backward pass."""

import re
from typing import NamedTuple

from torch import nn

# Names of the block list in decoders: transformer.h (gpt2, gptj, bloom, falcon), model.layers (llama and most others),
# gpt_neox.layers, model.decoder.layers (opt), transformer.blocks (mpt, dbrx), backbone.layers (mamba).
BLOCK_LIST_NAMES = ("h", "layers", "blocks", "layer", "block")
# Modules below the first block: embeddings and their norm (bloom), projections (opt), per-layer inputs (gemma3n,
# gemma4). The pattern excludes gemma3n's altup_unembed_projections, which follow the last block.
BELOW = r"(?<!un)emb|^project_in$|^per_layer_|^altup_projections$"


class Frozen(NamedTuple):
    layers: list[int]  # indices into the block list
    parameters: list[str]  # names, as in model.named_parameters()
    total_layers: int


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find any decoder's list of transformer blocks, and its name inside `model` ("transformer.h").

    Raises ValueError, with the names expected and found, if there is no such list or more than one (encoder-decoders).
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name in lists if name.rpartition(".")[2] in BLOCK_LIST_NAMES and len(lists[name])]
    # A list inside a block, such as an expert's layers, is not the block list.
    found = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    if len(found) != 1:
        names = f"{', '.join(BLOCK_LIST_NAMES[:-1])} or {BLOCK_LIST_NAMES[-1]}"
        got = f"found {' and '.join(found) or 'none'} (its module lists: {', '.join(list(lists)[:8]) or 'none'})"
        raise ValueError(f"{type(model).__name__}: expected one nn.ModuleList of decoder blocks called {names}; {got}")
    return found[0], lists[found[0]]


def trained_layer_count(layers: int, ratio: float) -> int:
    """int((1 - ratio) * layers), but at least one; 0 for ratio 1, which trains only the head.

    The published code uses `layers[:-int(0.3 * n)]`, which freezes nothing if the product is below one.
    Raises ValueError if ratio is outside 0..1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"freeze ratio must lie in 0..1, got {ratio}")
    return 0 if ratio == 1 else max(1, int((1 - ratio) * layers))


def freeze_bottom_layers(model: nn.Module, ratio: float = 0.7, embeddings: bool = True) -> Frozen:
    """Set requires_grad to False, in place, for the bottom `ratio` of the blocks and the embeddings below them.

    Args:
        model: any decoder: bare, with a language-model head, or a RewardModel.
        ratio: share of the blocks; `trained_layer_count` of them stay trainable. 0 freezes nothing; 1 freezes the
            whole trunk including the final norm, so that only a head outside it is trained.
        embeddings: False leaves them trainable, as in the published code; backward then crosses every frozen block.
    Raises ValueError as `find_blocks` does, if ratio is outside 0..1, and if frozen and trained blocks share weights.
    """
    name, blocks = find_blocks(model)
    decoder = model.get_submodule(name.rpartition(".")[0])
    frozen_layers = len(blocks) - trained_layer_count(len(blocks), ratio)
    # Everything that feeds the first block, such as token and position embeddings. A single trainable parameter there
    # would make the backward pass cross every frozen block.
    inputs = [m for key, m in decoder.named_children() if isinstance(m, nn.Embedding) or re.search(BELOW, key)]
    below = {p for module in inputs for p in module.parameters()}
    frozen = {*blocks[:frozen_layers].parameters()} if ratio < 1 else {*decoder.parameters()} - below
    if embeddings and ratio > 0:
        frozen |= below
    if frozen & {*blocks[frozen_layers:].parameters()}:
        what = f"layers 0-{frozen_layers - 1} of {name} share weights with the layers above"
        advice = "use a ratio of 0 or 1"
        raise ValueError(f"{type(model).__name__}: {what} and cannot be frozen without them; {advice}")
    for p in frozen:
        p.requires_grad_(False)
    return Frozen(list(range(frozen_layers)), [n for n, p in model.named_parameters() if p in frozen], len(blocks))
