"""Chat templates and separators: `python -m pytest tests/test_chat.py`. No network."""

from typing import NamedTuple

import pytest
import transformers
from conftest import ELEVEN, NINE, make_tokenizer, refusal, with_template, write_jsonl
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from minirm.data.chat import join, render, set_chat_template
from minirm.data.prepare import prepare, read_texts
from minirm.data.tokens import encode
from minirm.model import load_config
from minirm.rows import collate


@pytest.mark.parametrize(
    "prompt, answer, text",
    [
        ("p", "a", "p|a"),
        ("p ", "a", "p a"),
        ("p\n", "a", "p\na"),
        ("p", " a", "p a"),
        ("p", "\ta", "p\ta"),
        ("p\u00a0", "a", "p\u00a0a"),
        ("", "a", "a"),
        ("p", "", "p"),
    ],
)
def test_the_separator_is_inserted_unless_there_is_whitespace(prompt, answer, text):
    assert join(prompt, answer, "|") == text


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates like those of published models


class Chat(NamedTuple):
    template: str
    end: str  # the token whose reward is the answer's
    rendered: str  # a question "hi" and an answer "yo"
    bos: int = 0  # how often it contains BOS


CHATS = {
    "ChatML": Chat(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "ChatML with a system prompt of its own, over several lines": Chat(
        "{%- if messages[0].role != 'system' %}\n    {{- '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
        "<|im_end|>",
        "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "Llama 3": Chat(
        "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\\n\\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\\n\\n' }}{% endif %}",
        "<|eot_id|>",
        "<s><|start|>user<|stop|>\n\nhi<|eot_id|><|start|>assistant<|stop|>\n\nyo<|eot_id|>",
        bos=1,
    ),
    "Llama 2": Chat(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>[INST] hi [/INST] yo </s>",
        bos=1,
    ),
    "Zephyr": Chat(
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\\n' + m.content + eos_token }}\n"
        "{% else %}\n{{ '<|' + m.role + '|>\\n'  + m.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
        "<|user|>\nhi</s>\n<|assistant|>\nyo</s>",
    ),
    "Gemma, which refuses a system role and two questions in a row": Chat(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
        "alternate') }}{% endif %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        "<end_of_turn>",
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nyo<end_of_turn>",
        bos=1,
    ),
    "EOS behind the last end of a turn": Chat(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        "</s>",
        "<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n</s>",
    ),
    "no end of a turn": Chat(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}\n",
        "</s>",
        "user: hi\nassistant: yo\n</s>",
    ),
    "line breaks at both ends": Chat(
        "\n{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n\n{% if add_generation_prompt %}\nme:\n{% endif %}  \n",
        "</s>",
        "\nuser: hi\nassistant: yo\n\n  </s>",
    ),
    "blocks that eat the whitespace around them": Chat(
        "{%- for m in messages -%}\n  {{- '<|im_start|>' ~ m.role ~ '\\n' -}}\n  {{- m.content -}}\n  {{- '<|im_end|>\\n' -}}\n"
        "{%- endfor -%}\n{%- if add_generation_prompt -%}\n  {{- '<|im_start|>assistant\\n' -}}\n{%- endif -%}\n",
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>",
    ),
    "macros and a namespace": Chat(
        "{% macro turn(m, n) %}{{ '<|im_start|>' + m.role + n | string + '\\n' + m.content + '<|im_end|>' }}{% endmacro %}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ turn(m, ns.n) }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + ns.n | string }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>user1\nhi<|im_end|>\n\n<|im_start|>assistant2\nyo<|im_end|>",
    ),
    "what is generated in a block": Chat(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}\n<|im_start|>{% endif %}",
        "<|im_end|>",
        "<|im_start|>hi<|im_end|>\nyo<|im_end|>",
    ),
}  # fmt: skip

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]

LONG = [*TALK, {"role": "user", "content": "and\nthen? "}, {"role": "assistant", "content": "nothing more"}]


