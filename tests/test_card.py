"""The model card: `python -m pytest tests/test_card.py`. No network; tokenises a few short texts."""

import json
import re
from types import SimpleNamespace

from conftest import EVALUATION, make_tokenizer, write_jsonl
from tokenizers.processors import TemplateProcessing

from minirm.report.card import model_card
from minirm.report.lines import PUBLISHED, data_table


def card(data, tokenizer, folder, rows, result, loss="divergence", **more):
    write_jsonl(folder / "metrics.jsonl", rows)
    flags = {"model": "some/model", "loss": loss, "output_dir": "/home/me", "separator": "\n", "max_length": 99}
    flags |= {"train_data": ["/home/me/x y.jsonl", "b.csv"], "eval_data": None, "precision": "bf16"}
    args = SimpleNamespace(**flags | more, train_embeddings=True)
    return model_card(args, data.report, result, tokenizer, folder)


def test_the_model_card_states_the_runs_numbers(small_data, characters, tmp_path):
    rows = [{"step": 0, "eval_loss": 0.7, "eval_accuracy": 0.5}, {"step": 10, "loss": 0.6}, EVALUATION]
    text = card(small_data, characters, tmp_path, rows, EVALUATION)
    for line in (
        "base_model: some/model",
        "| accuracy | 0.7123, 95 % interval 0.6800 to 0.7420 |",
        "| pairs | 1,320, including 2 ties (equal rewards), which count as wrong |",
        "| accuracy of always choosing the longer answer | 0.5500 |",
        "| calibration error | 0.0310 |",
        "| rewards | mean -0.2500, standard deviation 1.5000 (`mean`, `std` in config.json) |",
        "model = AutoModelForSequenceClassification.from_pretrained(folder)  # in bf16; dtype=torch.float32 gives fewer ties",
        "Trained on 4 pairs from 3 prompts. The model is from step 1,000.",
        r"train.py --loss divergence --max_length 99 --model some/model --precision bf16 --separator '\n' --train_data 'x y.jsonl' b.csv --train_embeddings",
        "kept                                            4             2",
        r"""    -d '{"input": ["prompt\nanswer<|endoftext|>"], "use_activation": false}'    # data[0].probs[0] is the reward""",
    ):
        assert line in text.splitlines(), line
    assert text.endswith("| 0 | 0.7000 | 0.5000 |\n| 1,000 | 0.5000 | 0.7123 |\n")
    assert "apply_chat_template" not in text and "/home/me" not in text


def test_the_card_names_the_models_step_and_shows_ten_evaluations_and_the_plot(small_data, characters, tmp_path):
    rows = [{**EVALUATION, "step": 100 * i, "eval_loss": None if i == 3 else 0.5} for i in range(41)]
    (tmp_path / "curves.png").touch()
    text = card(small_data, characters, tmp_path, rows, EVALUATION)
    assert "The model is from step 1,000, which had the lowest held-out loss." in text
    table = re.findall(r"^\| ([\d,]+) \| 0\.5000 \| 0\.7123 \|$", text, re.MULTILINE)
    assert len(table) == 10 and table[0] == "0" and table[-1] == "4,000"
    assert text.endswith("![curves](curves.png)\n")


def test_the_card_of_a_published_loss_says_where_its_rewards_are_read(small_data, characters, tmp_path):
    assert PUBLISHED in card(small_data, characters, tmp_path, [EVALUATION], EVALUATION, loss="trlx")
    assert "trlx" not in card(small_data, characters, tmp_path, [EVALUATION], EVALUATION)


def test_the_card_leaves_eos_to_a_tokenizer_that_adds_it(small_data, characters, tmp_path):
    assert "c + tokenizer.eos_token for p, c" in card(small_data, characters, tmp_path, [EVALUATION], EVALUATION)
    adding = make_tokenizer()
    special = [(adding.eos_token, adding.eos_token_id)]
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|endoftext|>", special_tokens=special)
    text = card(small_data, adding, tmp_path, [EVALUATION], EVALUATION)
    assert " + c for p, c in" in text and r'["prompt\nanswer"]' in text and "+ tokenizer.eos_token" not in text


def test_the_card_mentions_the_chat_template_if_there_is_one(small_data, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    assert "apply_chat_template" in card(small_data, tokenizer, tmp_path, [EVALUATION], EVALUATION)


HOSTILE = "\x1b[2J\x1b]0;x\x07 a|b\n---\n# `c` ```\u202e"


def test_hostile_names_of_files_models_and_tokens_are_escaped(small_data, characters, tmp_path):
    """Escape sequences, line breaks, pipes, backticks and YAML markers are escaped, and every name stays on its line."""
    report = {
        part: [row | {"source": HOSTILE, "schema": HOSTILE} for row in rows] for part, rows in small_data.report.items()
    }
    report["train"] *= 2
    table = data_table(report, "shared")
    assert all(c.isprintable() for line in table.split("\n") for c in line)
    harmless = {part: [row | {"source": "x"} for row in rows] for part, rows in report.items()}
    assert table.count("\n") == data_table(harmless, "shared").count("\n")
    hostile = make_tokenizer(eos="`e`")
    more = {"model": HOSTILE, "train_data": [HOSTILE]}
    text = card(small_data._replace(report=report), hostile, tmp_path, [EVALUATION], EVALUATION, **more)
    assert all(c.isprintable() for line in text.split("\n") for c in line)
    head = text.split("\n---\n")[0]
    assert f"base_model: {json.dumps(HOSTILE)}" in head and head.count("\n") == 4
    assert r"It was trained from ```` '\x1b[2J\x1b]0;x\x07 a|b\n---\n# `c` ```\u202e' ```` with minirm." in text
    assert "read at `` `e` ``, so" in text
    assert text.count("\n```") == 6  # three blocks of code, opened and closed
