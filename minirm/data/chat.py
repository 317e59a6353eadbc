"""Chat templates and texts: turn messages, or a prompt and an answer, into one text."""

from pathlib import Path

from minirm.data.schemas import Messages
from minirm.errors import InputError, one_line, refusing


def set_chat_template(tokenizer, path: str | None = None) -> None:
    """Load a chat template from a file if there is one, and make the tokenizer's template end at the scored token.

    Many templates add a line break after the end-of-turn token; some add no such token. Here a conversation ends with
    that token, or else with EOS, so that any program that loads the exported tokenizer scores exactly what
    `apply_chat_template` returns. Prompts for generation stay unchanged.
    """
    flag = f"--chat_template {path}"
    if path:
        with refusing(f"{flag}: cannot be read as a Jinja file", (OSError, UnicodeDecodeError)):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, template = tokenizer.apply_chat_template(turns, tokenize=False), tokenizer.get_chat_template()
    except Exception as error:  # noqa: BLE001 - Jinja code can raise anything
        if not path:
            return  # `render` reports it if the data has messages
        raise InputError(f"{flag}: cannot render a question and an answer ({one_line(error)})") from None
    ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    ends = bool(ids) and ids[-1] in special_ids(tokenizer)
    if ends and text == text.rstrip():
        return
    # transformers' Jinja strips whitespace next to a block, except at a plus sign, and a template's last line break.
    tokenizer.chat_template = (
        "{% set minirm_text +%}" + template.removesuffix("\n") + "{%+ endset %}{{ minirm_text if add_generation_prompt "
        "else " + ("minirm_text.rstrip()" if ends else "minirm_text + eos_token") + " }}"
    )


def special_ids(tokenizer) -> set[int]:
    """Ids of the tokens that can end a turn: EOS and all other special tokens."""
    return {tokenizer.eos_token_id} | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def render(tokenizer, messages: Messages, where: str) -> str:
    """Render messages with the chat template. Raises InputError if there is none, or if it rejects them."""
    if not messages:
        return ""
    if not tokenizer.chat_template:
        advice = "pass one with --chat_template FILE, or use a chat model"
        raise InputError(f"{where}: chat data, but the tokenizer has no chat template; {advice}")
    with refusing(f"{where}: the chat template rejects these messages"):  # Jinja code can raise anything
        return tokenizer.apply_chat_template(messages, tokenize=False)


def unescaped(text: str) -> str:
    r"""Replace \n and \t in a separator typed on the command line."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def join(prompt: str, answer: str, separator: str) -> str:
    """Join prompt and answer into one text, with the separator in between unless there is whitespace already."""
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    return prompt + separator + answer
