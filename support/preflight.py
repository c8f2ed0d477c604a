"""What is checked, estimated and said before anything slow starts.

Imports torch and nothing that unsloth patches: train_grpo.py reads GPU from here before it imports unsloth.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError

from data import UserError

if TYPE_CHECKING:
    from train_grpo import Recipe

# requirements-cpu.txt leaves unsloth out: after it, a machine with a card runs as one without
GPU = torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None
GIB = 2**30
MODEL_ERRORS = (OSError, ValueError, ImportError, SafetensorError)  # of a model that cannot be loaded
CUDA_GIB = 0.85  # the CUDA context and library workspaces, outside PyTorch's allocator: 0.83 on an H200
BUFFERS_GIB = 0.6  # unpacked NF4 weights, blocks that PyTorch keeps: the rest of what benchmarks/memory.py measured


def compute_dtype(recipe: Recipe) -> torch.dtype:
    if not GPU:
        return torch.float32
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if recipe.dtype == "bfloat16" and not bf16:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16: give --dtype float16 or leave it at auto.")
    return torch.float16 if recipe.dtype == "float16" or not bf16 else torch.bfloat16


def parameter_counts(config, lora_rank: int) -> tuple[int, int, int]:
    """Parameters of the LoRA, of the linear layers, and of the embeddings, from a config of the Llama or Qwen2 shape."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    ]
    lora = config.num_hidden_layers * lora_rank * sum(rows + columns for rows, columns in shapes)
    linear = config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)
    return lora, linear, config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)


def estimate_memory(config, recipe: Recipe, card_gib: float) -> dict[str, float]:
    """Estimated peak GPU memory in GiB, part by part, from a transformers config of the Llama or Qwen2 shape.

    With vLLM the weights and the KV cache lie in vLLM's share of the card; without it they count by themselves.
    NF4 with double quantisation takes 4.127 bits a weight (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
    """
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lora, linear, embeddings = parameter_counts(config, recipe.lora_rank)
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    sequence = recipe.max_prompt_length + recipe.max_completion_length
    completions = recipe.prompts_per_step * recipe.num_generations

    weights = linear * (4.127 / 8 if recipe.load_in_4bit else 2) + embeddings * 2
    kv_cache = completions * sequence * 2 * layers * kv * 2  # every answer of a step at full length
    optimizer = 2 if "8bit" in recipe.optim else 8
    tokens = recipe.micro_batch_size * sequence
    # unsloth computes the logits again in the backward pass, a quarter of an answer at a time; six float32 arrays of their
    # size are there at once, among them the logits, their logarithms, the probabilities and the gradients.
    logits = sequence / 4 * config.vocab_size * 4 * 6
    if recipe.gradient_checkpointing:
        # Every layer keeps its input. Then come the logits, and when they are gone, four activations of one MLP at a time.
        activations = 2 * tokens * layers * hidden + max(logits, 2 * tokens * 4 * mlp)
    else:
        activations = 2 * tokens * layers * (6 * hidden + 2 * kv + 3 * mlp) + logits
    parts = {
        "weights": weights,
        "KV cache": kv_cache,
        "LoRA and optimiser": lora * (4 + 4 + 2 + optimizer),  # float32 weights and gradients, vLLM's 16-bit copy
        "activations and logits": activations,
        "CUDA and buffers": (CUDA_GIB + BUFFERS_GIB) * GIB,
    }
    parts = {name: size / GIB for name, size in parts.items()}
    if recipe.use_vllm:  # vLLM takes its whole share at once; 0.7 GiB of it are its own activations and CUDA graphs
        parts["KV cache"] = recipe.gpu_memory_utilization * card_gib - parts["weights"] - 0.7
    return parts


def estimate_minutes(parameters: float, weight_gib: float, recipe: Recipe) -> float:
    """A rough duration of training in minutes, from this machine's measured matrix rate and memory bandwidth.

    Generation reads the weights once a token; training takes 6 floating-point operations a parameter and token: forward,
    recomputed forward (not without gradient checkpointing) and backward through frozen weights. Both run at a third of the measured rates; a decoding step
    takes 8 ms at least, an optimiser step half a second.
    """
    device, dtype, n = ("cuda", compute_dtype(recipe), 4096) if GPU else ("cpu", torch.float32, 1024)
    a, b = torch.rand(n, n, device=device, dtype=dtype), torch.rand(2**25, device=device)

    def seconds(work) -> float:
        for repeats in (1, 5):  # the first round warms up
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            if GPU:
                torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    flops = 2 * n**3 / seconds(lambda: a @ a)
    bandwidth = 2 * b.nbytes / seconds(b.clone)
    sequence = (recipe.max_prompt_length + recipe.max_completion_length) / 2  # most are shorter than the limits
    tokens = recipe.prompts_per_step * recipe.num_generations * sequence
    generation = recipe.max_completion_length * max(3 * weight_gib * GIB / bandwidth, 0.008)
    operations = 6 if recipe.gradient_checkpointing else 4
    return recipe.max_steps * (generation + 3 * operations * parameters * tokens / flops + 0.5) / 60


def memory_advice(recipe: Recipe, resumed: bool = False) -> str:
    """Flags that save memory in training, with values, less those that are as low as they go, or that a resumed run keeps.

    Not vLLM's share: it may be too large for training or too small for vLLM, and an error does not tell which.
    """
    completions = recipe.prompts_per_step * recipe.num_generations
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
        "out of memory" in str(error).lower() or "memory for the cache" in str(error)
    )


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, None where there is none (or nothing to ask it with)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # pynvml raises its own types
        return None


def check_installed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        # an environment that uv made, as the notebook's, has no pip
        pip = "pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {sys.executable}"
        raise UserError(f"{package} is not installed, and this recipe needs it: {pip} -c constraints.txt {package}")


