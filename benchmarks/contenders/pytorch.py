"""PyTorch's attention: the function and the module."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contenders.step import Step, heads, normal


def _finish(_: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def attention(
    shape: tuple[int, int, int, int],
    *,
    dtype: str = "float32",
    backward: bool,
    is_causal: bool = False,
    sliding_window: int | None = None,
    device: str = "cpu",
) -> Step:
    """Times `scaled_dot_product_attention` in PyTorch's layout `(B, N, T, H)`.

    A window is a boolean mask `(T, T)`: the function has no argument for one.
    """
    query, key, value, upstream = (
        torch.from_numpy(array)
        .to(device, getattr(torch, dtype))
        .transpose(1, 2)
        .contiguous()
        for array in heads(shape, 4)
    )
    mask = None
    if sliding_window is not None:
        places = torch.arange(shape[2], device=device)
        mask = (places[:, None] - places).abs() < sliding_window

    def attend() -> Any:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal
        )

    if not backward:
        return Step(torch.inference_mode()(attend), _finish)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    return Step(lambda: torch.autograd.grad(attend(), inputs, upstream), _finish)


def layer(shape: tuple[int, int, int], num_heads: int, *, backward: bool) -> Step:
    """Times `torch.nn.MultiheadAttention` of a sequence to itself."""
    module = torch.nn.MultiheadAttention(shape[-1], num_heads, batch_first=True)
    inputs = torch.from_numpy(normal(*shape))

    def attend() -> Any:
        return module(inputs, inputs, inputs, need_weights=False)[0]

    if not backward:
        module.eval()  # allows PyTorch's fast path
        return Step(torch.inference_mode()(attend))
    wanted = [inputs.requires_grad_(), *module.parameters()]
    return Step(lambda: torch.autograd.grad(attend().square().sum(), wanted))


def projected(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    dtype: str,
    backward: bool,
    device: str,
) -> Step:
    """Times `scaled_dot_product_attention` between the projections of a layer."""
    B, T, D = shape
    inputs, upstream = (
        torch.from_numpy(normal(*shape, seed=seed)).to(device, getattr(torch, dtype))
        for seed in (0, 1)
    )
    options = {"device": device, "dtype": getattr(torch, dtype)}
    first = torch.nn.Linear(D, 3 * D, **options)
    last = torch.nn.Linear(D, D, **options)

    def attend() -> Any:
        fused = first(inputs).view(B, T, 3, num_heads, -1)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        return last(mixed.transpose(1, 2).reshape(B, T, D))

    if not backward:
        return Step(torch.inference_mode()(attend), _finish)
    wanted = [inputs.requires_grad_(), *first.parameters(), *last.parameters()]
    return Step(lambda: torch.autograd.grad(attend(), wanted, upstream), _finish)


def encoder_block(shape: tuple[int, int, int], num_heads: int, hidden_dim: int) -> Step:
    """Times a training step of `torch.nn.TransformerEncoderLayer`."""
    block = torch.nn.TransformerEncoderLayer(
        shape[-1], num_heads, hidden_dim, dropout=0.0, batch_first=True, norm_first=True
    )
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    examples, targets = (torch.from_numpy(normal(*shape, seed=seed)) for seed in (0, 1))

    def train() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(block(examples), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Step(train)
