"""Folders that are whole or absent: `python -m pytest tests/test_files.py`. Needs nothing."""

from minirm.files import whole_folder


def test_a_folder_that_a_living_process_is_writing_is_not_removed(tmp_path):
    with whole_folder(tmp_path / "a") as mine:
        with whole_folder(tmp_path / "b"):
            assert mine.is_dir() and len(list(tmp_path.glob("*.partial"))) == 2
        (mine / "x").touch()
    assert (tmp_path / "a" / "x").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
