"""What a run prints: `python -m pytest tests/test_lines.py`. No network; tokenises a few short texts.

The tokenizer has no merges: one token per character, and one for EOS. With a prompt of one character, the separator "|"
and answers NINE and ELEVEN of 9 and 11 characters, texts have 1 + 1 + 9 + 1 = 12 and 14 tokens.
"""

import re
from pathlib import Path
from types import SimpleNamespace

from conftest import ELEVEN, EVAL, EVALUATION, NINE, TRAIN, make_model, write_jsonl

from minirm.data.prepare import prepare
from minirm.freeze import freeze_bottom_layers
from minirm.model import empty_model, load_config
from minirm.report.lines import PUBLISHED, data_table, freeze_line, last_words, marked_pair, rate_warnings, start_report
from minirm.rows import collate


def table_rows(table):
    """{name: (train, held out)} as printed."""
    return {m[1].strip(): (m[2], m[3]) for m in re.finditer(r"^(.*?)  +(\S+)  +(held out|\S+)$", table, re.MULTILINE)}


def test_the_table_counts_comparisons_read_dropped_and_kept(small_data):
    """Shared: prompt p: 12 common tokens minus EOS, "p|a b c d e" (11), then EOS and " f" + EOS: 11 + 1 + 3 = 15.

    q: the same, 15; r: "p|a b c d " (10) + "e f" + EOS and "f g" + EOS: 10 + 4 + 4 = 18. Together 48.
    Separate: 12 + 14, 12 + 14, 14 + 14 = 80. Saved: 1 - 48 / 80 = 40.0 %.
    Held out: 15 and "v|" (2) + "yes" + EOS + "no" + EOS: 2 + 4 + 3 = 9, so 24; separate 26 + 6 + 5 = 37; 35.1 %.
    Chosen is longer in 2 of 4 and shorter in 1 of 4; held out in 1 of 2 each.
    """
    rows = table_rows(data_table(small_data.report, "shared"))
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
        "the chosen answer is longer": ("50.0%", "50.0%"),
        "the chosen answer is shorter": ("25.0%", "50.0%"),
    }


def test_the_table_shows_no_saving_for_separate_rows(small_data):
    rows = table_rows(data_table(small_data.report, "separate"))
    assert "saved" not in rows and rows["tokens, each answer with its prompt"] == ("80", "37")


def test_the_table_counts_cut_prompts(characters, tmp_path):
    """With --max_length 14, the two comparisons of a prompt of 5, of 16 and 18 tokens, lose 2 and 4 tokens."""
    rows = [
        {"prompt": "ppppp", "chosen": NINE, "rejected": "e d c b a"},
        {"prompt": "ppppp", "chosen": ELEVEN, "rejected": "e d c b a"},
        {"prompt": "q", "chosen": NINE, "rejected": "e d c b a"},
    ]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(characters, [source], [source], separator="|", max_length=14, cache_dir=tmp_path)
    table = table_rows(data_table(data.report, "shared"))
    assert table["kept"] == ("3", "3")
    assert table["kept, prompt truncated"] == ("2", "2")
    assert table["prompts"] == ("2", "2")
    assert "kept, answer truncated" not in table


def test_each_of_several_files_has_a_column_and_a_line_with_its_schema(characters, tmp_path):
    strength = {"prompt": "s", "response_1": NINE, "response_2": ELEVEN, "preference_strength": 1}
    files = {"texts": TRAIN[:3], "strengths": [strength, strength | {"preference_strength": 0}], "eval": EVAL}
    a, b, c = (str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in files.items())
    data = prepare(characters, [a, b], [c], separator="|", cache_dir=tmp_path)
    lines = data_table(data.report, "shared").splitlines()
    assert lines[:3] == [
        "train     texts.jsonl: texts in chosen and rejected; columns: prompt, chosen, rejected",
        "train     strengths.jsonl: HelpSteer; columns: prompt, response_1, response_2, preference_strength",
        "held out  eval.jsonl: texts in chosen and rejected; columns: prompt, chosen, rejected",
    ]
    assert [line.split() for line in lines[4:9]] == [
        ["comparisons", "train", "train", "held", "out"],
        ["texts.jsonl", "strengths.jsonl", "eval.jsonl"],
        ["read", "3", "2", "2"],
        ["dropped:", "tie", "0", "1", "0"],
        ["kept", "3", "1", "2"],
    ]
    assert len({len(line) for line in lines[4:]}) == 1  # the columns are aligned


