"""GPU memory: the estimate of what a run takes, whether that fits, and what to lower where it does not.

Like preflight.py it imports nothing that unsloth patches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from support.errors import UserError

if TYPE_CHECKING:
    from support.settings import Recipe

GIB = 2**30
CUDA_GIB = 0.85  # the CUDA context and library workspaces, outside PyTorch's allocator: 0.83 on an H200
NCCL_GIB = 0.8  # of a process that is not alone, outside PyTorch's allocator too: two H100s
BUFFERS_GIB = 0.6  # unpacked NF4 weights, blocks that PyTorch keeps: the rest of what benchmarks/memory.py measured
LOGIT_ROWS = 256  # tokens that have their logits at once; fewer read the output layer more often
NO_CACHE = ("memory for the cache", "available KV cache memory")  # vLLM's words
NOT_FREE = "desired GPU memory utilization"


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """What goes into each linear layer and what comes out, from a config of Llama's, Qwen's, Mistral's or Gemma's shape.

    Qwen3 and Gemma say how wide a head is; of the others it is the hidden size over their number.
    """
    hidden, mlp = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = (head * heads for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
    return attention | {"gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden)}


def parameter_counts(config, lora_rank: int) -> tuple[int, int, int]:
    """Parameters of the LoRA, of the linear layers, and of the embeddings; `config` as in linear_shapes."""
    shapes = linear_shapes(config).values()
    lora = config.num_hidden_layers * lora_rank * sum(rows + columns for rows, columns in shapes)
    linear = config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)
    return lora, linear, config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def outside_gib(recipe: Recipe) -> float:
    """What a process holds of the card outside PyTorch's allocator."""
    return CUDA_GIB + (NCCL_GIB if recipe.processes > 1 else 0)


def estimate_memory(config, recipe: Recipe, card_gib: float, kept: int = 0, shared: bool = True) -> dict[str, float]:
    """Estimated peak GPU memory in GiB, part by part, from a transformers config as in linear_shapes.

    `kept`: how many layers keep their activations although there is gradient checkpointing. `shared`: a prompt is
    computed once for its group (training_pass.py). With vLLM the weights and the KV cache lie in vLLM's share of the card;
    without it they count by themselves.
    NF4 with double quantisation takes 4.127 bits a weight (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
    """
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lora, linear, embeddings = parameter_counts(config, recipe.lora_rank)
    q, kv = (linear_shapes(config)[name][1] for name in ("q_proj", "k_proj"))
    sequence = recipe.max_prompt_length + recipe.max_completion_length
    completions = recipe.completions_each

    weights = linear * (4.127 / 8 if recipe.load_in_4bit else 2) + embeddings * 2
    kv_cache = completions * sequence * 2 * layers * kv * 2  # every answer of a step at full length
    optimizer = 2 if "8bit" in recipe.optim else 8
    buckets = 4 if recipe.processes > 1 else 0  # DDP's, in which the gradients are averaged
    answers = recipe.micro_batch_size
    prompts = answers // recipe.num_generations if shared and answers % recipe.num_generations == 0 else answers
    tokens = answers * recipe.max_completion_length + prompts * recipe.max_prompt_length
    # unsloth computes the logits again in the backward pass, an answer or a piece of one at a time; six float32 arrays of
    # their size are there at once, among them the logits, their logarithms, the probabilities and the gradients.
    logits = min(recipe.max_completion_length, LOGIT_ROWS) * config.vocab_size * 4 * 6
    if not recipe.gradient_checkpointing:
        kept = layers
    # A layer keeps its input or, without checkpointing, what its norms, products and attention are made of; attention, the keys
    # and values of a prompt anew for each of its answers, a head for each of the queries. Then come the logits, and when
    # they are gone, four activations of one MLP at a time, computed again.
    inputs = 2 * tokens * hidden
    everything = 2 * tokens * (4 * hidden + 2 * q + 2 * kv + 2 * mlp) + 2 * answers * sequence * 2 * q
    activations = inputs * (layers - kept) + max(everything * kept + logits, 2 * tokens * 4 * mlp)
    parts = {
        "weights": weights,
        "KV cache": kv_cache,
        # float32 weights and gradients, vLLM's 16-bit copy
        "LoRA and optimiser": lora * (4 + 4 + 2 + optimizer + buckets),
        "activations and logits": activations,
        "CUDA and buffers": (outside_gib(recipe) + BUFFERS_GIB) * GIB,
    }
    parts = {name: size / GIB for name, size in parts.items()}
    if recipe.use_vllm:  # vLLM takes its whole share at once; 0.7 GiB of it are its own activations and CUDA graphs
        parts["KV cache"] = recipe.gpu_memory_utilization * card_gib - parts["weights"] - 0.7
    return parts


