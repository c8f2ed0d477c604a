"""What a card below compute capability 8.0 needs, as a T4: the attention that works there.

Imports nothing that unsloth patches: train_grpo.py calls `after_unsloth` behind its import.
"""

import os

import torch

from support.screen import say

AT_ONCE = 64  # answers: above, bitsandbytes dequantises the weights of five in seven 4-bit products instead of fusing


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