def chat_tokenizer(name, template="<s> $A"):
    """A tokenizer without merges that adds BOS by itself, with one of the templates above."""
    tokenizer = with_template(template)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.chat_template = CHATS[name].template
    return tokenizer


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_ends_with_the_scored_token_and_has_one_bos(name, tmp_path):
    chat, tokenizer = CHATS[name], chat_tokenizer(name)
    set_chat_template(tokenizer)
    end = tokenizer.convert_tokens_to_ids(chat.end)
    assert render(tokenizer, TALK, "x:1") == chat.rendered
    for messages in (TALK, LONG):
        (ids,) = encode(tokenizer, [render(tokenizer, messages, "x:1")], chat=True)
        assert ids[-1] == end != ids[-2] and ids.count(tokenizer.bos_token_id) == chat.bos
        assert ids[:1] == [tokenizer.bos_token_id] or not chat.bos
        assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
        tokenizer.save_pretrained(tmp_path)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert saved.apply_chat_template(messages, return_dict=False) == ids
        set_chat_template(saved)
        assert saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("name", CHATS)
def test_generation_prompts_are_unchanged(name):
    before, after = chat_tokenizer(name), chat_tokenizer(name)
    set_chat_template(after)
    once = after.chat_template
    for messages in (TALK[:1], LONG[:3]):
        options = {"tokenize": False, "add_generation_prompt": True}
        assert after.apply_chat_template(messages, **options) == before.apply_chat_template(messages, **options)
    set_chat_template(after)
    assert after.chat_template == once


def test_a_template_that_already_ends_with_the_scored_token_is_unchanged():
    for name, kept in (("Llama 2", True), ("Llama 3", True), ("ChatML", False), ("no end of a turn", False)):
        tokenizer = chat_tokenizer(name)
        set_chat_template(tokenizer)
        assert (tokenizer.chat_template == CHATS[name].template) == kept


@pytest.mark.parametrize("name", CHATS)
def test_an_overlong_conversation_is_cut_on_the_left_after_bos(name, tmp_path):
    """Up to the whole question "hello" is cut. BOS and the end of the text remain."""
    chat, tokenizer = CHATS[name], chat_tokenizer(name)
    set_chat_template(tokenizer)
    ask = [{"role": "user", "content": "hello"}]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (NINE, ELEVEN))
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": ask, "chosen": chosen, "rejected": rejected}]))
    whole = [encode(tokenizer, [render(tokenizer, ask + side, "")], chat=True)[0] for side in (chosen, rejected)]
    longest, bos = max(map(len, whole)), [tokenizer.bos_token_id] * chat.bos
    for too_much in (-3, 0, 1, 5):
        data = prepare(tokenizer, [path], [path], max_length=longest - too_much, cache_dir=tmp_path)
        cut = max(0, too_much)
        (group,) = data.train
        found = [group["prefix"] + ids for ids in group["completions"]]
        assert found == [bos + ids[len(bos) + cut :] for ids in whole]
        assert data.report["train"][0]["kept, prompt truncated"] == (cut > 0)
        assert tokenizer.decode(found[0]).endswith(NINE + tokenizer.decode(whole[0]).split(NINE)[1])


def test_messages_without_a_template_are_refused_with_a_remedy(characters, tmp_path):
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": TALK, "chosen": NINE, "rejected": ELEVEN}]))
    assert refusal(prepare, characters, [path], cache_dir=tmp_path) == (
        f"{path}:1: chat data, but the tokenizer has no chat template; pass one with --chat_template FILE, or use a chat "
        "model"
    )


def test_messages_that_the_template_refuses_are_named(tmp_path):
    name = "Gemma, which refuses a system role and two questions in a row"
    tokenizer = chat_tokenizer(name)
    set_chat_template(tokenizer)
    system, twice = [{"role": "system", "content": "Be nice."}, *TALK], [TALK[0], *TALK]
    answer = [{"role": "assistant", "content": f"not {NINE}"}]
    for messages, why in ((system, "no system role"), (twice, "roles must alternate")):
        rows = [{"chosen": sides, "rejected": sides[:-1] + answer} for sides in (LONG, messages)]
        rows[0]["chosen"] = [*LONG[:3], {"role": "assistant", "content": NINE}]
        rows[1]["chosen"] = [*messages[:-1], {"role": "assistant", "content": NINE}]
        path = str(write_jsonl(tmp_path / "x.jsonl", rows))
        message = refusal(read_texts, path, tokenizer, "\n", {})
        assert message == f"{path}:2: the chat template rejects these messages ({why})"


