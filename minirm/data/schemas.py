"""Preference data as it is published: which columns mean what.

A schema is recognised from the columns of the first row, and every row becomes an Example. To add one, write a function
of a few lines, row -> Example, and enter it in SCHEMAS. An InputError it raises is shown with file and line.
"""

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from minirm.errors import InputError, shown

Messages = list[dict[str, str]]  # [{"role": "user", "content": "..."}, ...]


class Example(NamedTuple):
    """A prompt, its completions, and which of them was preferred to which. Texts are strings or lists of messages."""

    prompt: str | Messages
    completions: list[str] | list[Messages]
    pairs: list[tuple[int, int, float]]  # (chosen, rejected, margin or 0), the first two indices into completions
    ties: int = 0  # comparisons without a preference
    labelled: bool = True  # False: the order of the completions is taken for their ranking, nothing else tells it
    separator: str | None = None  # between prompt and completion; None: --separator
    subset: str = ""


class Schema(NamedTuple):
    name: str
    columns: str  # all of them must be there; | separates other names for one
    read: Callable[[dict], Example]


def recognise(row: dict) -> Schema:
    """The schema of a file by its first row, with the names of its columns there. InputError if none fits, or two."""
    fits = [s for s in SCHEMAS if all(set(column.split("|")) & row.keys() for column in s.columns.split())]
    if not fits:
        missing = "chosen" if "chosen" not in row else "rejected"
        raise InputError(
            f"no column '{missing}'; expected prompt (optional), chosen, rejected, or the columns of another schema that "
            f"README names; found {', '.join(map(str, row)) or 'none'}"
        )
    if len(fits) > 1:
        both = " as well as ".join(f"{s.name} ({', '.join(s.columns.split()).replace('|', ' or ')})" for s in fits)
        raise InputError(f"the columns fit {both}; leave out those of one of them")
    return fits[0]._replace(columns=" ".join(_name(row, *c.split("|")) for c in fits[0].columns.split()))


def to_example(schema: Schema, row: dict) -> Example:
    """Raises InputError for a column that is missing or holds what it should not."""
    if gone := [column for column in schema.columns.split() if column not in row]:
        raise InputError(f"no column '{gone[0]}', which the first row has; found {', '.join(map(str, row)) or 'none'}")
    example = schema.read(row)
    return example if row.get("subset") is None else example._replace(subset=_string(str(row["subset"]), "subset"))


def describe(schema: Schema, row: dict) -> str:
    """What is printed at start: the schema, and what its texts are where that is not a matter of columns."""
    if schema.read is chosen_rejected:
        kind = "transcripts" if _is_transcript(row) else "texts" if isinstance(row["chosen"], str) else "messages"
        return f"{kind} in chosen and rejected"
    return f"{schema.name} by {schema.columns.split()[-1]}" if schema.read is safe_rlhf else schema.name


# ---------------------------------------------------------------------------------------------------------------------
# One function a schema
def chosen_rejected(row: dict) -> Example:
    prompt, chosen, rejected = _text(row, "prompt", optional=True), _text(row, "chosen"), _text(row, "rejected")
    margin = _number(row, "margin", low=0, optional=True)
    if row.get("score_chosen") is not None and row.get("score_chosen") == row.get("score_rejected"):
        margin = 0.0  # ultrafeedback_binarized: equal scores are a tie
    if not _is_transcript(row):
        return _comparison(prompt, [chosen, rejected], margin)
    # Whole transcripts (hh-rlhf) are split at the last turn of the assistant that begins before the two sides part.
    part = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    end = chosen.rfind(TURN, 0, part) + len(TURN) if TURN in chosen[:part] else 0
    return _comparison(chosen[:end], [chosen[end:], rejected[end:]], margin)._replace(separator="")


