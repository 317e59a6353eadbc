"""Read a model's weights, and export the trained model."""

import copy
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto import modeling_auto as auto
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from minirm.errors import InputError, refusing
from minirm.model import LOADER, RewardModel, classifier, init_head, loader, lora_of, origin, saved_tensors, width

SAFETENSORS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
# Buffers that older versions of transformers stored with the weights: causal masks, rotary frequencies, positions.
OLD_BUFFERS = r"\b(attn|attention)\.(masked_)?bias$|\brotary_emb\.inv_freq$|\bposition_ids$"
MORE_THAN_TENSORS = (  # replaces torch's advice to load the file anyway
    "its .bin weights contain more than tensors (a pickle that may run arbitrary code, or an incomplete download), so "
    "they are not loaded; use .safetensors weights. If you trust their source, convert them with: "
    """python -c "import torch; from safetensors.torch import save_file; """
    "w = torch.load('pytorch_model.bin', weights_only=False); "
    """save_file({k: t.contiguous().clone() for k, t in w.items() if torch.is_tensor(t)}, 'model.safetensors')\""""
)


def stored_weights(name: str, model: RewardModel, seed: int, published: bool = False) -> Callable[..., Tensor] | None:
    """Return read(name in RewardModel, start=0, stop=None) -> rows of a tensor. It reads only those from safetensors.

    Returns None unless stored and wanted tensors match one to one by name and shape, except for a grown vocabulary.
    `load_weights` handles the rest: .bin files, tensors that transformers converts while loading, and errors.
    seed, published: for a new head (see `init_head`), used if `name` is not a reward model.
    """
    trunk = model.trunk
    try:  # load_weights will report any error
        stored = AutoConfig.from_pretrained(name)
        tensors = stored_tensors(name)
    except Exception:  # noqa: BLE001
        return None
    prefix = trunk_prefix(tensors, trunk)
    places = {key.removeprefix(prefix): (path, key, shape) for key, (path, shape, _) in tensors.items()}
    wanted = {key.removeprefix("trunk."): tensor for key, tensor in saved_tensors(model)}
    shapes = {key: list(tensor.shape) for key, tensor in wanted.items()}
    grown = next(key for key, tensor in wanted.items() if tensor is trunk.get_input_embeddings().weight)
    shapes[grown][0] = min(shapes[grown][0], stored.get_text_config().vocab_size)
    if not _is_reward_model(stored):
        del shapes["score.weight"]
    others = [places[key][1] for key in places.keys() - trunk.state_dict().keys()]
    unlike = any(key not in places or places[key][-1] != shape for key, shape in shapes.items())
    converted = get_model_conversion_mapping(trunk, add_legacy=False)
    if unlike or converted or _misplaced(others, trunk, prefix if stored.get_text_config() is not stored else ""):
        return None

    def read(key: str, start: int = 0, stop: int | None = None) -> Tensor:
        key = key.removeprefix("trunk.")
        if key not in shapes:
            return init_head(width(stored), seed, published)[start:stop]
        with safe_open(places[key][0], "pt") as file:  # reopen it, because pages read from an open file count as memory
            rows = file.get_slice(places[key][1])
            rows = rows[start:stop] if shapes[key] else rows[...]
        if key == grown:  # add a row for the pad token, which nothing attends to
            missing = (len(wanted[key]) if stop is None else stop) - start - len(rows)
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        return rows

    return read


def stored_tensors(name: str) -> dict[str, tuple[str, list[int], str]]:
    """{tensor name: (safetensors file, shape, dtype)} of a checkpoint. Reads no tensors. Lets every error through."""
    found = {}
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SAFETENSORS]
    for path in files[:1] if files[0] else get_checkpoint_shard_files(name, files[1])[0]:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dict
                rows = file.get_slice(key)
                found[key] = path, rows.get_shape(), rows.get_dtype()
    return found


