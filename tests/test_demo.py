"""The built-in demo: its comparisons, its tokenizer and its model.

Run: python -m pytest tests/test_demo.py. Needs torch, transformers, and a Python with the .py sources of its standard
library; no network, no GPU. The model's warm-up is cut to 2 steps; the demo's accuracy is not tested here.
"""

import functools
import json
import threading

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import minirm.data.demo
from minirm.data.demo import (
    DEMO_DEFAULTS,
    EVAL_PROMPTS,
    SHUFFLES,
    build_demo,
    make_comparisons,
    read_docstrings,
    train_tokenizer,
)


@pytest.fixture(scope="module", autouse=True)
def fast():
    """Read the standard library once and shorten the warm-up. Both take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minirm.data.demo, "read_docstrings", functools.cache(read_docstrings))
        patch.setattr(minirm.data.demo, "WARM_UP_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def comparisons():
    return make_comparisons(seed=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIRM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_demo()


def test_the_demo_has_hundreds_of_held_out_and_thousands_of_training_pairs(comparisons):
    train, held_out, texts = comparisons
    assert 200 <= EVAL_PROMPTS <= len({row["prompt"] for row in held_out}) + 5 and len(held_out) <= 3 * EVAL_PROMPTS
    assert len(train) > 2000 and len(texts) >= len({row["prompt"] for row in train})


def test_no_prompt_and_no_chosen_answer_is_in_both_splits(comparisons):
    train, held_out, texts = comparisons
    for key in ("prompt", "chosen"):
        assert not {row[key] for row in train} & {row[key] for row in held_out}
    warmed_up_on = {text.rpartition("\n")[2] for text in texts}
    assert not warmed_up_on & {row["chosen"] for row in held_out}


def test_every_row_has_two_different_answers_of_5_to_25_words(comparisons):
    for rows in comparisons[:2]:
        for row in rows:
            assert list(row) == ["prompt", "chosen", "rejected", "subset"]
            assert all(isinstance(value, str) and value for value in row.values())
            assert row["subset"] in ("shuffled", "other") and row["chosen"] != row["rejected"]
            assert 5 <= len(row["chosen"].split()) <= 25 and 5 <= len(row["rejected"].split()) <= 25
        assert len({tuple(row.values())[:3] for row in rows}) == len(rows)


def test_all_comparisons_of_a_prompt_share_the_chosen_answer(comparisons):
    for rows in comparisons[:2]:
        answers = {}
        for row in rows:
            answers.setdefault(row["prompt"], []).append(row["chosen"])
        assert {len(chosen) for chosen in answers.values()} == set(range(1, SHUFFLES + 2))
        assert all(len(set(chosen)) == 1 for chosen in answers.values())


@pytest.mark.parametrize("unit", ["characters", "words", "tokens"])
def test_choosing_by_length_is_right_in_less_than_60_percent_of_pairs(comparisons, unit):
    _, held_out, texts = comparisons
    tokenizer = train_tokenizer(texts)
    split = {"characters": list, "words": str.split, "tokens": tokenizer.tokenize}[unit]
    pairs = [(len(split(row["chosen"])), len(split(row["rejected"]))) for row in held_out]
    assert sum(chosen > rejected for chosen, rejected in pairs) / len(pairs) < 0.60
    assert sum(chosen < rejected for chosen, rejected in pairs) / len(pairs) < 0.60
    # Most pairs have equal lengths. Among the others, if they are many enough to tell, neither rule may win by much.
    differ = [chosen > rejected for chosen, rejected in pairs if chosen != rejected]
    assert len(differ) < 20 or 0.2 < sum(differ) / len(differ) < 0.8


def test_rejected_answers_have_as_many_words_as_the_chosen_ones(comparisons):
    for row in comparisons[1]:
        chosen, rejected = row["chosen"].split(), row["rejected"].split()
        assert len(chosen) == len(rejected)
        if row["subset"] == "shuffled":
            assert sorted(chosen) == sorted(rejected)
            assert (chosen[0], chosen[-1]) == (rejected[0], rejected[-1])


def test_the_seed_determines_the_comparisons_and_the_split(comparisons):
    assert make_comparisons(seed=0) == comparisons  # no hash order, no clock, no global random numbers
    assert make_comparisons(seed=1)[1] != comparisons[1]


def test_prompts_are_signatures_with_the_rest_of_the_docstring(tmp_path):
    """Four docstrings are usable. The others have too few words or no capital, or are in a test folder."""
    (tmp_path / "shop.py").write_text(
        "class Till(Box):\n"
        "    '''Counts the money of one day, e.g. in the evening. Not thread safe at all.'''\n"
        "    def add(self, coin, *rest):\n"
        "        '''Puts one coin into the till.'''\n"
        "    def take(self):\n"
        "        '''Too short.'''\n"
        "    async def close(self):\n"
        "        '''closes the till until the next day.'''\n"
        "if True:\n"
        "    def greet(name):\n"
        "        '''Says hello to the\n        next customer.'''\n"
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text("def f():\n    '''This one is not to be read.'''\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("def f(a, b=1):\n    '''Packs a and b into one box.'''\n")
    assert read_docstrings(tmp_path) == {
        "Counts the money of one day, e.g. in the evening.": "shop.Till(Box)\nNot thread safe at all.",
        "Puts one coin into the till.": "shop.add(self, coin, *rest)",
        "Says hello to the next customer.": "shop.greet(name)",
        "Packs a and b into one box.": "pack.f(a, b=1)",
    }


def test_a_standard_library_without_sources_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="expected at least 1000 usable docstrings .* found 0 in") as refusal:
        make_comparisons(library=tmp_path)
    assert "\n" not in str(refusal.value)


def test_the_model_loads_with_the_auto_classes_and_reads_the_tokens(demo, comparisons):
    tokenizer, model = AutoTokenizer.from_pretrained(demo.model), AutoModel.from_pretrained(demo.model)
    assert model.config.model_type == "gptj" and (demo.model / "model.safetensors").is_file()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = "os.fspath(path)\nReturn the path — “as is”."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text  # nothing is added or lost
    assert ids == train_tokenizer(comparisons[2])(text)["input_ids"]  # saving and loading changed nothing
    assert max(ids) < len(tokenizer) == model.config.vocab_size <= 2048
    with torch.no_grad():
        assert model(input_ids=torch.tensor([ids])).last_hidden_state.shape == (1, len(ids), model.config.n_embd)


def test_every_text_is_within_the_demos_max_length(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    for path in (demo.train, demo.eval):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            for side in ("chosen", "rejected"):
                assert len(tokenizer(f"{row['prompt']}\n{row[side]}")["input_ids"]) + 1 <= DEMO_DEFAULTS["max_length"]


def test_the_files_hold_the_comparisons(demo, comparisons):
    for path, rows in zip((demo.train, demo.eval), comparisons):
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows


def test_a_finished_demo_is_not_built_again(demo, monkeypatch):
    folder = demo.model.parent
    monkeypatch.setenv("MINIRM_CACHE", str(folder.parent))
    monkeypatch.setattr(minirm.data.demo, "make_comparisons", None)
    assert build_demo() == demo
    assert list(folder.parent.iterdir()) == [folder] and folder.name.startswith("demo-")


@pytest.fixture
def cache(tmp_path, monkeypatch, comparisons):
    """A cache folder in which demos of a few comparisons are built."""
    monkeypatch.setattr(minirm.data.demo, "make_comparisons", lambda seed: tuple(part[:300] for part in comparisons))
    monkeypatch.setenv("MINIRM_CACHE", str(tmp_path))
    return tmp_path


def test_two_concurrent_builds_end_with_the_same_demo(cache, monkeypatch):
    together, warm_up, results = threading.Barrier(2, timeout=60), minirm.data.demo.warm_up, []

    def warm_up_and_wait(*args):
        together.wait()  # neither has finished when the other starts, so both will rename
        return warm_up(*args)

    monkeypatch.setattr(minirm.data.demo, "warm_up", warm_up_and_wait)
    threads = [threading.Thread(target=lambda: results.append(build_demo())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1] and results[0].train.is_file()
    assert list(cache.iterdir()) == [results[0].model.parent]


def test_a_build_that_dies_leaves_no_demo_behind(cache, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(minirm.data.demo, "warm_up", die)
    with pytest.raises(KeyboardInterrupt):
        build_demo()
    assert list(cache.iterdir()) == []


def test_another_seed_or_number_of_steps_makes_another_demo(cache, monkeypatch):
    made = {build_demo(), build_demo(seed=1)}
    monkeypatch.setattr(minirm.data.demo, "WARM_UP_STEPS", 1)
    assert len(made | {build_demo()}) == 3 == len(list(cache.iterdir()))


def test_building_is_deterministic_and_leaves_the_global_rng_alone(cache, monkeypatch):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_demo()
    assert torch.equal(torch.rand(3), expected)
    monkeypatch.setenv("MINIRM_CACHE", str(cache / "second"))
    second = build_demo()
    for name in ("model.safetensors", "tokenizer.json"):
        assert (first.model / name).read_bytes() == (second.model / name).read_bytes()
