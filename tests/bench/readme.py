"""Write the tables of the benchmarks into README.md."""

from pathlib import Path


def write_between(marks: tuple[str, str], text: str, readme: Path) -> None:
    """Replace the text between two marks. Exits with a message unless each mark occurs exactly once."""
    old = readme.read_text()
    if any(old.count(mark) != 1 for mark in marks):
        raise SystemExit(f"{readme}: expected {marks[0]} and {marks[1]} once each, around the place of the table")
    before, after = old.split(marks[0])[0], old.split(marks[1])[1]
    readme.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}")
