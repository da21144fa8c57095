"""Configs of layers whose sublayers may be quantized."""

from __future__ import annotations

import re
from typing import Any

import keras


def dtype_config(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the entry `dtype` of a config, sublayers' quantization in it.

    Without it a quantized layer would be saved with quantized weights and recreated
    with float ones, which cannot take them.
    """
    policies = keras.dtype_policies
    policy = layer.dtype_policy
    quantized = [
        sublayer
        for sublayer in layer._flatten_layers(include_self=False)
        if sublayer.quantization_mode is not None
    ]
    if quantized and not isinstance(policy, policies.DTypePolicyMap):
        policy = policies.DTypePolicyMap(default_policy=policy.name)
        for sublayer in quantized:
            # Keys are patterns; what is above this layer may differ next time.
            below = layer.name + sublayer.path.removeprefix(layer.path)
            policy[rf"(.*/)?{re.escape(below)}"] = sublayer.dtype_policy
    return {"dtype": policies.serialize(policy)}