def summarize_from_feedback(row: dict) -> Example:
    """Written as in openai_summarize_comparisons, answers from "TL;DR:" on, so that one model serves both."""
    info, summaries = row["info"], row["summaries"]
    if not (isinstance(info, dict) and isinstance(summaries, list) and [type(s) for s in summaries] == [dict, dict]):
        raise InputError("expected an object in 'info' and two objects with a 'text' in 'summaries'")
    if info.get("post"):
        lines = {"SUBREDDIT: r/": "subreddit", "TITLE: ": "title", "POST: ": "post"}
        prompt = "\n".join(start + _text(info, column) for start, column in lines.items() if info.get(column))
    else:
        prompt = f"Article: {_text(info, 'article')}"
    answers = [f"TL;DR: {_text(summary, 'text').strip()}" for summary in summaries]
    return _comparison(prompt, answers, better=_choice(row, "choice"))


def helpsteer(row: dict) -> Example:
    """Negative: the first answer is the better one; the magnitude is the margin."""
    answers = [_text(row, _name(row, f"response_{n}", f"response{n}")) for n in (1, 2)]
    strength = _number(row, _name(row, "preference_strength", "overall_preference"), low=-3, high=3)
    prompt = _text(row, _name(row, "prompt", "context"), optional=True)
    return _comparison(prompt, answers, abs(strength), better=int(strength > 0))


def shp(row: dict) -> Example:
    """The margin is the logarithm of the ratio of votes."""
    ratio = _number(row, "score_ratio", low=1, optional=True)
    answers = [_text(row, "human_ref_A"), _text(row, "human_ref_B")]
    margin = None if ratio is None else math.log(ratio)
    return _comparison(_text(row, "history"), answers, margin, better=1 - _choice(row, "labels"))


def safe_rlhf(row: dict) -> Example:
    better = _choice(row, _name(row, "better_response_id", "safer_response_id"))
    return _comparison(_text(row, "prompt"), [_text(row, "response_0"), _text(row, "response_1")], better=better)


def arena(row: dict) -> Example:
    """Conversations or answers, as JSON in strings or not; the winner by name or in a column for each outcome."""
    kind = "conversation" if "conversation_a" in row else "response"
    columns = (f"{kind}_a", f"{kind}_b")
    prompt, *sides = ("" if kind == "conversation" else _list(row, "prompt"), *(_list(row, c) for c in columns))
    if isinstance(prompt, list):  # a question a turn
        prompt, sides = "", [_turns(prompt, side) for side in sides]
    prompt, *sides = (_text({c: text}, c) for c, text in zip(("prompt", *columns), (prompt, *sides)))
    outcomes = ("model_a", "model_b", "tie")
    marked = (outcome for outcome in outcomes if str(row.get(f"winner_{outcome}")) in ("1", "1.0", "True"))
    winner = row.get("winner") or next(marked, None)
    if winner in outcomes[:2]:
        return _comparison(prompt, sides, better=outcomes.index(winner))
    if str(winner).startswith("tie") or winner == "both_bad":
        return _comparison(prompt, sides, 0.0)
    raise InputError(f"'winner' must be model_a, model_b or a tie, got {shown(winner)}")


def ranked(row: dict) -> Example:
    """Every ordered pair. Best first, unless there are `scores` (higher is better) or a `rank` (1 is the best)."""
    texts = _list(row, "completions")
    column = next((name for name in ("scores", "rank") if row.get(name) not in (None, "")), None)
    if not isinstance(texts, list) or not texts:
        raise InputError(f"'completions' must be a list of answers, got {shown(texts)}")
    values = _list(row, column) if column else range(len(texts))
    if column and (not isinstance(values, list) or len(values) != len(texts)):
        raise InputError(f"'{column}' must be a list of {len(texts)} numbers, one a completion, got {shown(values)}")
    if column:
        values = [(1 if column == "rank" else -1) * _number({column: value}, column) for value in values]
    pairs = [(i, j, 0.0) for i, a in enumerate(values) for j, b in enumerate(values) if a < b]
    ties = len(texts) * (len(texts) - 1) // 2 - len(pairs)
    texts = [_text({"completions": text}, "completions") for text in texts]
    return _conversation(Example(_text(row, "prompt", optional=True), texts, pairs, ties, column is not None))


