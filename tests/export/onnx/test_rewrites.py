from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from keras_mha.export.onnx.operations import _as_product
from keras_mha.export.onnx.rewrites import rewrite

SHAPE = ("batch", "length", 5)


def make(
    nodes: list[Any],
    constants: dict[str, np.ndarray],
    dtype: int = onnx.TensorProto.FLOAT,
    shape: tuple[int | str, ...] = SHAPE,
    opset: int = 18,
) -> Any:
    """A model from `x` of `shape` to `y`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def rewritten(model: Any, x: np.ndarray) -> Counter[str]:
    """The operations after rewriting, once the values are known to be the same."""
    (wanted,) = ReferenceEvaluator(model).run(None, {"x": x})
    model = rewrite(model)
    onnx.checker.check_model(model, full_check=True)
    (got,) = ReferenceEvaluator(model).run(None, {"x": x})
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    return Counter(node.op_type for node in model.graph.node)


def vectors(*shape: int) -> np.ndarray:
    return np.random.default_rng(11).normal(size=shape).astype("float32")


def normalization(
    axis: int = -1,
    *,
    squared: str = "centered",
    width: int = 5,
    rows: tuple[int | str, ...] = ("batch", "length"),
    keepdims: int = 1,
) -> Any:
    kept = {"keepdims": keepdims}
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["mean"], **kept),
        helper.make_node("Neg", ["mean"], ["minus"]),
        helper.make_node("Sub", ["x", "mean"], ["centered"]),
        helper.make_node("Mul", [squared, squared], ["square"]),
        helper.make_node("ReduceMean", ["square", "axis"], ["variance"], **kept),
        helper.make_node("Add", ["variance", "epsilon"], ["sum"]),
        helper.make_node("Sqrt", ["sum"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node("Mul", ["inverse", "gamma"], ["factor"]),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Mul", ["minus", "factor"], ["moved"]),
        helper.make_node("Add", ["moved", "beta"], ["shift"]),
        helper.make_node("Add", ["scaled", "shift"], ["y"]),
    ]
    constants = {
        "axis": np.array([axis]),
        "epsilon": np.array(0.25, "float32"),
        "gamma": vectors(1, 1, width),
        "beta": vectors(1, 1, width) + 1,
    }
    return make(nodes, constants, shape=(*rows, width))


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_layer_normalization_becomes_one_operation(axis: int) -> None:
    assert rewritten(normalization(axis), vectors(2, 3, 5)) == {"LayerNormalization": 1}


def test_a_wide_layer_normalization_keeps_its_weights() -> None:
    # So wide that they are taken out for the shape inference.
    model = normalization(width=1031)
    assert rewritten(model, vectors(2, 3, 1031)) == {"LayerNormalization": 1}


@pytest.mark.parametrize(
    "model",
    [normalization(1), normalization(squared="x")],
    ids=["another axis", "another variance"],
)
def test_what_only_looks_like_it_stays(model: Any) -> None:
    counts = rewritten(model, vectors(2, 3, 5))
    assert (counts["LayerNormalization"], counts["ReduceMean"]) == (0, 2)


def test_means_without_their_axis_stay() -> None:
    # Of a square, row i's mean is then taken from column i.
    model = normalization(rows=(1, 5), keepdims=0)
    counts = rewritten(model, vectors(1, 5, 5))
    assert (counts["LayerNormalization"], counts["ReduceMean"]) == (0, 2)


def reshape(*parts: str) -> list[Any]:
    """Reshapes `x` to the concatenation of `parts`, read off its own shape."""
    return [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch"]),
        helper.make_node("Gather", ["sizes", "second"], ["length"]),
        helper.make_node("Concat", list(parts), ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]


SIZES = {
    "first": np.array([0]),
    "second": np.array([1]),
    "one": np.array([1]),
    "five": np.array([5]),
    "rest": np.array([-1]),
    "two": np.array([2]),
}


@pytest.mark.parametrize(
    ("parts", "operation"),
    [
        (("batch", "length", "one", "five"), "Unsqueeze"),
        (("batch", "one", "rest", "five"), "Unsqueeze"),
        (("length", "batch", "five"), "several"),
        (("batch", "five", "length"), "Reshape"),
        (("batch", "rest"), "several"),
        (("rest", "length", "five"), "Reshape"),
    ],
)
def test_targets_of_reshapes_become_constant(
    parts: tuple[str, ...], operation: str
) -> None:
    counts = rewritten(make(reshape(*parts), SIZES), vectors(2, 3, 5))
    if operation == "several":  # two sizes cannot both be told by -1
        assert counts["Concat"] == 1
    else:
        assert counts == {operation: 1}


def test_a_target_of_another_size_is_still_an_error() -> None:
    model = rewrite(make(reshape("batch", "two", "five"), SIZES))
    with pytest.raises(ValueError, match="reshape"):
        ReferenceEvaluator(model).run(None, {"x": vectors(2, 3, 5)})


def lookup(size: int, axis: int = 0) -> Any:
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Less", ["float", "zero"], ["negative"]),
        helper.make_node("Add", ["x", "size"], ["from_end"]),
        helper.make_node("Where", ["negative", "from_end", "x"], ["ids"]),
        helper.make_node("Gather", ["table", "ids"], ["y"], axis=axis),
    ]
    constants = {
        "zero": np.array(0, "float32"),
        "size": np.array(size, "int32"),
        "table": vectors(7, 5),
    }
    return make(nodes, constants, onnx.TensorProto.INT32, ("batch", "length"))


def test_ids_from_the_end_need_no_selection() -> None:
    ids = np.array([[0, -1, 6], [-7, 3, 2]], "int32")
    assert rewritten(lookup(7), ids) == {"Gather": 1}


def test_ids_from_another_end_keep_their_selection() -> None:
    ids = np.array([[0, -1, 6], [-5, 3, 2]], "int32")
    assert rewritten(lookup(5), ids)["Where"] == 1


def test_a_product_keeps_its_rank() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "leading"], ["kept"]),
        helper.make_node("Concat", ["kept", "width"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["product"]),
        helper.make_node("Reshape", ["product", "target"], ["y"]),
    ]
    constants = {
        "leading": np.array([0, 1]),
        "width": np.array([3]),
        "flat": np.array([-1, 5]),
        "matrix": vectors(5, 3),
    }
    assert rewritten(make(nodes, constants), vectors(2, 3, 5)) == {"MatMul": 1}


def test_large_constants_come_back() -> None:
    large = vectors(40, 50)
    model = make(
        [
            helper.make_node("Shape", ["x"], ["sizes"]),
            helper.make_node("MatMul", ["x", "large"], ["y"]),
        ],
        {"large": large},
        shape=("batch", 40),
    )
    before = model.SerializeToString()
    assert rewritten(model, vectors(3, 40)) == {"MatMul": 1}
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("equation", "plan"),
    [
        ("abc,cde->abde", (2, 1)),
        ("abcd,cde->abe", (2, 2)),
        ("ab,bc->ac", (1, 1)),
        ("abc,dc->abd", None),
        ("abc,cd->adb", None),
        ("abc,bd->acd", None),
        ("ab,cd->abcd", None),
        ("aab,bc->ac", None),
        ("...b,bc->...c", None),
    ],
)
def test_which_equations_are_products(
    equation: str, plan: Callable[..., Any] | None
) -> None:
    assert _as_product(equation) == plan
