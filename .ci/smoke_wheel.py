"""Builds the wheel, installs it outside the checkout, and runs `smoke.py` on it.

The wheel goes into a fresh virtual environment in a temporary folder. A `.pth` file
there names the packages of this script's environment, so that TensorFlow need not be
installed again. Python reads no `.pth` files in a folder named that way, so the
editable install stays out of sight.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent


def build_wheel(directory: Path) -> Path:
    """Builds the wheel of the checkout into `directory` and returns its path."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", directory, CHECKOUT],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = directory.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Refuses a wheel that misses a file of its packages or holds anything else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    package, command = CHECKOUT / "keras_mha", CHECKOUT / "keras_mha_cli"
    snippets = package / "export" / "tflite" / "snippets"
    files = (
        package / "py.typed",
        *(path for path in snippets.iterdir() if path.suffix in (".kt", ".swift")),
        *package.rglob("*.py"),
        *command.rglob("*.py"),
    )
    expected = {path.relative_to(CHECKOUT).as_posix() for path in files}
    if packed != expected:
        raise SystemExit(
            f"{wheel.name} and the checkout differ in: {sorted(packed ^ expected)}"
        )
    if not any(name.endswith("/licenses/LICENSE") for name in names):
        raise SystemExit(f"{wheel.name} has no license in it.")


def install(wheel: Path, directory: Path) -> Path:
    """Installs the wheel into a new environment; returns that environment's Python."""
    venv.create(directory, with_pip=False, symlinks=os.name != "nt")
    scheme = sysconfig.get_preferred_scheme("prefix")
    variables = {"base": str(directory), "platbase": str(directory)}
    site_packages = Path(sysconfig.get_path("purelib", scheme, variables))
    python = Path(sysconfig.get_path("scripts", scheme, variables)) / "python"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", f"--python={python}"),
            *("install", "--quiet", "--no-deps", wheel),
        ],
        check=True,
    )
    # Only now: pip would take the editable install for this one.
    borrowed = sysconfig.get_path("purelib")
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return python


def main() -> None:
    """Builds, checks, installs and runs."""
    with tempfile.TemporaryDirectory(prefix="keras-mha-wheel-") as folder:
        work = Path(folder)
        wheel = build_wheel(work)
        check_contents(wheel)
        python = install(wheel, work / "venv")
        # -I: neither the current folder nor PYTHONPATH is searched for modules.
        program = shutil.copy(HERE / "smoke.py", work)
        subprocess.run([python, "-I", program], check=True, cwd=work)
        print(f"{wheel.name}: passed")


if __name__ == "__main__":
    main()