@pytest.mark.parametrize(
    "content, why",
    [
        (None, "cannot be read as a Jinja file (No such file or directory"),
        (b"\xff", "cannot be read as a Jinja file ('utf-8' codec can't decode"),
        (b"{% for m in messages %}", "cannot render a question and an answer (Unexpected end of template"),
        (b"{{ messages[5].content }}", "cannot render a question and an answer ("),
    ],
)
def test_an_unusable_chat_template_is_refused(characters, tmp_path, content, why):
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    tokenizer = make_tokenizer(texts=["x"])
    assert refusal(set_chat_template, tokenizer, str(path)).startswith(f"--chat_template {path}: {why}")


# name: (what the tokenizer adds by itself, EOS, BOS, pad token, padding side)
SORTS = {
    "adds nothing": ("$A", "</s>", "<s>", None, "right"),
    "adds BOS": ("<s> $A", "</s>", "<s>", None, "right"),
    "adds BOS and EOS": ("<s> $A </s>", "</s>", "<s>", None, "right"),
    "BOS is EOS": ("</s> $A", "</s>", "</s>", None, "right"),
    "pad is EOS": ("<s> $A", "</s>", "<s>", "</s>", "right"),
    "pads on the left": ("<s> $A", "</s>", "<s>", "<p>", "left"),
}


@pytest.mark.parametrize("kind", ["strings", "ChatML", "Llama 3", "Llama 2", "no end of a turn"])
@pytest.mark.parametrize("sort", SORTS)
def test_the_scored_token_ends_the_answer_for_every_tokenizer_and_length(sort, kind, tmp_path):
    """Texts are short, exactly --max_length long, or cut. Prompt and answer contain EOS. The ids in the batch are checked."""
    template, eos, bos, pad, side = SORTS[sort]
    tokenizer = make_tokenizer(eos=eos, bos=None if bos == eos else bos, pad=None if pad == eos else pad, texts=["x"])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {eos, bos}]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos, bos_token=bos, pad_token=pad, padding_side=side
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    config.save_pretrained(tmp_path / "model")
    if kind != "strings":
        tokenizer.chat_template = CHATS[kind].template
    tokenizer.save_pretrained(tmp_path / "model")
    _, tokenizer = load_config(str(tmp_path / "model"))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)

    prompt, chosen, rejected = "because </s> so?", NINE, f"a b </s> c d f{' g' * 20}"
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if kind != "strings":
        row["prompt"] = [{"role": "user", "content": prompt}]
    path = str(write_jsonl(tmp_path / "x.jsonl", [row]))
    end = tokenizer.convert_tokens_to_ids("</s>" if kind == "strings" else CHATS[kind].end)
    longest = None
    for cut in (-100, 0, 4):
        data = prepare(tokenizer, [path], [path], max_length=(longest or 900) - cut, cache_dir=tmp_path)
        longest = longest or data.report["train"][0]["longest"]
        batch = collate([data.train[0]], row_layout="separate", pad_id=tokenizer.pad_token_id, row_limit=9999)
        assert data.report["train"][0]["kept, prompt truncated"] == (cut > 0)
        for row_of, answer, scored in zip(batch.input_ids, (chosen, rejected), batch.places[:, -1]):
            place = int(scored) % batch.input_ids.shape[1]
            assert row_of[place] == end and (row_of[place + 1 :] == tokenizer.pad_token_id).all()
            text = row_of[: place + 1].tolist()
            assert tokenizer.decode(text[:-1]).rstrip().endswith(answer)
            assert text[-2] != end
            adds = template.startswith(bos) if kind == "strings" else CHATS[kind].bos
            assert not adds or text[0] == tokenizer.bos_token_id != text[1]
