"""unsloth's training pass, shorter: a prompt once for all answers of its group, and Qwen2's q, k and v in the fused product.

Written for unsloth 2026.10 and xFormers 0.0.33; where these have changed, unsloth does it its own way.
"""

import contextlib
import sys

import torch

from support.screen import say


def fuse_qkv(policy) -> None:
    """Has unsloth compute q, k and v of a layer, with their LoRAs, in its fused product; where they have a bias, it does not."""
    try:
        from unsloth.kernels import apply_lora_qkv
    except ImportError:
        return say("training    this unsloth has no fused product for q, k and v: they are computed one by one")

    def fused(attention, x):
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        return [y + proj.base_layer.bias for y, proj in zip(apply_lora_qkv(attention, x), projections, strict=True)]

    for layer in policy.base_model.model.model.layers:
        attention = layer.self_attn
        if attention.q_proj.base_layer.bias is not None:
            attention.apply_qkv = fused


def keep_activations(policy, layers: int) -> None:
    """The last `layers` keep their activations for the backward pass, the others compute them again.

    The last ones, because theirs are gone first. unsloth and transformers switch checkpointing on in all layers, again and again.
    """
    for layer in policy.base_model.model.model.layers[-layers:] if layers else ():
        kind = type(layer)
        switch = property(lambda self: False, lambda self, value: None)
        layer.__class__ = type(kind.__name__, (kind,), {"gradient_checkpointing": switch})


def share_prompts() -> bool:
    """Has unsloth use the attention below for answers that share a prompt. False where it cannot.

    unsloth's own for it is FlexAttention, which wants torch.compile, and fails on a T4.
    """
    if "unsloth" not in sys.modules:
        return False
    try:
        from unsloth.utils import attention_dispatch, prefix_grouper
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask  # noqa: F401

        attention_dispatch._flex_shared_prefix_attention, prefix_grouper._VERIFY_ON  # noqa: B018
    except (ImportError, AttributeError):
        say("training    without xFormers, or with another unsloth, a prompt is computed anew for each of its answers")
        return False
    attention_dispatch._flex_shared_prefix_attention = shared_prompt_attention
    return True


def trust_pass(policy) -> None:
    """Has unsloth share prompts as soon as that saves anything, and compare its pass with no other.

    It would compare it with a pass for each answer by itself, again whenever a micro-batch is larger than all before:
    fifteen passes for one. The trainer compares each step with what vLLM has sampled the tokens with. Only where
    share_prompts could do its part.
    """
    from unsloth.utils import prefix_grouper

    prefix_grouper._TOKR_THRESHOLD, prefix_grouper._VERIFY_ON = 1.0, False
    policy._unsloth_seq_packing_grad_ok = True  # of answers that do not share a prompt
    policy._unsloth_seq_packing_grad_verified_T = policy._unsloth_seq_packing_grad_verified_seg = sys.maxsize


@contextlib.contextmanager
def prompts_shared(trainer):
    """Within it unsloth computes a prompt once for its group. With vLLM it would not, because it expects little from it."""
    use_vllm, trainer.use_vllm = trainer.use_vllm, False
    try:
        yield
    finally:
        trainer.use_vllm = use_vllm


def shared_prompt_attention(q, k, v, layout, scale=None) -> torch.Tensor:
    """Attention over a row of prompts and answers, in which an answer sees its group's prompt and, token by token, itself.

    q: (1, tokens, heads, width); k, v: (1, tokens, KV heads, width). `layout`: unsloth's PrefixSegInfo, whose signature
    holds, for each group in the row, the length of its prompt and the lengths of the answers behind it.
    Returns (1, tokens, heads, width).
    """
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    if not hasattr(layout, "blocks"):  # for the first layer
        keys, queries, lengths = blocks(layout.signature[2])
        bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(queries, lengths, device=q.device)
        layout.blocks = torch.tensor(keys, device=q.device), bias
    keys, bias = layout.blocks
    times = q.shape[2] // k.shape[2]  # query heads to a KV head
    k, v = (x.index_select(1, keys).repeat_interleave(times, dim=2) for x in (k, v))
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


def blocks(groups) -> tuple[list[int], list[int], list[int]]:
    """Places of the keys, and for each block of attention the number of its queries and of its keys, the last of which are its own.

    groups: [(tokens of the prompt, [tokens of each answer]), …]. A prompt is a block, and each answer, with the prompt's keys before its own.
    """
    keys, queries, lengths, start = [], [], [], 0
    for prompt, answers in groups:
        of_prompt = range(start, start + prompt)
        for before, own in [((), prompt), *((of_prompt, answer) for answer in answers if answer)]:
            keys += [*before, *range(start, start + own)]
            queries.append(own)
            lengths.append(len(before) + own)
            start += own
    return keys, queries, lengths
