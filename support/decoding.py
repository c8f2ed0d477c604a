"""vLLM's decode step, shorter: it schedules ahead, multiplies by q, k and v at once, and by gate and up; LoRA kernels for few rows.

Written for vLLM 0.11, unsloth_zoo 2026.10 and bitsandbytes 0.50; where these have changed, vLLM does it its own way.
"""

import json
import os
import tempfile
from functools import partialmethod
from pathlib import Path

import torch

from support.screen import say

# How vLLM's kernels for the LoRA cut their work, in its words; its other defaults stay. A decode step of 48 to 256 rows takes
# 10 to 50 % less time in them on an H100 than with vLLM's own. On a T4 its own do not fit the registers, by up to 4.9 KB a thread.
COMMON = {"block_m": 32, "num_warps": 4, "num_ctas": 1, "num_stages": 2, "max_nreg": None}
DECODE = COMMON | {"block_n": 16, "block_k": 64, "split_k": 32, "group_size_m": 8}
PREFILL = COMMON | {"block_n": 16, "block_k": 32, "split_k": 8, "group_size_m": 8}
EXPAND = COMMON | {"block_n": 128, "block_k": 16}

_folder: tempfile.TemporaryDirectory | None = None  # as long as this process, which reads it late


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


def tune_lora_kernels() -> None:
    """Writes the blocks above where vLLM looks for those of this card, in files that it calls by the card's name."""
    global _folder
    try:
        from vllm.lora.ops.triton_ops.utils import load_lora_op_config  # noqa: F401  what reads them
    except ImportError:
        return say(
            "generation  this vLLM does not read how to cut its LoRA kernels' work: it cuts as it does by itself"
        )
    _folder = tempfile.TemporaryDirectory(prefix="grpo-kernels-")
    card = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")

    def by_shape(rows: dict) -> dict:
        # number of LoRAs, of matrices in one product, rows, width in, width out: vLLM takes the nearest number, but of matrices
        return {"1": {str(n): {row: {"1": {"1": blocks}} for row, blocks in rows.items()} for n in (1, 2, 3)}}

    shrink, expand = by_shape({"256": DECODE, "1024": PREFILL}), by_shape({"1": EXPAND})
    for name, blocks in {"SHRINK": shrink, "EXPAND_TRUE": expand, "EXPAND_FALSE": expand}.items():
        Path(_folder.name, f"{card}_{name}.json").write_text(json.dumps(blocks))
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = _folder.name
