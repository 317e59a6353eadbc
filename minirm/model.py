"""The reward model: any transformers decoder as trunk and a linear head; loading it, and saving it for others."""

import copy
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto import modeling_auto as auto
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from minirm.data import set_chat_template
from minirm.sources import InputError, refusing

PAD_TOKEN = "<|pad|>"  # added where the tokenizer has no pad token of its own
SAFETENSORS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
# Buffers that older versions of transformers stored with the weights: causal masks, rotary frequencies, positions.
OLD_BUFFERS = r"\b(attn|attention)\.(masked_)?bias$|\brotary_emb\.inv_freq$|\bposition_ids$"


class RewardModel(nn.Module):
    """A decoder (of `AutoModel`) and a head that gives every token a reward.

    It knows nothing of ranks, precision or freezing: those are applied from outside.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(width(trunk.config), 1, bias=False, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask=None, position_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids: [R, L] int64; attention_mask: what the trunk takes -> rewards [R, L] in fp32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state  # [R, L, H]
        # fp32 whatever autocast says: half-precision rewards would tie by accident. A clone: FSDP warns of views.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1).clone()


def width(config) -> int:
    """Numbers per token that come out of the trunk. OPT-350m projects its hidden states down once more."""
    config = config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def init_head(hidden_size: int, seed: int) -> Tensor:
    """[1, H] fp32, normal with std 1/sqrt(H + 1): rewards of unit size (Stiennon et al., arXiv 2009.01325)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)


def load_config(name: str, chat_template: str | None = None):
    """(config, tokenizer) of a model folder or name, ready for a reward model: one label, a pad token that is not EOS.

    chat_template: a file, in place of the tokenizer's own.
    Looks at no weights. Raises InputError for what minirm cannot train, or others could not load afterwards.
    """
    # Errors here are of many kinds: huggingface_hub's, each tokenizer's, whatever a wrong number in a config leads to.
    with refusing(f"--model {name}: no such model folder or name, or not one for transformers"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # False: else it asks on the terminal
    kind = type(config)
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    if config.is_encoder_decoder or not causal:
        raise InputError(f"--model {name}: {config.model_type} is not a decoder (a causal language model)")
    if kind not in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"--model {name}: transformers has no sequence-classification class for {config.model_type}, so nothing could "
            "load the trained reward model; choose another model family"
        )
    if config.get_text_config() is not config:
        raise InputError(f"--model {name}: {config.model_type} is more than a language model; give its text model")
    theirs = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    with refusing(f"--model {name}: transformers cannot make a model of its config.json"), torch.device("meta"):
        names = theirs._from_config(copy.deepcopy(config)).state_dict()
    if heads := {n for n in names if not n.startswith(theirs.base_model_prefix + ".")} - {"score.weight"}:
        raise InputError(
            f"--model {name}: {theirs.__name__} is more than a linear head on the last token ({', '.join(sorted(heads))}), "
            "so it could not load the trained reward model; choose another model family"
        )
    with refusing(f"--model {name}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no EOS token, at which the reward is read; set eos_token")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    set_chat_template(tokenizer, chat_template)
    # The tokenizer's, since a config may name another EOS, which then could be the pad token.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Many models have more embeddings than tokens, so that a new pad token needs no new one.
    config.vocab_size = max(config.vocab_size, tokenizer.pad_token_id + 1)
    # num_labels is derived from id2label; without problem_type the pipeline and vLLM apply a sigmoid.
    config.id2label, config.label2id, config.problem_type = {0: "LABEL_0"}, {"LABEL_0": 0}, "regression"
    return config, tokenizer


def check_fit(args, config, counts: dict) -> None:
    """Raises InputError if ids or lengths of the data are beyond what the model has. counts: data.totals of all of it."""
    if (largest := counts["largest id"]) >= config.vocab_size:
        raise InputError(
            f"--model {args.model}: its tokenizer gives id {largest}, but it has {config.vocab_size} embeddings; the two do "
            "not belong together"
        )
    if counts["longest"] > (positions := getattr(config, "max_position_embeddings", math.inf)):
        raise InputError(f"--max_length {args.max_length}: {args.model} has {positions} positions; choose no more")


def stored_weights(name: str, config, model: RewardModel, seed: int) -> Callable[..., Tensor] | None:
    """read(name in RewardModel, start=0, stop=None) -> these rows of a tensor, and nothing else, from safetensors files.

    None where stored and wanted tensors do not agree one to one, by name and shape, a grown vocabulary aside: .bin files,
    what transformers converts while it loads, and whatever is wrong. All that is for `load_weights`.
    """
    trunk, prefix, places = model.trunk, model.trunk.base_model_prefix + ".", {}
    try:  # what is wrong here load_weights will say
        stored = AutoConfig.from_pretrained(name)
        files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SAFETENSORS]
        for path in files[:1] if files[0] else get_checkpoint_shard_files(name, files[1])[0]:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - no dict
                    places[key.removeprefix(prefix)] = path, key, file.get_slice(key).get_shape()
    except Exception:  # noqa: BLE001
        return None
    wanted = {key.removeprefix("trunk."): tensor for key, tensor in saved_tensors(model)}
    shapes = {key: list(tensor.shape) for key, tensor in wanted.items()}
    grown = next(key for key, tensor in wanted.items() if tensor is trunk.get_input_embeddings().weight)
    shapes[grown][0] = min(shapes[grown][0], stored.get_text_config().vocab_size)
    if not _is_reward_model(stored):
        del shapes["score.weight"]
    others = [places[key][1] for key in places.keys() - trunk.state_dict().keys()]
    unlike = any(key not in places or places[key][-1] != shape for key, shape in shapes.items())
    converted = get_model_conversion_mapping(trunk, add_legacy=False) or hasattr(stored, "quantization_config")
    if unlike or converted or _misplaced(others, trunk):
        return None

    def read(key: str, start: int = 0, stop: int | None = None) -> Tensor:
        key = key.removeprefix("trunk.")
        if key not in shapes:
            return init_head(width(stored), seed)[start:stop]
        with safe_open(places[key][0], "pt") as file:  # anew each time: what was read of an open file counts as memory
            rows = file.get_slice(places[key][1])
            rows = rows[start:stop] if shapes[key] else rows[...]
        if key == grown:  # by the pad token, which is never looked at
            missing = (len(wanted[key]) if stop is None else stop) - start - len(rows)
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        return rows

    return read


