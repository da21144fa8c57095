from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import keras_mha.export
from keras_mha.export.declaration import Format
from keras_mha.export.onnx import export as onnx_file
from keras_mha.models import BertEncoder
from keras_mha.text import WordpieceTokenizer
from keras_mha_cli import declared, main
from tests.support import small_models

ROOT = Path(__file__).resolve().parents[1]
# What the installed script does.
SCRIPT = "import sys, keras_mha_cli; sys.exit(keras_mha_cli.main())"
IDS = np.array([[3, 1, 4], [1, 5, 0]])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, *map(str, arguments)]


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of ids, one of texts, and samples for both."""
    directory = tmp_path_factory.mktemp("files")
    small_models.ids_model().save(directory / "ids.keras")
    small_models.text_model().save(directory / "texts.keras")
    np.save(directory / "ids.npy", IDS)
    (directory / "texts.txt").write_text("\n".join(small_models.TEXTS), "utf-8")
    return directory


def of_ids(files: Path, out: Path, *formats: str) -> list[str]:
    return [
        "export",
        str(files / "ids.keras"),
        *("--to", *formats),
        *("--samples", str(files / "ids.npy")),
        *("--out", str(out)),
    ]


def test_all_formats_in_one_command(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = tmp_path / "report.json"
    done = run(
        *of_ids(files, out, "saved_model", "tflite", "onnx"),
        *("--sequence-lengths", 5, "--opset", 17, "--warmup", 1, "--report", report),
        *("--version", 0, "--with-tflite"),
    )
    assert done.returncode == 0, done.stderr
    for name in ("saved_model.pb", "model.tflite"):
        assert (out / "saved_model" / "0" / name).exists()
    found = json.loads(report.read_text())
    assert list(found) == ["saved_model", "tflite", "onnx"]
    # An option reaches the exporters that take it.
    assert found["onnx"]["opset"] == 17
    assert found["tflite"]["files"][0]["inputs"][0]["shape"] == [1, 5]
    assert found["saved_model"]["warmup_records"] == 1
    # The table on stdout alone, the progress on stderr alone.
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("| ") for line in lines)
    assert str(out / "tflite" / "model_5.tflite") in lines[3]
    for name in found:
        assert f"keras-mha: export to {name}, " in done.stderr
    assert done.stderr.count(": done in ") == 7
    # By value, outside the exporters' own comparison.
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
    (answer,) = session.run(None, {"ids": IDS.astype(np.int32)})
    wanted = small_models.ids_model()(IDS)
    np.testing.assert_allclose(answer, wanted, atol=1e-5)


def test_a_wrong_value_ends_with_1_and_leaves_nothing(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = onnx_file.run_in_fresh_process

    def perturbed(*args: Any, **kwargs: Any) -> Any:
        answers, facts = original(*args, **kwargs)
        return [{n: a + np.float32(1e-3) for n, a in x.items()} for x in answers], facts

    monkeypatch.setattr(onnx_file, "run_in_fresh_process", perturbed)
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = of_ids(files, out, "onnx")
    assert main([*arguments, "--report", str(report)]) == 1
    told = capsys.readouterr()
    assert "'probabilities' of the exported file differs from the model's" in told.err
    assert "Traceback" not in told.err
    assert "| onnx | nothing: it failed |" in told.out
    assert "differs" in json.loads(report.read_text())["onnx"]["error"]
    assert not out.exists()
    # The comparison is what failed.
    assert main([*arguments, "--tolerance", "0.01"]) == 0
    assert (out / "onnx" / "model.onnx").exists()


def test_what_exists_is_replaced_with_a_warning_or_as_asked(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = of_ids(files, tmp_path, "onnx")
    path = tmp_path / "onnx" / "model.onnx"
    path.parent.mkdir()
    for options, warned in ([], True), (["--overwrite"], False):
        path.write_bytes(b"old")
        assert main([*arguments, *options]) == 0
        told = capsys.readouterr().err
        assert (f"warning: {path} exists and is replaced" in told) is warned
        assert path.read_bytes() != b"old"


@pytest.mark.slow
def test_models_of_keras_mha_models_load(tmp_path: Path) -> None:
    encoder = BertEncoder(11, 7, 8, num_layers=1, num_heads=2, hidden_dim=16)
    ids = keras.Input((None,), dtype="int32", name="ids")
    shown = keras.ops.not_equal(ids, 0)
    hidden = encoder({"input_ids": ids, "attention_mask": shown})
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(ids, keras.layers.Dense(2, "softmax", name="label")(pooled))
    model.save(tmp_path / "bert.keras")
    np.save(tmp_path / "ids.npy", np.array([[3, 1, 4], [1, 5, 0]]))
    samples = ("--samples", tmp_path / "ids.npy")
    done = run(
        *("export", tmp_path / "bert.keras", "--to", "onnx", "--out", tmp_path / "out"),
        *samples,
    )
    assert done.returncode == 0, done.stderr
    onnx = ("--onnx", tmp_path / "out" / "onnx" / "model.onnx")
    done = run("verify", tmp_path / "bert.keras", *onnx, *samples)
    assert done.returncode == 0, done.stderr


def test_a_format_that_fails_does_not_stop_the_others(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = of_ids(files, tmp_path / "out", "tflite", "onnx")
    assert main([*arguments, "--sequence-lengths", "2", "--debug"]) == 1
    told = capsys.readouterr()
    assert "`samples` must not be longer than any of `sequence_lengths`" in told.err
    assert "(On the command line: --sequence-lengths, --shapes, --samples)" in told.err
    assert "Traceback" in told.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["onnx"]
    assert "| tflite | nothing: it failed |" in told.out
    assert "| onnx | /" in told.out


def test_texts_are_refused_by_what_to_change(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            *("export", str(files / "texts.keras"), "--to", "tflite"),
            *("--samples", str(files / "texts.txt"), "--out", str(tmp_path / "out")),
        ]
    )
    assert code == 1
    told = capsys.readouterr().err
    assert "after its tokenizer: `without_tokenizer` gives it; or pass `text" in told
    assert "(On the command line: --text, --tokens)" in told
    assert not (tmp_path / "out").exists()


def test_a_model_of_texts_goes_where_ids_are_taken(files: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    code = main(
        [
            *("export", str(files / "texts.keras"), "--tokens"),
            *("--to", "tflite", "onnx", "--sequence-lengths", "7"),
            *("--quantization", "int8_dense", "--quantized-tolerance", "0.3"),
            *("--representative-data", str(files / "texts.txt")),
            *("--samples", str(files / "texts.txt")),
            *("--out", str(out), "--report", str(report)),
        ]
    )
    assert code == 0
    found = json.loads(report.read_text())
    assert found["tflite"]["files"][0]["inputs"][0]["name"] == "ids"
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx")
    tokenizer = WordpieceTokenizer(small_models.VOCABULARY, max_length=6)
    ids = tokenizer(np.array(small_models.TEXTS))
    (answer,) = session.run(None, {"ids": np.asarray(ids)})
    wanted = small_models.text_model()(np.array(small_models.TEXTS))
    np.testing.assert_allclose(answer, wanted, atol=1e-5)


def test_a_model_of_texts_becomes_files_that_take_texts(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    labels, texts = tmp_path / "labels.txt", tmp_path / "texts.txt"
    labels.write_text("bad\ngood\nnone\n", "utf-8")
    texts.write_text("good movie\n\na bad movie\n", "utf-8")
    code = main(
        [
            *("export", str(files / "texts.keras"), "--tokens", "--text"),
            *("--to", "saved_model", "tflite", "onnx", "--sequence-lengths", "6"),
            *("--metadata", str(labels), "--samples", str(texts)),
            *("--out", str(out), "--report", str(report)),
        ]
    )
    told = capsys.readouterr()
    assert code == 0, told.err
    found = json.loads(report.read_text())
    kinds = {file["kind"]: file for file in found["tflite"]["files"]}
    assert list(kinds) == ["ids", "text", "mediapipe"]
    assert kinds["text"]["inputs"][0]["dtype"] == "string"
    assert found["onnx"]["inputs"][0]["name"] == "ids"
    assert found["saved_model"]["further_signatures"][0]["name"] == "tokens"
    assert (out / "tflite" / "labels.txt").read_text() == labels.read_text()
    check = kinds["mediapipe"]["mediapipe"]
    if check["status"] == "not run":
        assert "; MediaPipe not run: pip install 'keras-mha[mediapipe]'" in told.out
        return
    assert (check["same_ids"], check["texts"]) == (3, 3)
    assert ", 3 of 3 texts into the same ids |" in told.out


def test_metadata_of_words(files: Path, tmp_path: Path) -> None:
    metadata, report = tmp_path / "metadata.json", tmp_path / "report.json"
    words = ["<PAD>", "<START>", "<UNKNOWN>", "good", "bad", "film"]
    fields = {
        "labels": ["a", "b", "c"],
        "vocabulary": words,
        "texts": ["good film", "bad"],
        "delimiter": "[^a-z]+",
    }
    metadata.write_text(json.dumps(fields), "utf-8")
    np.save(tmp_path / "ids.npy", np.array([[1, 3, 5], [1, 4, 0]]))
    arguments = of_ids(files, tmp_path / "out", "tflite")
    arguments[arguments.index("--samples") + 1] = str(tmp_path / "ids.npy")
    further = ["--metadata", str(metadata), "--report", str(report)]
    assert main([*arguments, *further]) == 0
    written = json.loads(report.read_text())["tflite"]["files"]
    assert [file["kind"] for file in written] == ["ids", "mediapipe"]
    vocabulary = (tmp_path / "out" / "tflite" / "vocab.txt").read_text("utf-8")
    assert vocabulary.split() == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"labels": ["a"], "words": []}', "object with `labels` and further of"),
        ("3", "object with `labels` and further of"),
        ('{"labels": "a"}', "`labels` must be a sequence of strings"),
        ("{", "Expecting property name"),
    ],
)
def test_metadata_that_is_none(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    metadata = tmp_path / "metadata.json"
    metadata.write_text(content, "utf-8")
    arguments = of_ids(files, tmp_path / "out", "tflite")
    assert main([*arguments, "--metadata", str(metadata)]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_samples_of_another_type_are_refused_in_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = of_ids(files, tmp_path / "out", "saved_model")
    arguments[1] = str(files / "texts.keras")
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "`samples` for input 'text' must be of type string" in told
    assert "(On the command line: --samples)" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("formats", "absent", "extras"),
    [
        (["onnx", "tflite"], ["tf2onnx", "ai_edge_litert"], "onnx,tflite"),
        (["saved_model", "onnx"], ["onnxruntime"], "onnx"),
    ],
)
def test_absent_packages_end_with_3_and_the_command_to_run(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    formats: Sequence[str],
    absent: Sequence[str],
    extras: str,
) -> None:
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(of_ids(files, tmp_path / "out", *formats)) == 3
    assert f"pip install 'keras-mha[{extras}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_that_the_model_needs_ends_with_3(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    arguments = of_ids(files, tmp_path / "out", "saved_model")
    arguments[1] = str(files / "texts.keras")
    assert main(arguments) == 3
    assert "pip install 'keras-mha[text]'" in capsys.readouterr().err


def test_layers_that_are_not_known_are_named(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_models.compiled_model().save(tmp_path / "own.keras")
    arguments = of_ids(files, tmp_path / "out", "saved_model")
    arguments[1] = str(tmp_path / "own.keras")
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "CompiledSoftmax" in told
    assert "Name the module that registers your own: --import MODULE" in told


OWN_LAYERS = """
import keras

