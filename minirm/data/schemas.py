"""Schemas of published preference data: which column means what.

A schema is recognised by the columns of the first row, and every row becomes an Example. To add one, write a function
of a few lines, row -> Example, and add it to SCHEMAS. Its InputErrors get file and line in front. Columns that no
schema knows are mapped on the command line: --columns prompt=question chosen=response_j rejected=response_k.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from minirm.errors import InputError, shown

Messages = list[dict[str, Any]]  # [{"role": "user", "content": "..."}, ...], tool calls as chat templates expect them
# Names that --columns accepts, and common names of the prompt, so that a prompt under another name is not lost.
NAMES = ("prompt", "chosen", "rejected", "margin", "subset", "completions", "scores", "rank", "response", "score",
         "system")  # fmt: skip
PROMPTS = ("question", "instruction", "query", "context", "history", "post", "problem", "user_prompt", "task", "input",
           "messages", "conversation", "conversations")  # fmt: skip


class Example(NamedTuple):
    """A prompt, its completions, and the preferences between them. Texts are strings or lists of messages."""

    prompt: str | Messages
    completions: list[str] | list[Messages]
    pairs: list[tuple[int, int, float]]  # (chosen, rejected, margin or 0), the first two indices into completions
    ties: int = 0  # comparisons without a preference
    labelled: bool = True  # False: only the order of the completions gives their ranking
    separator: str | None = None  # between prompt and completion; None: --separator
    subset: str = ""
    id: str = ""  # row id, if a benchmark needs it
    odd: str = ""  # why its comparisons are not worth training on, such as ODD_PROMPTS


class Schema(NamedTuple):
    name: str
    columns: str  # required columns; | separates alternative names
    read: Callable[[dict], Example]
    optional: str = "prompt"  # columns that are used if present, besides subset and system
    prompt: str = ""  # one or two columns that hold the prompt if it has another name


def column(text: str) -> str:
    """Check one word of --columns, such as prompt=question, and return it. Raises InputError if it is invalid."""
    name, _, path = text.partition("=")
    if name not in NAMES or not path:
        expected = f"NAME=COLUMN, where NAME is one of {', '.join(NAMES)}, as in prompt=question"
        raise InputError(f"--columns {text}: expected {expected}")
    return text


def renames(words: list[str]) -> dict[str, str]:
    """{"prompt": "question"} from the words of --columns."""
    return dict(word.split("=", 1) for word in words)


def rename(row: dict, columns: dict[str, str]) -> dict:
    """Rename columns of a row. columns: {minirm's name: the row's}; a dot accesses a nested field, "info.post"."""
    renamed = {}
    for name, path in columns.items():
        value: Any = row
        for key in [path] if path in row else path.split("."):
            if not isinstance(value, dict) or key not in value:
                raise InputError(f"--columns {name}={path}: no column '{path}'; found {_columns(row)}")
            value = value[key]
        renamed[name] = value
    used = {path.partition(".")[0] for path in columns.values()}
    return {key: value for key, value in row.items() if key not in used} | renamed


def _columns(row: dict) -> str:
    return ", ".join(map(str, row)) or "none"


def recognise(row: dict) -> Schema:
    """A file's schema by its first row, with the columns used there. Raises InputError if none or several match."""
    fits = [s for s in SCHEMAS if all(set(column.split("|")) & row.keys() for column in s.columns.split())]
    columns = [[_name(row, *c.split("|")) for c in s.columns.split()] for s in fits]
    # Prefer a schema that requires all of another's columns and more.
    fits = [(s, mine) for s, mine in zip(fits, columns) if not any({*mine} < {*other} for other in columns)]
    if not fits:
        missing = "chosen" if "chosen" not in row else "rejected"
        expected = "expected chosen, rejected and optionally prompt, or another format in README.md"
        advice = "map other names with --columns prompt=NAME chosen=NAME rejected=NAME"
        raise InputError(f"no column '{missing}'; {expected}; found {_columns(row)}; {advice}")
    if len(fits) > 1:
        both = " and ".join(f"{s.name} ({', '.join(s.columns.split()).replace('|', ' or ')})" for s, _ in fits)
        raise InputError(f"the columns match several schemas: {both}; remove the columns of all but one")
    ((schema, used),) = fits
    return schema._replace(columns=" ".join(used), prompt=_prompt_column(schema, row))


