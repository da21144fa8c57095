"""Multi-head attention for Keras: one numerics contract on every path."""

from keras_mha.layers.embedding import TokenAndPositionEmbedding
from keras_mha.layers.encoder_block import TransformerEncoderBlock
from keras_mha.layers.feed_forward import FeedForward
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.residual_norm import ResidualNorm
from keras_mha.layers.self_attention import MultiHeadSelfAttention

__version__ = "0.1.0"

__all__ = [
    "FeedForward",
    "MultiHeadAttention",
    "MultiHeadSelfAttention",
    "ResidualNorm",
    "TokenAndPositionEmbedding",
    "TransformerEncoderBlock",
    "__version__",
]
