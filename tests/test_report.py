"""What a run prints at its start: `python -m pytest tests/test_report.py`. No network; tokenises a few short texts.

The tokenizer has no merges: one token per character, and one for EOS. The table's three comparisons have the prompt
"p", the separator "|" and answers of 9 ("a b c d e") and 11 ("a b c d e f") characters, so texts of 1 + 1 + 9 + 1 = 12
and 14 tokens.
"""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_comparisons, make_model, make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing

from minirm.data.prepare import prepare
from minirm.freeze import freeze_bottom_layers
from minirm.model import empty_model, load_config
from minirm.report.card import model_card
from minirm.report.lines import PUBLISHED, data_table, freeze_line, last_words, marked_pair, rate_warnings, start_report
from minirm.report.profile import profile_table
from minirm.rows import collate


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(texts=["x"])


def table_rows(table):
    """{name: (train, held out)} as printed."""
    return {m[1].strip(): (m[2], m[3]) for m in re.finditer(r"^(.*?)  +(\S+)  +(held out|\S+)$", table, re.MULTILINE)}


NINE, ELEVEN = "a b c d e", "a b c d e f"
TRAIN = [
    {"prompt": "p", "chosen": ELEVEN, "rejected": NINE},
    {"prompt": "p", "chosen": NINE, "rejected": NINE + " f"},  # the same two answers, the other way round
    {"prompt": "q", "chosen": ELEVEN, "rejected": NINE},
    {"prompt": "r", "chosen": ELEVEN, "rejected": "a b c d f g"},  # as long as each other
    {"prompt": "s", "chosen": NINE, "rejected": NINE},
    {"prompt": "t", "chosen": NINE, "rejected": "one two"},
    {"prompt": "u", "chosen": NINE, "rejected": ELEVEN, "margin": 0},
]
EVAL = [
    {"prompt": "p", "chosen": NINE, "rejected": ELEVEN},
    {"prompt": "v", "chosen": "yes", "rejected": "no"},
]


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    sources = [str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in (("train", TRAIN), ("eval", EVAL))]
    return prepare(tokenizer, *([source] for source in sources), separator="|", cache_dir=folder)


def test_the_table_counts_what_was_read_dropped_and_kept(data):
    """Shared: prompt p: 12 common tokens minus EOS, "p|a b c d e" (11), then EOS and " f" + EOS: 11 + 1 + 3 = 15.

    q the same, 15; r: "p|a b c d " (10) + "e f" + EOS and "f g" + EOS: 10 + 4 + 4 = 18. Together 48.
    Separate: 12 + 14, 12 + 14, 14 + 14 = 80. Saved: 1 - 48 / 80 = 40.0 %.
    Held out: 15 and "v|" (2) + "yes" + EOS + "no" + EOS: 2 + 4 + 3 = 9, so 24; separate 26 + 6 + 5 = 37; 35.1 %.
    Chosen is longer in 2 of 4 and shorter in 1 of 4; held out in 1 of 2 each.
    """
    rows = table_rows(data_table(data.report, "shared"))
    assert rows == {
        "comparisons": ("train", "held out"),
        "read": ("7", "2"),
        "dropped: answer under 5 words": ("1", "0"),
        "dropped: identical answers": ("1", "0"),
        "dropped: tie": ("1", "0"),
        "kept": ("4", "2"),
        "prompt also in the training data": ("0", "1"),
        "prompts": ("3", "2"),
        "tokens, each answer with its prompt": ("80", "37"),
        "tokens, each prompt once": ("48", "24"),
        "saved": ("40.0%", "35.1%"),
        "the longer answer is the chosen one": ("50.0%", "50.0%"),
        "the shorter answer is the chosen one": ("25.0%", "50.0%"),
    }


def test_separate_rows_promise_no_saving(data):
    rows = table_rows(data_table(data.report, "separate"))
    assert "saved" not in rows and rows["tokens, each answer with its prompt"] == ("80", "37")


def test_the_table_counts_prompts_and_cuts_where_prompts_are_cut(tokenizer, tmp_path):
    """--max_length 14 and a prompt of 5: two comparisons of one prompt, of 16 and 18 tokens, lose 2 and 4 tokens."""
    rows = [
        {"prompt": "ppppp", "chosen": NINE, "rejected": "e d c b a"},
        {"prompt": "ppppp", "chosen": ELEVEN, "rejected": "e d c b a"},
        {"prompt": "q", "chosen": NINE, "rejected": "e d c b a"},
    ]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(tokenizer, [source], [source], separator="|", max_length=14, cache_dir=tmp_path)
    table = table_rows(data_table(data.report, "shared"))
    assert table["kept"] == ("3", "3")
    assert table["kept, prompt cut"] == ("2", "2")
    assert table["prompts"] == ("2", "2")
    assert "kept, answer cut" not in table


