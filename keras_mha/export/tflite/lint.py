"""Checks a TFLite file against what its runtimes refuse, or compute wrongly in silence.

The rules were measured operator by operator on ai-edge-litert 2.3: its CPU interpreter,
and its GPU delegate on a software driver; `tests/export/tflite/test_lint.py` repeats
that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from keras_mha.export.device.form import Target
from keras_mha.export.parity import check_timeout
from keras_mha.export.report import TensorInfo
from keras_mha.export.tflite.graph import Operator, Tensor, contents_of, read_file

Severity = Literal["error", "warning"]

# What the GPU delegate takes over and answers as the CPU does.
GPU_OPERATORS = frozenset(
    """
    ABS ADD ARG_MAX ATAN2 AVERAGE_POOL_2D BATCH_MATMUL CAST CEIL CONCATENATION CONV_2D
    COS CUMSUM DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE DIV ELU EMBEDDING_LOOKUP
    EQUAL EXP FLOOR FLOOR_DIV FLOOR_MOD FULLY_CONNECTED GATHER GELU GREATER
    GREATER_EQUAL HARD_SWISH LEAKY_RELU LESS LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT
    LOGICAL_OR LOGISTIC MAXIMUM MAX_POOL_2D MEAN MINIMUM MIRROR_PAD MUL NEG NOT_EQUAL
    ONE_HOT PACK PAD POW QUANTIZE REDUCE_ALL REDUCE_ANY REDUCE_MAX REDUCE_MIN
    REDUCE_PROD RELU RELU6 RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR REVERSE_V2
    ROUND RSQRT SELECT SELECT_V2 SIGN SIN SLICE SOFTMAX SPACE_TO_DEPTH SPLIT SQRT SQUARE
    SQUARED_DIFFERENCE STRIDED_SLICE SUB SUM TANH TILE TRANSPOSE UNPACK
    """.split()  # noqa: SIM905  (a list would take a line for each)
)
# In the schema, yet not among what the CPU's interpreter has built in.
_NOT_ON_CPU = ("CALL", "CONCAT_EMBEDDINGS", "DELEGATE", "STABLEHLO_", "UNKNOWN_")
_VARIABLES = ("ASSIGN_VARIABLE", "CALL_ONCE", "READ_VARIABLE", "VAR_HANDLE")
_ELEMENTWISE = frozenset(
    """
    ADD ATAN2 DIV EQUAL FLOOR_DIV FLOOR_MOD GREATER GREATER_EQUAL LESS LESS_EQUAL
    MAXIMUM MINIMUM MUL NOT_EQUAL POW SQUARED_DIFFERENCE SUB
    """.split()  # noqa: SIM905  (a list would take a line for each)
)


@dataclass(frozen=True)
class Finding:
    """An operator that breaks a rule.

    Attributes:
        rule: The rule's name.
        severity: `"error"` where the file will not run on the target, or not rightly;
            `"warning"` where it needs care.
        operator: The operator's name in TFLite's schema; a custom one's name.
        subgraph: Number of its graph in the file; the first is 0.
        index: Its number in that graph; the first is 0.
        inputs: The tensors that it reads.
        outputs: The tensors that it writes.
        message: What the rule is, and how to mend the model.
    """

    rule: str
    severity: Severity
    operator: str
    subgraph: int
    index: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    message: str

    @property
    def place(self) -> str:
        """The operator, its number, and its tensors."""
        tensors = ", ".join(
            f"{tensor.name} {tensor.dtype}{list(tensor.shape or ())}"
            for tensor in (*self.inputs, *self.outputs)
        )
        return (
            f"{self.operator} (operator {self.index} of graph {self.subgraph}; "
            f"{tensors})"
        )

    def __str__(self) -> str:
        """One line: where it is, and what to do."""
        return f"{self.severity}: {self.rule}: {self.place}: {self.message}"


def lint_tflite(
    path: str | Path, target: Target = "cpu", *, timeout: float = 60.0
) -> tuple[Finding, ...]:
    """Finds the operators in the file at `path` that `target` does not run rightly.

    The file is read and not run. It need not be trusted: a fresh process reads it. No
    finding does not mean that the values are right, which only a run shows.

    Args:
        path: A TFLite file.
        target: `"cpu"`, LiteRT's interpreter with its builtin operators; or `"gpu"`,
            its GPU delegate, for the whole graph.
        timeout: Seconds that reading may take.

    Returns:
        The findings, in the order of the operators; empty if there are none.

    Raises:
        FileNotFoundError: If `path` does not exist.
        ImportError: If ai-edge-litert is not installed.
        ValueError: If an argument is out of its domain, or the file is not a TFLite
            file, corrupt or cut off, or takes longer than `timeout` to read.

    Example:

    >>> import tempfile
    >>> import tensorflow as tf
    >>> from keras_mha.export import lint_tflite
    >>> table = tf.random.normal((11, 5))
    >>> @tf.function(input_signature=[tf.TensorSpec((1, 7), tf.int32)])
    ... def embed(ids):
    ...     return tf.gather(table, ids)
    >>> converter = tf.lite.TFLiteConverter.from_concrete_functions(
    ...     [embed.get_concrete_function()], tf.Module()
    ... )
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = Path(directory, "model.tflite")
    ...     _ = path.write_bytes(converter.convert())
    ...     on_cpu, on_gpu = lint_tflite(path), lint_tflite(path, target="gpu")
    >>> on_cpu
    ()
    >>> on_gpu[0].rule, on_gpu[0].operator
    ('gather-rank', 'GATHER')

    Source: the operators that the GPU delegate refuses say so in its own log; the
    elementwise error is https://github.com/google-ai-edge/LiteRT/issues/8980.
    """
    if target not in ("cpu", "gpu"):
        raise ValueError(f'`target` must be "cpu" or "gpu". Received: {target!r}')
    check_timeout(timeout)
    contents = contents_of(read_file(Path(path), timeout=timeout))
    return findings(contents.operators, target)


def findings(operators: Iterable[Operator], target: Target) -> tuple[Finding, ...]:
    """The rules for `target` that `operators` break."""
    return tuple(
        _finding(rule, rule.severity[target], operator)
        for operator in operators
        for rule in RULES
        if target in rule.severity and rule.is_broken_by(operator)
    )


class Rule(NamedTuple):
    """A rule on single operators.

    Attributes:
        name: Its name in findings.
        severity: How bad it is, by target; a target that is absent has no such rule.
        is_broken_by: Whether an operator breaks it.
        message: What the rule is, and how to mend the model.
    """

    name: str
    severity: Mapping[Target, Severity]
    is_broken_by: Callable[[Operator], bool]
    message: str


def _finding(rule: Rule, severity: Severity, operator: Operator) -> Finding:
    return Finding(
        rule=rule.name,
        severity=severity,
        operator=operator.custom or operator.name,
        subgraph=operator.subgraph,
        index=operator.index,
        inputs=_infos(operator.inputs),
        outputs=_infos(operator.outputs),
        message=rule.message,
    )


def _infos(tensors: tuple[Tensor, ...]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(one.name, one.dtype, one.shape) for one in tensors)


def _is_off_the_cpu_list(operator: Operator) -> bool:
    return operator.name.startswith(_NOT_ON_CPU) and operator.name != "CALL_ONCE"


def _is_off_the_gpu_list(operator: Operator) -> bool:
    return operator.name not in GPU_OPERATORS | {"CUSTOM", *_VARIABLES}


def _is_flex(operator: Operator) -> bool:
    return operator.custom.startswith("Flex")


def _is_custom(operator: Operator) -> bool:
    return operator.name == "CUSTOM" and not _is_flex(operator)


def _uses_a_variable(operator: Operator) -> bool:
    return operator.name in _VARIABLES


def _starts_a_dynamic_shape(operator: Operator) -> bool:
    """Whether a free size first appears here: as the graph's input, or as output."""
    reads = [tensor for tensor in operator.inputs if tensor.is_dynamic]
    writes = any(tensor.is_dynamic for tensor in operator.outputs)
    return any(tensor.is_input for tensor in reads) or (writes and not reads)


