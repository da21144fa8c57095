from __future__ import annotations

from pathlib import Path

import pytest

from keras_mha.export.files import (
    highest_version,
    publish_directory,
    size_of,
    staging,
)


def make(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "content").write_text(content)
    return path


def test_staging_leaves_nothing_but_what_was_published(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "er"
    with staging(home) as staged:
        assert staged.parent == home
        assert not staged.name.isdigit()
        make(staged / "unused", "x")
    assert not home.exists()
    with staging(home) as staged:
        publish_directory(make(staged / "a", "new"), home / "1", overwrite=False)
    assert [path.name for path in home.iterdir()] == ["1"]
    with staging(home):
        pass
    assert (home / "1" / "content").read_text() == "new"


def test_a_published_directory_has_the_usual_rights(tmp_path: Path) -> None:
    usual = make(tmp_path / "usual", "x").stat().st_mode
    with staging(tmp_path) as staged:
        publish_directory(make(staged / "a", "x"), tmp_path / "1", overwrite=False)
    assert (tmp_path / "1").stat().st_mode == usual


def test_an_existing_directory_is_replaced_only_when_asked(tmp_path: Path) -> None:
    final = make(tmp_path / "1", "old")
    with staging(tmp_path) as staged:
        new = make(staged / "a", "new")
        with pytest.raises(FileExistsError, match="overwrite=True"):
            publish_directory(new, final, overwrite=False)
        assert (final / "content").read_text() == "old"
        publish_directory(new, final, overwrite=True)
    assert (final / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_old_directory_comes_back_when_the_new_cannot_be_renamed(
    tmp_path: Path,
) -> None:
    final = make(tmp_path / "1", "old")
    with staging(tmp_path) as staged, pytest.raises(FileNotFoundError):
        publish_directory(staged / "absent", final, overwrite=True)
    assert (final / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_highest_version(tmp_path: Path) -> None:
    assert highest_version(tmp_path / "absent") == 0
    for name in ("2", "0010", "latest", ".staging-99", "-12", "\u0663"):
        (tmp_path / name).mkdir()
    assert highest_version(tmp_path) == 10


def test_size_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(7))
    make(tmp_path / "b", "12345")
    assert size_of(tmp_path / "a") == 7
    assert size_of(tmp_path) == 12