def _prompt_column(schema: Schema, row: dict) -> str:
    """The columns that hold the prompt under another name, or "". Raises InputError if several could be the prompt."""
    if "prompt" not in schema.optional.split() or row.get("prompt"):
        return ""
    sides = [row.get(side) for side in schema.columns.split() if side != "prompt"]
    if any(isinstance(side, list) and len(side) > 1 and isinstance(side[0], dict) for side in sides):
        return ""  # conversations contain their prompt
    if schema.read is chosen_rejected and _is_transcript(row):
        return ""
    known = {"prompt", *PROMPTS}
    found = [name for name, of in row.items() if str(name).lower() in known and isinstance(of, (str, list)) and of]
    if sorted(found) == ["input", "instruction"] or (found == ["instruction"] and "input" in row):
        return "instruction input"
    if len(found) > 1:
        sides = "".join(f" {side}={side}" for side in ("chosen", "rejected") if side in row)
        advice = f"choose one, as in --columns prompt={found[0]}{sides}"
        raise InputError(f"no column 'prompt', and several could be the prompt: {', '.join(found)}; {advice}")
    return "".join(found)


def to_example(schema: Schema, row: dict) -> Example:
    """Convert a row. Raises InputError for a column that is missing or has invalid content."""
    if gone := [column for column in schema.columns.split() if column not in row]:
        raise InputError(f"no column '{gone[0]}', which the first row has; found {_columns(row)}")
    advice = "put all prompts into one column and name it with --columns prompt=NAME"
    if schema.prompt:
        if row.get("prompt"):
            theirs = schema.prompt.split()[0]
            raise InputError(f"a prompt in 'prompt', but the first row has its prompt in '{theirs}'; {advice}")
        texts = [row[name] for name in schema.prompt.split() if row.get(name)]
        prompt = texts[0] if len(texts) == 1 else "\n".join(_string(text, schema.prompt) for text in texts)
        row = row | {"prompt": prompt}
    elif other := _prompt_column(schema, row):
        raise InputError(f"a prompt in '{other.split()[0]}' but none in 'prompt', unlike the first row; {advice}")
    example = _with_system(schema.read(row), row.get("system"))
    return example if row.get("subset") is None else example._replace(subset=_string(str(row["subset"]), "subset"))


def _with_system(example: Example, system: Any) -> Example:
    """Prepend a system prompt from its own column to the prompt, as a message or as text."""
    prompt = example.prompt
    if system in (None, ""):
        return example
    if isinstance(prompt, str):
        between = "" if prompt[:1].isspace() else "\n"
        return example._replace(prompt=_string(system, "system") + between + prompt)
    if any(message["role"] == "system" for message in prompt):
        if prompt[0]["content"].strip() == _string(system, "system").strip():
            return example
        raise InputError("'system' differs from the system message in the conversation; remove one of them")
    return example._replace(prompt=[{"role": "system", "content": _string(system, "system")}, *prompt])


def describe(schema: Schema, row: dict) -> str:
    """The schema's name for the report, with the kind of its texts if the columns do not determine it."""
    if schema.read is chosen_rejected:
        if isinstance(row["chosen"], list) and row["chosen"] and isinstance(row["chosen"][0], str):
            return "answers in lists"
        kind = "texts" if isinstance(_text(row, "chosen"), str) else "messages"
        return f"{'transcripts' if _is_transcript(row) else kind} in chosen and rejected"
    return f"{schema.name} by {schema.columns.split()[-1]}" if schema.read is safe_rlhf else schema.name


def used_columns(schema: Schema, row: dict) -> tuple[list[str], list[str]]:
    """(columns that are used, text columns that are not) in the first row."""
    known = {*schema.columns.split(), *schema.optional.split(), *schema.prompt.split(), "subset", "system"}
    used = [name for name in row if name in known and row[name] is not None]
    text = lambda value: isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict))
    return used, [name for name, value in row.items() if name not in known and value and text(value)]


