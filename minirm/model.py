"""The reward model: any transformers decoder as trunk and a linear head; loading it, and saving it for others."""

import copy
import json
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from minirm.data import set_chat_template
from minirm.sources import InputError, one_line

PAD_TOKEN = "<|pad|>"  # added where the tokenizer has no pad token of its own


class RewardModel(nn.Module):
    """A decoder and a head that gives every token a reward.

    Args: trunk: a transformers decoder without a language-model head (`AutoModel`).
    The module knows nothing of ranks, precision or freezing: those are applied from outside.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(width(trunk.config), 1, bias=False, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask=None, position_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids: [R, L] int64; attention_mask: what the trunk takes -> rewards [R, L] in fp32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state  # [R, L, H]
        # fp32 whatever autocast says: half-precision rewards would tie by accident.
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = self.score(hidden.float()).squeeze(-1)
            return rewards.clone()  # FSDP warns of views, which cannot be changed in place


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
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # False: else it asks on the terminal
    except Exception as error:  # noqa: BLE001 - of many kinds, huggingface_hub's among them
        raise InputError(
            f"--model {name}: no such model folder or name, or not one for transformers ({one_line(error)})"
        )
    kind = type(config)
    if config.is_encoder_decoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(
            f"--model {name}: {config.model_type} is not a decoder (a causal language model), which is needed"
        )
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"--model {name}: transformers has no sequence-classification class for {config.model_type}, so nothing "
            "could load the trained reward model; choose another model family"
        )
    if config.get_text_config() is not config:
        raise InputError(
            f"--model {name}: {config.model_type} is more than a language model; give its text model alone"
        )
    theirs = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    try:
        with torch.device("meta"):
            names = theirs._from_config(copy.deepcopy(config)).state_dict()
    except Exception as error:  # noqa: BLE001 - whatever a wrong number leads to
        raise InputError(f"--model {name}: transformers cannot make a model of its config.json ({one_line(error)})")
    if heads := {n for n in names if not n.startswith(theirs.base_model_prefix + ".")} - {"score.weight"}:
        raise InputError(
            f"--model {name}: {theirs.__name__} is more than a linear head on the last token ({', '.join(sorted(heads))}), "
            "so it could not load the trained reward model; choose another model family"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - each kind of tokenizer has its own
        raise InputError(f"--model {name}: its tokenizer cannot be loaded ({one_line(error)})")
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


def load_weights(name: str, config, seed: int) -> dict[str, Tensor]:
    """Weights and buffers by the names of RewardModel, on the CPU, as they are stored.

    The head is a new one, or, where `name` already is a reward model, that one's. Raises InputError if weights cannot
    be loaded or are missing from the checkpoint.
    """
    rewards = (config.architectures or [""])[0].endswith("ForSequenceClassification")
    cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)] if rewards else AutoModel
    stored = AutoConfig.from_pretrained(name)  # not ours, whose vocabulary may hold one more token
    try:
        model, info = cls.from_pretrained(name, config=stored, dtype="auto", output_loading_info=True)
    except Exception as error:  # noqa: BLE001 - no weights there, half a file, other shapes than in config.json
        raise InputError(f"--model {name}: its weights cannot be loaded ({one_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"--model {name}: weights missing from the checkpoint: {', '.join(missing[:5])} ({len(missing)})"
        )
    trunk = model.base_model
    if config.vocab_size > trunk.get_input_embeddings().num_embeddings:
        known = trunk.get_input_embeddings().num_embeddings
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        trunk.get_input_embeddings().weight.data[known:] = 0.0  # the pad token is never looked at
    weights = {f"trunk.{key}": value for key, value in [*trunk.named_parameters(), *trunk.named_buffers()]}
    head = model.score.weight if rewards and stored.num_labels == 1 else init_head(width(trunk.config), seed)
    return weights | {"score.weight": head}


def empty_model(config) -> RewardModel:
    """The model without weights or memory (on the meta device), in fp32, in evaluation mode: dropout is off for good."""
    with torch.device("meta"):
        return RewardModel(AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)).eval()


def export(
    state: dict[str, Tensor], config, tokenizer, folder: Path, notes: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes what `AutoModelForSequenceClassification.from_pretrained(folder)` loads, tokenizer included.

    Args:
        state: whole tensors by the names of RewardModel (trunk.*, score.weight), all of one dtype.
        notes: more entries for config.json.
        max_shard_size: of one file of weights; if they need several, there is an index beside them.
    """
    cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
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