def _is_reward_model(config) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification") and config.num_labels == 1


def _misplaced(keys, trunk) -> list[str]:
    """Which names of stored tensors belong to the trunk, not to some head, and are of no use in it."""
    known = "|".join([OLD_BUFFERS, *(trunk._keys_to_ignore_on_load_unexpected or [])])
    tops = {trunk.base_model_prefix, *(name for name, _ in trunk.named_children())}
    return sorted(key for key in keys if key.partition(".")[0] in tops and not re.search(known, key))


def load_weights(name: str, config, seed: int) -> dict[str, Tensor]:
    """All weights by the names of RewardModel, on the CPU, as they are stored: from_pretrained, of what it can read at all.

    The head is a new one, or, where `name` already is a reward model, that one's. Raises InputError if weights cannot
    be loaded, are missing from the checkpoint, or are in it and have no place in the model.
    """
    stored = AutoConfig.from_pretrained(name)  # not ours, whose vocabulary may hold one more token
    cls, lm = AutoModel, auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if (config.architectures or [""])[0].endswith("ForSequenceClassification"):
        cls = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    elif stored.get_text_config().tie_word_embeddings:  # the embeddings may be stored as those of the output
        cls = lm
    with refusing(f"--model {name}: its weights cannot be loaded"):  # none, half a file, not the config's shapes
        model, info = cls.from_pretrained(name, config=stored, dtype="auto", output_loading_info=True)
    trunk = model.base_model
    wanted = f"{trunk.base_model_prefix}." if cls is lm else ""  # of a language model the trunk alone
    missing = sorted(key for key in info["missing_keys"] if key.startswith(wanted))
    for kind, keys in (("missing from", missing), ("of no use in", _misplaced(info["unexpected_keys"], trunk))):
        if keys:
            raise InputError(f"--model {name}: weights {kind} the checkpoint: {', '.join(keys[:5])} ({len(keys)})")
    if config.vocab_size > (known := trunk.get_input_embeddings().num_embeddings):
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        trunk.get_input_embeddings().weight.data[known:] = 0.0  # the pad token is never looked at
    head = model.score.weight.detach() if _is_reward_model(stored) else init_head(width(trunk.config), seed)
    return {f"trunk.{key}": value for key, value in trunk.state_dict().items()} | {"score.weight": head}


def empty_model(config) -> RewardModel:
    """The model without weights or memory (on the meta device), in fp32, in evaluation mode: dropout is off for good.

    Only the buffers that no checkpoint has (rotary frequencies and the like) are there, on the CPU.
    """
    with torch.device("meta"):
        model = RewardModel(AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)).eval()
    for _, tensor in saved_tensors(model):
        tensor._is_hf_initialized = True  # so that transformers computes the others alone, as in from_pretrained
    for name, buffer in list(model.trunk.named_non_persistent_buffers()):
        module, _, name = name.rpartition(".")
        model.trunk.get_submodule(module)._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.trunk.initialize_weights()
    return model


def saved_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what a checkpoint has: parameters, those that are tied once, and persistent buffers."""
    saved = model.state_dict().keys()
    return [(n, t) for n, t in [*model.named_parameters(), *model.named_buffers()] if n in saved]


def export(
    state: dict[str, Tensor], config, tokenizer, folder: Path, notes: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes what `AutoModelForSequenceClassification.from_pretrained(folder)` loads, tokenizer included.

    state: whole tensors by the names of RewardModel (trunk.*, score.weight), all of one dtype; notes: more entries for
    config.json; max_shard_size: of one file of weights; if they need several, there is an index beside them.
    """
    cls = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    config = copy.deepcopy(config)
    config.update(notes or {})
    with torch.device("meta"):
        model = cls._from_config(config, dtype=state["score.weight"].dtype)
    prefix = cls.base_model_prefix + "."
    state = {prefix + name.removeprefix("trunk.") if name != "score.weight" else name: t for name, t in state.items()}
    if state.keys() != model.state_dict().keys():
        raise RuntimeError(f"{cls.__name__} has other weights: {sorted(state.keys() ^ model.state_dict().keys())[:5]}")
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # Sides that were set on a tokenizer are not saved by transformers 5. Whoever cuts a text keeps the EOS that is scored.
    sides = {"padding_side": "right", "truncation_side": "left"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | sides, indent=2, ensure_ascii=False) + "\n")
    os.umask(umask := os.umask(0))
    for path in folder.glob("*.safetensors"):  # written readable for the owner alone, whatever the umask says
        path.chmod(0o666 & ~umask)