# -- One function per schema. -----------------------------------------------------------------------------------------
def chosen_rejected(row: dict) -> Example:
    if all(isinstance(of, list) and of and isinstance(of[0], str) for of in (row["chosen"], row["rejected"])):
        return answer_lists(row)
    prompt, chosen, rejected = _text(row, "prompt", optional=True), _text(row, "chosen"), _text(row, "rejected")
    margin = _number(row, "margin", low=0, optional=True)
    if row.get("score_chosen") is not None and row.get("score_chosen") == row.get("score_rejected"):
        margin = 0.0  # ultrafeedback_binarized: equal scores are a tie
    if not _is_transcript(row):
        return _comparison(prompt, [chosen, rejected], margin)
    # Split whole transcripts (hh-rlhf) at the last assistant turn that begins before the two sides diverge.
    part = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    end = chosen.rfind(TURN, 0, part) + len(TURN) if TURN in chosen[:part] else 0
    sides = [chosen[end:], rejected[end:]]
    asked = [re.findall(r"(?:^|\n\n)Human:(.*?)(?=\n\nAssistant:|$)", side, re.DOTALL) for side in sides]
    odd = ODD_PROMPTS if asked[0] != asked[1] else ""
    if any("\n\nHuman:" in side and TURN not in side[side.rfind("\n\nHuman:") :] for side in sides):
        odd = ODD_END
    return _comparison(chosen[:end], sides, margin)._replace(separator="", odd=odd)


def summarize_from_feedback(row: dict) -> Example:
    """Format texts as in openai_summarize_comparisons, with answers after "TL;DR:", so that one model fits both."""
    info, summaries = row["info"], row["summaries"]
    if not (isinstance(info, dict) and isinstance(summaries, list) and [type(s) for s in summaries] == [dict, dict]):
        raise InputError("expected an object in 'info' and two objects with a 'text' in 'summaries'")
    if info.get("post"):
        lines = {"SUBREDDIT: r/": "subreddit", "TITLE: ": "title", "POST: ": "post"}
        prompt = "\n".join(start + _text(info, column) for start, column in lines.items() if info.get(column))
    else:
        prompt = f"Article: {_text(info, 'article')}"
    answers = [f"TL;DR: {_text(summary, 'text').strip()}" for summary in summaries]
    return _comparison(prompt, answers, better=_choice(row, "choice", "0", "1"))


def helpsteer(row: dict) -> Example:
    """A negative preference means that the first answer is better; the magnitude is the margin."""
    answers = [_text(row, _name(row, f"response_{n}", f"response{n}")) for n in (1, 2)]
    strength = _number(row, _name(row, "preference_strength", "overall_preference"), low=-3, high=3)
    prompt = _text(row, _name(row, "prompt", "context"), optional=True)
    return _comparison(prompt, answers, abs(strength), better=int(strength > 0))


def shp(row: dict) -> Example:
    """The margin is the logarithm of the ratio of votes."""
    ratio = _number(row, "score_ratio", low=1, optional=True)
    answers = [_text(row, "human_ref_A"), _text(row, "human_ref_B")]
    margin = None if ratio is None else math.log(ratio)
    return _comparison(_text(row, "history"), answers, margin, better=1 - _choice(row, "labels", "0", "1"))


def safe_rlhf(row: dict) -> Example:
    better = _choice(row, _name(row, "better_response_id", "safer_response_id"), "0", "1")
    return _comparison(_text(row, "prompt"), [_text(row, "response_0"), _text(row, "response_1")], better=better)


def arena(row: dict) -> Example:
    """Conversations or answers, possibly as JSON strings; the winner by name or in one column per outcome."""
    kind = "conversation" if "conversation_a" in row else "response"
    columns = (f"{kind}_a", f"{kind}_b")
    prompt, *sides = ("" if kind == "conversation" else _list(row, "prompt"), *(_list(row, c) for c in columns))
    if isinstance(prompt, list):  # one question per turn
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


def answer_lists(row: dict) -> Example:
    """RewardBench 2, RM-Bench: every answer in `chosen` is better than every answer in `rejected`."""
    sides = {side: row[side] if isinstance(row[side], list) else [row[side]] for side in ("chosen", "rejected")}
    if empty := [side for side, texts in sides.items() if not texts]:
        raise InputError(f"'{empty[0]}' must contain at least one answer, got an empty list; remove the row")
    texts = [_string(text, side) for side, of_side in sides.items() for text in of_side]
    good = len(sides["chosen"])
    pairs = [(c, r, 0.0) for c in range(good) for r in range(good, len(texts))]
    subset = row.get("domain") if isinstance(row.get("domain"), str) else ""
    return Example(_string(row.get("prompt") or "", "prompt"), texts, pairs, subset=subset, id=str(row.get("id") or ""))


