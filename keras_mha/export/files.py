"""Written beside, then renamed: nothing half-written under its final name."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".staging-"
_RETIRED = "retired"  # holds a replaced directory under its own name
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Lends an empty directory inside `directory`, and removes it at the end.

    Being on the same file system, what is in it can be renamed into place. Its name
    is no number, so TF Serving never takes it for a version, not even where a killed
    process left it behind. What killed processes left is removed first. `directory`
    and those above it that are made for this are removed if they stay empty.
    """
    created = [p for p in (directory, *directory.parents) if not p.exists()]
    staged, lock = None, None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        staged, lock = _make_locked(directory)
        yield staged
    finally:
        if staged is not None:
            shutil.rmtree(staged)
        if lock is not None:
            os.close(lock)
        for path in created:
            with suppress(OSError):  # not made, or something was published
                path.rmdir()


def _make_locked(directory: Path) -> tuple[Path, int | None]:
    """A new directory, locked as long as this process lives."""
    while True:
        staged = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        lock = _lock(staged, wait=True)
        # Another process may have taken it for abandoned before it was locked.
        if lock is None or staged.exists():
            return staged, lock
        os.close(lock)


def _remove_abandoned(directory: Path) -> None:
    """Removes what processes left that were killed while they wrote.

    The kernel ends a lock with the process that held it. Where there are no such
    locks nothing is removed.
    """
    for left in directory.glob(f"{_PREFIX}*"):
        lock = _lock(left, wait=False)
        if lock is None:
            continue
        # Killed between two renames, it may hold the only version.
        for retired in left.glob(f"{_RETIRED}/*"):
            if not (directory / retired.name).exists():
                retired.rename(directory / retired.name)
        shutil.rmtree(left, ignore_errors=True)
        os.close(lock)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Locks a directory; `None` if it is locked, gone, or cannot be locked here."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def publish_directory(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Renames `staged` to `final`; an older `final` leaves in the same moment.

    On Linux the two change places in one step. Elsewhere, and on file systems that
    cannot do this, the older one is first renamed to `retired/` beside `staged`, and
    comes back if the second rename fails.

    Raises:
        FileExistsError: If `final` exists and `overwrite` is False.
    """
    if not final.exists():
        staged.rename(final)
        return
    if not overwrite:
        raise FileExistsError(
            f"{final} exists; pass `overwrite=True` or another `version`."
        )
    if _exchange(staged, final):
        return
    retired = staged.with_name(_RETIRED) / final.name
    retired.parent.mkdir()
    final.rename(retired)
    try:
        staged.rename(final)
    finally:
        if not final.exists():
            retired.rename(final)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths in one step; False where the system cannot.

    Source: renameat2(2).
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    failed = libc.renameat2(
        _AT_FDCWD, paths[0], _AT_FDCWD, paths[1], ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def highest_version(directory: Path) -> int:
    """The highest number among the names in `directory`; 0 where there is none."""
    if not directory.is_dir():
        return 0
    names = [path.name for path in directory.iterdir()]
    return max((int(name) for name in names if _is_version(name)), default=0)


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit()


def size_of(path: Path) -> int:
    """Bytes in a file, or in all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
