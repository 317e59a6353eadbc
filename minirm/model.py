"""The reward model: a linear head on any transformers decoder. Also its configuration, tokenizer and export class."""

import copy
import json
import math
import re
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto import modeling_auto as auto
from transformers.utils import find_adapter_config_file

from minirm.data.chat import set_chat_template
from minirm.errors import InputError, refusing

PAD_TOKEN = "<|pad|>"  # added if the tokenizer has no pad token of its own
# Small enough that even states of 100 times the usual size give no rewards to unlearn. With 0, every pair would tie.
HEAD_SCALE = 1e-3


class RewardModel(nn.Module):
    """A decoder (from `AutoModel`) and a head that gives every token a reward. Knows nothing of ranks and precision."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(width(trunk.config), 1, bias=False, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask=None, position_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids: [R, L] int64; attention_mask: whatever the trunk takes -> rewards [R, L] in fp32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state  # [R, L, H]
        # fp32 even under autocast, because half-precision rewards tie by rounding; clone() because FSDP warns of views.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1).clone()


def width(config) -> int:
    """Size of the trunk's output per token. OPT-350m projects its hidden states down at the end."""
    config = config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def init_head(hidden_size: int, seed: int, published: bool = False) -> Tensor:
    """[1, H] fp32, normal. Published: std 1/sqrt(H + 1) (Stiennon et al., arXiv 2009.01325); else times HEAD_SCALE.

    The published size gives rewards of unit size only if the final states have unit size. A real model's states are
    larger: SmolLM2-135M starts at a loss of 1.1 to 1.4 and spends its first epoch unlearning it. A small head always
    starts at log 2.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
    return head if published else HEAD_SCALE * head


@cache  # every lookup of a name on the hub is a request
def lora_of(name: str) -> dict:
    """adapter_config.json of a LoRA adapter; {} for any other model."""
    path = None
    if not name.endswith(".gguf") and not (Path(name) / "config.json").exists():
        with suppress(OSError):  # an unknown name, which is reported when the model is read
            path = find_adapter_config_file(name)
    return json.loads(Path(path).read_text()) if path else {}


def origin(name: str) -> dict[str, str]:
    """Arguments of from_pretrained. Raises InputError if the package that reads GGUF files or adapters is missing."""
    if name.endswith(".gguf"):
        if not find_spec("gguf"):
            raise InputError(f"--model {name}: reading GGUF files needs the package gguf; run: pip install gguf")
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    if lora := lora_of(name):
        name, adapter = lora["base_model_name_or_path"], name
        if not find_spec("peft"):
            raise InputError(f"--model {adapter}: merging an adapter needs the package peft; run: pip install peft")
    return {"pretrained_model_name_or_path": name}


def load_config(name: str, chat_template: str | None = None):
    """(config, tokenizer) of a model folder or name, ready for a reward model: one label, a pad token that is not EOS.

    chat_template: a file that replaces the tokenizer's own template.
    Reads no weights. Raises InputError for a model that minirm cannot train or that others could not load afterwards.
    """
    source = origin(name) | {"trust_remote_code": False}  # without this, transformers would ask on the terminal
    # Catch everything: huggingface_hub, each tokenizer, and wrong numbers in a config raise different kinds of errors.
    with refusing(f"--model {name}: not a model folder or name that transformers can load"):
        config = AutoConfig.from_pretrained(**source)
    if about := getattr(config, "quantization_config", None):
        method = (about if isinstance(about, dict) else about.to_dict()).get("quant_method", "quantization_config")
        what = f"its weights are quantised ({method}) and cannot be trained"
        raise InputError(f"--model {name}: {what}; use the unquantised original")
    whole, config = config, config.get_text_config(decoder=True)  # a multimodal model's decoder
    causal = is_causal(config) or (whole is not config and type(whole) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    encoder = whole.is_encoder_decoder or config.is_encoder_decoder
    if encoder or not causal or type(config) not in auto.MODEL_MAPPING:
        raise InputError(f"--model {name}: {config.model_type} is not a decoder; expected a causal language model")
    with refusing(f"--model {name}: its tokenizer cannot be loaded"):
        if (Path(name) / "tokenizer_config.json").exists():  # also beside an adapter
            source["pretrained_model_name_or_path"] = name
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no EOS token, where the reward is read; set eos_token")
    if lacks_pad := tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    set_chat_template(tokenizer, chat_template)
    # Use the tokenizer's ids: the config may name another EOS, which could be the pad token.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # A new pad token often needs no new embedding, because many models have more embeddings than tokens.
    config.vocab_size = max(config.vocab_size, tokenizer.pad_token_id + 1)
    # num_labels is derived from id2label. Without problem_type, the pipeline and vLLM apply a sigmoid.
    config.id2label, config.label2id, config.problem_type = {0: "LABEL_0"}, {"LABEL_0": 0}, "regression"
    what = f"transformers cannot build a model from its config.json{' and a new pad token' if lacks_pad else ''}"
    advice = "; give its tokenizer a pad_token other than EOS" if lacks_pad else ""
    with refusing(f"--model {name}: {what}", advice=advice), torch.device("meta"):
        classifier(config)._from_config(copy.deepcopy(config))
    return config, tokenizer


def is_causal(config) -> bool:
    """Whether this is a decoder family. Encoders can run as decoders, but their weights were not trained as such."""
    kind = type(config)
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING or kind in auto.MODEL_FOR_MASKED_LM_MAPPING:
        return False
    if getattr(config, "attn_type", None) == "bi":  # XLNet attends in both directions
        return False
    return kind not in auto.MODEL_MAPPING or "Encoder" not in auto.MODEL_MAPPING[kind].__name__


def classifier(config) -> type[PreTrainedModel]:
    """The class that saves and loads a reward model, with trunk and `score`: transformers' own, or else `loader`'s."""
    if theirs := _class_of_transformers(config):
        return theirs
    space: dict = {}
    exec(loader(config), space)  # noqa: S102 - the same code with which others load the model
    cls = list(space.values())[-1]
    cls.__module__ = cls.__bases__[1].__module__  # where transformers looks up the attention implementation
    return cls


def _class_of_transformers(config) -> type[PreTrainedModel] | None:
    """None if transformers has no class for the family, or one with another head."""
    theirs = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    # A class from elsewhere is code that came with some weights and registered itself.
    if not theirs or not theirs.__module__.startswith("transformers.models."):
        return None
    if not is_causal(config) or issubclass(theirs, GenericForSequenceClassification):
        return theirs
    with torch.device("meta"):
        names = theirs._from_config(copy.deepcopy(config)).state_dict()
    heads = {name for name in names if not name.startswith(theirs.base_model_prefix + ".")}
    return theirs if heads == {"score.weight"} else None


LOADER = "modeling_reward.py"  # saved beside the weights if transformers has no class for the family
SOURCE = '''"""A decoder with a linear head that scores the last token. transformers has no such class for this family."""

from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast
from {kind.__module__} import {kind.__name__}
from {base.__module__} import {base.__name__}


class {name}(GenericForSequenceClassification, {base.__name__}):
    config_class = {kind.__name__}
    base_model_prefix = "{prefix}"

    def __init__(self, config):
        super().__init__(config)
        self.{prefix}.register_forward_hook(self.plain)

    @classmethod
    def is_custom_code(cls):
        """False: every part is transformers' own, and its weight conversions and buffers must be applied on loading."""
        return False

    @staticmethod
    def plain(module, inputs, output):
        """Return the kind of output that the base class expects; recurrent models return another."""
        return output if "WithPast" in type(output).__name__ else BaseModelOutputWithPast(output[0])