def check_machine(recipe: Recipe) -> None:
    """Raises UserError where loading the model needs a GPU, or a package, that is not there."""
    without = "Without a GPU: python train_grpo.py --config recipes/tiny.yaml"
    if not GPU and (recipe.load_in_4bit or recipe.use_vllm):
        if torch.cuda.is_available():
            raise UserError(
                "unsloth is not installed, which loads 4-bit weights and vLLM: pip install -r requirements.txt"
            )
        if driver := nvidia_driver():
            raise UserError(
                f"the NVIDIA driver {driver} does not run CUDA {torch.version.cuda}, which this PyTorch is built for: "
                f"update the driver. {without}"
            )
        raise UserError(f"no CUDA GPU was found, and 4-bit weights and vLLM need one. {without}")
    capability = torch.cuda.get_device_capability() if GPU else (0, 0)
    if GPU and capability < (7, 5):
        raise UserError(
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; the packages need 7.5 "
            "(T4, RTX 20) or newer."
        )
    if recipe.use_vllm:
        check_installed("vllm")
    if recipe.load_in_4bit:
        check_installed("bitsandbytes")


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


def check_disk(lora_gib: float, recipe: Recipe) -> None:
    """Raises UserError where output_dir has no room for the checkpoints: float32 weights and AdamW's two averages."""
    folder = Path(recipe.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    checkpoint = lora_gib * (1.5 if "8bit" in recipe.optim else 3) + 0.02  # and the tokenizer
    held = min(len(list(Path(recipe.output_dir).glob("checkpoint-*"))), 3)  # by a run that is resumed
    needed = (4 - held) * checkpoint + lora_gib  # three that are kept, one that is being written, the adapter
    if needed > free:
        smaller = "" if held else f", or try --lora_rank {max(recipe.lora_rank // 2, 1)}"
        raise UserError(
            f"about {needed:.1f} GiB of disk are needed for checkpoints and {free:.1f} are free in {folder}: make room, or give "
            f"another --output_dir{smaller}."
        )


def check_disk_for_model(weight_gib: float, recipe: Recipe) -> None:
    """Raises UserError where the model has to be downloaded and the hub's cache has no room for it."""
    if Path(recipe.model).is_dir():
        return
    config = try_to_load_from_cache(recipe.model, "config.json")
    if isinstance(config, str) and any(Path(config).parent.glob("*model*.safetensors")):
        return
    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    if weight_gib > free:
        raise UserError(
            f"about {weight_gib:.1f} GiB of disk are needed to download {recipe.model} and {free:.1f} are free in {folder}: make "
            "room, or set HF_HOME to another folder."
        )


def model_error(model: str, error: Exception) -> UserError:
    """What transformers or unsloth say when they cannot load `model`, in one line."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "gated" in str(error):
        reason += " Accept its licence on its page, then run `hf auth login`."
    return UserError(f"cannot load the model {model}: {reason}")


def check_chat_template(tokenizer, model: str) -> None:
    """Raises UserError for a tokenizer that cannot write a conversation."""
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {model} has no chat template: give an instruct model with --model.")


def preflight(recipe: Recipe, config) -> None:
    """Prints what will run on what. Raises UserError where it cannot run. `config`: the model's, of transformers."""
    if not (hasattr(config, "intermediate_size") and hasattr(config, "num_key_value_heads")):
        raise UserError(
            f"{recipe.model} is a {config.model_type}, which has other layers than the LoRA goes on: "
            "give a --model of the Qwen2 or Llama kind."
        )
    if "8bit" in recipe.optim:
        check_installed("bitsandbytes")
    if recipe.report_to != "none":
        check_installed(recipe.report_to)
    free, total = (size / GIB for size in torch.cuda.mem_get_info()) if GPU else (0.0, 0.0)
    card = min(recipe.vram_gib or total, total)
    parts = estimate_memory(config, recipe, card)
    if not GPU:
        print(f"machine     {platform.machine()}, {torch.get_num_threads()} threads, no GPU")
        print("numbers     float32; transformers generates")
    else:
        backend = os.environ.get("VLLM_ATTENTION_BACKEND", "chosen by vLLM")
        print(
            f"card        {torch.cuda.get_device_name()}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}, driver {nvidia_driver()}, "
            f"{free:.1f} of {total:.1f} GiB free" + (f", to stay under {recipe.vram_gib}" if recipe.vram_gib else "")
        )
        print(
            f"numbers     {str(compute_dtype(recipe)).removeprefix('torch.')}, {4 if recipe.load_in_4bit else 16}-bit weights; "
            + (f"vLLM generates, attention backend {backend}" if recipe.use_vllm else "unsloth generates")
        )
        sizes = " + ".join(f"{name} {size:.1f}" for name, size in parts.items())
        print(f"memory      {sizes} = about {sum(parts.values()):.1f} GiB")
        check_memory(parts, recipe, min(free + CUDA_GIB, card), card)
    lora, linear, embeddings = parameter_counts(config, recipe.lora_rank)
    check_disk(4 * lora / GIB, recipe)
    check_disk_for_model(parts["weights"], recipe)
    completions = recipe.prompts_per_step * recipe.num_generations
    print(
        f"step        {recipe.prompts_per_step} prompts × {recipe.num_generations} answers = {completions} completions, "
        f"in micro-batches of {recipe.micro_batch_size}"
    )
    print(
        f"run         {recipe.max_steps} steps = {recipe.max_steps * completions:,} completions; "
        f"very roughly {estimate_minutes(linear + embeddings, parts['weights'], recipe):.0f} min"
    )
    if GPU:
        torch.cuda.empty_cache()  # give back what the estimate used
