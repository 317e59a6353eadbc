"""Reading a model's weights, and writing the trained model for others."""

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
MORE_THAN_TENSORS = (  # in place of torch's advice, which is to load it all the same
    "its .bin weights are not only tensors (a pickle that may run any code, or an unfinished download), so they are not "
    "loaded; give .safetensors. Convert a .bin only if you trust where it is from: "
    """python -c "import torch; from safetensors.torch import save_file; """
    "w = torch.load('pytorch_model.bin', weights_only=False); "
    """save_file({k: t.contiguous().clone() for k, t in w.items() if torch.is_tensor(t)}, 'model.safetensors')\""""
)


def stored_weights(
    name: str, config, model: RewardModel, seed: int, published: bool = False
) -> Callable[..., Tensor] | None:
    """read(name in RewardModel, start=0, stop=None) -> these rows of a tensor, and nothing else, from safetensors files.

    None where stored and wanted tensors do not agree one to one, by name and shape, a grown vocabulary aside: .bin files,
    what transformers converts while it loads, and whatever is wrong. All that is for `load_weights`.
    seed, published: of the head, see `init_head`, where `name` is no reward model.
    """
    trunk = model.trunk
    try:  # what is wrong here load_weights will say
        stored = AutoConfig.from_pretrained(name)
        tensors = stored_tensors(name)
    except Exception:  # noqa: BLE001
        return None
    prefix = trunk_prefix(tensors, trunk)
    places = {key.removeprefix(prefix): (path, key, shape) for key, (path, shape) in tensors.items()}
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
        with safe_open(places[key][0], "pt") as file:  # anew each time: what was read of an open file counts as memory
            rows = file.get_slice(places[key][1])
            rows = rows[start:stop] if shapes[key] else rows[...]
        if key == grown:  # by the pad token, which is never looked at
            missing = (len(wanted[key]) if stop is None else stop) - start - len(rows)
            rows = nn.functional.pad(rows, (0, 0, 0, missing))
        return rows

    return read


def stored_tensors(name: str) -> dict[str, tuple[str, list[int]]]:
    """{name of a tensor: (safetensors file, shape)} of a checkpoint; nothing else is read. Raises whatever goes wrong."""
    found = {}
    files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SAFETENSORS]
    for path in files[:1] if files[0] else get_checkpoint_shard_files(name, files[1])[0]:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dict
                found[key] = path, file.get_slice(key).get_shape()
    return found


def decoder_tensors(name: str, config, prefix: str) -> dict[str, Tensor]:
    """The decoder's tensors and `score.weight` out of a checkpoint that holds more; the trunk's names begin with `prefix`."""
    with torch.device("meta"):
        trunk = AutoModel.from_config(config)
    stored, found = stored_tensors(name), {}
    theirs = trunk_prefix(stored, trunk)
    for path in sorted({path for path, _ in stored.values()}):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dict
                if key.startswith(theirs):
                    found[prefix + key.removeprefix(theirs)] = file.get_tensor(key)
                elif key == "score.weight":
                    found[key] = file.get_tensor(key)
    return found


def trunk_prefix(stored: Iterable[str], trunk) -> str:
    """What stands before the names of the trunk's tensors in a checkpoint: "model.", "model.language_model.", "", ..."""
    names = trunk.state_dict().keys()
    anchor = next(name for name, p in trunk.named_parameters() if p is trunk.get_input_embeddings().weight)
    found = {key.removesuffix(anchor) for key in stored if key == anchor or key.endswith("." + anchor)}
    return max(sorted(found), key=lambda prefix: len({prefix + name for name in names} & set(stored)), default="")


def brings_head(name: str) -> bool:
    """Whether the model already is a reward model, whose head is kept."""
    return lora_of(name).get("task_type") == "SEQ_CLS" or _is_reward_model(AutoConfig.from_pretrained(**origin(name)))


def _is_reward_model(config) -> bool:
    return (config.architectures or [""])[0].endswith("ForSequenceClassification") and config.num_labels == 1


def _misplaced(keys, trunk, prefix: str = "") -> list[str]:
    """Which names of stored tensors belong to the trunk, not to some head, and are of no use in it.

    prefix: of the trunk's names in a checkpoint that holds more than a language model.
    """
    known = "|".join([OLD_BUFFERS, *(trunk._keys_to_ignore_on_load_unexpected or [])])
    tops = {trunk.base_model_prefix, *(name for name, _ in trunk.named_children())}
    ours = [key for key in keys if (key.startswith(prefix) if prefix else key.partition(".")[0] in tops)]
    return sorted(key for key in ours if not re.search(known, key))


def stored_dtype(name: str) -> str:
    """How most of the weights are stored, "BF16" as safetensors call it; "" where that is not said."""
    with suppress(Exception):  # no safetensors: then the configuration says it
        name = origin(name)["pretrained_model_name_or_path"]
        files = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in SAFETENSORS]
        path = files[0] or get_checkpoint_shard_files(name, files[1])[0][0]
        with safe_open(path, "pt") as file:
            sizes: Counter[str] = Counter()
            for key in file.keys():  # noqa: SIM118 - no dict
                rows = file.get_slice(key)
                sizes[rows.get_dtype()] += math.prod(rows.get_shape())
        return sizes.most_common(1)[0][0]
    with suppress(Exception):
        return {torch.bfloat16: "BF16", torch.float16: "F16"}.get(AutoConfig.from_pretrained(**origin(name)).dtype, "")
    return ""


