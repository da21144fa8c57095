"""Files that pip downloads once: checked, kept in the user's cache directory.

Nothing of them is part of this repository, and nothing in them is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


class DataError(RuntimeError):
    """What was downloaded is not what this program was written for."""


def cache_directory() -> Path:
    """The user's cache directory for this example, as the platform has it."""
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "keras_mha" / "sentiment"


def fetch_with_pip(
    requirement: str, sha256: str, directory: Path, *, source: bool = False
) -> None:
    """Lets pip download a published file into `directory`.

    With a hash, pip refuses another file before it runs anything of it.

    Args:
        requirement: Name and version, such as `"package==1.0"`.
        sha256: The file's, in hexadecimal.
        directory: Where the file goes.
        source: Whether the source archive is wanted, and not the wheel.

    Raises:
        DataError: If pip fails.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
    kind = "--no-binary" if source else "--only-binary"
    name = requirement.partition("==")[0]
    options = ["--no-deps", kind, name, "--disable-pip-version-check"]
    files = ["--dest", str(directory), "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(
            f"pip could not download {requirement} as it was published; is there a "
            f"network? It said:\n{done.stderr.strip() or done.stdout.strip()}"
        )


def checked(name: str, content: bytes, expected: Mapping[str, str]) -> bytes:
    """Returns `content` if it has the SHA-256 that is expected under its name.

    Raises:
        DataError: Otherwise.
    """
    found = digest(content)
    if found != expected[name]:
        raise DataError(
            f"{name} is truncated or altered: its SHA-256 must be {expected[name]}. "
            f"Received: {found} of {len(content)} bytes"
        )
    return content


def digest(content: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Written beside and renamed, so that a file with this name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        beside = Path(file.name)
        try:
            file.write(content)
        except OSError:
            beside.unlink()
            raise
    beside.replace(path)