def judge_bench(row: dict) -> Example:
    answers, better = [_text(row, "response_A"), _text(row, "response_B")], _choice(row, "label", "A>B", "B>A", "A=B")
    example = _comparison(_text(row, "question"), answers, 0.0 if better == 2 else None, better)
    return example._replace(subset=row["source"] if isinstance(row.get("source"), str) else "")


def llm_bar(row: dict) -> Example:
    better = _choice(row, "label", "1", "2")
    return _comparison(_text(row, "input"), [_text(row, "output_1"), _text(row, "output_2")], better=better)


def share_gpt(row: dict) -> Example:
    """LLaMA-Factory: the conversation so far, and one turn for each side, all with from and value."""
    roles = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}

    def turns(column: str) -> Messages:
        value = row[column] if isinstance(row[column], list) else [row[column]]
        for turn in value:
            if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
                raise InputError(f"'{column}' must contain turns with from and value, got {shown(turn)}")
        said = [{"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in value]
        return _text({column: said}, column)

    return _comparison(turns("conversations"), [turns("chosen"), turns("rejected")])


def rejected_response(row: dict) -> Example:
    """ms-swift: messages that end with the chosen answer, and a rejected answer to replace it."""
    messages = _text(row, "messages")
    if not isinstance(messages, list) or messages[-1]["role"] != "assistant":
        raise InputError(f"'messages' must end with the assistant's answer, got {shown(row['messages'])}")
    texts = row["rejected_response"]
    texts = texts if isinstance(texts, list) and texts and isinstance(texts[0], str) else [texts]
    sides = [messages[-1:], *([{"role": "assistant", "content": _string(t, "rejected_response")}] for t in texts)]
    return _conversation(Example(messages[:-1], sides, [(0, k, 0.0) for k in range(1, len(sides))]))


def openai_preference(row: dict) -> Example:
    if not isinstance(row["input"], dict) or "messages" not in row["input"]:
        raise InputError(f"'input' must be an object with messages, got {shown(row['input'])}")
    sides = [_text(row, "preferred_output"), _text(row, "non_preferred_output")]
    return _comparison(_text(row["input"], "messages"), sides)


def nectar(row: dict) -> Example:
    """Seven answers with ranks, where 1 is the best; equal ranks are ties. The prompt is a transcript."""
    return _rated(row, "answers", "answer", lambda of: _number(of, "rank"))


def ultrafeedback(row: dict) -> Example:
    """As published: an instruction and four completions, each with an overall score."""
    row = row | {"prompt": row["instruction"]}
    return _rated(row, "completions", "response", lambda of: -_number(of, "overall_score"))


def _rated(row: dict, column: str, text: str, cost: Callable[[dict], float]) -> Example:
    """Rank the objects in a list column by their costs."""
    objects = _list(row, column)
    if not isinstance(objects, list) or not objects or not all(isinstance(of, dict) for of in objects):
        raise InputError(f"'{column}' must be a list of objects with {text}, got {shown(objects)}")
    costs = [cost(of) for of in objects]
    return _ranking(_text(row, "prompt", optional=True), [_text(of, text) for of in objects], costs)


def web_gpt(row: dict) -> Example:
    """The answer with the higher score is better. The question is a text or an object with full_text."""
    question = row["question"].get("full_text") if isinstance(row["question"], dict) else row["question"]
    low, high = sorted(scores := [_number(row, "score_0"), _number(row, "score_1")])
    answers = [_string(row[f"answer_{k}"], f"answer_{k}") for k in (0, 1)]
    return _comparison(_string(question, "question"), answers, high - low, better=scores.index(high))


def preferred(row: dict) -> Example:
    """Two answers, and which one is preferred: a, b or a tie. Numbers are rejected as ambiguous."""
    answers = [_text(row, "response_a"), _text(row, "response_b")]
    value = str(row["preference"]).strip().lower().removeprefix("response_")
    tie = value in ("tie", "equal", "same")
    if not tie and value not in ("a", "b"):
        raise InputError(f"'preference' must be a, b or tie, got {shown(row['preference'])}; numbers are ambiguous")
    return _comparison(_text(row, "prompt", optional=True), answers, 0.0 if tie else None, better=int(value == "b"))


def stepwise(row: dict) -> Example:
    what = "stepwise supervision, where each completion is a right or wrong step of one answer"
    raise InputError(f"prompt, completions and labels are {what}; expected answers to compare")


def point_wise(row: dict) -> Example:
    """One answer and its score. read_examples ranks the rows of each prompt (see `by_score`)."""
    column = next(name for name in ("score", "label", "rating") if name in row)
    value = row[column]
    score = float(value) if isinstance(value, bool) else _number(row, column)
    prompt = _text(row, "prompt")
    if not prompt:
        raise InputError("'prompt' is empty; expected one, because scored answers are compared within their prompt")
    answer = _text(row, "completion" if "completion" in row else "response")
    return Example(prompt, [answer], [(0, 0, score)])


def by_score(rows: list[Example]) -> Example:
    """Merge all rows of a prompt from `point_wise` into one example."""
    answers, costs = [row.completions[0] for row in rows], [-row.pairs[0][2] for row in rows]
    return _ranking(rows[0].prompt, answers, costs, subset=rows[0].subset)


def ranked(row: dict) -> Example:
    """Best first unless there are `scores` (higher is better) or a `rank` (1 is the best)."""
    texts = _list(row, "completions")
    column = next((name for name in ("scores", "rank") if row.get(name) not in (None, "")), None)
    if not isinstance(texts, list) or not texts:
        raise InputError(f"'completions' must be a list of answers, got {shown(texts)}")
    values = _list(row, column) if column else range(len(texts))
    if column and (not isinstance(values, list) or len(values) != len(texts)):
        raise InputError(f"'{column}' must be a list of {len(texts)} numbers, one per completion, got {shown(values)}")
    if column:
        values = [(1 if column == "rank" else -1) * _number({column: value}, column) for value in values]
    texts = [_text({"completions": text}, "completions") for text in texts]
    return _ranking(_text(row, "prompt", optional=True), texts, values, labelled=column is not None)


SCHEMAS = [
    Schema("chosen and rejected", "chosen rejected", chosen_rejected, "prompt margin score_chosen score_rejected"),
    Schema("RewardBench 2", "chosen rejected num_correct", answer_lists, "prompt id"),
    Schema("summarize_from_feedback", "info summaries choice", summarize_from_feedback, ""),
    Schema("HelpSteer", "prompt|context response_1|response1 response_2|response2 "
                        "preference_strength|overall_preference", helpsteer, ""),
    Schema("SHP", "history human_ref_A human_ref_B labels", shp, "score_ratio"),
    Schema("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id|safer_response_id", safe_rlhf, ""),
    Schema("lmarena conversations", "conversation_a conversation_b winner|winner_model_a", arena, "winner_model_b winner_tie"),
    Schema("lmarena responses", "prompt response_a response_b winner|winner_model_a", arena, "winner_model_b winner_tie"),
    Schema("ranked completions", "prompt completions", ranked, "scores rank"),
    Schema("JudgeBench", "question response_A response_B label", judge_bench, "source"),
    Schema("LLMBar", "input output_1 output_2 label", llm_bar, ""),
    Schema("ShareGPT", "conversations chosen rejected", share_gpt, ""),
    Schema("ms-swift", "messages rejected_response", rejected_response, ""),
    Schema("OpenAI preference", "input preferred_output non_preferred_output", openai_preference, ""),
    Schema("Nectar", "prompt answers", nectar, ""),
    Schema("UltraFeedback", "instruction completions", ultrafeedback, ""),
    Schema("WebGPT", "question answer_0 answer_1 score_0 score_1", web_gpt, ""),
    Schema("responses with a preference", "response_a response_b preference", preferred),
    Schema("stepwise supervision", "prompt completions labels|label", stepwise, ""),
    Schema("answers with a score", "prompt response|completion score|label|rating", point_wise, ""),
]  # fmt: skip


# -- Shared helpers. --------------------------------------------------------------------------------------------------
TURN = "\n\nAssistant:"
ODD_END, ODD_PROMPTS = "an answer ends with a user turn", "the answers have different prompts"


def _is_transcript(row: dict) -> bool:
    prompt, *sides = row.get("prompt") or "", row["chosen"], row["rejected"]
    if not all(isinstance(text, str) for text in (prompt, *sides)):
        return False
    # In some files the prompt repeats the question.
    return all(side.lstrip().startswith("Human:") and TURN in side and prompt.strip() in side for side in sides)


def _comparison(prompt, completions: list, margin: float | None = None, better: int = 0) -> Example:
    """Make an Example of two completions; `better` is the index of the chosen one. A margin of 0 is a tie."""
    pairs = [] if margin == 0 else [(better, 1 - better, margin or 0.0)]
    return _conversation(Example(prompt, completions, pairs, ties=1 - len(pairs)))


def _ranking(prompt, completions: list, costs: Sequence[float], **more) -> Example:
    """Compare all pairs of completions: the lower cost is better, equal costs are ties."""
    pairs = [(i, j, 0.0) for i, a in enumerate(costs) for j, b in enumerate(costs) if a < b]
    ties = len(costs) * (len(costs) - 1) // 2 - len(pairs)
    return _conversation(Example(prompt, completions, pairs, ties, **more))


def _conversation(example: Example) -> Example:
    """With messages, the prompt becomes everything before the sides diverge; otherwise nothing changes."""
    prompt, sides = example[:2]
    if isinstance(prompt, str) and {*map(type, sides)} == {str}:
        return example
    sides = [[{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in sides]
    most = min(map(len, sides)) - 1  # at least one message must remain to be scored
    lead = next((i for i in range(most) if any(side[i] != sides[0][i] for side in sides)), most)
    shared = sides[0][:lead]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    # The messages may repeat the prompt: all of it anywhere, or its last turns at their beginning.
    turns, later = ([(m["role"], m["content"].strip()) for m in part] for part in (prompt, shared))
    if all(later[i : i + len(turns)] != turns for i in range(len(later) + 1)):
        again = max(k for k in range(len(turns) + 1) if turns[len(turns) - k :] == later[:k])
        if not again and prompt[-1]["role"] == sides[0][0]["role"] == "user":
            raise InputError("'prompt' differs from the question that the messages begin with; remove one of them")
        shared = prompt + shared[again:]
    rest = [side[lead:] for side in sides]
    asked = [[m for m in side if m["role"] in ("user", "system")] for side in rest]
    odd = ODD_PROMPTS if any(other != asked[0] for other in asked) else ""
    odd = ODD_END if any(side[-1]["role"] == "user" for side in rest) else odd
    return example._replace(prompt=shared, completions=rest, odd=odd)


def _name(row: dict, *names: str) -> str:
    """The first of the column's alternative names that the row has."""
    return next((name for name in names if name in row), names[0])


def _text(row: dict, column: str, optional: bool = False) -> str | Messages:
    """A string, or a list of messages with role and content. Raises InputError for anything else."""
    value = row.get(column)
    if value is None and optional:
        return ""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{\s*['\"](role|content)['\"]\s*:", value):
        text, value = value, _list(row, column)
        if value is text:
            raise InputError(f"'{column}' must be messages as JSON, got {shown(text)}; write them with json.dumps")
    if not isinstance(value, list):
        return _string(value, column)
    if not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"'{column}' must be a string or a list of messages with role and content, got {shown(value)}")
    return [_message(message, column) for message in value]


def _message(message: dict, column: str) -> dict[str, Any]:
    """Role, content and tool-use fields for the chat template, without fields that Parquet filled with null."""
    more = {key: message[key] for key in ("tool_calls", "tool_call_id", "name") if message.get(key) is not None}
    role, content = _string(message.get("role"), f"{column}: role"), message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(_string(part.get("text"), f"{column}: content") for part in content)
    elif content is None and more.get("tool_calls"):
        content = ""
    return {"role": role, "content": _string(content, f"{column}: content"), **more}


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"'{column}' must be a string, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can contain and tokenizers reject
        raise InputError(f"'{column}' is not valid Unicode ({error})") from None
    return value


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


def _choice(row: dict, column: str, *names: str) -> int:
    """The index in `names` of a column's value, ignoring spaces."""
    if (value := str(row.get(column)).replace(" ", "")) not in names:
        raise InputError(f"'{column}' must be {', '.join(names[:-1])} or {names[-1]}, got {shown(row.get(column))}")
    return names.index(value)


def _list(row: dict, column: str) -> Any:
    """A column's value, parsed if it is a list written as a JSON string."""
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):  # just a text that begins with a bracket
            return json.loads(value)
    return value


def _turns(questions: list, answers: Any) -> Messages:
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise InputError(f"'prompt' has {len(questions)} questions; expected as many answers, got {shown(answers)}")
    roles = ("user", "assistant")
    return [{"role": r, "content": text or ""} for turn in zip(questions, answers) for r, text in zip(roles, turn)]