'''


def loader(config) -> str:
    """Source of LOADER, which defines `classifier(config)` for programs without minirm; "" if transformers has it."""
    if _class_of_transformers(config):
        return ""
    kind, trunk = type(config), auto.MODEL_MAPPING[type(config)]
    lm = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, trunk)
    base = next(cls for cls in trunk.__mro__[1:] if issubclass(cls, PreTrainedModel))
    # vLLM finds the model by the name before ForSequenceClassification.
    name = re.sub("(LMHeadModel|ForCausalLM|Model)$", "", lm.__name__) + "ForSequenceClassification"
    return SOURCE.format(kind=kind, base=base, name=name, prefix=trunk.base_model_prefix or "model")


def check_fit(args, config, counts: dict) -> None:
    """Raise InputError if ids or lengths in the data exceed the model's limits. counts: `totals` of all the data."""
    if (largest := counts["largest id"]) >= config.vocab_size:
        what = f"it produces id {largest}, but the model has {config.vocab_size} embeddings"
        advice = "use the model's own tokenizer"
        raise InputError(f"--model {args.model}: the tokenizer does not match the model: {what}; {advice}")
    if counts["longest"] > (positions := getattr(config, "max_position_embeddings", math.inf)):
        advice = f"use {positions} or less"
        raise InputError(f"--max_length {args.max_length}: {args.model} has {positions} positions; {advice}")


def empty_model(config) -> RewardModel:
    """The model on the meta device, without weights or memory, in fp32. Evaluation mode keeps dropout off for good.

    Only buffers that checkpoints lack, such as rotary frequencies, have values, on the CPU.
    """
    with torch.device("meta"):
        model = RewardModel(AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)).eval()
    for _, tensor in saved_tensors(model):
        tensor._is_hf_initialized = True  # then transformers initializes only the others, as in from_pretrained
    for name, buffer in list(model.trunk.named_non_persistent_buffers()):
        module, _, name = name.rpartition(".")
        model.trunk.get_submodule(module)._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.trunk.initialize_weights()
    return model


def saved_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what a checkpoint stores: parameters and persistent buffers, tied ones once, no adapters."""
    saved = model.state_dict().keys()
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t) for n, t in found if n in saved and not n.startswith("lora.")]