def layers_kept(config, recipe: Recipe, card_gib: float, free_gib: float, shared: bool = True) -> int:
    """How many layers can keep their activations in 95 % of what is free of a card (or cap); all without checkpointing."""
    if not recipe.gradient_checkpointing:
        return config.num_hidden_layers

    def fits(kept: int) -> bool:
        return sum(estimate_memory(config, recipe, card_gib, kept, shared).values()) <= 0.95 * free_gib

    return max((kept for kept in range(1, config.num_hidden_layers + 1) if fits(kept)), default=0)


def check_memory(parts: dict[str, float], recipe: Recipe, free: float, card: float) -> None:
    """Raises UserError where the estimated GiB do not fit into the `free` ones of a card (or cap) of `card` GiB."""
    needed = sum(parts.values())
    if recipe.use_vllm and parts["KV cache"] <= 0:
        raise UserError(
            f"vLLM's share of {recipe.gpu_memory_utilization:.0%} of {card:.1f} GiB has no room for a KV cache beside "
            f"{parts['weights']:.1f} GiB of weights: raise --gpu_memory_utilization or take a smaller --model."
        )
    if needed > card:
        raise UserError(
            f"about {needed:.1f} GiB of GPU memory are needed, and there are {card:.1f}: {memory_advice(recipe)}"
        )
    if needed > free:
        raise UserError(
            f"about {needed:.1f} GiB of GPU memory are needed and {free:.1f} of {card:.1f} are free: end what holds the "
            f"rest (nvidia-smi lists it), or {memory_advice(recipe)}"
        )


def limit_memory(recipe: Recipe) -> float:
    """Holds this process to `vram_gib`, if that is given. Returns vLLM's share of the whole card."""
    if not recipe.vram_gib:
        return recipe.gpu_memory_utilization
    total = torch.cuda.mem_get_info()[1] / GIB
    cap = min(recipe.vram_gib, total)
    torch.cuda.set_per_process_memory_fraction((cap - outside_gib(recipe)) / total)
    return recipe.gpu_memory_utilization * cap / total


def memory_advice(recipe: Recipe, resumed: bool = False, error: Exception | None = None) -> str:
    """Flags that save memory in training, with values, less those that are as low as they go, or that a resumed run keeps.

    Of vLLM's share only where the `error` is vLLM's about its cache: no other tells whether the share is too large or too small.
    """
    share = recipe.gpu_memory_utilization
    if error and any(words in str(error) for words in NO_CACHE):
        return f"vLLM's share has no room for its cache: try --gpu_memory_utilization {min(share + 0.1, 0.95):g}."
    if error and NOT_FREE in str(error):
        return (
            "vLLM's share of the card is not free: end what holds the rest (nvidia-smi lists it), or try "
            f"--gpu_memory_utilization {max(share - 0.1, 0.05):g}."
        )
    completions = recipe.completions_each
    lower = {
        "micro_batch_size": max(d for d in range(1, max(recipe.micro_batch_size // 2, 1) + 1) if completions % d == 0),
        "max_completion_length": max(recipe.max_completion_length * 3 // 4, 64),
        "lora_rank": 16 if recipe.lora_rank > 16 else 8,  # vLLM has kernels for 8, 16, 32, 64, ...
    }
    if resumed or recipe.resume:
        del lower["lora_rank"]
    flags = [] if recipe.gradient_checkpointing else ["--gradient_checkpointing true"]
    flags += [f"--{name} {value}" for name, value in lower.items() if value < getattr(recipe, name)]
    return f"try {' or '.join(flags)}." if flags else "take a smaller --model."


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU. unsloth wraps vLLM's error into one of its own."""
    return isinstance(error, RuntimeError) and (
        "out of memory" in str(error).lower() or any(words in str(error) for words in (*NO_CACHE, NOT_FREE))
    )
