"""Schemas of published data: `python -m pytest tests/test_schemas.py`. No network; made-up rows in published formats."""

import json

import pytest
from conftest import make_tokenizer, refusal, write_jsonl

from minirm.data.chat import join
from minirm.data.prepare import prepare, prompt_key, read_texts
from minirm.data.schemas import Example, column, describe, recognise, renames, to_example

# A turn is [U...] or [A...], without an end token.
CHAT = "{% for m in messages %}[{{ m.role[0].upper() }}{{ m.content }}]{% endfor %}"
USER, ASSISTANT = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
GOOD, BAD = "the sky is blue by day", "it is green all the time"


def example(row):
    return to_example(recognise(row), row)


def pairs_of(row, separator="\n"):
    """(prompt, [(chosen, rejected, margin)], ties) of a row."""
    prompt, completions, pairs, ties, *_ = example(row)
    return prompt, [(completions[c], completions[r], margin) for c, r, margin in pairs], ties


# ---------------------------------------------------------------------------------------------------------------------
# Every schema: a row, the name of its schema, and its prompt, pairs and ties

ASK = "What colour is the sky?"
TURNS = [USER(ASK), ASSISTANT("By day?"), USER("Yes.")]
ONE = ([USER(ASK)], [([ASSISTANT(GOOD)], [ASSISTANT(BAD)], 0.0)], 0)  # as messages
PLAIN = (ASK, [(GOOD, BAD, 0.0)], 0)  # as strings
POST = {"id": "t3_x", "post": "My sky is green.", "title": "Green?", "subreddit": "sky", "site": None, "article": None}
ARTICLE = {"id": "x", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": "The sky is green."}
PARTS = [{"role": "user", "content": [{"type": "text", "text": ASK, "image": None}], "num_tokens": 7}]
CASES = {
    "strings": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, "texts in chosen and rejected", PLAIN),
    "no prompt": ({"chosen": GOOD, "rejected": BAD}, "texts in chosen and rejected", ("", [(GOOD, BAD, 0.0)], 0)),
    "margin": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": "1.5"},
        "texts in chosen and rejected", (ASK, [(GOOD, BAD, 1.5)], 0)),
    "a margin of 0": ({"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 0},
        "texts in chosen and rejected", (ASK, [], 1)),
    "reward-bench": (
        {"prompt": ASK, "chosen": GOOD, "chosen_model": "x", "rejected": BAD, "rejected_model": "y", "subset": "easy"},
        "texts in chosen and rejected", PLAIN),
    "ultrafeedback_binarized": (
        {
            "prompt": ASK, "prompt_id": "7", "chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)],
            "messages": [USER(ASK), ASSISTANT(GOOD)], "score_chosen": 8.0, "score_rejected": 5.5,
        },
        "messages in chosen and rejected", ONE),
    "ultrafeedback_binarized with equal scores": (
        {
            "prompt": ASK, "chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)],
            "score_chosen": 7.0, "score_rejected": 7.0,
        },
        "messages in chosen and rejected", ([USER(ASK)], [], 1)),
    "Skywork": ({"chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)], "source": "x"},
        "messages in chosen and rejected", ONE),
    "TRL, prompt apart": ({"prompt": [USER(ASK)], "chosen": [ASSISTANT(GOOD)], "rejected": [ASSISTANT(BAD)]},
        "messages in chosen and rejected", ONE),
    "HelpSteer2": ({"split": "train", "prompt": ASK, "response_1": BAD, "response_2": GOOD, "preference_strength": 2},
        "HelpSteer", (ASK, [(GOOD, BAD, 2.0)], 0)),
    "HelpSteer3": (
        {"domain": "general", "context": TURNS, "response1": GOOD, "response2": BAD, "overall_preference": -3},
        "HelpSteer", (TURNS, [([ASSISTANT(GOOD)], [ASSISTANT(BAD)], 3.0)], 0)),
    "HelpSteer3, tie": ({"context": TURNS, "response1": GOOD, "response2": BAD, "overall_preference": 0},
        "HelpSteer", (TURNS, [], 1)),
    "SHP, A": (
        {"history": ASK, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_ratio": 1.0e0 * 2},
        "SHP",
        (ASK, [(GOOD, BAD, pytest.approx(0.6931, abs=1e-4))], 0),  # log 2
    ),
    "SHP, B": ({"history": ASK, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}, "SHP", PLAIN),
    "PKU-SafeRLHF": (
        {"prompt": ASK, "response_0": BAD, "response_1": GOOD, "better_response_id": 1, "safer_response_id": 0},
        "PKU-SafeRLHF by better_response_id", PLAIN),
    "PKU-SafeRLHF by safety": ({"prompt": ASK, "response_0": GOOD, "response_1": BAD, "safer_response_id": 0},
        "PKU-SafeRLHF by safer_response_id", PLAIN),
    "summarize_from_feedback": (
        {"info": POST, "split": "train", "summaries": [{"text": " Sky is green"}, {"text": " Help: green sky "}], "choice": 1},
        "summarize_from_feedback",
        ("SUBREDDIT: r/sky\nTITLE: Green?\nPOST: My sky is green.", [("TL;DR: Help: green sky", "TL;DR: Sky is green", 0.0)], 0),
    ),
    "summarize_from_feedback, news": (
        {"info": ARTICLE, "summaries": [{"text": "Green sky"}, {"text": "Nothing"}], "choice": 0},
        "summarize_from_feedback",
        ("Article: The sky is green.", [("TL;DR: Green sky", "TL;DR: Nothing", 0.0)], 0),
    ),
    "lmarena, conversations": (
        {
            "model_a": "x", "model_b": "y", "winner": "model_b",
            "conversation_a": [USER(ASK), ASSISTANT(BAD), USER("Sure?"), ASSISTANT("No.")],
            "conversation_b": [USER(ASK), ASSISTANT(GOOD), USER("Sure?"), ASSISTANT("Yes.")],
        },
        "lmarena conversations",
        ([USER(ASK)], [([ASSISTANT(GOOD), USER("Sure?"), ASSISTANT("Yes.")], [ASSISTANT(BAD), USER("Sure?"), ASSISTANT("No.")], 0.0)], 0),
    ),
    "lmarena, content in parts": (
        {"conversation_a": [*PARTS, ASSISTANT(GOOD)], "conversation_b": [*PARTS, ASSISTANT(BAD)], "winner": "model_a"},
        "lmarena conversations", ONE),
    "lmarena, conversations as JSON": (
        {
            "conversation_a": json.dumps([USER(ASK), ASSISTANT(GOOD)]), "conversation_b": json.dumps([USER(ASK), ASSISTANT(BAD)]),
            "winner": "model_a",
        },
        "lmarena conversations", ONE),
    "lmarena, both bad": (
        {"conversation_a": [USER(ASK), ASSISTANT(GOOD)], "conversation_b": [USER(ASK), ASSISTANT(BAD)], "winner": "both_bad"},
        "lmarena conversations", ([USER(ASK)], [], 1)),
    "lmarena, tie (bothbad)": (
        {"conversation_a": [USER(ASK), ASSISTANT(GOOD)], "conversation_b": [USER(ASK), ASSISTANT(BAD)], "winner": "tie (bothbad)"},
        "lmarena conversations", ([USER(ASK)], [], 1)),
    "lmarena, turns as JSON": (
        {
            "id": 1, "prompt": json.dumps([ASK, "Sure?"]), "response_a": json.dumps([GOOD, None]), "response_b": json.dumps([BAD, "No."]),
            "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0,
        },
        "lmarena responses",
        ([USER(ASK)], [([ASSISTANT(GOOD), USER("Sure?"), ASSISTANT("")], [ASSISTANT(BAD), USER("Sure?"), ASSISTANT("No.")], 0.0)], 0),
    ),
    "lmarena, CSV": (
        {"prompt": ASK, "response_a": BAD, "response_b": GOOD, "winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"},
        "lmarena responses", PLAIN),
    "lmarena, tie": (
        {"prompt": ASK, "response_a": GOOD, "response_b": BAD, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1},
        "lmarena responses", (ASK, [], 1)),
    "a ranked list, best first": ({"prompt": ASK, "completions": ["a", "b", "c"]},
        "ranked completions", (ASK, [("a", "b", 0.0), ("a", "c", 0.0), ("b", "c", 0.0)], 0)),
    "a ranked list with scores": (
        {"prompt": ASK, "completions": ["a", "b", "c", "d"], "scores": [1, 3.5, 1, 2]},
        "ranked completions",
        (ASK, [("b", "a", 0.0), ("b", "c", 0.0), ("b", "d", 0.0), ("d", "a", 0.0), ("d", "c", 0.0)], 1),
    ),
    "a ranked list with ranks": ({"prompt": ASK, "completions": ["a", "b", "c"], "rank": [2, 1, 2]},
        "ranked completions", (ASK, [("b", "a", 0.0), ("b", "c", 0.0)], 1)),
    "a ranked list in CSV": ({"prompt": ASK, "completions": '["a", "b"]', "scores": "[0, 1]"},
        "ranked completions", (ASK, [("b", "a", 0.0)], 0)),
    "a ranked list of messages": ({"prompt": [USER(ASK)], "completions": [[ASSISTANT(GOOD)], [ASSISTANT(BAD)]]},
        "ranked completions", ONE),
    "RewardBench 2": (
        {"id": "1", "prompt": ASK, "chosen": [GOOD], "rejected": [BAD, "no"], "num_correct": 1, "subset": "Math"},
        "RewardBench 2", (ASK, [(GOOD, BAD, 0.0), (GOOD, "no", 0.0)], 0)),
    "RM-Bench": ({"id": 1, "prompt": ASK, "chosen": ["a", "b"], "rejected": ["c", "d"], "domain": "chat"},
        "answers in lists", (ASK, [("a", "c", 0.0), ("a", "d", 0.0), ("b", "c", 0.0), ("b", "d", 0.0)], 0)),
    "JudgeBench": ({"question": ASK, "response_A": BAD, "response_B": GOOD, "label": "B>A", "source": "mmlu-pro"},
        "JudgeBench", PLAIN),
    "LLMBar": ({"input": ASK, "output_1": GOOD, "output_2": BAD, "label": 1}, "LLMBar", PLAIN),
    "ShareGPT": (
        {
            "conversations": [{"from": "human", "value": ASK}], "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
        "ShareGPT", ONE),
    "ms-swift": ({"messages": [USER(ASK), ASSISTANT(GOOD)], "rejected_response": BAD}, "ms-swift", ONE),
    "OpenAI": (
        {
            "input": {"messages": [USER(ASK)], "tools": []}, "preferred_output": [ASSISTANT(GOOD)],
            "non_preferred_output": [ASSISTANT(BAD)],
        },
        "OpenAI preference", ONE),
    "Nectar": (
        {"prompt": ASK, "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}, {"answer": "c", "rank": 2.0}]},
        "Nectar", (ASK, [("a", "b", 0.0), ("a", "c", 0.0)], 1)),
    "UltraFeedback": (
        {"instruction": ASK, "completions": [{"response": BAD, "overall_score": 2.5}, {"response": GOOD, "overall_score": 8.0}]},
        "UltraFeedback", PLAIN),
    "WebGPT": ({"question": {"full_text": ASK}, "answer_0": BAD, "answer_1": GOOD, "score_0": -0.5, "score_1": 0.5},
        "WebGPT", (ASK, [(GOOD, BAD, 1.0)], 0)),
    "a preference by letter": ({"prompt": ASK, "response_a": BAD, "response_b": GOOD, "preference": "B"},
        "responses with a preference", PLAIN),
    "the prompt under another name": ({"question": ASK, "chosen": GOOD, "rejected": BAD}, "texts in chosen and rejected", PLAIN),
    "an empty prompt beside a question": ({"prompt": "", "question": ASK, "chosen": GOOD, "rejected": BAD},
        "texts in chosen and rejected", PLAIN),
    "instruction and input": ({"instruction": "Answer.", "input": ASK, "chosen": GOOD, "rejected": BAD},
        "texts in chosen and rejected", (f"Answer.\n{ASK}", [(GOOD, BAD, 0.0)], 0)),
    "instruction and no input": ({"instruction": ASK, "input": "", "chosen": GOOD, "rejected": BAD},
        "texts in chosen and rejected", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_published_schema_is_recognised_and_read(case):
    row, name, wanted = CASES[case]
    assert describe(recognise(row), row) == name
    prompt, pairs, ties = pairs_of(row)
    assert (prompt, sorted(pairs, key=str), ties) == (wanted[0], sorted(wanted[1], key=str), wanted[2])


@pytest.mark.parametrize(
    "completions, scores", [(["a", "b", "c", "d"], [4, 3, 3, 1]), (["a", "b", "c"], None), (["a"], None)]
)
def test_ranked_lists_give_every_ordered_pair_and_count_ties(completions, scores):
    """The reference is two plain loops."""
    row = {"prompt": "p", "completions": completions} | ({"scores": scores} if scores else {})
    values = scores or [-i for i in range(len(completions))]
    wanted, ties = [], 0
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            wanted += [(i, j, 0.0)] if a > b else []
            ties += a == b and i < j
    assert example(row) == Example("p", completions, wanted, ties, labelled=scores is not None)


def test_the_counts_are_exact_for_every_schema(tmp_path):
    """Each case above in its own file: comparisons read, ties, and the number of comparisons that are kept."""
    tokenizer = make_tokenizer(texts=["x"])
    tokenizer.chat_template = CHAT
    for number, (row, name, (_, pairs, ties)) in enumerate(CASES.values()):
        path = str(write_jsonl(tmp_path / f"{number}.jsonl", [row] * 3))
        report = {}
        examples = list(read_texts(path, tokenizer, "\n", report, "labelled"))
        assert (report["schema"], report["read"], report["dropped: tie"]) == (name, 3 * (len(pairs) + ties), 3 * ties)
        assert sum(len(e["chosen"]) for e in examples) == 3 * len(pairs)
        assert [m for e in examples for m in e["margin"]] == [m for *_, m in pairs] * 3


def test_summaries_give_the_texts_of_openai_summarize_comparisons(tmp_path):
    """That dataset keeps "TL;DR:" in the answers and joins prompt and answer with a line break. Both give the same text."""
    row = CASES["summarize_from_feedback"][0]
    theirs = {
        "prompt": "SUBREDDIT: r/sky\nTITLE: Green?\nPOST: My sky is green.",
        "chosen": "TL;DR: Help: green sky",
        "rejected": "TL;DR: Sky is green",
    }
    texts = []
    for name, data in (("a", row), ("b", theirs)):
        path = str(write_jsonl(tmp_path / f"{name}.jsonl", [data]))
        (found,) = read_texts(path, make_tokenizer(), "\n", {}, "labelled")
        texts.append((found["texts"][found["chosen"][0]], found["texts"][found["rejected"][0]], prompt_key(found)))
    assert texts[0] == texts[1]
    assert texts[0][0] == "SUBREDDIT: r/sky\nTITLE: Green?\nPOST: My sky is green.\nTL;DR: Help: green sky"


# ---------------------------------------------------------------------------------------------------------------------
# Transcripts

START = "\n\nHuman: What colour is the sky?\n\nAssistant:"
TRANSCRIPTS = {
    "the last turn": (START, " Blue, by day.", " Green, all day long."),
    "no space": (START, "Blue.", "Green."),
    "line breaks": (START, "\nBlue.\n\n ", "\n\n\tGreen."),
    "a space on one side": (START, " Blue.", "Green."),
    "an empty answer": (START, "", " Green."),
    "nothing but a space": (START, " ", " Green."),
    "equal beginnings": (START, " It is blue.", " It is green."),
    "one begins with the other": (START, " It is blue.", " It is blue. And green."),
    "equal": (START, " It is blue.", " It is blue."),
    "a later turn": (f"{START} Blue.\n\nHuman: Sure?\n\nAssistant:", " Yes.", " No."),
    "they differ early": (START, " Blue.\n\nHuman: Sure?\n\nAssistant: Yes.", " Green.\n\nHuman: Sure?\n\nAssistant: No."),
    "the user's turns differ": (START, " Blue.\n\nHuman: Sure?\n\nAssistant: Yes.", " Blue.\n\nHuman: Why?\n\nAssistant: Air."),
    "they differ inside a marker": (START, " Blue.\n\nAssistant: x", " Blue.\n\nAssistance, please"),
    "no shared turn of the assistant": ("\n\nHuman: ", "A?\n\nAssistant: a", "B?\n\nAssistant: b"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSCRIPTS)
def test_transcripts_are_split_before_the_first_differing_turn_without_loss(case):
    start, *ends = TRANSCRIPTS[case]
    row = {"chosen": start + ends[0], "rejected": start + ends[1]}
    assert describe(recognise(row), row) == "transcripts in chosen and rejected"
    prompt, completions, pairs, ties, _, separator, *_ = example(row)
    assert [join(prompt, text, separator) for text in completions] == [row["chosen"], row["rejected"]]
    assert prompt == ("" if case.startswith("no shared") else start)
    assert (pairs, ties) == ([(0, 1, 0.0)], 0)


def test_comparisons_of_one_dialogue_form_one_group(tmp_path):
    rows = [
        {"chosen": START + a, "rejected": START + b}
        for a, b in ((" a b c d e", "b c d e f"), ("\nc d e f g", " d e f g h"))
    ]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(make_tokenizer(texts=["x"]), [path], [path], cache_dir=tmp_path)
    assert (len(data.train), data.train[0]["pairs"], len(data.train[0]["completions"])) == (1, 2, 4)


def test_texts_that_only_resemble_a_transcript_are_texts():
    for chosen in ("Human: no answer", "Well.\n\nHuman: a\n\nAssistant: b"):
        row = {"chosen": chosen, "rejected": START + " b"}
        assert describe(recognise(row), row) == "texts in chosen and rejected"
        assert pairs_of(row)[0] == ""
    row = {"prompt": "Which one?", "chosen": START + " a", "rejected": START + " b"}
    assert pairs_of(row)[:2] == ("Which one?", [(START + " a", START + " b", 0.0)])


# ---------------------------------------------------------------------------------------------------------------------
# Messages and their prompt

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "prompt, lead, wanted",
    [
        (ASK, [USER(ASK)], [USER(ASK)]),
        (f" {ASK}\n", [USER(ASK)], [USER(ASK)]),
        (ASK, [SYSTEM, USER(ASK)], [SYSTEM, USER(ASK)]),
        (ASK, [], [USER(ASK)]),
        (ASK, [ASSISTANT("By day?"), USER("Yes.")], TURNS),
        ("Yes.", TURNS, TURNS),
        (None, TURNS, TURNS),
        ([USER(ASK)], [USER(ASK)], [USER(ASK)]),
        ([USER(ASK)], [SYSTEM, USER(ASK)], [SYSTEM, USER(ASK)]),
        ([SYSTEM, USER(ASK)], [USER(ASK)], [SYSTEM, USER(ASK)]),
        ([SYSTEM, USER(ASK)], [SYSTEM, USER(ASK)], [SYSTEM, USER(ASK)]),
        ([SYSTEM], [USER(ASK)], [SYSTEM, USER(ASK)]),
        (TURNS, [], TURNS),
        (TURNS[:1], TURNS[1:], TURNS),
    ],
)
def test_a_prompt_repeated_in_the_messages_is_used_once(prompt, lead, wanted):
    row = {"prompt": prompt, "chosen": [*lead, ASSISTANT(GOOD)], "rejected": [*lead, ASSISTANT(BAD)]}
    assert pairs_of(row) == (wanted, [([ASSISTANT(GOOD)], [ASSISTANT(BAD)], 0.0)], 0)


def test_a_prompt_that_contradicts_the_messages_is_refused(tmp_path):
    row = {"prompt": "Why?", "chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)]}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    wanted = f"{path}:1: 'prompt' differs from the question that the messages begin with; remove one of them"
    assert refusal(read_texts, str(path), make_tokenizer(), "\n", {}) == wanted


def test_messages_are_split_where_they_differ_and_each_side_keeps_a_turn():
    both = [USER(ASK), ASSISTANT(GOOD)]
    equal = [USER(ASK)], [([ASSISTANT(GOOD)], [ASSISTANT(GOOD)], 0.0)]
    assert pairs_of({"chosen": both, "rejected": both})[:2] == equal
    longer = [*both, USER("Sure?"), ASSISTANT("Yes.")]
    assert pairs_of({"chosen": longer, "rejected": both})[:2] == ([USER(ASK)], [(longer[1:], both[1:], 0.0)])
    assert pairs_of({"chosen": longer, "rejected": [*longer[:3], ASSISTANT("No.")]})[0] == longer[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_columns_that_fit_two_schemas_are_refused_with_both_names(tmp_path):
    helpsteer = {"context": ASK, "response1": GOOD, "response2": BAD, "overall_preference": 1}
    row = {"chosen": GOOD, "rejected": BAD, **helpsteer}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    message = refusal(read_texts, str(path), make_tokenizer(), "\n", {})
    assert message == (
        f"{path}:1: the columns match several schemas: chosen and rejected (chosen, rejected) and HelpSteer (prompt or context, "
        "response_1 or response1, response_2 or response2, preference_strength or overall_preference); remove the columns of "
        "all but one"
    )
    for other in (
        {"prompt": ASK, "completions": ["a"]},
        {"history": ASK, "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    ):
        assert "the columns match several schemas" in refusal(recognise, {"chosen": GOOD, "rejected": BAD, **other})


BAD_ROWS = [
    ("strings", {"chosen": 5}, "'chosen' must be a string, got int 5"),
    ("strings", {"rejected": None}, "'rejected' must be a string, got NoneType null"),
    ("strings", {"rejected": ["r"]}, "'rejected' must be a string or a list of messages with role and content, got list [\"r\"]"),
    ("strings", {"prompt": {"a": 1}}, "'prompt' must be a string, got dict {\"a\": 1}"),
    ("strings", {"rejected": True}, "'rejected' must be a string, got bool true"),
    ("strings", {"prompt": 7}, "'prompt' must be a string, got int 7"),
    ("strings", {"chosen": "\ud800 half"}, "'chosen' is not valid Unicode ('utf-8' codec can't encode"),
    ("strings", {"subset": "\ud800"}, "'subset' is not valid Unicode ('utf-8' codec can't encode"),
    ("strings", {"margin": "big"}, "'margin' must be a number, got str \"big\""),
    ("strings", {"margin": [1]}, "'margin' must be a number, got list [1]"),
    ("strings", {"margin": True}, "'margin' must be a number, got bool true"),
    ("strings", {"margin": 10**400}, "'margin' must be a number, got int 1000"),
    ("strings", {"margin": -1}, "'margin' must lie in 0..inf, got -1.0"),
    ("strings", {"margin": float("nan")}, "'margin' must lie in 0..inf, got nan"),
    ("strings", {"margin": float("inf")}, "'margin' must lie in 0..inf, got inf"),
    ("Skywork", {"chosen": [{"from": "human", "value": "x"}]}, "'chosen: role' must be a string, got NoneType null"),
    ("Skywork", {"chosen": [{"role": "user", "content": 3}]}, "'chosen: content' must be a string, got int 3"),
    ("Skywork", {"chosen": [{"role": "user", "content": [{"type": "image"}]}]}, "'chosen: content' must be a string, got list"),
    ("Skywork", {"rejected": []}, "'rejected' must be a string or a list of messages"),
    ("HelpSteer2", {"preference_strength": -100}, "'preference_strength' must lie in -3..3, got -100.0"),
    ("HelpSteer2", {"preference_strength": None}, "'preference_strength' must be a number, got NoneType null"),
    ("HelpSteer2", {"response_1": None}, "'response_1' must be a string, got NoneType null"),
    ("SHP, A", {"labels": 2}, "'labels' must be 0 or 1, got int 2"),
    ("SHP, A", {"score_ratio": 0.5}, "'score_ratio' must lie in 1..inf, got 0.5"),
    ("PKU-SafeRLHF", {"better_response_id": None}, "'better_response_id' must be 0 or 1, got NoneType null"),
    ("summarize_from_feedback", {"choice": True}, "'choice' must be 0 or 1, got bool true"),
    ("summarize_from_feedback", {"info": "x"}, "expected an object in 'info' and two objects with a 'text' in 'summaries'"),
    ("summarize_from_feedback", {"summaries": [{}, {}]}, "'text' must be a string, got NoneType null"),
    ("summarize_from_feedback", {"summaries": ["a", "b"]}, "expected an object in 'info' and two objects with a 'text'"),
    ("lmarena, both bad", {"winner": "model_c"}, "'winner' must be model_a, model_b or a tie, got str \"model_c\""),
    ("lmarena, tie", {"winner_tie": 0}, "'winner' must be model_a, model_b or a tie, got NoneType null"),
    ("lmarena, turns as JSON", {"response_b": "[\"a\"]"}, "'prompt' has 2 questions; expected as many answers, got list [\"a\"]"),
    ("lmarena, both bad", {"conversation_b": None}, "'conversation_b' must be a string, got NoneType null"),
    ("a ranked list with scores", {"scores": [1, 2]}, "'scores' must be a list of 4 numbers, one per completion, got list [1, 2]"),
    ("a ranked list with scores", {"scores": [1, 2, "x", 3]}, "'scores' must be a number, got str \"x\""),
    ("a ranked list with scores", {"completions": "a"}, "'completions' must be a list of answers, got str \"a\""),
    ("a ranked list with scores", {"completions": []}, "'completions' must be a list of answers, got list []"),
    ("a ranked list with scores", {"completions": ["a", "b", "c", 4]}, "'completions' must be a string, got int 4"),
]  # fmt: skip


@pytest.mark.parametrize("case, change, wanted", BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_named_with_file_line_and_column(tmp_path, case, change, wanted):
    tokenizer = make_tokenizer(texts=["x"])
    tokenizer.chat_template = CHAT
    row = CASES[case][0]
    path = write_jsonl(tmp_path / "x.jsonl", [row, row | change, row])
    message = refusal(read_texts, str(path), tokenizer, "\n", {})
    assert message.startswith(f"{path}:2: {wanted}") and len(message) < 500 + len(str(path))


@pytest.mark.parametrize("case", CASES)
def test_a_column_missing_in_a_later_line_is_named(tmp_path, case):
    tokenizer = make_tokenizer(texts=["x"])
    tokenizer.chat_template = CHAT
    row, *_ = CASES[case]
    for name in recognise(row).columns.split():
        path = write_jsonl(tmp_path / "x.jsonl", [row, {k: v for k, v in row.items() if k != name}])
        message = refusal(read_texts, str(path), tokenizer, "\n", {})
        assert message.startswith(f"{path}:2: no column '{name}', which the first row has; found ")


def test_columns_of_no_schema_are_listed():
    found = {"question": "p", "answer": "a"}
    assert refusal(recognise, found) == (
        "no column 'chosen'; expected chosen, rejected and optionally prompt, or another format in README.md; found question, "
        "answer; map other names with --columns prompt=NAME chosen=NAME rejected=NAME"
    )
    assert refusal(recognise, {"prompt": "p", "chosen": "c"}).startswith("no column 'rejected'; ")
    assert "found none; " in refusal(recognise, {})


# ---------------------------------------------------------------------------------------------------------------------
# Other names, odd rows


def read_all(tmp_path, rows, tokenizer=None, keep="worth", columns=None):
    report = {}
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))
    return list(read_texts(path, tokenizer or make_tokenizer(), "\n", report, keep, columns=columns)), report


def test_columns_reach_into_objects_unless_a_column_has_the_dotted_name(tmp_path):
    row = {"data": {"q.full": ASK}, "response_j": GOOD, "response_k": BAD, "note": "a text"}
    columns = renames([column(word) for word in ("prompt=data.q.full", "chosen=response_j", "rejected=response_k")])
    assert "no column 'data.q.full'" in refusal(read_all, tmp_path, [row], columns=columns)
    row = row | {"data": {"q": {"full": ASK}}}
    (found,), report = read_all(tmp_path, [row], columns=columns)
    assert found["texts"] == [f"{ASK}\n{GOOD}", f"{ASK}\n{BAD}"]
    assert report["columns"] == ["prompt", "chosen", "rejected"] and report["not used"] == ["note"]
    literal = {"data.q.full": ASK, "response_j": GOOD, "response_k": BAD}
    assert read_all(tmp_path, [literal], columns=columns)[0][0]["prompt"] == ASK
    for wrong in ("prompt", "promt=x", "prompt="):
        assert "as in prompt=question" in refusal(lambda text: [column(text)], wrong)


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"question": ASK, "context": "c", "chosen": GOOD, "rejected": BAD}, "--columns prompt=question chosen=chosen rejected=rejected"),
        ({"prompt": ASK, "completions": ["a", "b"], "labels": [True, False]}, "stepwise supervision"),
        ({"prompt": ASK, "response_a": GOOD, "response_b": BAD, "preference": 1}, "numbers are ambiguous"),
        ({"question": ASK, "response_A": GOOD, "response_B": BAD, "label": "A"}, "must be A>B, B>A or A=B"),
        ({"input": ASK, "output_1": GOOD, "output_2": BAD, "label": 0}, "must be 1 or 2"),
        ({"messages": [USER(ASK)], "rejected_response": BAD}, "must end with the assistant's answer"),
        ({"conversations": ["x"], "chosen": GOOD, "rejected": BAD}, "turns with from and value"),
        ({"prompt": "", "response": GOOD, "score": 1}, "'prompt' is empty"),
        ({"prompt": ASK, "answers": ["a", "b"]}, "list of objects with answer"),
        ({"input": [USER(ASK)], "preferred_output": [], "non_preferred_output": []}, "object with messages"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)  # fmt: skip
def test_ambiguous_rows_are_refused_with_what_to_type(tmp_path, row, wanted):
    message = refusal(read_all, tmp_path, [row])
    assert wanted in message and message.startswith(f"{tmp_path}/x.jsonl:1: ")


def test_a_prompt_in_two_columns_of_a_later_row_is_refused(tmp_path):
    rows = [
        {"question": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": "x", "question": ASK, "chosen": GOOD, "rejected": BAD},
    ]
    assert "a prompt in 'prompt', but the first row has its prompt in 'question'" in refusal(read_all, tmp_path, rows)


def test_answers_with_scores_are_ranked_over_the_whole_file(tmp_path):
    rows = [
        ("p", "a b c d e", 1),
        ("q", "f g h i j", 0.5),
        ("p", "k l m n o", 3),
        ("p", "u v w x y", True),
        ("q", "1 2 3 4 5", 0.5),
        ("alone", "1 2 3 4 5", 1),
    ]
    rows = [{"prompt": prompt, "response": answer, "score": score} for prompt, answer, score in rows]
    found, report = read_all(tmp_path, rows, keep="labelled")
    assert [(e["prompt"], e["texts"], e["chosen"], e["rejected"]) for e in found] == [
        ("p", ["p\na b c d e", "p\nk l m n o", "p\nu v w x y"], (1, 1), (0, 2))
    ]
    assert report["read"] == 4 and report["dropped: tie"] == 2 and report["schema"] == "answers with a score"
    assert report["prompts with only one answer"] == 1


def test_answers_with_a_score_are_ranked_within_their_subset(tmp_path):
    rows = [
        {"prompt": "p", "response": f"{n} b c d e", "score": n, "subset": "even" if n % 2 == 0 else "odd"}
        for n in range(5)
    ]
    found, report = read_all(tmp_path, rows)
    assert [(e["subset"], len(e["texts"]), len(e["chosen"])) for e in found] == [("even", 3, 3), ("odd", 2, 1)]
    assert report["prompts with only one answer"] == 0


def test_a_column_replaced_by_a_renamed_one_is_named_as_not_used(tmp_path):
    """--columns prompt=question on a file that also has a prompt column."""
    rows = [{"prompt": "old", "question": "new", "chosen": GOOD, "rejected": BAD}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    report = {}
    (found,) = read_texts(str(path), make_tokenizer(), "\n", report, columns={"prompt": "question"})
    assert found["prompt"] == "new" and report["not used"] == ["prompt of the file"]


def test_sides_that_answer_different_prompts_are_dropped_in_training(tmp_path):
    system = lambda text: {"role": "system", "content": text}
    good = {"chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)]}
    rows = [
        good,
        {"chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER("Another?"), ASSISTANT(BAD)]},
        {"chosen": [system("a"), USER(ASK), ASSISTANT(GOOD)], "rejected": [system("b"), USER(ASK), ASSISTANT(BAD)]},
        {"chosen": [USER(ASK), ASSISTANT(GOOD), USER("Thanks for that.")], "rejected": [USER(ASK), ASSISTANT(BAD)]},
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    found, report = read_all(tmp_path, rows, tokenizer)
    assert len(found) == 1 and report["read"] == 4
    assert report["dropped: the answers have different prompts"] == 2
    assert report["dropped: an answer ends with a user turn"] == 1
    assert len(read_all(tmp_path, rows, tokenizer, keep="labelled")[0]) == 4  # evaluation files keep all of them


def test_tool_calls_and_tool_turns_reach_the_chat_template(tmp_path):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"day": 1}}}
    turns = [
        USER(ASK),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "blue", "name": "look_up"},
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role[0] }}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}]{% endfor %}"
    (found,), _ = read_all(
        tmp_path, [{"prompt": turns, "chosen": [ASSISTANT(GOOD)], "rejected": [ASSISTANT(BAD)]}], tokenizer
    )
    assert found["texts"][0] == f"[u{ASK}][alook_up][tblue][a{GOOD}]"


def test_special_tokens_written_out_in_a_text_are_counted(tmp_path):
    rows = [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"prompt": f"{ASK}<|endoftext|>x", "chosen": GOOD, "rejected": BAD},
    ]
    assert read_all(tmp_path, rows)[1]["special tokens in the text"] == 1


@pytest.mark.parametrize("name", ["question", "Question", "query", "messages"])
def test_a_prompt_under_another_name_is_read_as_the_prompt(name):
    asked = [USER(ASK)] if name == "messages" else ASK
    prompt = example({name: asked, "chosen": GOOD, "rejected": BAD}).prompt
    assert prompt == asked


@pytest.mark.parametrize(
    "first, other",
    [({"prompt": ASK}, {"prompt": "", "question": ASK}), ({}, {"question": ASK}), ({"question": ASK}, {"prompt": ASK})],
)
def test_a_row_with_its_prompt_in_another_column_than_the_first_is_refused(first, other):
    sides = {"chosen": GOOD, "rejected": BAD}
    message = refusal(to_example, recognise(first | sides), other | sides)
    assert "the first row" in message and "--columns prompt=NAME" in message


def test_a_system_column_begins_the_prompt():
    sides = {"chosen": GOOD, "rejected": BAD, "system": "Be brief."}
    assert example(sides | {"question": ASK}).prompt == f"Be brief.\n{ASK}"
    messages = [{"role": "system", "content": "Be brief."}, USER(ASK)]
    assert example(sides | {"prompt": [USER(ASK)]}).prompt == messages
    assert example(sides | {"prompt": messages}).prompt == messages
    assert "remove one of them" in refusal(example, sides | {"prompt": messages, "system": "Be long."})


def test_messages_in_a_string_must_be_json():
    sides = {"chosen": [USER(ASK), ASSISTANT(GOOD)], "rejected": [USER(ASK), ASSISTANT(BAD)]}
    assert pairs_of({side: json.dumps(turns) for side, turns in sides.items()}) == ONE
    assert "json.dumps" in refusal(example, {side: str(turns) for side, turns in sides.items()})


def test_a_list_without_answers_is_refused():
    message = refusal(example, {"prompt": ASK, "chosen": [], "rejected": [BAD], "num_correct": 0})
    assert message.startswith("'chosen' must contain at least one answer")


@pytest.mark.parametrize(
    "chosen, why",
    [
        (f"\n\nHuman: Why?\n\nAssistant: {GOOD}", ""),
        (f"\n\nHuman: Who?\n\nAssistant: {GOOD}", "the answers have different prompts"),
        (f"\n\nHuman: Why?\n\nAssistant: {GOOD}\n\nHuman: Thanks", "an answer ends with a user turn"),
    ],
)
def test_transcripts_that_cannot_be_compared_say_why(chosen, why):
    assert example({"chosen": chosen, "rejected": f"\n\nHuman: Why?\n\nAssistant: {BAD}"}).odd == why


def test_a_prompt_repeated_in_the_transcripts_is_used_once():
    sides = {side: f"\n\nHuman: Why?\n\nAssistant: {x}" for side, x in (("chosen", GOOD), ("rejected", BAD))}
    assert example({"prompt": "Why?", **sides}).prompt == "\n\nHuman: Why?\n\nAssistant:"