@keras.saving.register_keras_serializable(package="mine")
class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs
"""


def test_a_module_of_own_layers_is_imported(tmp_path: Path) -> None:
    (tmp_path / "own_layers.py").write_text(OWN_LAYERS)
    program = (
        "import keras, own_layers\n"
        "x = keras.Input((3,), name='x')\n"
        "keras.Model(x, own_layers.Doubled(name='y')(x)).save('own.keras')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.save(tmp_path / "x.npy", np.ones((2, 3), "float32"))
    samples = ("--import", "own_layers", "--samples", "x.npy")
    for arguments in (
        ("export", "own.keras", "--to", "onnx", "--out", ".", *samples),
        ("verify", "own.keras", "--onnx", "onnx/model.onnx", *samples),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        # Nothing but what the command itself says.
        lines = done.stderr.splitlines()
        assert all(line.startswith("keras-mha: ") for line in lines), done.stderr
        assert "keras-mha: import own_layers: done in " in done.stderr


def test_a_module_that_fails_is_told_in_a_line(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_layers.py").write_text("1 / 0")
    arguments = of_ids(files, tmp_path / "out", "onnx")
    assert main([*arguments, "--import", "broken_layers"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "keras-mha: error: division by zero"


@pytest.mark.parametrize(
    ("formats", "further", "message"),
    [
        (["tflite"], ["--opset", "17"], "--opset is for onnx, not for tflite"),
        (["onnx"], ["--warmup", "2"], "--warmup is for saved_model, not for onnx"),
        (["tflite"], ["--output-names", "p"], "is for saved_model and onnx, not"),
        (["onnx"], ["--opset", "12"], "must be 13 to 18, not 12"),
        (["saved_model"], ["--version", "-1"], "must be at least 0, not -1"),
        (["onnx"], ["--tolerance", "nan"], "must be finite and at least 0, not nan"),
        (["onnx"], ["--tolerance", "x"], "invalid number value: 'x'"),
        (["tflite"], ["--sequence-lengths", "0"], "must be at least 1, not 0"),
        (["tflite"], ["--representative-data", "a.npy"], "--representative-data goes"),
        (["tflite"], ["--shapes", "ids=1,x"], "must be written as ids=1,64, not ids"),
        (
            ["tflite"],
            ["--shapes", "ids=1,64", "--sequence-lengths", "64"],
            "--shapes and --sequence-lengths both set sizes",
        ),
        (
            ["tflite"],
            ["--quantization", "float16", "--tolerance", "0.1"],
            "the tolerance is --quantized-tolerance",
        ),
        (["pb"], [], "invalid choice: 'pb'"),
        (["onnx"], ["--text"], "--text is for tflite, not for onnx"),
        (["tflite"], ["--metadata", "l.csv"], "--metadata must end in .txt or .json"),
        (["tflite"], ["--metadata", "l.txt"], "l.txt does not exist"),
        (["onnx"], ["--report", "absent/r.md"], "absent does not exist"),
        (["onnx"], ["--report", "r.txt"], "--report must end in .json or .md"),
        (["onnx"], ["--samples", "absent.npy"], "absent.npy does not exist"),
        (["onnx"], ["--samples", "."], ". is not a file"),
        (["onnx"], ["--import", "layers.py"], "no module layers.py, here or"),
        (["onnx"], ["--import", "./layers"], "the name of a module, such as my_la"),
        (["onnx"], ["--import", "no_such"], "there is no module no_such, here or"),
    ],
)
def test_wrong_usage_ends_with_2_before_the_work(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    formats: Sequence[str],
    further: Sequence[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*of_ids(files, tmp_path / "out", *formats), *further])
    told = capsys.readouterr().err
    first, second = told.splitlines()
    assert first.startswith("keras-mha export: error: ")
    assert message in first
    assert second == "Try 'keras-mha export --help'."
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model_is_named(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = of_ids(files, tmp_path / "out", "onnx")
    arguments[1] = str(files / "ids.npy")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "ids.npy is not a .keras file" in capsys.readouterr().err
    # A zip archive with something else in it.
    np.savez(tmp_path / "other.keras", x=1)
    (tmp_path / "other.keras.npz").rename(tmp_path / "other.keras")
    arguments[1] = str(tmp_path / "other.keras")
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "other.keras" in told.splitlines()[-1]
    assert "Traceback" not in told


def test_help_and_version_load_nothing_heavy() -> None:
    program = (
        "import atexit, sys, keras_mha_cli\n"
        "heavy = {'keras', 'keras_mha', 'numpy', 'tensorflow'}\n"
        "atexit.register(lambda: print('loaded', *heavy & set(sys.modules)))\n"
        "sys.exit(keras_mha_cli.main(sys.argv[1:]))"
    )
    for arguments in (
        ["export", "--help"],
        ["lint", "--help"],
        ["serve-config", "--help"],
        ["verify", "--help"],
        ["--help"],
        ["export", "--opset", "x"],
        ["lint", "absent.tflite"],
        ["verify", "absent.keras", "--samples", "x.npy", "--onnx", "y.onnx"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
        assert done.stdout.splitlines()[-1] == "loaded"
    version = run("--version")
    assert version.stdout.startswith("keras-mha 0."), version.stderr


def test_help_names_every_option_and_exit_code() -> None:
    told = run("export", "--help").stdout
    for option, _ in declared.options_of(list(declared.FORMATS)).values():
        assert f"\n  {option.flag}" in told
    for code in (0, 1, 2, 3, 130):
        assert f"\n  {code}  " in told


@pytest.mark.parametrize("one", declared.FORMATS.values(), ids=lambda one: one.name)
def test_every_exporter_is_called_in_one_way(one: Format) -> None:
    exporter = getattr(keras_mha.export, f"export_{one.name}")
    model, place, *options = inspect.signature(exporter).parameters.values()
    assert model.name == "model"
    assert place.name in ("path", "directory")
    assert {p.kind for p in options} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.name for p in options if p.default is p.empty] == ["samples"]
    # The command asks for the signature of tokens with an option for all formats.
    tokens = {"tokens"} if one.signature_of_tokens else set()
    declares = {"samples", *one.arguments} | tokens
    assert {p.name for p in options} == declares


def test_the_installed_script_is_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, name = project["project"]["scripts"]["keras-mha"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_ended_early_it_leaves_nothing_under_a_final_name(
    files: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        # A shell may have started the tests with Ctrl-C ignored.
        ["/usr/bin/env", "--default-signal=INT", *command(*of_ids(files, out, "onnx"))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # Then it waits for the file's values: what traces and converts before may
        # swallow an interruption.
        while process.poll() is None and not list(out.glob("onnx/.staging-*/*.onnx")):
            time.sleep(0.01)
        process.send_signal(ending)
        _, told = process.communicate()
    left = [path for path in out.glob("*/*") if not path.name.startswith(".staging-")]
    assert left == [], told
    if ending == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert list(out.glob("onnx/.staging-*"))
    else:
        assert process.returncode == 130
        assert told.splitlines()[-1].startswith("keras-mha: interrupted")
        assert not out.exists()