def test_several_files_have_a_column_each_and_a_line_that_says_what_they_were_read_as(tokenizer, tmp_path):
    strength = {"prompt": "s", "response_1": NINE, "response_2": ELEVEN, "preference_strength": 1}
    files = {"texts": TRAIN[:3], "strengths": [strength, strength | {"preference_strength": 0}], "eval": EVAL}
    a, b, c = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items())
    data = prepare(tokenizer, [a, b], [c], separator="|", cache_dir=tmp_path)
    lines = data_table(data.report, "shared").splitlines()
    assert lines[:3] == [
        "train     texts.jsonl: texts in chosen and rejected; columns prompt, chosen, rejected",
        "train     strengths.jsonl: HelpSteer; columns prompt, response_1, response_2, preference_strength",
        "held out  eval.jsonl: texts in chosen and rejected; columns prompt, chosen, rejected",
    ]
    assert [line.split() for line in lines[4:9]] == [
        ["comparisons", "train", "train", "held", "out"],
        ["texts.jsonl", "strengths.jsonl", "eval.jsonl"],
        ["read", "3", "2", "2"],
        ["dropped:", "tie", "0", "1", "0"],
        ["kept", "3", "1", "2"],
    ]
    assert len({len(line) for line in lines[4:]}) == 1  # columns stand under each other


def test_a_file_of_which_nothing_is_kept_saves_nothing(tokenizer, tmp_path):
    ties = str(write_jsonl(tmp_path / "ties.jsonl", [TRAIN[0] | {"margin": 0}]))
    source = str(write_jsonl(tmp_path / "x.jsonl", TRAIN[:3]))
    data = prepare(tokenizer, [source, ties], [source], separator="|", cache_dir=tmp_path)
    (saved,) = (line.split() for line in data_table(data.report, "shared").splitlines() if line.startswith("saved"))
    assert saved[2] == "0.0%" != saved[1]


