"""README.md agrees with the code: its flags, paths, defaults and imports exist.

Run: pytest tests/test_readme.py. Needs nothing.
"""

import re

import pytest
from conftest import ROOT

import train
from minirm.data.prepare import MIN_WORDS
from minirm.data.schemas import SCHEMAS
from minirm.data.sources import FILE_TYPES

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def recipe():
    return vars(train.parse_args(["--model", "any"]))


def test_every_flag_in_readme_exists(recipe):
    # Flags of torchrun, srun, minirm.score and tests/bench.
    others = "nproc_per_node max_restarts ntasks data output kills write seeds threads pairs processes rounds dry_run"
    others += " epochs methods width layers shape"
    flags = set(re.findall(r"--([a-z_]+)", README)) - {"help"}
    assert flags - set(recipe) - {*others.split()} == set()
    assert {"train_data", "eval_data", "output_dir", "loss"} <= flags


def test_every_file_that_readme_links_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


def test_every_module_is_in_the_table_of_files():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "minirm").rglob("*.py") if path.stem != "__init__"}
    assert set(re.findall(r"\| \[`(minirm/[\w/]+\.py)`\]", README)) == modules


def test_the_numbers_of_the_recipe_are_the_defaults(recipe):
    text = " ".join(README.split())
    stated = {
        r"learning rate ([\d.e-]+),": recipe["learning_rate"],
        r"([\d.]+) accumulation steps": recipe["gradient_accumulation_steps"],
        r"([\d.]+) epochs, \d+ warm-up": recipe["num_train_epochs"],
        r"([\d.]+) warm-up steps": recipe["warmup_steps"],
        r"[Bb]ottom ([\d.]+) % of the layers": recipe["freeze_ratio"] * 100,
        r"--max_length` \((\d+) tokens\)": recipe["max_length"],
        r"([\d.]+) % of the prompts are held out": recipe["eval_fraction"] * 100,
    }
    for pattern, value in stated.items():
        found = re.findall(pattern, text)
        assert found and all(float(number) == pytest.approx(value) for number in found), pattern
    assert f"under {['zero', 'one', 'two', 'three', 'four', 'five'][MIN_WORDS]} words" in text
    assert all(f"`{suffix}`" in README for suffix in FILE_TYPES)


def test_the_columns_of_every_schema_are_named():
    taken = [schema for schema in SCHEMAS if schema.name != "stepwise supervision"]  # which is refused
    columns = {name for schema in taken for column in schema.columns.split() for name in column.split("|")}
    assert [name for name in sorted(columns) if f"`{name}`" not in README] == []


def test_the_losses_in_the_table_are_the_choices_of_the_flag():
    table = README.split("| `--loss` | ")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE)) == {"divergence", "last", "trlx"}
    for kind in ("divergence", "last", "trlx"):
        assert train.parse_args(["--loss", kind]).loss == kind


def test_everything_that_readme_imports_exists():
    for module, names in re.findall(r"^from (minirm\.\w+) import (.+)$", README, re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(__import__(module, fromlist=[name]), name), (module, name)


def test_the_ratios_on_the_first_screen_are_those_of_the_tables():
    first = " ".join(README.split("It is not a framework")[0].split())
    cached = re.findall(r"\| \(f\) [^|]+\| [\d.]+ \| \d+% \| ([\d.]+) \|", README)
    assert f"**{cached[0]}x** | faster than TRL" in first and f"on summaries, {cached[1]}x on ranking data |" in first
    rows = [float(ratio) for ratio in re.findall(r"\| ([\d.]+)x \| \d+ \|$", README, re.MULTILINE)]
    assert f"**{rows[0]:.1f}x** | faster than two full sequences" in first
    assert f"on summaries, {rows[2]:.1f}x on ranking data: " in first
