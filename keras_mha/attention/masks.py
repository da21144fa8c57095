"""Masks: values that say which queries attend to which keys, and compose with `&`.

To add a kind of mask, subclass `Mask` and say in `visible` which pairs attend. Every
implementation then serves it or leaves it to one that does. A kind that the fast ones
know too also overrides `take_apart`.

Convention: boolean, True means attend. Integers count as booleans (non-zero is True);
floating masks are refused, because an additive mask read as a boolean one would
silently mean its opposite.

Letters: B batch, T query length, S key length, N query heads.
"""

from __future__ import annotations

import abc
import functools
import warnings
from typing import Any

import keras
from keras import KerasTensor, ops

from keras_mha.attention.mask_arguments import (
    as_boolean,
    as_integers,
    as_lengths,
    as_offset,
    as_pairs,
    check_window,
    rank_2,
    refuse_symbolic,
)
from keras_mha.attention.mask_parts import MaskParts, band, meet, meet_pairs
from keras_mha.typing import Shape, Tensor

# Files of models can hold what is registered.
_saved = keras.saving.register_keras_serializable(package="keras_mha")


class Mask(abc.ABC):
    """Says which queries attend to which keys.

    Masks are values: they do not change, and `a & b` is a mask by which a pair attends
    where both allow it. A boolean array joins a mask by `&` too.

    For a kind of your own, write `visible`. It is right at once on every path, in
    layers as `attention_mask=` and in `dot_product_attention` as `mask=`; those that
    work block by block leave it to one that stores the scores. To save models that
    hold it, write `get_config`, and `from_config` where the constructor does not take
    its entries, and register the class with
    `keras.saving.register_keras_serializable`.

    Example:

    >>> import numpy as np
    >>> from keras import ops
    >>> import keras_mha
    >>> class StridedMask(keras_mha.Mask):
    ...     def __init__(self, step):
    ...         self.step = step
    ...     def visible(self, queries, keys):
    ...         return ops.equal((queries[:, None] - keys) % self.step, 0)
    >>> mask = StridedMask(2) & keras_mha.CausalMask()
    >>> np.asarray(mask.visible(np.arange(4), np.arange(4))).squeeze().astype(int)
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [1, 0, 1, 0],
           [0, 1, 0, 1]])
    """

    # NumPy then leaves `array & mask` to the mask.
    __array_ufunc__ = None

    @abc.abstractmethod
    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend.

        Pure: it is called inside graphs, XLA and exports, also more than once.

        Args:
            queries: Positions of the queries, int32 `(T,)`: 0 to T - 1. T may be
                unknown in a graph. Queries that come after keys from earlier calls
                count from 0 all the same; a kind that needs to know takes the number
                of those keys as an argument, as `CausalMask(offset)` does.
            keys: Positions of the keys, int32 `(S,)`: 0 to S - 1.

        Returns:
            Booleans `(T, S)`, `(B, T, S)` or `(B, N, T, S)`, where any dimension may
            be 1 for all.
        """

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        return MaskParts(others=(self,))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for saved models.

        Raises:
            NotImplementedError: If a subclass does not override it.
        """
        raise NotImplementedError(
            f"To be saved, `{type(self).__name__}` needs a `get_config` that returns "
            "the arguments of its constructor"
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes the mask that `get_config` describes."""
        return cls(**keras.saving.deserialize_keras_object(config))

    def __and__(self, other: Any) -> Mask:
        return CombinedMask(self, other)

    def __rand__(self, other: Any) -> Mask:
        return CombinedMask(other, self)


class _Kind(Mask):
    """Base of the kinds that implementations know: frozen, compared by value."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"A mask does not change: make another. Received: {name}={value!r}"
        )

    def _set(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, tensors as lists."""
        return {name: _as_plain(value) for name, value in vars(self).items()}

    def __eq__(self, other: Any) -> bool:
        """Whether both say the same; of tensors, only one and the same counts."""
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = vars(self).values(), vars(other).values()
        return all(map(_equal, mine, theirs))

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        words = (f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    def is_causal(self) -> bool:
        """Whether query `i` is limited to keys up to `i + offset`."""
        return False

    @property
    def sliding_window(self) -> int | None:
        """Positions in the window on either side of a query; `None` if unlimited."""
        return None


class _Range(_Kind):
    """Base of the kinds that limit the distance of key from query."""

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend, `(1, 1, T, S)`."""
        rows, columns = (ops.cast(x, "float32") for x in (queries, keys))
        return band(self.take_apart(), rows, columns)


@_saved
class CausalMask(_Range):
    """Query `i` attends to keys `j <= i + offset` only.

    Args:
        offset: How many keys come before the first query: 0 aligns the first query
            with the first key. An int or an integer scalar tensor.

    Raises:
        TypeError: If `offset` is not an integer.
        ValueError: If it is not a scalar.

    Example:

    >>> import keras_mha
    >>> keras_mha.CausalMask(offset=2).is_causal
    True
    """

    offset: Any

    def __init__(self, offset: Any = 0) -> None:
        self._set(offset=as_offset(offset))

    @property
    def is_causal(self) -> bool:
        """True."""
        return True

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        return MaskParts(upper=self.offset)


@_saved
class SlidingWindowMask(_Range):
    """Query `i` attends to keys `j` with `|i + offset - j| < size` only.

    Together with `CausalMask`, `0 <= i + offset - j < size`.

    Source: Beltagy et al. 2020, "Longformer: the long-document transformer".

    Args:
        size: Positions in the window, on either side, the query's own included.
        offset: How many keys come before the first query, an int or an integer
            scalar tensor.

    Raises:
        TypeError: If `offset` is not an integer.
        ValueError: If `size` is not a positive integer, or `offset` not a scalar.

    Example:

    >>> import keras_mha
    >>> (keras_mha.CausalMask() & keras_mha.SlidingWindowMask(256)).sliding_window
    256
    """

    size: int
    offset: Any

    def __init__(self, size: int, offset: Any = 0) -> None:
        self._set(size=check_window(size, "size"), offset=as_offset(offset))

    @property
    def sliding_window(self) -> int:
        """The size."""
        return self.size

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        beyond = self.size - 1
        return MaskParts(lower=self.offset - beyond, upper=self.offset + beyond)


@_saved
class PaddingMask(_Kind):
    """Hides what comes after the length of each sequence.

    A length counts as far as there are positions: one beyond S or T hides nothing,
    and a negative one hides all, as 0 does.

    Args:
        *lengths: The lengths of the keys, which need no name.
        query_lengths: Integers `(B,)`: queries from there on attend to nothing.
        key_lengths: Integers `(B,)`: keys from there on are seen by no query.

    Raises:
        TypeError: If the lengths are not integers, or those of the keys come twice.
        ValueError: If their rank is not 1.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> mask = keras_mha.PaddingMask(np.array([2, 1]))
    >>> np.asarray(mask.visible(np.arange(1), np.arange(3)))[:, 0, 0].astype(int)
    array([[1, 1, 0],
           [1, 0, 0]])
    """

    query_lengths: Tensor | None
    key_lengths: Tensor | None

    def __init__(
        self,
        *lengths: Tensor | None,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
    ) -> None:
        keys_twice = lengths and key_lengths is not None
        queries_twice = len(lengths) > 1 and query_lengths is not None
        if len(lengths) > 2 or keys_twice or queries_twice:
            raise TypeError(
                "`PaddingMask` takes `key_lengths` and `query_lengths` once each. "
                f"Received: {len(lengths)} arguments by position, "
                f"query_lengths={query_lengths!r} and key_lengths={key_lengths!r}"
            )
        if len(lengths) > 1:
            warnings.warn(
                "`PaddingMask(key_lengths, query_lengths)` by position is deprecated, "
                "because other masks name queries first: pass `query_lengths=` and "
                "`key_lengths=` by name",
                DeprecationWarning,
                stacklevel=2,
            )
        by_position = dict(zip(("key_lengths", "query_lengths"), lengths, strict=False))
        self._set(
            query_lengths=as_lengths(
                by_position.get("query_lengths", query_lengths), "query_lengths"
            ),
            key_lengths=as_lengths(
                by_position.get("key_lengths", key_lengths), "key_lengths"
            ),
        )

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend, `(B or 1, 1, T or 1, S or 1)`."""
        table = ops.ones((1, 1, 1, 1), dtype="bool")
        for lengths, places, axes in (
            (self.query_lengths, queries, (1, 3)),
            (self.key_lengths, keys, (1, 2)),
        ):
            if lengths is not None:
                counts = ops.cast(places, "int32") < ops.expand_dims(lengths, 1)
                table = ops.logical_and(table, ops.expand_dims(counts, axes))
        return table

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        return MaskParts(self.query_lengths, self.key_lengths)


@_saved
class SegmentMask(_Kind):
    """Queries attend to the keys of their own segment only.

    For sequences packed side by side into rows; see `pack_sequences`.

    Args:
        query_ids: Integers `(T,)` or `(B, T)`. Negative ones are places without a
            token: they attend to nothing and are seen by nobody.
        key_ids: Integers `(S,)` or `(B, S)`. Defaults to `query_ids`.

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If their rank is neither 1 nor 2.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> mask = keras_mha.SegmentMask(np.array([0, 0, 1]))
    >>> np.asarray(mask.visible(np.arange(3), np.arange(3))).squeeze().astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """

    query_ids: Tensor
    key_ids: Tensor

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None) -> None:
        query_ids = _as_ids(query_ids, "query_ids")
        key_ids = query_ids if key_ids is None else _as_ids(key_ids, "key_ids")
        self._set(query_ids=query_ids, key_ids=key_ids)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend, `(B or 1, 1, T, S)`."""
        rows = ops.take(rank_2(self.query_ids), queries, axis=1)
        columns = ops.take(rank_2(self.key_ids), keys, axis=1)
        rows, columns = ops.expand_dims(rows, (1, 3)), ops.expand_dims(columns, (1, 2))
        return ops.logical_and(ops.equal(rows, columns), columns >= 0)

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        return MaskParts(query_segments=self.query_ids, key_segments=self.key_ids)


@_saved
class TableMask(_Kind):
    """Spells out for each pair whether it attends.

    An array that joins another mask by `&` becomes one.

    Args:
        table: Boolean or integer `(T, S)`, `(B, T, S)` or `(B, N or 1, T, S)`, True
            or non-zero = attend.

    Raises:
        TypeError: If `table` is floating.
        ValueError: If its rank is another.

    Example:

    >>> import numpy as np
    >>> import keras_mha
    >>> mask = keras_mha.TableMask(np.eye(2, dtype=bool)) & keras_mha.CausalMask()
    >>> np.asarray(mask.visible(np.arange(2), np.arange(2))).squeeze().astype(int)
    array([[1, 0],
           [0, 1]])
    """

    table: Tensor

    def __init__(self, table: Any) -> None:
        table = as_boolean(table, "mask")
        if not 2 <= len(table.shape) <= 4:
            raise ValueError(
                "What joins a mask by `&` must be another one, or have rank 2 (T, S), "
                "3 (B, T, S) or 4 (B, N or 1, T, S). "
                f"Received: shape {tuple(table.shape)}"
            )
        self._set(table=table)

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend, of the rank of the table."""
        table = self.table
        for places, axis in ((queries, -2), (keys, -1)):
            if table.shape[axis] != 1:
                table = ops.take(table, places, axis=axis)
        return table

    def take_apart(self) -> MaskParts:
        """Returns the mask as implementations read it."""
        return MaskParts(pairs=self.table)


@_saved
class CombinedMask(_Kind):
    """Joins several masks, as `&` does: a pair attends where every one allows it.

    Args:
        *masks: Masks, and arrays as `TableMask` takes them.

    Example:

    >>> import keras_mha
    >>> mask = keras_mha.CausalMask() & keras_mha.SlidingWindowMask(3)
    >>> isinstance(mask, keras_mha.Mask), mask.is_causal, mask.sliding_window
    (True, True, 3)
    """

    masks: tuple[Mask, ...]

    def __init__(self, *masks: Any) -> None:
        flat: list[Mask] = []
        for mask in masks:
            if isinstance(mask, CombinedMask):
                flat += mask.masks
            else:
                flat.append(mask if isinstance(mask, Mask) else TableMask(mask))
        self._set(masks=tuple(flat))

    @property
    def is_causal(self) -> bool:
        """Whether one of the masks is causal."""
        return any(getattr(mask, "is_causal", False) for mask in self.masks)

    @property
    def sliding_window(self) -> int | None:
        """The smallest of the windows, or `None`."""
        sizes = [getattr(mask, "sliding_window", None) for mask in self.masks]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def offset(self) -> Any:
        """The offset of causality and windows; 0 if there are none.

        Raises:
            ValueError: If they have more than one.
        """
        offsets = [vars(m)["offset"] for m in self.masks if "offset" in vars(m)]
        if not all(_equal(offset, offsets[0]) for offset in offsets):
            raise ValueError(f"The masks have offsets of their own: {offsets}")
        return offsets[0] if offsets else 0

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Returns which pairs attend, `(B or 1, N or 1, T or 1, S or 1)`."""
        table = ops.ones((1, 1, 1, 1), dtype="bool")
        for mask in self.masks:
            table = meet_pairs(table, mask.visible(queries, keys))
        return table

    def take_apart(self) -> MaskParts:
        """Returns the masks as implementations read them, merged."""
        return functools.reduce(meet, (mask.take_apart() for mask in self.masks))

    def get_config(self) -> dict[str, Any]:
        """Returns the masks, serialized."""
        return {"masks": [keras.saving.serialize_keras_object(m) for m in self.masks]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes the mask that `get_config` describes."""
        return cls(*map(keras.saving.deserialize_keras_object, config["masks"]))


def with_table(
    mask: MaskParts, table: Any, score_shape: Shape, attention_rank: int
) -> MaskParts:
    """Joins a layer's `attention_mask` to its other masks.

    Args:
        mask: The other masks.
        table: See `as_pairs`; or a mask value.
        score_shape: Static shape of the scores, `(B, ..., N, T..., S...)`.
        attention_rank: Number of attention axes.
    """
    if not isinstance(table, Mask):
        return mask._replace(pairs=as_pairs(table, score_shape, attention_rank))
    parts = checked_parts(table, score_shape, attention_rank, "attention_mask")
    return meet(mask, parts)


def checked_parts(
    mask: Mask, score_shape: Shape, attention_rank: int, name: str
) -> MaskParts:
    """Takes a mask value apart, and refuses what does not fit the scores.

    Args:
        mask: The mask.
        score_shape: Static shape of the scores, `(B, ..., N, T..., S...)`.
        attention_rank: Number of attention axes.
        name: What the caller calls the mask, for the error text.

    Raises:
        ValueError: If a shape does not fit, or there are other axes than one of
            positions, whose lengths or segments could not be told.
    """
    parts = mask.take_apart()
    described = (
        (parts.query_padding, "query padding", -2),
        (parts.query_segments, "query segments", -2),
        (parts.key_padding, "key padding", -1),
        (parts.key_segments, "key segments", -1),
    )
    for tensor, what, axis in described:
        if tensor is None:
            continue
        if len(score_shape) != 4:
            raise ValueError(
                f"The {what} of `{name}` need inputs (B, T, D): over other axes it is "
                "not said what they count. Received: attention scores of shape "
                f"{tuple(score_shape)}"
            )
        B, length = score_shape[0], score_shape[axis]
        shape = tuple(tensor.shape)
        is_lengths = len(shape) == 1 and "padding" in what
        batch = shape[0] if len(shape) == 2 or is_lengths else 1
        fits = batch == 1 if "segments" in what else False
        if not (fits or _fit(batch, B)) or not (is_lengths or _fit(shape[-1], length)):
            raise ValueError(
                f"The {what} of `{name}` must fit B={B}, T={score_shape[-2]} and "
                f"S={score_shape[-1]}. Received: shape {shape}"
            )
    if parts.others is not None and attention_rank > 1:
        kinds = [type(one).__name__ for one in parts.others]
        raise ValueError(
            f"`{name}` holds masks of positions, which need a single attention axis: "
            f"several have no one order. Received: {kinds} and attention scores of "
            f"shape {tuple(score_shape)}"
        )
    return parts._replace(
        pairs=as_pairs(parts.pairs, score_shape, attention_rank, name)
    )


def _fit(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other


def _equal(one: Any, other: Any) -> bool:
    plain = isinstance(one, int | tuple) and isinstance(other, int | tuple)
    return one is other or (plain and one == other)


def _as_plain(value: Any) -> Any:
    """Brings a tensor into a form that JSON takes."""
    if value is None or isinstance(value, int | KerasTensor):
        return value
    array: Any = ops.convert_to_numpy(value)
    return array.tolist()


def _as_ids(ids: Tensor, name: str) -> Tensor:
    refuse_symbolic(ids, name)
    return as_integers(ids, name, (1, 2))