def test_held_out_comparisons_are_in_the_table(tokenizer, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": ELEVEN, "rejected": NINE} for i in range(20)]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(tokenizer, [source], eval_fraction=0.1, separator="|", cache_dir=tmp_path)
    table = table_rows(data_table(data.report, "shared"))
    assert (table["read"], table["held out"], table["kept"]) == (("20", "2"), ("2", "0"), ("18", "2"))


def test_the_marked_pair_shows_what_is_scored_and_eos_as_the_last_scored_token(data, tokenizer):
    lines = marked_pair(data.train[0], tokenizer).splitlines()
    assert lines[1] == "  both      'p|a b c d e'"
    assert lines[2] == "  chosen    [[' f<|endoftext|>']] 14 tokens, the last is '<|endoftext|>'"
    assert lines[3] == "  rejected  [['<|endoftext|>']] 12 tokens, the last is '<|endoftext|>'"


def test_the_marked_pair_is_the_first_comparison_of_its_group_not_all_of_them(data, tokenizer):
    """The first two of three answers share more than all three do; their shared tokens are not scored."""
    group = {"prefix": [], "completions": [tokenizer(t)["input_ids"] for t in ("xab", "xac", "y")]}
    lines = marked_pair({**group, "chosen": [1], "rejected": [0]}, tokenizer).splitlines()
    assert lines[1:] == [
        "  both      'xa'",
        "  chosen    [['c']] 3 tokens, the last is 'c'",
        "  rejected  [['b']] 3 tokens, the last is 'b'",
    ]


def test_a_long_pair_is_shown_in_part_with_its_end(tokenizer):
    group = {"prefix": tokenizer("p" * 500)["input_ids"], "chosen": [0], "rejected": [1]}
    group["completions"] = [
        tokenizer("a" * 500 + "<|endoftext|>")["input_ids"],
        tokenizer("b<|endoftext|>")["input_ids"],
    ]
    lines = marked_pair(group, tokenizer).splitlines()
    assert lines[1] == f"  both      '...{'p' * 300}'"
    assert (
        lines[2]
        == f"  chosen    [['{'a' * 150} ... {'a' * 137}<|endoftext|>']] 1001 tokens, the last is '<|endoftext|>'"
    )


def test_a_prompt_with_line_breaks_stays_on_its_line(tokenizer):
    ids = [tokenizer(t)["input_ids"] for t in ("one\ntwo", "a\nb", "c")]
    text = marked_pair({"prefix": ids[0], "completions": ids[1:], "chosen": [0], "rejected": [1]}, tokenizer)
    assert len(text.splitlines()) == 4


def test_the_line_on_freezing_counts_layers_and_parameters(tmp_path):
    """GPT-2, 4 layers of width 32, without a language-model head: a block has 12 * 32 * 32 + 13 * 32 = 12,704

    parameters; the final norm 64; the head 32; int(0.3 * 4) = 1 layer trained: 12,704 + 64 + 32 = 12,800.
    Embeddings: (327 tokens + pad) * 32 + 1024 * 32 = 43,264 at 328 tokens; in all 4 * 12,704 + 96 + embeddings.
    """
    config, _ = load_config(str(make_model(tmp_path / "gpt2", "gpt2")))
    model = empty_model(config)
    total = 4 * 12_704 + 96 + (config.vocab_size + 1024) * 32
    line = freeze_line(model, freeze_bottom_layers(model))
    assert line == f"frozen: layers 0-2 of 4; trained: 12,800 of {total:,} parameters ({12_800 / total:.1%})"
    model = empty_model(config)
    line = freeze_line(model, freeze_bottom_layers(model, 0))
    assert line == f"frozen: no layer; trained: {total:,} of {total:,} parameters (100.0%)"
    model = empty_model(config)
    line = freeze_line(model, freeze_bottom_layers(model, 1))
    assert line == f"frozen: layers 0-3 of 4; trained: 32 of {total:,} parameters (0.0%)"


def test_the_report_has_its_three_parts(data, tokenizer, tmp_path):
    config, _ = load_config(str(make_model(tmp_path / "gpt2", "gpt2")))
    model = empty_model(config)
    groups = [data.train[i] for i in range(len(data.train))]
    batches = [collate(part, row_layout="shared", pad_id=0, row_limit=1000) for part in (groups[:1], groups[1:])]
    rates = {"learning_rate": 1e-3, "warmup_steps": 4, "lr_scheduler_type": "linear", "freeze_ratio": 0.7}
    args = SimpleNamespace(loss="divergence", margin_scale=1.0, pair_weight="pair", **rates)
    report = start_report(args, data, tokenizer, model, freeze_bottom_layers(model), "shared", None, batches, 40)
    assert "  --loss 'divergence'\n" in report and "warning" not in report and PUBLISHED not in report
    args = SimpleNamespace(loss="trlx", margin_scale=1.0, pair_weight="pair", **rates)
    published = start_report(args, data, tokenizer, model, freeze_bottom_layers(model), "shared", None, batches, 40)
    assert PUBLISHED in published
    assert report.index("comparisons") < report.index("frozen: layers 0-2 of 4") < report.index("the first pair")
    # The first batch is one row without padding; in the second every row is as long as its longest.
    rows = [len(g["prefix"]) + sum(map(len, g["completions"])) for g in groups]
    places = rows[0] + max(rows[1:]) * len(rows[1:])
    assert f"padding in a micro-batch: {1 - sum(rows) / places:.1%} of its places (mean of 2)" in report


def test_rates_at_which_little_can_be_learned_are_warned_about():
    def said(total_steps, **changes):
        flags = {"learning_rate": 1e-5, "warmup_steps": 0, "lr_scheduler_type": "linear", "freeze_ratio": 0.7} | changes
        return [line for say, line in rate_warnings(SimpleNamespace(**flags), total_steps) if say]

    (line,) = said(50)
    assert line.startswith("warning: 50 steps at --learning_rate 1e-05 move no weight by more than 0.0005,")
    assert (
        said(200)
        == said(50, freeze_ratio=1)
        == said(0)
        == said(50, learning_rate=0)
        == said(50, learning_rate=1e-4)
        == []
    )
    (line,) = said(200, warmup_steps=200)
    assert line.startswith("warning: --warmup_steps 200 of 200 steps: --learning_rate is never reached")
    assert said(200, warmup_steps=200, lr_scheduler_type="constant") == said(201, warmup_steps=200) == []


EVALUATION = {
    "step": 1000,
    "eval_loss": 0.5,
    "eval_accuracy": 0.71234,
    "eval_accuracy_low": 0.68,
    "eval_accuracy_high": 0.742,
    "eval_pairs": 1320,
    "eval_ties": 2,
    "eval_length_accuracy": 0.55,
    "eval_calibration_error": 0.031,
    "eval_reward_mean": -0.25,
    "eval_reward_std": 1.5,
}


def test_the_last_line_says_if_chance_or_length_would_do_as_well():
    # The shorter answer is the chosen one in 330 of 1,320 pairs, the longer one in 55 %.
    row = EVALUATION | {"eval_by_length": [{"high": -1, "pairs": 330}, {"high": 9, "pairs": 990}]}
    where = "; the model is in x, load it with AutoModelForSequenceClassification.from_pretrained"
    assert last_words(row, row, Path("x")) == f"held-out accuracy 0.7123 on 1320 pairs{where}"
    row |= {"eval_accuracy_low": 0.54}
    said = "held-out accuracy 0.7123 on 1320 pairs, no better than choosing the longer answer (0.5500)"
    assert last_words(row, row, Path("x")) == said + where
    row |= {"eval_accuracy_low": 0.49}
    said = "held-out accuracy 0.7123 on 1320 pairs, no better than chance (its 95 % interval begins at 0.490)"
    assert last_words(row, row, Path("x")) == said + where


def card(data, tokenizer, folder, rows, result, loss="divergence", **more):
    write_jsonl(folder / "metrics.jsonl", rows)
    flags = {
        "model": "some/model",
        "loss": loss,
        "train_data": ["/home/me/x y.jsonl", "b.csv"],
        "output_dir": "/home/me",
    } | more
    args = SimpleNamespace(
        **flags, separator="\n", max_length=99, precision="bf16", train_embeddings=True, eval_data=None
    )
    return model_card(args, data.report, result, tokenizer, folder)


def test_the_model_card_states_the_runs_numbers(data, tokenizer, tmp_path):
    rows = [{"step": 0, "eval_loss": 0.7, "eval_accuracy": 0.5}, {"step": 10, "loss": 0.6}, EVALUATION]
    text = card(data, tokenizer, tmp_path, rows, EVALUATION)
    for line in (
        "base_model: some/model",
        "| accuracy | 0.7123, 95 % interval 0.6800 to 0.7420 |",
        "| pairs | 1,320, of them 2 with equal rewards, which count as wrong |",
        "| accuracy of choosing the longer answer | 0.5500 |",
        "| calibration error | 0.0310 |",
        "| rewards | mean -0.2500, standard deviation 1.5000 (`mean`, `std` in config.json) |",
        "model = AutoModelForSequenceClassification.from_pretrained(folder)  # bf16; with dtype=torch.float32 fewer rewards are equal",
        "4 pairs of 3 prompts; the model of step 1,000.",
        r"train.py --loss divergence --max_length 99 --model some/model --precision bf16 --separator '\n' --train_data 'x y.jsonl' b.csv --train_embeddings",
        "kept                                             4             2",
        r"""    -d '{"input": ["prompt\nanswer<|endoftext|>"], "use_activation": false}'    # data[0].probs[0] is the reward""",
    ):
        assert line in text.splitlines(), line
    assert text.endswith("| 0 | 0.7000 | 0.5000 |\n| 1,000 | 0.5000 | 0.7123 |\n")
    assert "apply_chat_template" not in text and "/home/me" not in text


def test_the_model_card_says_of_which_step_the_model_is_and_shows_ten_evaluations_and_the_picture(
    data, tokenizer, tmp_path
):
    rows = [{**EVALUATION, "step": 100 * i, "eval_loss": None if i == 3 else 0.5} for i in range(41)]
    (tmp_path / "curves.png").touch()
    text = card(data, tokenizer, tmp_path, rows, EVALUATION)
    assert "the model of step 1,000, where the held-out loss was lowest." in text
    table = re.findall(r"^\| ([\d,]+) \| 0\.5000 \| 0\.7123 \|$", text, re.MULTILINE)
    assert len(table) == 10 and table[0] == "0" and table[-1] == "4,000"
    assert text.endswith("![curves](curves.png)\n")


def test_the_card_of_a_model_trained_with_the_published_loss_says_where_its_figures_are_read(data, tokenizer, tmp_path):
    assert PUBLISHED in card(data, tokenizer, tmp_path, [EVALUATION], EVALUATION, loss="trlx")
    assert "trlx" not in card(data, tokenizer, tmp_path, [EVALUATION], EVALUATION)


def test_the_model_card_leaves_eos_to_a_tokenizer_that_adds_it(data, tokenizer, tmp_path):
    assert "c + tokenizer.eos_token for p, c" in card(data, tokenizer, tmp_path, [EVALUATION], EVALUATION)
    adding = make_tokenizer()
    special = [(adding.eos_token, adding.eos_token_id)]
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=special)
    text = card(data, adding, tmp_path, [EVALUATION], EVALUATION)
    assert " + c for p, c in" in text and r'["prompt\nanswer"]' in text and "+ tokenizer.eos_token" not in text


