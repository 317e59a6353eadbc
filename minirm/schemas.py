"""Preference data as it is published: which columns mean what.

A schema is recognised from the columns of the first row, and every row becomes an Example. To add one, write a function
of a few lines, row -> Example, and enter it in SCHEMAS. An InputError it raises is shown with file and line.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from minirm.sources import InputError, shown

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]


class Example(NamedTuple):
    """A prompt, its completions, and which of them was preferred to which. Texts are strings or lists of messages."""

    prompt: str | Messages
    completions: list[str] | list[Messages]
    pairs: list[tuple[int, int, float | None]]  # (chosen, rejected, margin), the first two indices into completions
    ties: int = 0  # comparisons without a preference
    labelled: bool = True  # False: the order of the completions is taken for their ranking, nothing else tells it


class Schema(NamedTuple):
    name: str
    columns: str  # all of them must be there; | separates other names for one
    convert: Callable[[dict], Example]


def recognise(row: Any) -> Schema:
    """The schema of a file by its first row. Raises InputError if none fits, or two."""
    if not isinstance(row, dict):
        raise InputError(f"expected an object with the columns chosen and rejected, got {shown(row)}")
    fits = [s for s in SCHEMAS if all(set(column.split("|")) & row.keys() for column in s.columns.split())]
    if not fits:
        missing = "chosen" if "chosen" not in row else "rejected"
        raise InputError(
            f"no column '{missing}'; expected prompt (optional), chosen, rejected, or the columns of another schema that "
            f"README names; found {', '.join(map(str, row)) or 'none'}"
        )
    if len(fits) > 1:
        both = " as well as ".join(f"{schema.name} ({', '.join(schema.columns.split())})" for schema in fits)
        raise InputError(f"the columns fit {both}; leave out those of one of them")
    return fits[0]


def describe(schema: Schema, row: dict) -> str:
    """What is printed at start: the schema, and what its texts are where that is not a matter of columns."""
    if schema.convert is chosen_rejected:
        if not isinstance(row["chosen"], str):
            return "messages in chosen and rejected"
        return "transcripts in chosen and rejected" if _is_transcript(row) else schema.name
    if schema.convert is safe_rlhf:
        return f"{schema.name} by {_first(row, 'better_response_id', 'safer_response_id')[0]}"
    return schema.name


# ---------------------------------------------------------------------------------------------------------------------
# One function a schema


def chosen_rejected(row: dict) -> Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    margin = None if row.get("margin") in (None, "") else _number(row, "margin")
    if margin is not None and margin < 0:
        raise InputError(f"'margin' must be finite and not negative, got {margin}; swap the two answers")
    if _is_transcript(row):
        return _comparison(*_split_transcripts(chosen, rejected), margin)
    if row.get("score_chosen") is not None and row.get("score_chosen") == row.get("score_rejected"):
        margin = 0.0  # ultrafeedback_binarized: equal scores are a tie
    return _comparison(_text(row, "prompt", optional=True), [chosen, rejected], margin)


def summarize_from_feedback(row: dict) -> Example:
    """The prompt is written as in openai_summarize_comparisons, so that one model serves both."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise InputError("expected an object in 'info' and two objects with a 'text' in 'summaries'")
    if info.get("post"):
        head = [f"SUBREDDIT: r/{info['subreddit']}"] if info.get("subreddit") else []
        head += [f"TITLE: {info['title']}"] if info.get("title") else []
        prompt = "\n".join([*head, f"POST: {_text(info, 'post')}", "TL;DR:"])
    else:
        prompt = f"Article: {_text(info, 'article')}\nTL;DR:"
    texts = [_text(summary, "text") for summary in summaries]
    return _comparison(prompt, _in_order(texts, first=_choice(row, "choice", 0, 1) == 0))


def helpsteer(row: dict) -> Example:
    """Negative: the first answer is the better one; the magnitude is the margin."""
    _, prompt = _first(row, "prompt", "context")
    answers = [_text(row, _first(row, f"response_{n}", f"response{n}")[0]) for n in (1, 2)]
    strength = _number(row, _first(row, "preference_strength", "overall_preference")[0])
    prompt = _text({"prompt": prompt}, "prompt", optional=True)
    return _comparison(prompt, _in_order(answers, first=strength < 0), abs(strength))


