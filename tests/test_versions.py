"""Pinned versions and tested ranges: `python -m pytest tests/test_versions.py`. Needs nothing."""

import re

import pytest
import torch
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import train
from minirm import TESTED


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "tests" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_pins_are_within_the_tested_ranges_and_name_no_build():
    newest, oldest = pins("constraints.txt"), pins("constraints.txt") | pins("constraints-oldest.txt")
    for name, tested in TESTED.items():
        assert Version(newest[name]) in SpecifierSet(tested) and Version(oldest[name]) in SpecifierSet(tested), name
    assert oldest["transformers"] == re.search(r">=([\d.]+)", TESTED["transformers"])[1] + ".0"
    assert not [version for version in newest.values() if "+" in version]
    needed = "torch transformers datasets safetensors tqdm tokenizers numpy pyarrow matplotlib"
    assert {*needed.split()} <= newest.keys()


@pytest.mark.parametrize("version, said", [("2.13.0+cpu", False), ("2.10.1", True), ("9.0.0.dev1", True)])
def test_untested_versions_cause_a_one_line_warning(version, said, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", version)
    train.warn_untested()
    lines = [line for line in capsys.readouterr().err.splitlines() if "torch " in line]
    wanted = f"train.py: warning: torch {version} is installed, but minirm is tested with torch{TESTED['torch']}"
    assert lines == [wanted] * said
