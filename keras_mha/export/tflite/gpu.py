"""Puts operators that the GPU delegate takes in place of some that it does not.

Values stay as they are: each rewrite only moves a reshape, which the delegate does as
it should. `keras_mha.export.tflite.lint` finds where; its rules say why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from keras_mha.export.runtimes import tflite_schema
from keras_mha.export.tflite.graph import Operator, Tensor, contents_of
from keras_mha.export.tflite.lint import findings, is_misread

_MOST_AXES = 4


def mend_for_gpu(model: Any, size: int) -> bool:
    """Rewrites the operators in a file that break a rule with a way around it.

    Args:
        model: The file as objects, a `ModelT`, with fixed shapes; it is changed.
        size: Bytes in the file.

    Returns:
        Whether anything was changed.
    """
    passed_by = [_pass_by_int64(model, graph) for graph in model.subgraphs]
    contents = contents_of(tflite_schema.describe(model, size))
    broken = {
        (finding.subgraph, finding.index): finding.rule
        for finding in findings(contents.operators, "gpu")
        if finding.rule in _REWRITES
    }
    operators = {(one.subgraph, one.index): one for one in contents.operators}
    for number, subgraph in enumerate(model.subgraphs):
        graph = _Graph(model, subgraph)
        for index, operator in enumerate(list(subgraph.operators)):
            rule = broken.get((number, index))
            if rule is None:
                graph.operators.append(operator)
            else:
                _REWRITES[rule](graph, operator, operators[number, index])
        subgraph.operators = graph.operators
    return bool(broken) or any(passed_by)


def _pass_by_int64(model: Any, subgraph: Any) -> bool:
    """Reads int32 where it was cast to int64 and is cast again; tells if it did."""
    schema, tensors = _schema(), subgraph.tensors
    casts = [
        operator
        for operator in subgraph.operators
        if _builtin(model.operatorCodes[operator.opcodeIndex])
        == schema.BuiltinOperator.CAST
    ]
    wide = {
        int(operator.outputs[0]): int(operator.inputs[0])
        for operator in casts
        if tensors[operator.outputs[0]].type == schema.TensorType.INT64
    }
    alias = {}
    for operator in casts:
        (source,), (target,) = operator.inputs, map(int, operator.outputs)
        if int(source) not in wide:
            continue
        operator.inputs, operator.builtinOptions = [wide[int(source)]], None
        operator.builtinOptionsType = schema.BuiltinOptions.NONE
        if tensors[target].type == tensors[wide[int(source)]].type:
            alias[target] = wide[int(source)]
    for operator in subgraph.operators:
        operator.inputs = [alias.get(int(n), int(n)) for n in operator.inputs]
    read = {int(n) for operator in subgraph.operators for n in operator.inputs}
    unread = {*wide, *alias} - read - {int(number) for number in subgraph.outputs}
    subgraph.operators = [
        operator
        for operator in subgraph.operators
        if not unread.intersection(map(int, operator.outputs))
    ]
    return bool(unread)


def _builtin(code: Any) -> int:
    return max(code.builtinCode, code.deprecatedBuiltinCode)


class _Graph:
    """A graph to which operators are added, in their order.

    Attributes:
        operators: The operators so far.
    """

    def __init__(self, model: Any, subgraph: Any) -> None:
        self._model, self._subgraph = model, subgraph
        self.operators: list[Any] = []

    def shape(self, number: int) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = self._subgraph.tensors[number].shape
        return () if shape is None else tuple(int(size) for size in shape)

    def constant(self, number: int) -> np.ndarray:
        """Returns the values of a constant of int32; none of another tensor."""
        data = self._model.buffers[self._subgraph.tensors[number].buffer].data
        data = [] if data is None else data  # it is no constant
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.int32)

    def add_like(self, number: int, shape: Sequence[int]) -> int:
        """Adds a tensor like another of a shape of its own; returns its number."""
        like = self._subgraph.tensors[number]
        return self._add(like.name + b"_reshaped", like.type, shape, buffer=0)

    def add_constant(self, values: Sequence[int]) -> int:
        """Adds a constant of int32; returns its number."""
        schema = _schema()
        data = np.asarray(values, np.int32)
        self._model.buffers.append(
            schema.BufferT(np.frombuffer(data.tobytes(), np.uint8))
        )
        buffer, kind = len(self._model.buffers) - 1, schema.TensorType.INT32
        return self._add(b"sizes", kind, data.shape, buffer=buffer)

    def add_reshape(self, source: int, target: int) -> None:
        """Adds an operator that gives one tensor the shape of the other."""
        schema, shape = _schema(), self.shape(target)
        options = schema.ReshapeOptionsT(newShape=list(shape))
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self._code(schema.BuiltinOperator.RESHAPE),
                inputs=[source, self.add_constant(shape)],
                outputs=[target],
                builtinOptionsType=schema.BuiltinOptions.ReshapeOptions,
                builtinOptions=options,
            )
        )

    def add_slice(
        self, source: int, begins: Sequence[int], ends: Sequence[int], target: int
    ) -> None:
        """Adds an operator that cuts a tensor, in steps of 1."""
        schema, steps = _schema(), [1] * len(begins)
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self._code(schema.BuiltinOperator.STRIDED_SLICE),
                inputs=[source, *map(self.add_constant, (begins, ends, steps))],
                outputs=[target],
                builtinOptionsType=schema.BuiltinOptions.StridedSliceOptions,
                builtinOptions=schema.StridedSliceOptionsT(),
            )
        )

    def _add(self, name: bytes, kind: int, shape: Sequence[int], buffer: int) -> int:
        tensor = _schema().TensorT(
            shape=[int(size) for size in shape],
            type=kind,
            name=name,
            buffer=buffer,
            hasRank=True,
        )
        self._subgraph.tensors.append(tensor)
        return len(self._subgraph.tensors) - 1

    def _code(self, builtin: int) -> int:
        codes = self._model.operatorCodes
        for index, code in enumerate(codes):
            if _builtin(code) == builtin:
                return index
        codes.append(
            _schema().OperatorCodeT(
                deprecatedBuiltinCode=builtin, builtinCode=builtin, version=1
            )
        )
        return len(codes) - 1


def _slice_then_reshape(graph: _Graph, operator: Any, _: Operator) -> None:
    """`x[:, 0]` and `x[:, None]`: all axes stay while it slices."""
    source, *constants = (int(number) for number in operator.inputs)
    begin, end, strides = (graph.constant(number) for number in constants)
    options = operator.builtinOptions
    sizes = iter(graph.shape(source))
    begins, ends, steps, shape = [], [], [], []
    for axis, (first, last, step) in enumerate(zip(begin, end, strides, strict=True)):
        if options.newAxisMask >> axis & 1:
            continue
        size = next(sizes)
        if options.shrinkAxisMask >> axis & 1:
            place = int(first) % size
            cut = (place, place + 1, 1)
        else:
            cut = slice(
                None if options.beginMask >> axis & 1 else int(first),
                None if options.endMask >> axis & 1 else int(last),
                int(step),
            ).indices(size)
        begins.append(cut[0])
        ends.append(cut[1])
        steps.append(cut[2])
        shape.append(len(range(*cut)))
    rest = list(sizes)  # axes that are not named stay whole
    begins, ends = begins + [0] * len(rest), ends + rest
    steps, shape = steps + [1] * len(rest), shape + rest
    (target,) = operator.outputs
    if tuple(shape) == graph.shape(source):
        graph.add_reshape(source, int(target))
        return
    sliced = graph.add_like(int(target), shape)
    operator.inputs = [source, *map(graph.add_constant, (begins, ends, steps))]
    operator.outputs = [sliced]
    options.beginMask = options.endMask = 0
    options.newAxisMask = options.shrinkAxisMask = options.ellipsisMask = 0
    graph.operators.append(operator)
    graph.add_reshape(sliced, int(target))


def _gather_by_one_axis(graph: _Graph, operator: Any, _: Operator) -> None:
    """Looks up by ids of several axes, or of none, as by ids of one."""
    table, ids = (int(number) for number in operator.inputs)
    (target,) = operator.outputs
    options = operator.builtinOptions
    if options.batchDims or options.axis:
        _take_one(graph, operator, table, ids)
        return
    flat = graph.add_like(ids, [int(np.prod(graph.shape(ids)))])
    graph.add_reshape(ids, flat)
    rows = graph.add_like(int(target), graph.shape(flat) + graph.shape(table)[1:])
    operator.inputs, operator.outputs = [table, flat], [rows]
    graph.operators.append(operator)
    graph.add_reshape(rows, int(target))


def _take_one(graph: _Graph, operator: Any, table: int, ids: int) -> None:
    """Takes the only place of an axis by a slice; leaves other gathers as they are."""
    options, sizes = operator.builtinOptions, graph.shape(table)
    places = graph.constant(ids)
    if options.batchDims or len(places) != 1:
        graph.operators.append(operator)
        return
    axis = options.axis % len(sizes)
    begins, ends = [0] * len(sizes), list(sizes)
    begins[axis], ends[axis] = int(places[0]), int(places[0]) + 1
    (target,) = operator.outputs
    sliced = graph.add_like(int(target), (*sizes[:axis], 1, *sizes[axis + 1 :]))
    graph.add_slice(table, begins, ends, sliced)
    graph.add_reshape(sliced, int(target))


def _combine_with_more_axes(graph: _Graph, operator: Any, told: Operator) -> None:
    """Gives an activation the axes with which a constant is read as it should be."""
    (target,) = operator.outputs
    numbers = [int(number) for number in operator.inputs]
    constant = next(i for i, tensor in enumerate(told.inputs) if tensor.constant)
    place = 1 - constant
    wide = _widened(told.inputs[constant], told.inputs[place])
    if wide is not None:
        numbers[place] = graph.add_like(numbers[place], wide)
        graph.add_reshape(int(operator.inputs[place]), numbers[place])
    operator.inputs = numbers
    out = graph.shape(int(target))
    if wide is None or len(wide) <= len(out):
        graph.operators.append(operator)
        return
    ones = (1,) * (len(wide) - len(out))
    result = graph.add_like(int(target), ones + out)
    operator.outputs = [result]
    graph.operators.append(operator)
    graph.add_reshape(result, int(target))


def _widened(constant: Tensor, activation: Tensor) -> tuple[int, ...] | None:
    """Returns the shortest shape with which the two agree, if there is one."""
    shape = tuple(size or 0 for size in activation.shape or ())
    for rank in range(len(shape) + 1, _MOST_AXES + 1):
        wide = (1,) * (rank - len(shape)) + shape
        if not is_misread(constant, replace(activation, shape=wide)):
            return wide
    return None


def _schema() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


_REWRITES: dict[str, Callable[[_Graph, Any, Operator], None]] = {
    "strided-slice-axes": _slice_then_reshape,
    "gather-rank": _gather_by_one_axis,
    "elementwise-constant": _combine_with_more_axes,
}
