"""Multi-head attention for Keras: one numerics contract on every path."""

# These three register the layers that a saved model may hold.
import keras_mha.convert
import keras_mha.models
import keras_mha.text  # noqa: F401 - and are not used otherwise.
from keras_mha.attention.api import dot_product_attention
from keras_mha.attention.cache import flatten_cache, unflatten_cache
from keras_mha.attention.masks import (
    CausalMask,
    Mask,
    PaddingMask,
    SegmentMask,
    SlidingWindowMask,
    TableMask,
)
from keras_mha.attention.packing import (
    PackedSequences,
    pack_sequences,
    unpack_sequences,
)
from keras_mha.interpret.maps import attention_maps
from keras_mha.layers.decoder_block import TransformerDecoderBlock
from keras_mha.layers.embedding import TokenAndPositionEmbedding
from keras_mha.layers.encoder_block import TransformerEncoderBlock
from keras_mha.layers.feed_forward import FeedForward
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.normalization import RMSNormalization
from keras_mha.layers.positions import (
    ALiBi,
    DistanceBias,
    RelativePositionBias,
    RotaryEmbedding,
)
from keras_mha.layers.residual_norm import ResidualNorm
from keras_mha.layers.self_attention import MultiHeadSelfAttention

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "CausalMask",
    "DistanceBias",
    "FeedForward",
    "Mask",
    "MultiHeadAttention",
    "MultiHeadSelfAttention",
    "PackedSequences",
    "PaddingMask",
    "RMSNormalization",
    "RelativePositionBias",
    "ResidualNorm",
    "RotaryEmbedding",
    "SegmentMask",
    "SlidingWindowMask",
    "TableMask",
    "TokenAndPositionEmbedding",
    "TransformerDecoderBlock",
    "TransformerEncoderBlock",
    "__version__",
    "attention_maps",
    "dot_product_attention",
    "flatten_cache",
    "pack_sequences",
    "unflatten_cache",
    "unpack_sequences",
]
