"""The reward model: a linear head on any transformers decoder, and its configuration, tokenizer and export class."""

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
HEAD_SCALE = (
    1e-3  # even states 100 times the usual size give no rewards to unlearn; not 0, which would make every pair a tie
)


class RewardModel(nn.Module):
    """A decoder (from `AutoModel`) and a head that gives every token a reward.

    It knows nothing about ranks, precision or freezing, which are applied from outside.
    """

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = nn.Linear(width(trunk.config), 1, bias=False, dtype=torch.float32)

    def forward(self, input_ids: Tensor, attention_mask=None, position_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids: [R, L] int64; attention_mask: as the trunk takes it -> rewards [R, L] in fp32."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state  # [R, L, H]
        # fp32 even under autocast: half-precision rewards would tie by rounding. Clone because FSDP warns about views.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1).clone()


def width(config) -> int:
    """Size of the trunk's output per token. OPT-350m projects its hidden states down at the end."""
    config = config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def init_head(hidden_size: int, seed: int, published: bool = False) -> Tensor:
    """[1, H] fp32, normal. Published: std 1/sqrt(H + 1) (Stiennon et al., arXiv 2009.01325); else times HEAD_SCALE.

    The published rewards have unit size only if the final states do. A real model's states are larger: SmolLM2-135M
    starts at a loss of 1.1 to 1.4 and spends its first epoch unlearning that. A small head always starts at log 2.
    """
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(1, hidden_size, generator=generator) / math.sqrt(hidden_size + 1)
    return head if published else HEAD_SCALE * head


@cache  # for a name on the hub every look is a request
def lora_of(name: str) -> dict:
    """adapter_config.json of a LoRA adapter, {} for any other model."""
    path = None
    if not name.endswith(".gguf") and not (Path(name) / "config.json").exists():
        with suppress(OSError):  # no such name: reported when the model is read
            path = find_adapter_config_file(name)
    return json.loads(Path(path).read_text()) if path else {}


def origin(name: str) -> dict[str, str]:
    """Arguments of from_pretrained: folder and name for a GGUF file, the base model for an adapter.

    Raises InputError if the package that reads them is missing.
    """
    if name.endswith(".gguf"):
        if not find_spec("gguf"):
            raise InputError(f"--model {name}: transformers reads GGUF with the package gguf; type: pip install gguf")
        return {"pretrained_model_name_or_path": str(Path(name).parent), "gguf_file": Path(name).name}
    if lora := lora_of(name):
        name, adapter = lora["base_model_name_or_path"], name
        if not find_spec("peft"):
            raise InputError(
                f"--model {adapter}: an adapter for {name}, which the package peft merges; type: pip install peft"
            )
    return {"pretrained_model_name_or_path": name}


def load_config(name: str, chat_template: str | None = None):
    """(config, tokenizer) of a model folder or name, ready for a reward model: one label, a pad token that is not EOS.

    chat_template: a file that replaces the tokenizer's own.
    Reads no weights. Raises InputError for a model that minirm cannot train or that others could not load afterwards.
    """
    source = origin(name) | {"trust_remote_code": False}  # False: never prompt on the terminal
    # Many kinds of errors occur here: huggingface_hub's, each tokenizer's, and those of wrong numbers in a config.
    with refusing(f"--model {name}: no such model folder or name, or not one for transformers"):
        config = AutoConfig.from_pretrained(**source)
    if method := quantised(config):
        raise InputError(
            f"--model {name}: its weights are quantised ({method}), which cannot be trained; give the model it was made from"
        )
    whole, config = config, config.get_text_config(decoder=True)  # a multimodal model's decoder
    causal = is_causal(config) or (whole is not config and type(whole) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    encoder = whole.is_encoder_decoder or config.is_encoder_decoder
    if encoder or not causal or type(config) not in auto.MODEL_MAPPING:
        raise InputError(f"--model {name}: {config.model_type} is not a decoder (a causal language model)")
    with refusing(f"--model {name}: its tokenizer cannot be loaded"):
        if (Path(name) / "tokenizer_config.json").exists():  # also beside an adapter
            source["pretrained_model_name_or_path"] = name
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token_id is None:
        raise InputError(f"--model {name}: its tokenizer has no EOS token, at which the reward is read; set eos_token")
    if lacks_pad := tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    set_chat_template(tokenizer, chat_template)
    # Use the tokenizer's ids: the config may name another EOS, which could be the pad token.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Many models have more embeddings than tokens, so a new pad token needs no new embedding.
    config.vocab_size = max(config.vocab_size, tokenizer.pad_token_id + 1)
    # num_labels is derived from id2label; without problem_type the pipeline and vLLM apply a sigmoid.
    config.id2label, config.label2id, config.problem_type = {0: "LABEL_0"}, {"LABEL_0": 0}, "regression"
    more = " with one more token for padding; give its tokenizer a pad_token other than EOS" if lacks_pad else ""
    with refusing(f"--model {name}: transformers cannot make a model of its config.json{more}"), torch.device("meta"):
        classifier(config)._from_config(copy.deepcopy(config))
    return config, tokenizer


def quantised(config) -> str:
    """A model's quantisation method: "gptq", "awq", "bitsandbytes", ...; "" if its weights are not quantised."""
    about = getattr(config, "quantization_config", None) or {}
    about = about if isinstance(about, dict) else about.to_dict()
    return str(about.get("quant_method", "quantization_config")) if about else ""


def is_causal(config) -> bool:
    """Whether this is a decoder family. Encoders can run as decoders, but their weights were not trained for that."""
    kind = type(config)
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING or kind in auto.MODEL_FOR_MASKED_LM_MAPPING:
        return False
    if getattr(config, "attn_type", None) == "bi":  # XLNet reads in both directions
        return False
    return kind not in auto.MODEL_MAPPING or "Encoder" not in auto.MODEL_MAPPING[kind].__name__


def classifier(config) -> type[PreTrainedModel]:
    """The class that saves and loads a reward model: trunk and `score`, for sequences with one label.

    This is transformers' class. A decoder family whose class has another head, or that has none, gets `loader`'s.
    """
    if theirs := _class_of_transformers(config):
        return theirs
    space: dict = {}
    exec(loader(config), space)  # noqa: S102 - the code with which others load the model
    cls = list(space.values())[-1]
    cls.__module__ = cls.__bases__[1].__module__  # where transformers looks up the attention implementation
    return cls


def _class_of_transformers(config) -> type[PreTrainedModel] | None:
    theirs = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if not theirs or not theirs.__module__.startswith("transformers.models."):  # code beside weights registers itself
        return None
    if not is_causal(config) or issubclass(theirs, GenericForSequenceClassification):
        return theirs
    with torch.device("meta"):
        names = theirs._from_config(copy.deepcopy(config)).state_dict()
    heads = {name for name in names if not name.startswith(theirs.base_model_prefix + ".")}
    return theirs if heads == {"score.weight"} else None


LOADER = "modeling_reward.py"  # saved beside the weights if transformers has no class for the family
SOURCE = '''"""A decoder with a linear head that rewards the last token; transformers has no such class for this family."""

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
        """No: all its parts are those of transformers. Custom code loads without their conversions and initial buffers."""
        return False

    @staticmethod
    def plain(module, inputs, output):
        """What the forward pass above expects; recurrent models return less."""
        return output if "WithPast" in type(output).__name__ else BaseModelOutputWithPast(output[0])
'''


def loader(config) -> str:
    """Source of LOADER: `classifier(config)` for programs without minirm; "" if transformers has the class."""
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
        raise InputError(
            f"--model {args.model}: its tokenizer gives id {largest}, but it has {config.vocab_size} embeddings; the two do "
            "not belong together"
        )
    if counts["longest"] > (positions := getattr(config, "max_position_embeddings", math.inf)):
        raise InputError(f"--max_length {args.max_length}: {args.model} has {positions} positions; choose no more")


def empty_model(config) -> RewardModel:
    """The model without weights or memory (on the meta device), in fp32 and evaluation mode, so dropout is always off.

    Only the buffers that checkpoints lack, such as rotary frequencies, have values, on the CPU.
    """
    with torch.device("meta"):
        model = RewardModel(AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)).eval()
    for _, tensor in saved_tensors(model):
        tensor._is_hf_initialized = True  # so that transformers computes only the others, as in from_pretrained
    for name, buffer in list(model.trunk.named_non_persistent_buffers()):
        module, _, name = name.rpartition(".")
        model.trunk.get_submodule(module)._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.trunk.initialize_weights()
    return model


def saved_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs of a checkpoint: persistent buffers and parameters, without adapters, tied ones once."""
    saved = model.state_dict().keys()
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t) for n, t in found if n in saved and not n.startswith("lora.")]