def decoder_tensors(name: str, config, prefix: str) -> dict[str, Tensor]:
    """The decoder's tensors and `score.weight` from a multimodal checkpoint; the trunk's names get `prefix`."""
    with torch.device("meta"):
        trunk = AutoModel.from_config(config)
    stored, found = stored_tensors(name), {}
    theirs = trunk_prefix(stored, trunk)
    for path in sorted({path for path, *_ in stored.values()}):  # parse each file's header once
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dict
                if (ours := key.startswith(theirs)) or key == "score.weight":
                    found[prefix + key.removeprefix(theirs) if ours else key] = file.get_tensor(key)
    return found


def trunk_prefix(stored: Iterable[str], trunk) -> str:
    """The prefix of the trunk's tensor names in a checkpoint: "model.", "model.language_model.", "", ..."""
    names = trunk.state_dict().keys()
    anchor = next(name for name, p in trunk.named_parameters() if p is trunk.get_input_embeddings().weight)
    found = {key.removesuffix(anchor) for key in stored if key == anchor or key.endswith("." + anchor)}
    return max(sorted(found), key=lambda prefix: len({prefix + name for name in names} & set(stored)), default="")


def brings_head(name: str) -> bool:
    """Whether the model is already a reward model, whose head is kept."""
    return lora_of(name).get("task_type") == "SEQ_CLS" or _is_reward_model(AutoConfig.from_pretrained(**origin(name)))


def _is_reward_model(config) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification") and config.num_labels == 1


def _misplaced(keys, trunk, prefix: str = "") -> list[str]:
    """Names of stored tensors that belong to the trunk (by `prefix`, if several are stored) but that it lacks."""
    known = "|".join([OLD_BUFFERS, *(trunk._keys_to_ignore_on_load_unexpected or [])])
    tops = {trunk.base_model_prefix, *(name for name, _ in trunk.named_children())}
    ours = [key for key in keys if (key.startswith(prefix) if prefix else key.partition(".")[0] in tops)]
    return sorted(key for key in ours if not re.search(known, key))


def stored_dtype(name: str) -> str:
    """The dtype of most weights as safetensors names it, such as "BF16"; "" if unknown."""
    with suppress(Exception):  # without safetensors, use the configuration below
        sizes: Counter[str] = Counter()
        for _, shape, dtype in stored_tensors(origin(name)["pretrained_model_name_or_path"]).values():
            sizes[dtype] += math.prod(shape)
        return sizes.most_common(1)[0][0]
    with suppress(Exception):
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(AutoConfig.from_pretrained(**origin(name)).dtype, "")
    return ""


