"""What a card below compute capability 8.0 needs, as a T4: the attention that works there, LoRA kernels that fit its registers.

Imports nothing that unsloth patches: train_grpo.py calls `after_unsloth` behind its import.
"""

import json
import os
import tempfile
from pathlib import Path

import torch

from support.screen import say

AT_ONCE = 64  # answers: above, bitsandbytes dequantises the weights of five in seven 4-bit products instead of fusing

# Of vLLM's kernels for the LoRA, by default, up to 4.9 KB a thread do not fit a T4's registers and go through its memory;
# of these 0 to 32 bytes. Blocks as vLLM names them; its other defaults stay.
COMMON = {"block_m": 32, "num_warps": 4, "num_ctas": 1, "num_stages": 2, "max_nreg": None}
DECODE = COMMON | {"block_n": 16, "block_k": 64, "split_k": 64, "group_size_m": 8}
PREFILL = COMMON | {"block_n": 16, "block_k": 32, "split_k": 8, "group_size_m": 8}
EXPAND = COMMON | {"block_n": 128, "block_k": 16}

_folder: tempfile.TemporaryDirectory | None = None  # as long as this process, which reads it late


def after_unsloth() -> None:
    """What vLLM reads when it starts, if the card is one of these."""
    if torch.cuda.get_device_capability() >= (8, 0):
        return
    wanted = os.environ.get("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")
    if wanted != "TRITON_ATTN":  # no FlashAttention 2; XFORMERS fails at the first token, FlashInfer compiles itself
        say(
            f"attention   VLLM_ATTENTION_BACKEND={wanted} does not work below compute capability 8.0: TRITON_ATTN it is"
        )
    os.environ["VLLM_ATTENTION_BACKEND"] = "TRITON_ATTN"
    tune_lora_kernels()


def tune_lora_kernels() -> None:
    """Writes the blocks above where vLLM looks for those of this card, in files that it calls by the card's name."""
    global _folder
    _folder = tempfile.TemporaryDirectory(prefix="grpo-kernels-")
    card = torch.cuda.get_device_name().replace(" ", "_").replace("-", "_")

    def by_shape(rows: dict) -> dict:
        # number of LoRAs, of matrices in one product, rows, width in, width out: vLLM takes the nearest number, but of matrices
        return {"1": {str(n): {row: {"1": {"1": blocks}} for row, blocks in rows.items()} for n in (1, 2, 3)}}

    shrink, expand = by_shape({"127": DECODE, "129": PREFILL}), by_shape({"1": EXPAND})
    for name, blocks in {"SHRINK": shrink, "EXPAND_TRUE": expand, "EXPAND_FALSE": expand}.items():
        Path(_folder.name, f"{card}_{name}.json").write_text(json.dumps(blocks))
    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = _folder.name