def shp(row: dict) -> Example:
    """The margin is the logarithm of the ratio of votes."""
    answers = [_text(row, "human_ref_A"), _text(row, "human_ref_B")]
    ratio = None if row.get("score_ratio") is None else _number(row, "score_ratio")
    if ratio is not None and ratio < 1:
        raise InputError(f"'score_ratio' must be 1 or more, got {ratio}")
    margin = None if ratio is None else math.log(ratio)
    return _comparison(_text(row, "history"), _in_order(answers, first=_choice(row, "labels", 0, 1) == 1), margin)


def safe_rlhf(row: dict) -> Example:
    column, _ = _first(row, "better_response_id", "safer_response_id")
    answers = [_text(row, "response_0"), _text(row, "response_1")]
    return _comparison(_text(row, "prompt"), _in_order(answers, first=_choice(row, column, 0, 1) == 0))


def arena(row: dict) -> Example:
    """Conversations or answers, as JSON in strings or not; the winner by name or in a column for each outcome."""
    if "conversation_a" in row:
        prompt, columns = "", ("conversation_a", "conversation_b")
        sides = [_parsed(row.get(column)) for column in columns]
    else:
        prompt, columns = _parsed(row.get("prompt")), ("response_a", "response_b")
        sides = [_parsed(row.get(column)) for column in columns]
        if isinstance(prompt, list):  # a question a turn
            prompt, sides = "", [_turns(prompt, side) for side in sides]
    sides = [_text({column: side}, column) for column, side in zip(columns, sides)]
    if "winner" in row:
        winner = str(row["winner"])
    else:
        winner = next(
            (name for name in ("model_a", "model_b", "tie") if row.get(f"winner_{name}") in (1, "1", True)), "none"
        )
    if winner in ("model_a", "model_b"):
        return _comparison(prompt, _in_order(sides, first=winner == "model_a"))
    if "tie" in winner or winner == "both_bad":
        return _comparison(prompt, sides)._replace(pairs=[], ties=1)
    raise InputError(f"the winner must be model_a, model_b or a tie, got {shown(winner)}")


def ranked(row: dict) -> Example:
    """Every ordered pair. Best first, unless there are `scores` (higher is better) or a `rank` (1 is the best)."""
    if not isinstance(row["completions"], list) or not row["completions"]:
        raise InputError(f"'completions' must be a list of answers, got {shown(row['completions'])}")
    texts = [_text({"completions": text}, "completions") for text in row["completions"]]
    column = next((name for name in ("scores", "rank") if row.get(name) is not None), None)
    values = row[column] if column else range(len(texts))
    if column and (not isinstance(values, list) or len(values) != len(texts)):
        raise InputError(f"'{column}' must be a list of {len(texts)} numbers, one a completion, got {shown(values)}")
    if column:
        sign = -1 if column == "scores" else 1
        values = [sign * _number({column: value}, column) for value in values]
    pairs = [(i, j, None) for i, a in enumerate(values) for j, b in enumerate(values) if a < b]
    ties = len(texts) * (len(texts) - 1) // 2 - len(pairs)
    return _conversation(Example(_text(row, "prompt", optional=True), texts, pairs, ties, column is not None))


SCHEMAS = [
    Schema("chosen and rejected", "chosen rejected", chosen_rejected),
    Schema("summarize_from_feedback", "info summaries choice", summarize_from_feedback),
    Schema(
        "HelpSteer",
        "prompt|context response_1|response1 response_2|response2 preference_strength|overall_preference",
        helpsteer,
    ),
    Schema("SHP", "history human_ref_A human_ref_B labels", shp),
    Schema("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id|safer_response_id", safe_rlhf),
    Schema("lmarena conversations", "conversation_a conversation_b winner|winner_model_a", arena),
    Schema("lmarena responses", "prompt response_a response_b winner|winner_model_a", arena),
    Schema("ranked completions", "prompt completions", ranked),
]


# ---------------------------------------------------------------------------------------------------------------------
# What they have in common


