from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keras_mha.export import files
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


def test_directories_for_one_that_cannot_be_made_go_again(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="too long"),
        staging(tmp_path / "deep" / "er" / ("x" * 300)),
    ):
        pass
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("kind", [Path.touch, Path.mkdir])
def test_overwrite_means_one_thing(
    tmp_path: Path, kind: Callable[[Path], None]
) -> None:
    absent, there = tmp_path / "absent", tmp_path / "there"
    kind(there)
    for overwrite in (True, False, None):
        files.check_overwrite([absent], overwrite=overwrite)
    files.check_overwrite([absent, there], overwrite=True)
    with pytest.raises(FileExistsError, match="there exists; pass `overwrite=True`"):
        files.check_overwrite([absent, there], overwrite=False)
    with pytest.warns(DeprecationWarning, match="there exists and is replaced"):
        files.check_overwrite([absent, there], overwrite=None)


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a system that cannot swap two directories in one step."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("without_exchange")
def test_without_an_exchange_the_old_directory_is_replaced_too(tmp_path: Path) -> None:
    test_an_existing_directory_is_replaced_only_when_asked(tmp_path)


@pytest.mark.usefixtures("without_exchange")
def test_without_an_exchange_the_old_directory_comes_back_too(tmp_path: Path) -> None:
    test_the_old_directory_comes_back_when_the_new_cannot_be_renamed(tmp_path)


def test_an_exchange_is_one_step(tmp_path: Path) -> None:
    new, final = make(tmp_path / "a", "new"), make(tmp_path / "1", "old")
    assert files._exchange(new, final)
    assert (final / "content").read_text() == "new"
    assert (new / "content").read_text() == "old"
    with pytest.raises(FileNotFoundError, match="absent"):
        files._exchange(tmp_path / "absent", final)


LEAVE_STAGING = """
import os, runpy, signal, sys
from collections.abc import Callable
from pathlib import Path
staging = runpy.run_path(sys.argv[3])["staging"]
with staging(Path(sys.argv[1])) as staged:
    (staged / "part").write_bytes(bytes(7))
    print(staged, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def start(directory: Path, fate: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVE_STAGING, str(directory), fate, files.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(
    tmp_path: Path,
) -> None:
    killed, left = start(tmp_path, "killed")
    killed.communicate()
    assert (left / "part").exists()
    living, kept = start(tmp_path, "living")
    assert not left.exists()
    with staging(tmp_path) as own:
        assert set(tmp_path.iterdir()) == {kept, own}
        assert (kept / "part").exists()
    living.communicate()
    assert (living.returncode, list(tmp_path.iterdir())) == (0, [])


def test_a_version_caught_between_two_renames_comes_back(tmp_path: Path) -> None:
    left = tmp_path / ".staging-of-a-killed-process"
    (left / "retired").mkdir(parents=True)
    make(left / "retired" / "1", "old")
    make(left / "retired" / "2", "older")
    make(tmp_path / "2", "new")
    with staging(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert (tmp_path / "1" / "content").read_text() == "old"
    assert (tmp_path / "2" / "content").read_text() == "new"


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
