"""Chat templates and texts: how messages, or a prompt and an answer, become one text."""

from pathlib import Path

from minirm.data.schemas import Messages
from minirm.errors import InputError, one_line, refusing


# ---------------------------------------------------------------------------------------------------------------------
# Texts
def set_chat_template(tokenizer, path: str | None = None) -> None:
    """Gives a tokenizer the template in a file, and makes its template end where the reward is read.

    Many templates put a line break behind the token that ends a turn, some put no such token. Here a conversation ends
    with it, or with EOS, so that what `apply_chat_template` gives is what is scored, in any program that loads the
    exported tokenizer. Prompts for generation stay as they are.
    """
    flag = f"--chat_template {path}"
    if path:
        with refusing(f"{flag}: not a Jinja file that can be read", (OSError, UnicodeDecodeError)):
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        return
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, template = tokenizer.apply_chat_template(turns, tokenize=False), tokenizer.get_chat_template()
    except Exception as error:  # noqa: BLE001 - whatever Jinja code can raise
        if not path:
            return  # an error where messages come up
        raise InputError(f"{flag}: cannot render a question and an answer ({one_line(error)})") from None
    ids = tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
    ends = bool(ids) and ids[-1] in special_ids(tokenizer)
    if ends and text == text.rstrip():
        return
    # The plus signs keep the whitespace that Jinja, as transformers sets it up, would take away beside a block. It does
    # so with the last line break of a template.
    tokenizer.chat_template = (
        "{% set minirm_text +%}" + template.removesuffix("\n") + "{%+ endset %}{{ minirm_text if add_generation_prompt "
        "else " + ("minirm_text.rstrip()" if ends else "minirm_text + eos_token") + " }}"
    )


def special_ids(tokenizer) -> set[int]:
    """Ids that can end a turn: EOS and all other special tokens."""
    return {tokenizer.eos_token_id} | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def render(tokenizer, messages: Messages, where: str) -> str:
    """Messages by the chat template. Raises InputError if there is none, or if it refuses them."""
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: messages, but the tokenizer has no chat template; give one with --chat_template FILE, or use a "
            "model that has been trained to chat"
        )
    with refusing(f"{where}: the chat template refuses these messages"):  # whatever Jinja code can raise
        return tokenizer.apply_chat_template(messages, tokenize=False)


def unescaped(text: str) -> str:
    r"""A separator as it is typed on a command line, with \n and \t."""
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def join(prompt: str, answer: str, separator: str) -> str:
    """Prompt and answer as one text, the separator between them unless whitespace already stands there."""
    if not prompt or not answer or prompt[-1].isspace() or answer[0].isspace():
        return prompt + answer
    return prompt + separator + answer
