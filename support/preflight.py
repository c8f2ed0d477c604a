"""What is checked and said before anything slow starts: machine, packages, disk, memory, minutes.

Imports torch and nothing that unsloth patches: train_grpo.py reads GPU from here before it imports unsloth.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError

from support.errors import UserError
from support.memory import CUDA_GIB, GIB, check_memory, estimate_memory, layers_kept, parameter_counts
from support.places import find_model
from support.screen import say
from support.templates import adapt_template

if TYPE_CHECKING:
    from support.settings import Recipe


def take_own_card() -> None:
    """Under torchrun a process sees one card, its own: unsloth and vLLM put everything on the first that they see."""
    place, cards = os.environ.get("LOCAL_RANK"), os.environ.get("CUDA_VISIBLE_DEVICES") or None
    if place is None:
        return
    if cards is None:
        cards = place
    elif "," in cards:  # one alone is this process's own already
        cards = (cards.split(",") + ["-1"] * int(place))[int(place)]  # none, where there are more processes than cards
    os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"] = cards, "0"


take_own_card()
# requirements-cpu.txt leaves unsloth out: after it, a machine with a card runs as one without
GPU = torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None
MODEL_ERRORS = (OSError, ValueError, ImportError, SafetensorError)  # of a model that cannot be loaded


def check_processes(recipe: Recipe) -> None:
    """Raises UserError for several processes that could only wait for one another."""
    if recipe.processes > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {recipe.processes} in the environment, and torchrun has not started this: unset it, or start "
            f"this with torchrun --nproc_per_node {recipe.processes}."
        )
    if recipe.processes > 1 and not GPU and importlib.util.find_spec("unsloth") and nvidia_driver():
        raise UserError("there are more processes than cards: give --nproc_per_node the number of cards of a host.")


def compute_dtype(recipe: Recipe) -> torch.dtype:
    if not GPU:
        return torch.float32
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if recipe.dtype == "bfloat16" and not bf16:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16: give --dtype float16 or leave it at auto.")
    return torch.float16 if recipe.dtype == "float16" or not bf16 else torch.bfloat16


def estimate_minutes(parameters: float, weight_gib: float, recipe: Recipe) -> float:
    """A rough duration of training in minutes, from this machine's measured matrix rate and memory bandwidth.

    Generation reads the weights once a token; training takes 6 floating-point operations a parameter and token: forward,
    recomputed forward (not without gradient checkpointing) and backward through frozen weights. Both run at a third of the measured rates; a decoding step
    takes 8 ms at least, an optimiser step half a second.
    """
    device, dtype, n, size = ("cuda", compute_dtype(recipe), 4096, 2**25) if GPU else ("cpu", torch.float32, 512, 2**23)
    a, b = torch.rand(n, n, device=device, dtype=dtype), torch.rand(size, device=device)

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
    tokens = recipe.completions_each * sequence
    generation = recipe.max_completion_length * max(3 * weight_gib * GIB / bandwidth, 0.008)
    operations = 6 if recipe.gradient_checkpointing else 4
    return recipe.max_steps * (generation + 3 * operations * parameters * tokens / flops + 0.5) / 60


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
    without = "Without a GPU give train_grpo.py --config recipes/tiny.yaml, and infer.py --model tiny"
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


def check_disk(lora_gib: float, recipe: Recipe) -> None:
    """Raises UserError where output_dir has no room for the checkpoints: float32 weights and AdamW's two averages."""
    folder = Path(recipe.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    checkpoint = lora_gib * (1.5 if "8bit" in recipe.optim else 3) + 0.02  # and the tokenizer
    held = min(
        len(list(Path(recipe.output_dir).glob("checkpoint-*"))), recipe.save_total_limit
    )  # by a run that is resumed
    # those that are kept, one that is being written, the adapter
    needed = (recipe.save_total_limit + 1 - held) * checkpoint + lora_gib
    if needed > free:
        smaller = "" if held else f", or try --lora_rank {max(recipe.lora_rank // 2, 1)}"
        raise UserError(
            f"about {needed:.1f} GiB of disk are needed for checkpoints and {free:.1f} are free in {folder}: make room, or give "
            f"another --output_dir{smaller}."
        )


def check_disk_for_model(weight_gib: float, recipe: Recipe) -> None:
    """Raises UserError where the model has to be downloaded and the hub's cache has no room for it."""
    if Path(find_model(recipe.model)).is_dir():
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


def commit_of(config) -> str | None:
    """The commit on the hub that a model's config is of; None of a folder."""
    return getattr(config, "_commit_hash", None)


def prepare_tokenizer(tokenizer, model: str):
    """`tokenizer` as training, asking and measuring need it: it can write a conversation, end it and pad it.

    Raises UserError where it cannot.
    """
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {model} has no chat template: give an instruct model with --model.")
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model} has no eos_token, which ends an answer: set it in tokenizer_config.json."
        )
    adapt_template(tokenizer, model)
    if tokenizer.pad_token is None:  # Llama's, among others
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_kind(model: str, config) -> None:
    """Raises UserError for what is no dense language model with the seven linear layers of Llama's."""
    if hasattr(config, "text_config") or hasattr(config, "vision_config"):
        fault = "which takes more than text"
    elif any("expert" in name and value for name, value in config.to_dict().items()):
        fault = "a mixture of experts"
    elif config.is_encoder_decoder or not (
        hasattr(config, "intermediate_size") and hasattr(config, "num_key_value_heads")
    ):
        fault = "which has other layers than the LoRA goes on"
    else:
        return
    raise UserError(
        f"{model} is a {config.model_type}, {fault}: give a dense --model, "
        "of the Qwen2, Qwen3, Llama, Mistral or Gemma kind."
    )


