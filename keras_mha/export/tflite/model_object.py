"""A TFLite file as objects that can be changed, and back."""

from __future__ import annotations

from typing import Any

_ALIGNMENT = 16  # of constants, as the schema asks


def read_model(content: bytes) -> Any:
    """The `ModelT` of a file that this process wrote itself."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(content, 0)


def write_model(model: Any) -> bytes:
    """The file's content of a `ModelT`, its constants aligned."""
    import flatbuffers

    class Builder(flatbuffers.Builder):
        """Python's does not read alignments from the schema."""

        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802  (flatbuffers' names)
            bytes_of_a_constant = elemSize == 1 and numElems >= _ALIGNMENT
            least = _ALIGNMENT if bytes_of_a_constant else alignment
            return super().StartVector(elemSize, numElems, least)

    builder = Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
