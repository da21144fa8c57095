"""Writes under another name, then renames: nothing half-written has its final name.

All exporters have one argument `overwrite`. True replaces what exists, each file or
directory in one step; False refuses it before the work begins. ONNX and TFLite files
were always replaced before there was the argument: without it they still are, with a
DeprecationWarning.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".staging-"
_RETIRED = "retired"  # holds a replaced directory under its own name
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Lends an empty directory inside `directory`, and removes it at the end.

    It is on the same file system, so what is in it can be renamed into place. Its name
    is not a number, so TF Serving never takes it for a version, not even where a killed
    process left it behind. What killed processes left is removed first. `directory`
    and those above it that are created for this are removed if they stay empty.
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
            with suppress(OSError):  # not created, or something was published
                path.rmdir()


def _make_locked(directory: Path) -> tuple[Path, int | None]:
    """Makes a new directory, locked as long as this process lives."""
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


def check_overwrite(paths: Iterable[Path], *, overwrite: bool | None) -> None:
    """Refuses to replace what exists, unless `overwrite` is set.

    Args:
        paths: What is to be written.
        overwrite: The exporter's argument; `None` where the caller left it out and the
            exporter replaced files before it had the argument.

    Raises:
        FileExistsError: If one exists and `overwrite` is False.

    Warns:
        DeprecationWarning: If one exists and `overwrite` is `None`.
    """
    there = next((path for path in paths if path.exists()), None)
    if there is None or overwrite:
        return
    if overwrite is not None:
        raise FileExistsError(f"{there} exists; pass `overwrite=True` to replace it.")
    warnings.warn(
        f"{there} exists and is replaced. In a later version this will need "
        "`overwrite=True`",
        DeprecationWarning,
        stacklevel=3,
    )


def publish_directory(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Renames `staged` to `final`; an older `final` leaves in the same moment.

    The two change places in one step. On file systems that cannot do this, the older
    one is first renamed to `retired/` next to `staged`, and comes back if the second
    rename fails.

    Raises:
        FileExistsError: If `final` exists and `overwrite` is False.
    """
    if not final.exists():
        staged.rename(final)
        return
    check_overwrite([final], overwrite=overwrite)
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
    """Returns the highest number among the names in `directory`, else 0."""
    if not directory.is_dir():
        return 0
    names = [path.name for path in directory.iterdir()]
    return max((int(name) for name in names if _is_version(name)), default=0)


def _is_version(name: str) -> bool:
    return name.isascii() and name.isdigit()


def size_of(path: Path) -> int:
    """Returns the bytes in a file, or in all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
