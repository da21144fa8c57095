"""What a model's attention heads do: maps, rollout, importance, pruning."""

from keras_mha.interpret.maps import attention_maps
from keras_mha.interpret.rollout import attention_rollout

__all__ = ["attention_maps", "attention_rollout"]
