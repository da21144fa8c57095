"""Shows what a model's attention heads do: maps, rollout, importance, pruning."""

from keras_mha.interpret.curve import PruningCurve, PruningStep, pruning_curve
from keras_mha.interpret.importance import head_importance
from keras_mha.interpret.maps import attention_maps
from keras_mha.interpret.pruning import prune_heads
from keras_mha.interpret.rollout import attention_rollout

__all__ = [
    "PruningCurve",
    "PruningStep",
    "attention_maps",
    "attention_rollout",
    "head_importance",
    "prune_heads",
    "pruning_curve",
]