def test_a_file_without_kept_comparisons_saves_nothing(characters, tmp_path):
    ties = str(write_jsonl(tmp_path / "ties.jsonl", [TRAIN[0] | {"margin": 0}]))
    source = str(write_jsonl(tmp_path / "x.jsonl", TRAIN[:3]))
    data = prepare(characters, [source, ties], [source], separator="|", cache_dir=tmp_path)
    (saved,) = (line.split() for line in data_table(data.report, "shared").splitlines() if line.startswith("saved"))
    assert saved[2] == "0.0%" != saved[1]


def test_held_out_comparisons_are_in_the_table(characters, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": ELEVEN, "rejected": NINE} for i in range(20)]
    source = str(write_jsonl(tmp_path / "x.jsonl", rows))
    data = prepare(characters, [source], eval_fraction=0.1, separator="|", cache_dir=tmp_path)
    table = table_rows(data_table(data.report, "shared"))
    assert (table["read"], table["held out"], table["kept"]) == (("20", "2"), ("2", "0"), ("18", "2"))


def test_the_marked_pair_shows_the_scored_tokens_up_to_eos(small_data, characters):
    lines = marked_pair(small_data.train[0], characters).splitlines()
    assert lines[1] == "  both      'p|a b c d e'"
    assert lines[2] == "  chosen    [[' f<|endoftext|>']] 14 tokens, the last is '<|endoftext|>'"
    assert lines[3] == "  rejected  [['<|endoftext|>']] 12 tokens, the last is '<|endoftext|>'"


def test_the_marked_pair_is_the_first_comparison_of_its_group(small_data, characters):
    """The first two of three answers share more tokens than all three do, and shared tokens are not scored."""
    group = {"prefix": [], "completions": [characters(t)["input_ids"] for t in ("xab", "xac", "y")]}
    lines = marked_pair({**group, "chosen": [1], "rejected": [0]}, characters).splitlines()
    assert lines[1:] == [
        "  both      'xa'",
        "  chosen    [['c']] 3 tokens, the last is 'c'",
        "  rejected  [['b']] 3 tokens, the last is 'b'",
    ]


def test_a_long_marked_pair_is_abridged_but_keeps_its_end(characters):
    group = {"prefix": characters("p" * 500)["input_ids"], "chosen": [0], "rejected": [1]}
    group["completions"] = [
        characters("a" * 500 + "<|endoftext|>")["input_ids"],
        characters("b<|endoftext|>")["input_ids"],
    ]
    lines = marked_pair(group, characters).splitlines()
    assert lines[1] == f"  both      '...{'p' * 300}'"
    chosen = f"  chosen    [['{'a' * 150} ... {'a' * 137}<|endoftext|>']] 1001 tokens, the last is '<|endoftext|>'"
    assert lines[2] == chosen


def test_a_prompt_with_line_breaks_stays_on_one_line(characters):
    ids = [characters(t)["input_ids"] for t in ("one\ntwo", "a\nb", "c")]
    text = marked_pair({"prefix": ids[0], "completions": ids[1:], "chosen": [0], "rejected": [1]}, characters)
    assert len(text.splitlines()) == 4


def test_the_freeze_line_counts_layers_and_parameters(tmp_path):
    """GPT-2 with 4 layers of width 32: a block has 12 * 32 * 32 + 13 * 32 = 12,704 parameters, the final norm 64, the

    head 32. int(0.3 * 4) = 1 layer is trained: 12,704 + 64 + 32 = 12,800.
    Embeddings: (327 tokens + pad) * 32 + 1024 * 32 = 43,264 at 328 tokens; in all 4 * 12,704 + 96 + embeddings.
    """
    config, _ = load_config(str(make_model(tmp_path / "gpt2", "gpt2")))
    total = 4 * 12_704 + 96 + (config.vocab_size + 1024) * 32
    for ratio, wanted in (
        (0.7, f"frozen: layers 0-2 of 4; trained: 12,800 of {total:,} parameters ({12_800 / total:.1%})"),
        (0, f"frozen: no layers; trained: {total:,} of {total:,} parameters (100.0%)"),
        (1, f"frozen: layers 0-3 of 4; trained: 32 of {total:,} parameters (0.0%)"),
    ):
        model = empty_model(config)
        assert freeze_line(model, freeze_bottom_layers(model, ratio)) == wanted


def test_the_report_has_its_three_parts(small_data, characters, tmp_path):
    config, _ = load_config(str(make_model(tmp_path / "gpt2", "gpt2")))
    model = empty_model(config)
    groups = [small_data.train[i] for i in range(len(small_data.train))]
    batches = [collate(part, row_layout="shared", pad_id=0, row_limit=1000) for part in (groups[:1], groups[1:])]
    rates = {"learning_rate": 1e-3, "warmup_steps": 4, "lr_scheduler_type": "linear", "freeze_ratio": 0.7}
    args = SimpleNamespace(loss="divergence", margin_scale=1.0, pair_weight="pair", **rates)
    report = start_report(args, small_data, characters, model, freeze_bottom_layers(model), "shared", None, batches, 40)
    assert "  --loss 'divergence'\n" in report and "warning" not in report and PUBLISHED not in report
    args = SimpleNamespace(loss="trlx", margin_scale=1.0, pair_weight="pair", **rates)
    published = start_report(
        args, small_data, characters, model, freeze_bottom_layers(model), "shared", None, batches, 40
    )
    assert PUBLISHED in published
    assert report.index("comparisons") < report.index("frozen: layers 0-2 of 4") < report.index("the first pair")
    # The first batch is one row without padding; in the second every row is as long as its longest.
    rows = [len(g["prefix"]) + sum(map(len, g["completions"])) for g in groups]
    places = rows[0] + max(rows[1:]) * len(rows[1:])
    assert f"padding: {1 - sum(rows) / places:.1%} of the tokens in a micro-batch (mean of 2)" in report


def test_learning_rates_that_train_too_little_cause_a_warning():
    def said(total_steps, **changes):
        flags = {"learning_rate": 1e-5, "warmup_steps": 0, "lr_scheduler_type": "linear", "freeze_ratio": 0.7} | changes
        return [line for say, line in rate_warnings(SimpleNamespace(**flags), total_steps) if say]

    (line,) = said(50)
    assert line.startswith("warning: 50 steps at --learning_rate 1e-05 move a weight by at most 0.0005,")
    assert said(200) == said(50, freeze_ratio=1) == said(0) == []
    assert said(50, learning_rate=0) == said(50, learning_rate=1e-4) == []
    (line,) = said(200, warmup_steps=200)
    assert line.startswith("warning: --warmup_steps 200 takes all 200 steps, so --learning_rate is never reached")
    assert said(200, warmup_steps=200, lr_scheduler_type="constant") == said(201, warmup_steps=200) == []


def test_the_last_line_says_if_chance_or_length_does_as_well():
    # The shorter answer is the chosen one in 330 of 1,320 pairs, the longer one in 55 %.
    row = EVALUATION | {"eval_by_length": [{"high": -1, "pairs": 330}, {"high": 9, "pairs": 990}]}
    where = "; the model is in x: load it with AutoModelForSequenceClassification.from_pretrained"
    assert last_words(row, row, Path("x")) == f"held-out accuracy 0.7123 on 1320 pairs{where}"
    row |= {"eval_accuracy_low": 0.54}
    said = "held-out accuracy 0.7123 on 1320 pairs, no better than always choosing the longer answer (0.5500)"
    assert last_words(row, row, Path("x")) == said + where
    row |= {"eval_accuracy_low": 0.49}
    said = "held-out accuracy 0.7123 on 1320 pairs, no better than chance (its 95 % interval starts at 0.490)"
    assert last_words(row, row, Path("x")) == said + where


def test_the_last_line_escapes_the_name_of_the_folder():
    row = EVALUATION | {"eval_by_length": []}
    assert r"the model is in a\x1b[2J: " in last_words(row, row, Path("a\x1b[2J"))
