"""vLLM's decode step, shorter: it schedules ahead, and multiplies by q, k and v at once, and by gate and up.

Written for vLLM 0.11, unsloth_zoo 2026.10 and bitsandbytes 0.50; where these have changed, vLLM does it its own way.
"""

from functools import partialmethod

import torch

from support.screen import say


def schedule_ahead() -> None:
    """Has vLLM schedule the next step while the card computes this one; unsloth does not hand the argument on."""
    from vllm import LLM, EngineArgs

    if "async_scheduling" not in EngineArgs.__dataclass_fields__:
        return say("generation  this vLLM cannot be told to schedule ahead: it waits for Python between two tokens")
    LLM.__init__ = partialmethod(LLM.__init__, async_scheduling=True)


def merge_products() -> None:
    """Has vLLM multiply by the 4-bit weights of one layer that lie side by side in one product, not one for each."""
    try:
        from unsloth_zoo import vllm_utils

        vllm_utils._apply_4bit_weight  # noqa: B018  what unsloth puts in the place of vLLM's
    except (ImportError, AttributeError):
        return say(
            "generation  this unsloth_zoo has no 4-bit product to replace: vLLM multiplies by q, k, v one by one"
        )
    vllm_utils._apply_4bit_weight = product


def product(_, layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` (rows, width in) times the layer's weights, plus `bias`: (rows, sum of the widths out), in the dtype of `x`."""
    from bitsandbytes import matmul_4bit

    weight = layer.weight
    if not hasattr(weight, "merged_state"):
        states = weight.bnb_quant_state  # by the weight's place, in the order of loading
        weight.merged_state = merged([states[place] for place in range(len(states))])
    state = weight.merged_state
    bias = None if bias is None else bias.to(state.dtype)
    return matmul_4bit(x.to(state.dtype), weight.t(), state, bias=bias).to(x.dtype)


def merged(states: list):
    """One quantisation state for weights that lie one after the other in memory, each with its own of `states`.

    Each has quantised scales and an offset of its own for them, which one state cannot hold: it has the scales in float32.
    """
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    first = states[0]
    scales = [dequantize_blockwise(s.absmax, s.state2) + s.offset if s.nested else s.absmax for s in states]
    return QuantState(
        absmax=torch.cat([s.float() for s in scales]),
        shape=torch.Size((sum(s.shape[0] for s in states), first.shape[1])),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