def _comparison(prompt, completions, margin: float | None = None) -> Example:
    """Of two completions, the chosen one first. A margin of 0 is a tie."""
    pairs = [] if margin == 0 else [(0, 1, margin)]
    return _conversation(Example(prompt, completions, pairs, ties=1 - len(pairs)))


def _conversation(example: Example) -> Example:
    """Where completions are messages, the prompt is all that comes before the sides part; else nothing changes."""
    prompt, sides, *_ = example
    if isinstance(prompt, str) and all(isinstance(side, str) for side in sides):
        return example
    sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
    most = min(map(len, sides)) - 1  # something is left to score
    lead = next((i for i in range(most) if any(side[i] != sides[0][i] for side in sides)), most)
    shared = sides[0][:lead]
    if isinstance(prompt, list):
        repeated = sides[0][: len(prompt)] == prompt
    else:
        repeated = not prompt or any(message["content"].strip() == prompt.strip() for message in shared)
        prompt = [{"role": "user", "content": prompt}]
    return example._replace(prompt=shared if repeated else prompt + shared, completions=[side[lead:] for side in sides])


def _is_transcript(row: dict) -> bool:
    return not row.get("prompt") and all(
        isinstance(row[side], str) and row[side].lstrip().startswith("Human:") and "\n\nAssistant:" in row[side]
        for side in ("chosen", "rejected")
    )


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Whole transcripts are split at the last turn of the assistant that begins before the two sides part."""
    part = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    turn = "\n\nAssistant:"
    start = chosen.rfind(turn, 0, part + 1)
    end = max(0, start) + len(turn) if start >= 0 else 0
    # The space behind the colon goes to the answers, so that putting the two together again changes nothing.
    if start >= 0 and not all(side[end : end + 1].isspace() for side in (chosen, rejected)):
        end = start
    return chosen[:end], [chosen[end:], rejected[end:]]


def _in_order(texts: list, first: bool) -> list:
    return texts if first else texts[::-1]


def _first(row: dict, *names: str) -> tuple[str, Any]:
    """The first of the columns that the row has, and what stands in it."""
    name = next((name for name in names if row.get(name) is not None), names[0])
    return name, row.get(name)


def _text(row: dict, column: str, optional: bool = False) -> str | Messages:
    """A string, or a list of messages with role and content. Raises InputError for anything else."""
    if column not in row and not optional:
        found = ", ".join(str(name) for name in row) or "none"
        raise InputError(f"no column '{column}'; found {found}")
    value = row.get(column)
    if value is None and optional:
        return ""
    if isinstance(value, list) and value and all(isinstance(m, dict) for m in value):
        return [{"role": _string(m.get("role"), "role"), "content": _content(m.get("content"))} for m in value]
    if isinstance(value, list):
        raise InputError(f"'{column}' must be a string or a list of messages with role and content, got {shown(value)}")
    return _string(value, column)


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"'{column}' must be a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise InputError(f"'{column}' is not valid Unicode ({error})") from None
    return value


def _content(value: Any) -> str:
    """Of a message: a string, or a list of parts of type text."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_string(part.get("text"), "text") for part in value)
    return _string(value, "content")


def _number(row: dict, column: str) -> float:
    value = row.get(column)
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"'{column}' must be a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise InputError(f"'{column}' must be finite and not negative, got {number}" if column == "margin" else
                         f"'{column}' must be finite, got {number}")  # fmt: skip
    return number


def _choice(row: dict, column: str, *allowed: int) -> int:
    value = row.get(column)
    if str(value) not in map(str, allowed) or isinstance(value, bool):
        raise InputError(f"'{column}' must be {' or '.join(map(str, allowed))}, got {shown(value)}")
    return int(value)


def _parsed(value: Any) -> Any:
    """lmarena keeps lists as JSON in strings."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            pass  # a text that begins with a bracket
    return value


def _turns(questions: list, answers: Any) -> Messages:
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise InputError(f"{len(questions)} questions in 'prompt' need as many answers, got {shown(answers)}")
    roles = ("user", "assistant")
    return [{"role": r, "content": text or ""} for turn in zip(questions, answers) for r, text in zip(roles, turn)]
