"""The machine on which the figures were measured."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

# Features of the processor that decide how fast products are.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PACKAGES = (
    "keras-mha",
    "keras",
    "tensorflow",
    "numpy",
    "keras-hub",
    "torch",
    "jax",
)


def describe(threads: int) -> dict[str, Any]:
    """Returns processor, memory and versions as JSON, without the machine's name."""
    processor = _fields(Path("/proc/cpuinfo"))
    flags = processor.get("flags", "").split()
    return {
        "processor": processor.get("model name") or platform.processor(),
        "architecture": platform.machine(),
        "extensions": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "threads": threads,
        "memory_gib": round(memory("MemTotal") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def memory(name: str) -> int:
    """Returns `MemTotal` or `MemAvailable`, in bytes."""
    return int(_fields(Path("/proc/meminfo"))[name].split()[0]) * 1024


def in_words(machine: dict[str, Any]) -> str:
    """Turns `describe` into a paragraph."""
    versions = ", ".join(
        f"{name} {version or 'not installed'}"
        for name, version in machine["packages"].items()
    )
    extensions = ", ".join(machine["extensions"]) or "none of " + ", ".join(FLAGS)
    accelerator = machine.get("accelerator")
    return (
        f"{machine['processor']} ({machine['architecture']}; {extensions}), "
        f"{machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory_gib']} GiB, {machine['system']}, "
        f"load {machine['load_at_start']} at the start; "
        + (f"{accelerator}; " if accelerator else "")
        + f"Python {machine['python']}, {versions}."
    )


def _fields(path: Path) -> dict[str, str]:
    """Reads the first value of each `name: value` in a file of /proc, if it exists."""
    if not path.exists():
        return {}
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