def _has_rank_over_4(operator: Operator) -> bool:
    return any(tensor.rank > 4 for tensor in (*operator.inputs, *operator.outputs))


def _gathers_by_other_ids(operator: Operator) -> bool:
    return (
        operator.name == "GATHER"
        and len(operator.inputs) == 2
        and (operator.inputs[1].rank != 1 or operator.options.get("axis", 0) != 0)
    )


def _looks_up_rows_of_one_scale(operator: Operator) -> bool:
    return operator.name == "EMBEDDING_LOOKUP" and any(
        tensor.scales == 1 and tensor.constant and (tensor.shape or (1,))[0] != 1
        for tensor in operator.inputs
    )


def _slices_with_other_axes(operator: Operator) -> bool:
    masks = ("newAxisMask", "shrinkAxisMask")
    return operator.name == "STRIDED_SLICE" and any(
        operator.options.get(mask, 0) for mask in masks
    )


def _slices_booleans(operator: Operator) -> bool:
    return operator.name == "STRIDED_SLICE" and any(
        tensor.dtype == "bool" for tensor in operator.inputs
    )


def _combines_with_a_misread_constant(operator: Operator) -> bool:
    return operator.name in _ELEMENTWISE and any(
        is_misread(constant, activation)
        for constant in operator.inputs
        for activation in operator.inputs
        if constant.constant and not activation.constant
    )


def is_misread(constant: Tensor, activation: Tensor) -> bool:
    """Whether the delegate lays the two out in different orders.

    An activation's axes are to it B, BC, BWC or BHWC by their number; a constant's are
    C, WC, HWC or BHWC. They agree only on the last axes, all of them from rank 4 on.
    Integers are not laid out so.
    """
    if activation.dtype in ("bool", "int32", "int64") or activation.rank > 3:
        return False
    if activation.rank < 3 and constant.rank > activation.rank:
        return True
    agreeing = max(activation.rank - 1, 0)
    apart = (constant.shape or ())[: max(constant.rank - agreeing, 0)]
    return any(size != 1 for size in apart)


