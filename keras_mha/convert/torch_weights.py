"""The weights of PyTorch's attention modules, taken out of a state dict by name.

Letters: D widths of inputs, N heads, H head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mha.layers.arguments import check_positive
from keras_mha.typing import Shape

PARTS = ("query", "key", "value")


class Arrays:
    """A state dict's arrays, taken one by one by their names."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.left = arrays
        self.names = list(arrays)

    def take(self, name: str, shape: Shape) -> np.ndarray:
        """Takes an array, which must have this shape."""
        self._check_name(name)
        array = self.left.pop(name)
        if array.shape != tuple(shape):
            raise ValueError(
                f"`{name}` must have the shape {tuple(shape)}. "
                f"Received: {name} of shape {array.shape}"
            )
        return array

    def size_of(self, name: str, axis: int) -> int:
        """The size of one axis of a matrix, which is left."""
        self._check_name(name)
        shape = self.left[name].shape
        if len(shape) != 2:
            raise ValueError(
                f"`{name}` must be a matrix. Received: {name} of shape {shape}"
            )
        return shape[axis]

    def check_all_taken(self) -> None:
        """Raises where something was not asked for."""
        for name in self.left:
            if name.rpartition(".")[2] in ("bias_k", "bias_v"):
                raise ValueError(
                    "Our attention has no learned key and value next to those of the "
                    f"inputs (`add_bias_kv`). Received: {name}"
                )
        if self.left:
            raise ValueError(
                "The state dict has weights that belong nowhere. "
                f"Received: {', '.join(map(repr, self.left))}"
            )

    def _check_name(self, name: str) -> None:
        if name not in self.left:
            raise ValueError(
                f"The state dict must have `{name}`; of a larger model, pass only "
                "the part, with the prefix removed from its names. "
                f"Received: {', '.join(map(repr, self.names))}"
            )


def take_attention(
    arrays: Arrays, prefix: str, num_heads: Any, use_bias: bool
) -> tuple[tuple[int, int, int, int], dict[str, Any]]:
    """Takes the widths of queries, values and keys, N, and the parts' weights."""
    num_heads = check_positive(num_heads, "num_heads")
    width = arrays.size_of(f"{prefix}out_proj.weight", 1)
    if width % num_heads:
        raise ValueError(
            "The width must be divisible by `num_heads`. Received: "
            f"num_heads={num_heads} and {prefix}out_proj.weight of width {width}"
        )
    kernel, bias = take_linear(arrays, f"{prefix}out_proj.", width, width, use_bias)
    heads = (num_heads, width // num_heads)
    output = kernel.reshape(*heads, width), bias
    if f"{prefix}q_proj_weight" in arrays.left:
        names = [f"{prefix}{part[0]}_proj_weight" for part in PARTS]
        widths = [width, *(arrays.size_of(name, 1) for name in names[1:])]
        kernels = [
            arrays.take(name, (width, D)) for name, D in zip(names, widths, strict=True)
        ]
    else:
        packed = arrays.take(f"{prefix}in_proj_weight", (3 * width, width))
        kernels, widths = np.split(packed, 3), [width] * 3
    biases: list[Any] = [None] * 3
    if use_bias:
        packed = arrays.take(f"{prefix}in_proj_bias", (3 * width,))
        biases = [bias.reshape(heads) for bias in np.split(packed, 3)]
    weights: dict[str, Any] = {"output": output}
    for part, kernel, bias in zip(PARTS, kernels, biases, strict=True):
        weights[part] = kernel.T.reshape(-1, *heads), bias
    query, key, value = widths
    return (query, value, key, num_heads), weights


def take_linear(
    arrays: Arrays, prefix: str, outputs: int, inputs: int, use_bias: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Takes a `torch.nn.Linear` as a kernel `(inputs, outputs)` and a bias."""
    kernel, bias = take_with_bias(arrays, prefix, (outputs, inputs), use_bias)
    return kernel.T, bias


def take_with_bias(
    arrays: Arrays, prefix: str, shape: Shape, use_bias: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Takes a weight of this shape, and the bias that goes with it."""
    weight = arrays.take(f"{prefix}weight", shape)
    return weight, arrays.take(f"{prefix}bias", shape[:1]) if use_bias else None


def assign(dense: Any, weights: tuple[np.ndarray, np.ndarray | None]) -> None:
    """Gives a dense layer a kernel and a bias."""
    kernel, bias = weights
    dense.kernel.assign(kernel)
    if bias is not None:
        dense.bias.assign(bias)


def assign_fused(layer: Any, weights: dict[str, Any]) -> None:
    """Each head's columns are those of its queries, its keys and its values."""
    kernels, biases = zip(*(weights[name] for name in PARTS), strict=True)
    bias = None if biases[0] is None else np.concatenate(biases, axis=-1)
    assign(layer.qkv_dense, (np.concatenate(kernels, axis=-1), bias))
    assign(layer.output_dense, weights["output"])


def to_array(name: str, value: Any) -> np.ndarray:
    """A tensor or array as a floating NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none
            value = value.float()
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype("float32")
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            "Weights must be floating tensors or arrays. "
            f"Received: {name} of dtype {array.dtype}"
        )
    return array
