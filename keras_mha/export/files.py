"""Written beside, then renamed: nothing half-written under its final name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Lends an empty directory inside `directory`, and removes it at the end.

    Being on the same file system, what is in it can be renamed into place. Its name
    is no number, so TF Serving never takes it for a version, not even where a killed
    process left it behind. A `directory` made for this is removed if it stays empty.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".staging-", dir=directory))
    try:
        yield staged
    finally:
        shutil.rmtree(staged)
        if created:
            with suppress(OSError):  # something was published
                directory.rmdir()


def publish_directory(staged: Path, final: Path, *, overwrite: bool) -> None:
    """Renames `staged` to `final`; an older `final` leaves in the same moment.

    A directory cannot replace another in one step: the older one is first renamed
    to `retired` beside `staged`, and comes back if the second rename fails.

    Raises:
        FileExistsError: If `final` exists and `overwrite` is False.
    """
    retired = staged.with_name("retired")
    if final.exists():
        if not overwrite:
            raise FileExistsError(
                f"{final} exists; pass `overwrite=True` or another `version`."
            )
        final.rename(retired)
    try:
        staged.rename(final)
    finally:
        if retired.exists() and not final.exists():
            retired.rename(final)


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