def larger_recipe(recipe: Recipe, card_gib: float) -> str | None:
    """The recipe that fits a card of `card_gib` better than the default model in NF4, if that is what runs."""
    if recipe.model != type(recipe).model or not recipe.load_in_4bit:
        return None
    sizes = {"80gb": 78, "48gb": 44, "24gb": 22}  # GiB; an L4 has 22.2, an L40S 44.5
    return next((name for name, size in sizes.items() if card_gib >= size), None)


def preflight(recipe: Recipe, config) -> int:
    """Prints what will run on what. Raises UserError where it cannot run. `config`: the model's, of transformers.

    Returns how many layers shall keep their activations for the backward pass.
    """
    check_kind(recipe.model, config)
    if re.search("8bit|32bit|ademamix|bnb", recipe.optim) and "torch" not in recipe.optim:
        check_installed("bitsandbytes")
    if recipe.report_to != "none":
        check_installed(recipe.report_to)
    free, total = (size / GIB for size in torch.cuda.mem_get_info()) if GPU else (0.0, 0.0)
    card = min(recipe.vram_gib or total, total)
    room = min(free + CUDA_GIB, card)
    shared = importlib.util.find_spec("xformers") is not None  # training_pass.py
    kept = layers_kept(config, recipe, card, room, shared)
    parts = estimate_memory(config, recipe, card, kept, shared)
    if not GPU:
        say(f"machine     {platform.machine()}, {torch.get_num_threads()} threads, no GPU")
        say("numbers     float32; transformers generates")
    else:
        backend = os.environ.get("VLLM_ATTENTION_BACKEND", "chosen by vLLM")
        say(
            f"card        {torch.cuda.get_device_name()}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}, driver {nvidia_driver()}, "
            f"{free:.1f} of {total:.1f} GiB free" + (f", to stay under {recipe.vram_gib}" if recipe.vram_gib else "")
        )
        say(
            f"numbers     {str(compute_dtype(recipe)).removeprefix('torch.')}, {4 if recipe.load_in_4bit else 16}-bit weights; "
            + (f"vLLM generates, attention backend {backend}" if recipe.use_vllm else "unsloth generates")
        )
        if (better := larger_recipe(recipe, card)) is not None:
            say(
                f"recipe      --config recipes/{better}.yaml is made for a card of this size: 16-bit weights, more answers a step"
            )
        sizes = " + ".join(f"{name} {size:.1f}" for name, size in parts.items())
        say(f"memory      {sizes} = about {sum(parts.values()):.1f} GiB")
        check_memory(parts, recipe, room, card)
        if recipe.gradient_checkpointing and kept:
            rest = ", the others compute them again" if kept < config.num_hidden_layers else ""
            say(f"layers      {kept} of {config.num_hidden_layers} keep their activations{rest}")
    lora, linear, embeddings = parameter_counts(config, recipe.lora_rank)
    check_disk(4 * lora / GIB, recipe)
    check_disk_for_model(parts["weights"], recipe)
    completions = recipe.completions
    several = f", {recipe.completions_each} on each of {recipe.processes} processes" if recipe.processes > 1 else ""
    say(
        f"step        {recipe.prompts_per_step} prompts × {recipe.num_generations} answers = {completions} completions{several}, "
        f"in micro-batches of {recipe.micro_batch_size}"
    )
    say(
        f"run         {recipe.max_steps} steps = {recipe.max_steps * completions:,} completions; "
        f"very roughly {max(estimate_minutes(linear + embeddings, parts['weights'], recipe), 1):.0f} min"
    )
    if GPU:
        torch.cuda.empty_cache()  # give back what the estimate used
    return kept
