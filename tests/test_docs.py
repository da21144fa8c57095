"""The documents hold: their code runs, their links lead to files, versions agree."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import keras_mha

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "docs", "examples", "export")
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
# They train.
LONG = ("interpret", "lora", "mixed-precision")
# What users import from; all of it is in the API pages.
MODULES = ("", ".convert", ".export", ".interpret", ".models", ".text")
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", *(f"{folder}/**/*.md" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"^::: ([\w.]+)\.(\w+)$", re.MULTILINE)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, each moved to the line it stands on."""
    return [
        "\n" * text.count("\n", 0, block.start(2)) + block.group(2)
        for block in FENCED.finditer(text)
        if block.group(1) == language
    ]


def run_blocks(text: str, name: str) -> dict[str, Any]:
    """Runs the Python blocks of a document one after the other, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in code_blocks(text, "python"):
        exec(compile(block, name, "exec"), namespace)  # noqa: S102 - our own text.
    return namespace


def dead_links(text: str, folder: Path) -> list[str]:
    """The relative links of a document that lead to no file."""
    prose = FENCED.sub("", text)
    targets = {target.split("#")[0] for target in LINK.findall(prose)}
    return sorted(
        target
        for target in targets
        if target and "://" not in target and not (folder / target).exists()
    )


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert code_blocks(text, "python")
    monkeypatch.chdir(tmp_path)
    run_blocks(text, "README.md")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow) if path.stem in LONG else path
        for path in GUIDES
    ],
    ids=lambda path: path.stem,
)
def test_guides_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = code_blocks(text, "python")
    assert any("assert" in block for block in blocks)
    monkeypatch.chdir(tmp_path)
    run_blocks(text, str(path.relative_to(ROOT)))


def test_the_index_and_the_navigation_name_every_guide() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in GUIDES:
        assert f"(guides/{path.name})" in index
        assert f"- guides/{path.name}\n" in navigation


def test_the_api_pages_have_every_public_name() -> None:
    pages = (ROOT / "docs" / "api").glob("*.md")
    shown = [
        getattr(import_module(module), name)
        for page in pages
        for module, name in DIRECTIVE.findall(page.read_text(encoding="utf-8"))
    ]
    # By identity: some have two names.
    public = {
        id(getattr(module, name)): name
        for module in (import_module(f"keras_mha{end}") for end in MODULES)
        for name in module.__all__
        if name != "__version__"
    }
    assert {id(each) for each in shown} == set(public), public
    assert len(shown) == len(public)


@pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_to_files(path: Path) -> None:
    assert not dead_links(path.read_text(encoding="utf-8"), path.parent)


def test_the_make_commands_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, path.name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_the_pages_count_the_faults_that_the_tests_show() -> None:
    tests = ROOT / "tests" / "layers" / "test_mended_faults.py"
    text = tests.read_text(encoding="utf-8")
    faults = len(set(re.findall(r"^def test_(\d+)_", text, re.MULTILINE)))
    page = (ROOT / "docs" / "differences-from-keras.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) - 2 == faults  # without the head and the rule below it
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{faults} faults of Keras" in readme


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)[0]
    assert newest == keras_mha.__version__ == version("keras-mha")


# The checks themselves can fail.


def test_docstrings_are_translated_for_the_api_pages() -> None:
    path = ROOT / "docs" / "keras_docstrings.py"
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    extension = module_from_spec(spec)
    spec.loader.exec_module(extension)
    docstring = (
        "Adds.\n\nLetters: B batch.\n\nCall arguments:\n    x: A number.\n\n"
        "Example:\n\n>>> add(1)\n2\n\n>>> add(2)\n3\n"
    )
    assert extension.translate(docstring) == (
        "Adds.\n\n**Letters:** B batch.\n\nOther Args: Call arguments:\n"
        "    x: A number.\n\nExamples:\n    >>> add(1)\n    2\n\n"
        "    >>> add(2)\n    3\n"
    )


def test_blocks_share_a_namespace_and_keep_their_lines() -> None:
    text = "# A\n```python\nx = 1\n```\n```sh\nno python\n```\n\n```python\n{}\n```"
    assert run_blocks(text.format("y = x + 1"), "text")["y"] == 2
    with pytest.raises(ZeroDivisionError) as raised:
        run_blocks(text.format("x / 0"), "text")
    assert raised.traceback[-1].lineno + 1 == 10


def test_dead_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "here.md").touch()
    text = "[a](here.md#part) [b](gone.md) [c](https://example.org/x) [d](#part)"
    assert dead_links(text, tmp_path) == ["gone.md"]