SCHEMAS = [
    Schema("chosen and rejected", "chosen rejected", chosen_rejected),
    Schema("summarize_from_feedback", "info summaries choice", summarize_from_feedback),
    Schema("HelpSteer", "prompt|context response_1|response1 response_2|response2 "
                        "preference_strength|overall_preference", helpsteer),
    Schema("SHP", "history human_ref_A human_ref_B labels", shp),
    Schema("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id|safer_response_id", safe_rlhf),
    Schema("lmarena conversations", "conversation_a conversation_b winner|winner_model_a", arena),
    Schema("lmarena responses", "prompt response_a response_b winner|winner_model_a", arena),
    Schema("ranked completions", "prompt completions", ranked),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What they have in common
TURN = "\n\nAssistant:"


def _is_transcript(row: dict) -> bool:
    return not row.get("prompt") and all(
        isinstance(side, str) and side.lstrip().startswith("Human:") and TURN in side
        for side in (row["chosen"], row["rejected"])
    )


def _comparison(prompt, completions: list, margin: float | None = None, better: int = 0) -> Example:
    """Of two completions; `better` is the index of the chosen one. A margin of 0 is a tie."""
    pairs = [] if margin == 0 else [(better, 1 - better, margin or 0.0)]
    return _conversation(Example(prompt, completions, pairs, ties=1 - len(pairs)))


def _conversation(example: Example) -> Example:
    """Where there are messages, the prompt is all that comes before the sides part; else nothing changes."""
    prompt, sides = example[:2]
    if isinstance(prompt, str) and {*map(type, sides)} == {str}:
        return example
    sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
    most = min(map(len, sides)) - 1  # something is left to score
    lead = next((i for i in range(most) if any(side[i] != sides[0][i] for side in sides)), most)
    shared = sides[0][:lead]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    # The prompt may stand in the messages once more: all of it anywhere, or its last turns at their beginning.
    turns, later = ([(m["role"], m["content"].strip()) for m in part] for part in (prompt, shared))
    if all(later[i : i + len(turns)] != turns for i in range(len(later) + 1)):
        again = max(k for k in range(len(turns) + 1) if turns[len(turns) - k :] == later[:k])
        if not again and prompt[-1]["role"] == sides[0][0]["role"] == "user":
            raise InputError("'prompt' is another question than the one the messages begin with; leave one of them out")
        shared = prompt + shared[again:]
    return example._replace(prompt=shared, completions=[side[lead:] for side in sides])


def _name(row: dict, *names: str) -> str:
    """Which of the names for one column the row has."""
    return next((name for name in names if name in row), names[0])


def _text(row: dict, column: str, optional: bool = False) -> str | Messages:
    """A string, or a list of messages with role and content. Raises InputError for anything else."""
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        return _string(value, column)
    if not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"'{column}' must be a string or a list of messages with role and content, got {shown(value)}")
    return [
        {"role": _string(m.get("role"), f"{column}: role"), "content": _content(m.get("content"), f"{column}: content")}
        for m in value
    ]


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"'{column}' must be a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise InputError(f"'{column}' is not valid Unicode ({error})") from None
    return value


def _content(value: Any, column: str) -> str:
    """Of a message: a string, or a list of parts of type text."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_string(part.get("text"), column) for part in value)
    return _string(value, column)


def _number(row: dict, column: str, low=-math.inf, high=math.inf, optional: bool = False) -> float | None:
    value = row.get(column)
    if optional and value in (None, ""):
        return None
    try:
        number = float(None if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"'{column}' must be a number, got {shown(value)}") from None
    if not (low <= number <= high and math.isfinite(number)):
        raise InputError(f"'{column}' must lie in {low}..{high}, got {number}")
    return number


def _choice(row: dict, column: str) -> int:
    if str(row.get(column)) not in ("0", "1"):
        raise InputError(f"'{column}' must be 0 or 1, got {shown(row.get(column))}")
    return int(row[column])


def _list(row: dict, column: str) -> Any:
    """What stands in a column, which may be a list as JSON in a string."""
    value = row.get(column)
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