def test_the_model_card_says_how_messages_become_text_where_there_is_a_template(data, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert "apply_chat_template" in card(data, tokenizer, tmp_path, [EVALUATION], EVALUATION)


def test_waiting_is_what_a_process_spends_in_collectives_beyond_the_one_that_spends_the_least():
    slow = Counter({"whole": 4000.0, "matrix products": 3000.0, "communication": 400.0})
    fast = Counter({"whole": 4000.0, "matrix products": 1000.0, "attention": 200.0, "communication": 2400.0})
    _, *rows = profile_table([slow, fast], steps=2).splitlines()
    assert [row.split() for row in rows] == [
        ["0", "2.0", "75.0%", "0.0%", "0.0%", "10.0%", "0.0%", "15.0%"],
        ["1", "2.0", "25.0%", "5.0%", "0.0%", "10.0%", "50.0%", "10.0%"],
    ]


def test_profile_writes_a_trace_for_every_process_and_one_table(server, model_folder, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", make_comparisons(12))
    flags = ["--model", model_folder("gptj"), "--train_data", data, "--eval_data", data, "--max_length", 200]
    flags += ["--output_dir", tmp_path / "out", "--max_steps", 5, "--profile", 2]
    run = server.run(*flags, world=2)
    assert run.codes == [0, 0], run.text()[-3000:]
    for rank in (0, 1):
        events = json.loads(gzip.decompress((tmp_path / "out" / f"trace-rank{rank}.json.gz").read_bytes()))[
            "traceEvents"
        ]
        names = {event.get("name") for event in events}
        assert {"ProfilerStep#2", "ProfilerStep#3"} <= names  # the third and fourth, counted from 0
        assert "ProfilerStep#4" not in names and any("gloo:" in str(name) for name in names)
    rows = re.findall(r"^([01]) +[\d.]+ +(.*%)$", run.text(), re.MULTILINE)
    assert [rank for rank, _ in rows] == ["0", "1"]
    shares = [[float(share) for share in row.replace("%", "").split()] for _, row in rows]
    assert all(sum(row) == pytest.approx(100, abs=0.5) and row[0] > 0 and row[3] > 0 for row in shares)
    assert min(row[4] for row in shares) == 0  # one of them waits for nobody
    # The traces are no other run's files; and with too few steps nothing is recorded, which would go on to the end.
    again = server.run(*flags, "--max_steps", 6, world=2, patch="import torch; torch.profiler.profile = None")
    assert again.codes == [0, 0] and "--profile 2 needs 4 steps, only 1 are to come" in again.text()


HOSTILE = "\x1b[2J\x1b]0;x\x07 a|b\n---\n# `c` ```\u202e"


def test_hostile_names_of_files_models_and_tokens_leave_table_and_card_whole(data, tokenizer, tmp_path):
    """Escape sequences, line breaks, pipes, backticks and YAML markers are escaped in place, on one line each."""
    report = {
        part: [row | {"source": HOSTILE, "schema": HOSTILE} for row in rows] for part, rows in data.report.items()
    }
    report["train"] *= 2
    table = data_table(report, "shared")
    assert all(c.isprintable() for line in table.split("\n") for c in line)
    assert len(table.split("\n")) == len(
        data_table({p: [r | {"source": "x"} for r in rows] for p, rows in report.items()}, "shared").split("\n")
    )
    hostile = make_tokenizer(eos="`e`")
    more = {"model": HOSTILE, "train_data": [HOSTILE]}
    text = card(data._replace(report=report), hostile, tmp_path, [EVALUATION], EVALUATION, **more)
    assert all(c.isprintable() for line in text.split("\n") for c in line)
    head = text.split("\n---\n")[0]
    assert f"base_model: {json.dumps(HOSTILE)}" in head and head.count("\n") == 4
    assert r"Trained from ```` '\x1b[2J\x1b]0;x\x07 a|b\n---\n# `c` ```\u202e' ```` with minirm." in text
    assert "read at `` `e` ``, so" in text
    assert text.count("\n```") == 6  # three blocks of code, opened and closed


def test_the_last_line_escapes_the_name_of_the_folder():
    row = EVALUATION | {"eval_by_length": []}
    assert r"the model is in a\x1b[2J," in last_words(row, row, Path("a\x1b[2J"))