def _merges_a_split(operator: Operator) -> bool:
    """Whether it puts together what was split, and nothing else reads the parts.

    Products are answered rightly, and so are sums where one part is used elsewhere.
    """
    combining = _ELEMENTWISE - {"MUL"} | {"CONCATENATION"}
    return operator.merges == "SPLIT" and operator.name in combining


def _attends_in_int8(operator: Operator) -> bool:
    # A softmax at the end of a model attends to nothing.
    attends = operator.name == "BATCH_MATMUL" or (
        operator.name == "SOFTMAX" and "BATCH_MATMUL" in operator.feeds
    )
    return attends and any(tensor.dtype == "int8" for tensor in operator.outputs)


RULES = (
    Rule(
        "cpu-operator",
        {"cpu": "error"},
        _is_off_the_cpu_list,
        "The operator is not among those that LiteRT's interpreter has built in. "
        "Convert with builtin operators only, or update ai-edge-litert.",
    ),
    Rule(
        "gpu-operator",
        {"gpu": "error"},
        _is_off_the_gpu_list,
        "The operator is not among those that the GPU delegate runs rightly, so it "
        "falls back to the CPU or fails. Write the layer with other operations "
        "(`keras_mha.export.tflite.lint.GPU_OPERATORS`).",
    ),
    Rule(
        "flex",
        {"cpu": "error", "gpu": "error"},
        _is_flex,
        "Flex operators run only where TensorFlow is linked in. Convert with "
        "TFLITE_BUILTINS only, without SELECT_TF_OPS.",
    ),
    Rule(
        "custom-operator",
        {"cpu": "warning", "gpu": "error"},
        _is_custom,
        "The operator is not built in: the program that loads the file must register "
        "it, and the GPU delegate has none. Leave it out of the graph, as a tokenizer "
        "before it.",
    ),
    Rule(
        "variable",
        {"cpu": "error", "gpu": "error"},
        _uses_a_variable,
        "Variables are not in the file as constants, so the answer can be NaN. Convert "
        "with the variables frozen: from a SavedModel, or with no trackable object but "
        "a tf.Module.",
    ),
    Rule(
        "dynamic-shape",
        {"cpu": "warning", "gpu": "error"},
        _starts_a_dynamic_shape,
        "A size is only known at run time: the GPU delegate refuses the graph or "
        "keeps the size it assumed, and the CPU's runs it in parts. Export a file for "
        "each length, with a TensorSpec of fixed batch and length.",
    ),
    Rule(
        "rank",
        {"gpu": "error"},
        _has_rank_over_4,
        "The GPU delegate takes tensors of at most 4 axes. Fold axes by a reshape.",
    ),
    Rule(
        "gather-rank",
        {"gpu": "error"},
        _gathers_by_other_ids,
        "The GPU delegate only gathers by ids of rank 1, along the first axis. Reshape "
        "them, look up (`one_hot(ids) @ table` becomes EMBEDDING_LOOKUP), and back.",
    ),
    Rule(
        "embedding-scale",
        {"gpu": "error"},
        _looks_up_rows_of_one_scale,
        "The GPU delegate only knows scales of single rows and answers with zeros for "
        "all rows but the first, without a word. Export with `target='gpu'`, which "
        "gives each row its scale.",
    ),
    Rule(
        "strided-slice-axes",
        {"gpu": "error"},
        _slices_with_other_axes,
        "The GPU delegate does not add or remove axes while slicing, as x[:, 0] and "
        "x[:, None] do. Slice with x[:, 0:1] and reshape.",
    ),
    Rule(
        "strided-slice-bool",
        {"gpu": "error"},
        _slices_booleans,
        "The GPU delegate does not slice booleans. Cast them first.",
    ),
    Rule(
        "elementwise-constant",
        {"gpu": "error"},
        _combines_with_a_misread_constant,
        "The GPU delegate reads the constant in another order than the activation and "
        "answers wrongly without a word: an activation of rank 2 takes constants along "
        "its last axis only, one of rank 3 along its last two. Reshape the activation "
        "to [1, S, D], and keep it so by an operation on that rank, as a product with "
        "a mask [1, S, 1]; the converter folds a lone reshape away.",
    ),
    Rule(
        "split-merge",
        {"gpu": "error"},
        _merges_a_split,
        "The GPU delegate answers wrongly without a word where all parts of a SPLIT go "
        "to one operator that is not a product. Cut the parts by slices x[:, :, a:b].",
    ),
    Rule(
        "int8-attention",
        {"cpu": "warning", "gpu": "error"},
        _attends_in_int8,
        "Attention in full int8 loses its values without a word: with an additive mask "
        "of -1e4 the error is as large as they are. Quantize with dynamic range, or "
        "leave SOFTMAX and BATCH_MATMUL in float32.",
    ),
)