def choose_precision(name: str, device: str, computes_bf16: bool) -> tuple[str, str]:
    """Resolve --precision auto: (fp16, bf16 or fp32, why). Models made in bf16, as Gemma and Qwen, overflow in fp16."""
    if device != "cuda":
        return "fp32", "because there is no GPU"
    if stored_dtype(name) != "BF16":
        return "fp16", "with a GradScaler, because the weights are not stored in bf16"
    if not computes_bf16:
        return "fp16", "because this GPU does not support bf16, in which the weights are stored"
    return "bf16", "because the weights are stored in bf16"


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn any error that transformers or torch raises while loading weights into an InputError."""
    try:
        yield
    except Exception as error:
        if "weights_only" in str(error):
            raise InputError(f"--model {name}: {MORE_THAN_TENSORS}") from None
        with refusing(f"--model {name}: its weights cannot be loaded"):  # missing, truncated, wrong shapes
            raise


def load_weights(name: str, config, seed: int, published: bool = False) -> dict[str, Tensor]:
    """Load all weights with from_pretrained: {name in RewardModel: tensor}, on the CPU, in the stored precision.

    The head is new (seed, published: see `init_head`) unless `name` is already a reward model, whose head is kept.
    Raises InputError if weights cannot be loaded, are missing, or have no place in the model.
    """
    source, lora = origin(name), lora_of(name)
    stored = AutoConfig.from_pretrained(**source)  # `config` may have one more token in its vocabulary
    text = stored.get_text_config(decoder=True)
    trunk_cls, rewards = auto.MODEL_MAPPING[type(text)], _is_reward_model(stored)
    if lora.get("task_type") == "SEQ_CLS":
        cls, text.num_labels, rewards = classifier(text), 1, True
    elif (stored.architectures or [""])[0].endswith("ForSequenceClassification"):
        cls, text.num_labels = classifier(text), stored.num_labels
    elif lora or (text is stored and getattr(text, "tie_word_embeddings", False)):
        cls = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]  # tied embeddings may be stored under the output's name
    else:
        cls = trunk_cls
    prefix = "" if cls is trunk_cls else cls.base_model_prefix + "."
    with loading(name):
        if text is not stored:  # a multimodal model: read only the tensors of its decoder
            tensors = decoder_tensors(source["pretrained_model_name_or_path"], text, prefix)
            source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        options = {**source, "config": text, "dtype": "auto", "output_loading_info": True}
        model, info = cls.from_pretrained(**options)
        whole = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
        if cls is trunk_cls and info["missing_keys"] and whole:
            # transformers renames some tensors of DeepSeek V4 for its language model, but not for its trunk alone.
            prefix = whole.base_model_prefix + "."
            model, info = whole.from_pretrained(**options)
        if lora:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name).merge_and_unload()
    trunk = model.base_model
    wanted = prefix if lora or not hasattr(model, "score") else ""  # of a language model, only the trunk is needed
    missing = sorted(key for key in info["missing_keys"] if key.startswith(wanted))
    odd = _misplaced(info["unexpected_keys"], trunk)
    for what, keys in (("weights missing from the checkpoint", missing), ("unexpected weights in the checkpoint", odd)):
        if keys:
            raise InputError(f"--model {name}: {what}: {', '.join(keys[:5])} ({len(keys)})")
    if config.vocab_size > (known := trunk.get_input_embeddings().num_embeddings):
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        trunk.get_input_embeddings().weight.data[known:] = 0.0  # nothing attends to the pad token
    if config.vocab_size > text.vocab_size:
        # Other tensors may depend on the vocabulary: CPM-Ant's prompts follow its tokens, DeepSeek V4 has more tables.
        with torch.device("meta"):
            sizes = {key: tensor.shape for key, tensor in AutoModel.from_config(config).state_dict().items()}
        unlike = [key for key, tensor in trunk.state_dict().items() if tensor.shape != sizes.get(key, tensor.shape)]
        if unlike:
            advice = "give its tokenizer a pad_token other than EOS"
            raise InputError(f"--model {name}: {unlike[0]} has no room for a new pad token; {advice}")
    head = model.score.weight.detach() if rewards else init_head(width(trunk.config), seed, published)
    return {f"trunk.{key}": value for key, value in trunk.state_dict().items()} | {"score.weight": head}


def export(
    state: dict[str, Tensor], config, tokenizer, folder: Path, notes: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """Write a model and tokenizer that `AutoModelForSequenceClassification.from_pretrained(folder)` loads.

    If transformers has no such class for the family, loading needs trust_remote_code=True; the code is in LOADER.
    state: full tensors by their names in RewardModel (trunk.*, score.weight), all of one dtype; notes: more entries for
    config.json; max_shard_size: maximum size of a weights file.
    """
    cls, config = classifier(config), copy.deepcopy(config)
    config.update(notes or {})
    vars(config).pop("auto_map", None)  # it refers to code beside the original weights
    if source := loader(config):
        config.auto_map = {"AutoModelForSequenceClassification": f"{LOADER.removesuffix('.py')}.{cls.__name__}"}
    with torch.device("meta"):
        model = cls._from_config(config, dtype=state["score.weight"].dtype)
    prefix = cls.base_model_prefix + "."
    state = {prefix + name.removeprefix("trunk.") if name != "score.weight" else name: t for name, t in state.items()}
    if odd := sorted(state.keys() ^ model.state_dict().keys()):
        raise RuntimeError(f"{cls.__name__} expects different weights: {', '.join(odd[:5])} ({len(odd)})")
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    if source:
        (folder / LOADER).write_text(source)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # transformers 5 does not save sides that were set on a tokenizer. Truncation on the left keeps the scored EOS.
    sides = {"padding_side": "right", "truncation_side": "left"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | sides, indent=2, ensure_ascii=False) + "\n")
    os.umask(umask := os.umask(0))
    for path in folder.glob("*.safetensors"):  # safetensors ignores the umask and lets only the owner read them
        path.chmod(0o666 & ~umask)