def choose_precision(name: str, device: str, computes_bf16: bool) -> tuple[str, str]:
    """What --precision auto is: (fp16, bf16 or fp32, why). Models made in bf16 overflow in fp16, among them Gemma and Qwen."""
    if device != "cuda":
        return "fp32", "on a CPU"
    if stored_dtype(name) != "BF16":
        return "fp16", "with a GradScaler, since the weights are not stored in bf16"
    if not computes_bf16:
        return "fp16", "since this GPU does not compute in bf16, in which the weights are stored"
    return "bf16", "as the weights are stored"


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turn what transformers and torch raise while they read weights into an InputError."""
    try:
        yield
    except Exception as error:
        if "weights_only" in str(error):
            raise InputError(f"--model {name}: {MORE_THAN_TENSORS}") from None
        with refusing(f"--model {name}: its weights cannot be loaded"):  # none, half a file, not the config's shapes
            raise


def load_weights(name: str, config, seed: int, published: bool = False) -> dict[str, Tensor]:
    """All weights by the names of RewardModel, on the CPU, as they are stored: from_pretrained, of what it can read at all.

    The head is a new one (seed, published: see `init_head`), or, where `name` already is a reward model, that one's.
    Raises InputError if weights cannot be loaded, are missing from the checkpoint, or are in it and have no place.
    """
    source, lora = origin(name), lora_of(name)
    stored = AutoConfig.from_pretrained(**source)  # not ours, whose vocabulary may hold one more token
    text = stored.get_text_config(decoder=True)
    trunk_cls, rewards = auto.MODEL_MAPPING[type(text)], _is_reward_model(stored)
    if lora.get("task_type") == "SEQ_CLS":
        cls, text.num_labels, rewards = classifier(text), 1, True
    elif (stored.architectures or [""])[0].endswith("ForSequenceClassification"):
        cls, text.num_labels = classifier(text), stored.num_labels
    elif lora or (
        getattr(text, "tie_word_embeddings", False) and text is stored
    ):  # the embeddings may be stored as those of the output
        cls = auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    else:
        cls = trunk_cls
    prefix = "" if cls is trunk_cls else cls.base_model_prefix + "."
    with loading(name):
        if text is not stored:  # of a model that also sees or hears, the tensors of its decoder alone
            tensors = decoder_tensors(source["pretrained_model_name_or_path"], text, prefix)
            source = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        model, info = cls.from_pretrained(**source, config=text, dtype="auto", output_loading_info=True)
        if lora:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name).merge_and_unload()
    trunk = model.base_model
    wanted = prefix if lora or not hasattr(model, "score") else ""  # of a language model the trunk alone
    missing = sorted(key for key in info["missing_keys"] if key.startswith(wanted))
    for kind, keys in (("missing from", missing), ("of no use in", _misplaced(info["unexpected_keys"], trunk))):
        if keys:
            raise InputError(f"--model {name}: weights {kind} the checkpoint: {', '.join(keys[:5])} ({len(keys)})")
    known = trunk.get_input_embeddings().num_embeddings
    if config.vocab_size > text.vocab_size and known != text.vocab_size:  # CPM-Ant's prompts stand behind its tokens
        raise InputError(
            f"--model {name}: it has {known} embeddings for {text.vocab_size} tokens, so none can be added for a pad "
            "token; give its tokenizer a pad_token other than EOS"
        )
    if config.vocab_size > known:
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        trunk.get_input_embeddings().weight.data[known:] = 0.0  # the pad token is never looked at
    head = model.score.weight.detach() if rewards else init_head(width(trunk.config), seed, published)
    return {f"trunk.{key}": value for key, value in trunk.state_dict().items()} | {"score.weight": head}


def export(
    state: dict[str, Tensor], config, tokenizer, folder: Path, notes: dict | None = None, max_shard_size: str = "5GB"
) -> None:
    """Writes what `AutoModelForSequenceClassification.from_pretrained(folder)` loads, tokenizer included.

    Where transformers has no such class for the family, that takes trust_remote_code=True: LOADER is the code.

    state: whole tensors by the names of RewardModel (trunk.*, score.weight), all of one dtype; notes: more entries for
    config.json; max_shard_size: of one file of weights; if they need several, there is an index beside them.
    """
    cls, config = classifier(config), copy.deepcopy(config)
    config.update(notes or {})
    vars(config).pop("auto_map", None)  # of code beside the weights that training began with
    if source := loader(config):
        config.auto_map = {"AutoModelForSequenceClassification": f"{LOADER.removesuffix('.py')}.{cls.__name__}"}
    with torch.device("meta"):
        model = cls._from_config(config, dtype=state["score.weight"].dtype)
    prefix = cls.base_model_prefix + "."
    state = {prefix + name.removeprefix("trunk.") if name != "score.weight" else name: t for name, t in state.items()}
    if state.keys() != model.state_dict().keys():
        raise RuntimeError(f"{cls.__name__} has other weights: {sorted(state.keys() ^ model.state_dict().keys())[:5]}")
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    if source:
        (folder / LOADER).write_text(source)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # Sides that were set on a tokenizer are not saved by transformers 5. Whoever cuts a text keeps the EOS that is scored.
    sides = {"padding_side": "right", "truncation_side": "left"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | sides, indent=2, ensure_ascii=False) + "\n")
    os.umask(umask := os.umask(0))
    for path in folder.glob("*.safetensors"):  # written readable for the owner alone, whatever the umask says
        path.chmod(0o666 & ~umask)
