"""Ways to shrink the numbers of a TFLite file.

| name | weights | activations |
| --- | --- | --- |
| `None` | float32 | float32 |
| `"float16"` | float16, of all | float32; float16 on delegates that can |
| `"dynamic_int8"` | int8, of dense layers and embeddings | float32; int8 in products |
| `"int8_dense"` | int8, of dense layers and embeddings | int8 in dense layers, float |
||| between them, attention included |

Attention in int8 loses what an additive mask hides; see `keras_mha.attention.portable`
for the mask.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import tensorflow as tf

Quantization: TypeAlias = Literal["float16", "dynamic_int8", "int8_dense"]
# Largest difference of a probability from the float model's that is allowed if the
# caller allows no other.
TOLERANCES = {"float16": 2e-3, "dynamic_int8": 0.05, "int8_dense": 0.05}


def check_quantization(
    quantization: Quantization | None, representative_data: Any
) -> None:
    """Refuses an unknown way of quantizing, and data that it cannot use.

    Raises:
        ImportError: If litert-quantizer is needed and not installed.
        ValueError: Otherwise.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise ValueError(
            f"`quantization` must be None or one of {list(get_args(Quantization))}. "
            f"Received: quantization={quantization!r}"
        )
    if representative_data is not None and quantization != "int8_dense":
        raise ValueError(
            "`representative_data` is for quantization='int8_dense': it tells the "
            f"range of the activations. Received: quantization={quantization!r} with "
            "representative_data"
        )
    if (
        quantization == "int8_dense"
        and importlib.util.find_spec("litert_quantizer") is None
    ):
        raise ImportError(
            "quantization='int8_dense' needs litert-quantizer: "
            "pip install 'keras-mha[tflite]'"
        )


def ask_converter(converter: Any, quantization: Quantization | None) -> None:
    """Sets up a `tf.lite.TFLiteConverter` for what it can do by itself."""
    if quantization in ("dynamic_int8", "float16"):
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]


def quantize_dense(
    content: bytes, signature_name: str, cases: Sequence[dict[str, np.ndarray]]
) -> bytes:
    """Quantizes the dense layers and embeddings of a float file, and nothing else.

    Args:
        content: The file.
        signature_name: Its signature.
        cases: Inputs by name, from which the activations' ranges are taken.
    """
    from litert_quantizer import Quantizer
    from litert_quantizer.calibrator import Calibrator
    from litert_quantizer.qtyping import TFLOperationName
    from litert_quantizer.recipe_manager import RecipeManager
    from litert_quantizer.utils.qsv_utils import min_max_update

    quantizer = Quantizer(content)
    quantizer.add_static_config(".*", TFLOperationName.FULLY_CONNECTED, 8, 8)
    quantizer.add_weight_only_config(".*", TFLOperationName.EMBEDDING_LOOKUP, 8)
    recipe: Any = RecipeManager()
    recipe.load_quantization_recipe(quantizer.get_quantization_recipe())
    with _quietly(), _refusing():
        # `Quantizer.calibrate` takes moving averages, beyond which values are cut off.
        calibrator: Any = Calibrator(
            content, num_threads=1, qsv_update_func=min_max_update
        )
        calibrator.calibrate({signature_name: list(cases)}, recipe)
        ranges = calibrator.get_model_qsvs()
        result: Any = quantizer.quantize(ranges, enable_progress_report=False)
    return bytes(result.quantized_model)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Says in the exporter's words where the quantizer fails."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            "`quantization='int8_dense'` does not work for `model`: litert-quantizer "
            "cannot run its float file to take the ranges. Try "
            "quantization='dynamic_int8'."
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keeps progress bars, and a warning of how calibration works, to itself."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.filterwarnings("ignore", "(?s).*experimental_preserve_all_tensors")
        yield
