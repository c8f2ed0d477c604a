"""GRPO on one GPU: Qwen2.5-7B-Instruct learns to reason in Chinese, from questions and final answers alone.

A step of GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300), as it is done here:

  - take a few questions and let the policy answer each of them several times (a group), with vLLM on the same card;
  - score every answer with five rules (rewards.py); there is no reward model and no value model;
  - the advantage of an answer is its reward less its group's mean, over the group's standard deviation;
  - raise the probability of the tokens of answers that beat their group, lower the others';
  - no KL term: the LoRA is small and the run is short. Every answer is used once, so nothing is clipped.

    python train_grpo.py                                          a free Colab T4 or better, the settings below
    python train_grpo.py --config recipes/24gb.yaml --max_steps 500
    python train_grpo.py --config recipes/tiny.yaml               a tiny policy, no GPU, a few minutes
    python train_grpo.py --help                                   every setting

The order is: settings, preflight, data, model, rewards, evaluation, training, evaluation.
"""

import argparse
import dataclasses
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

# requirements-cpu.txt leaves unsloth out: after it, a machine with a card runs as one without
GPU = torch.cuda.is_available() and importlib.util.find_spec("unsloth") is not None
if GPU:
    # unsloth unrolls its loss into 4 chunks an answer and has torch.compile trace all of them: minutes before the first
    # step, more for larger micro-batches, to save milliseconds afterwards. vLLM's own compilation stays on.
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    if torch.cuda.get_device_capability() < (8, 0):  # T4, V100: no FlashAttention 2; XFORMERS fails at the first token
        os.environ.setdefault("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")
    from unsloth import FastLanguageModel  # before trl, transformers and peft, which it patches

import yaml
from datasets import concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser

from data import HUB_ID, SYSTEM_PROMPT, UserError, fail, load_questions, run_script, train_and_test_splits
from infer import evaluate, evaluation_table, generate
from rewards import REWARD_FUNCS

# recipe.yaml shows the system prompt line by line
yaml.SafeDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)

GIB = 2**30
CUDA_GIB = 0.6  # the CUDA context and library workspaces, outside PyTorch's allocator
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- settings ----------------------------------------------------------------------------------------


def setting(default, reason: str, **argument):
    return field(default=default, metadata={"help": reason, **argument})


@dataclass
class Recipe:
    """Every setting of a run. The defaults are for a 14 GB card; recipes/t4.yaml gives their arithmetic."""

    model: str = setting("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "the policy to start from: a hub id or a folder")
    dataset: str = setting(HUB_ID, "the questions: a hub id, a folder, or a JSONL, CSV or Parquet file")
    system_prompt: str = setting(SYSTEM_PROMPT, "the form that rewards.py scores, in words")
    output_dir: str = setting("outputs", "where everything that the run writes goes")
    resume: str = setting(
        "",
        "continue from the newest complete checkpoint in output_dir, or from the one named here; auto: from the newest "
        "if there is one, else from the beginning",
        nargs="?",
        const="newest",
    )

    max_steps: int = setting(250, "optimiser steps")
    prompts_per_step: int = setting(8, "questions a step")
    num_generations: int = setting(6, "answers to each question: the group whose mean is the baseline")
    micro_batch_size: int = setting(6, "answers in one backward pass; lower it when memory runs out")
    max_prompt_length: int = setting(256, "tokens; longer questions are dropped")
    max_completion_length: int = setting(256, "tokens; longer answers are cut off")
    temperature: float = setting(1.0, "of sampling in training; 1.0 samples from the policy itself")

    learning_rate: float = setting(2e-5, "a LoRA takes about ten times the rate of full fine-tuning")
    lr_scheduler: str = setting("cosine", "a transformers schedule: cosine, linear, constant_with_warmup, ...")
    warmup_ratio: float = setting(0.05, "share of max_steps in which the learning rate rises from 0")
    optim: str = setting("adamw_8bit", "a transformers optimiser name; 8 bit saves 6 bytes a LoRA parameter")
    adam_beta1: float = setting(0.9, "of AdamW")
    adam_beta2: float = setting(0.99, "of AdamW; shorter memory than 0.999, for a run of a few hundred steps")
    weight_decay: float = setting(0.0, "of AdamW; it would pull the LoRA back to the base model")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = setting("dapo", "dapo weighs every token of a step alike")
    scale_rewards: Literal["group", "batch", "none"] = setting("group", "whose standard deviation divides advantages")
    beta: float = setting(0.0, "weight of the KL term against the base model; 0 leaves it out")
    epsilon: float = setting(0.2, "PPO clip range; idle as long as every answer is used once")

    lora_rank: int = setting(16, "LoRA rank; alpha is the same")
    load_in_4bit: bool = setting(True, "NF4 base weights; needs a GPU")
    dtype: Literal["auto", "float16", "bfloat16"] = setting(
        "auto", "auto: bfloat16 from compute capability 8.0, else float16"
    )
    use_vllm: bool = setting(True, "generate with vLLM in the same process; needs a GPU")
    gpu_memory_utilization: float = setting(0.6, "share of the card for vLLM: weights and KV cache")
    vram_gib: float = setting(0.0, "stay under so many GiB of GPU memory; 0: the whole card")

    eval_samples: int = setting(200, "held-out questions, answered greedily before the first step and after the last")
    save_steps: int = setting(50, "steps between checkpoints")
    sample_steps: int = setting(10, "steps between the sample answers that are printed")
    report_to: str = setting("none", "also log to: tensorboard, wandb, trackio, ... (install it first)")
    seed: int = setting(3407, "of the LoRA weights, the order of the questions and sampling")


def load_recipe(config: str | Path | None = None) -> Recipe:
    """The recipe in the YAML file `config`, or the default one. Raises UserError for a key that is none of Recipe's."""
    return parse_recipe(["--config", str(config)] if config else [])


def parse_recipe(argv: list[str]) -> Recipe:
    """The recipe from `--config FILE` and flags, which win. Raises UserError for what is unknown or makes no sense."""
    parser = TrlParser(
        Recipe,
        usage="python train_grpo.py [--config FILE] [--SETTING VALUE ...]",
        description=__doc__.split("\n")[0],
        epilog="--config FILE reads settings from a YAML file; flags win over it. Presets: recipes/*.yaml.",
        allow_abbrev=False,
    )
    parser.error = fail
    for action in parser._actions:  # --no_use_vllm and its like would repeat the help text of what they negate
        if action.dest.startswith("no_") or any(name.startswith("--no_") for name in action.option_strings):
            action.help = argparse.SUPPRESS
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    try:
        recipe, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except OSError as error:
        raise UserError(f"cannot read the recipe {error.filename}: {error.strerror}.") from error
    except (yaml.YAMLError, TypeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{' '.join(argv)}: this is not a YAML file of `setting: value` lines ({reason}).") from error
    if unknown:
        names = [f.name for f in dataclasses.fields(Recipe)]
        if not unknown[0].startswith("--"):
            raise UserError(f"settings are given as --SETTING VALUE; {unknown[0]} is neither. --help lists them all.")
        name = unknown[0].lstrip("-").split("=")[0]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown setting {unknown[0]}; the nearest is --{nearest}. --help lists them all.")
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError for values that cannot work, with the value that does."""
    for f in dataclasses.fields(Recipe):
        value = getattr(recipe, f.name)
        if f.type is float and type(value) is int:
            setattr(recipe, f.name, float(value))
        elif f.type in (int, float, str, bool) and type(value) is not f.type:
            raise UserError(f"{f.name} is {value!r}: give a value of type {f.type.__name__}.")
        elif get_args(f.type) and value not in get_args(f.type):
            raise UserError(f"{f.name} is {value!r}: choose from {', '.join(get_args(f.type))}.")
    least = dict.fromkeys(
        ["max_steps", "prompts_per_step", "micro_batch_size", "max_prompt_length", "max_completion_length", "lora_rank"]
        + ["eval_samples", "save_steps", "sample_steps"],
        1,
    )
    least |= {"num_generations": 2, "beta": 0, "epsilon": 0, "weight_decay": 0, "vram_gib": 0, "seed": 0}
    for name, low in least.items():
        if not getattr(recipe, name) >= low:
            raise UserError(f"--{name} {getattr(recipe, name)} is too small: give {low} or more.")
    for name in ("learning_rate", "temperature", "max_grad_norm"):
        if not getattr(recipe, name) > 0:
            raise UserError(f"--{name} {getattr(recipe, name)} must be above 0.")
    for name in ("gpu_memory_utilization", "warmup_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(recipe, name) < 1:
            raise UserError(f"--{name} {getattr(recipe, name)} must lie between 0 and 1.")
    completions = recipe.prompts_per_step * recipe.num_generations
    if completions % recipe.micro_batch_size:
        divisor = max(d for d in range(1, recipe.micro_batch_size) if completions % d == 0)
        raise UserError(
            f"{recipe.prompts_per_step} prompts × {recipe.num_generations} answers = {completions} completions do not "
            f"divide into micro-batches of {recipe.micro_batch_size}: give --micro_batch_size {divisor}."
        )


# --- preflight ---------------------------------------------------------------------------------------


def compute_dtype(recipe: Recipe) -> torch.dtype:
    if not GPU:
        return torch.float32
    bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if recipe.dtype == "bfloat16" and not bf16:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16: give --dtype float16 or leave it at auto.")
    return torch.float16 if recipe.dtype == "float16" or not bf16 else torch.bfloat16


def estimate_memory(config, recipe: Recipe, card_gib: float) -> dict[str, float]:
    """Estimated peak GPU memory in GiB, part by part, from a transformers config of the Llama or Qwen2 shape.

    With vLLM the weights and the KV cache lie in vLLM's share of the card; without it they count by themselves.
    NF4 with double quantisation takes 4.127 bits a weight (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
    """
    hidden, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    q, kv = head * config.num_attention_heads, head * config.num_key_value_heads
    linear_shapes = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, mlp), (hidden, mlp), (mlp, hidden)]
    linear = layers * sum(rows * columns for rows, columns in linear_shapes)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    lora = layers * recipe.lora_rank * sum(rows + columns for rows, columns in linear_shapes)
    sequence = recipe.max_prompt_length + recipe.max_completion_length
    completions = recipe.prompts_per_step * recipe.num_generations

    weights = linear * (4.127 / 8 if recipe.load_in_4bit else 2) + embeddings * 2
    kv_cache = completions * sequence * 2 * layers * kv * 2  # every answer of a step at full length
    optimizer = 2 if "8bit" in recipe.optim else 8
    # One layer's activations are recomputed at a time; the others keep their input only.
    activations = recipe.micro_batch_size * sequence * 2 * (layers * hidden + 8 * hidden + 6 * mlp)
    logits = recipe.micro_batch_size * recipe.max_completion_length * config.vocab_size * 4 * 3
    parts = {
        "weights": weights,
        "KV cache": kv_cache,
        "LoRA and optimiser": lora * (4 + 4 + 2 + optimizer),  # float32 weights and gradients, vLLM's 16-bit copy
        "activations": activations,
        "logits": logits,
        "CUDA": CUDA_GIB * GIB,
    }
    parts = {name: size / GIB for name, size in parts.items()}
    if recipe.use_vllm:  # vLLM takes its whole share at once; 0.7 GiB of it are its own activations and CUDA graphs
        parts["KV cache"] = recipe.gpu_memory_utilization * card_gib - parts["weights"] - 0.7
    return parts


def estimate_minutes(parameters: float, weight_gib: float, recipe: Recipe) -> float:
    """A rough duration of training in minutes, from this machine's measured matrix rate and memory bandwidth.

    Generation reads the weights once a token; training takes 6 floating-point operations a parameter and token, forward,
    recomputed forward and backward through frozen weights. Both run at a third of the measured rates; a decoding step
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
    return recipe.max_steps * (generation + 3 * 6 * parameters * tokens / flops + 0.5) / 60


def memory_advice(recipe: Recipe) -> str:
    """The flags that save most, with values: three, less those that are as low as they go."""
    completions = recipe.prompts_per_step * recipe.num_generations
    lower = {
        "micro_batch_size": max(d for d in range(1, max(recipe.micro_batch_size // 2, 1) + 1) if completions % d == 0),
        "max_completion_length": max(recipe.max_completion_length * 3 // 4, 64),
        "lora_rank": 16 if recipe.lora_rank > 16 else 8,  # vLLM has kernels for 8, 16, 32, 64, ...
    }
    flags = [f"--{name} {value}" for name, value in lower.items() if value < getattr(recipe, name)]
    return f"try {' or '.join(flags)}." if flags else "take a smaller --model."


def check_machine(recipe: Recipe) -> None:
    """Raises UserError where the recipe needs a GPU and there is none."""
    if not GPU and (recipe.load_in_4bit or recipe.use_vllm):
        raise UserError(
            "no CUDA GPU was found, or unsloth is not installed (requirements.txt has it), and 4-bit weights and vLLM "
            "need both. Without them: python train_grpo.py --config recipes/tiny.yaml"
        )


def preflight(recipe: Recipe) -> None:
    """Prints what will run on what. Raises UserError where it cannot run."""
    check_machine(recipe)
    try:
        config = AutoConfig.from_pretrained(recipe.model)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {recipe.model}: {str(error).splitlines()[0]}") from error
    free, total = (size / GIB for size in torch.cuda.mem_get_info()) if GPU else (0.0, 0.0)
    card = min(recipe.vram_gib or total, total)
    parts = estimate_memory(config, recipe, card)
    if not GPU:
        print(f"machine     {platform.machine()}, {torch.get_num_threads()} threads, no GPU")
        print("numbers     float32; transformers generates")
    else:
        import pynvml

        pynvml.nvmlInit()
        needed, available = sum(parts.values()), min(free + CUDA_GIB, card)
        backend = os.environ.get("VLLM_ATTENTION_BACKEND", "chosen by vLLM")
        print(
            f"card        {torch.cuda.get_device_name()}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}, driver {pynvml.nvmlSystemGetDriverVersion()}, "
            f"{free:.1f} of {total:.1f} GiB free" + (f", to stay under {recipe.vram_gib}" if recipe.vram_gib else "")
        )
        print(
            f"numbers     {str(compute_dtype(recipe)).removeprefix('torch.')}, {4 if recipe.load_in_4bit else 16}-bit weights; "
            + (f"vLLM generates, attention backend {backend}" if recipe.use_vllm else "unsloth generates")
        )
        print(
            f"memory      {' + '.join(f'{name} {size:.1f}' for name, size in parts.items())} = about {needed:.1f} GiB"
        )
        if recipe.use_vllm and parts["KV cache"] <= 0:
            raise UserError(
                f"vLLM's share of {recipe.gpu_memory_utilization:.0%} of {card:.1f} GiB has no room for a KV cache beside "
                f"{parts['weights']:.1f} GiB of weights: raise --gpu_memory_utilization or take a smaller --model."
            )
        if needed > available:
            raise UserError(
                f"about {needed:.1f} GiB of GPU memory are needed and {available:.1f} free: {memory_advice(recipe)}"
            )
    completions = recipe.prompts_per_step * recipe.num_generations
    parameters = config.vocab_size * config.hidden_size + config.num_hidden_layers * config.hidden_size * (
        3 * config.intermediate_size + 2 * config.hidden_size
    )
    print(
        f"step        {recipe.prompts_per_step} prompts × {recipe.num_generations} answers = {completions} completions, "
        f"in micro-batches of {recipe.micro_batch_size}"
    )
    print(
        f"run         {recipe.max_steps} steps = {recipe.max_steps * completions:,} completions; "
        f"very roughly {estimate_minutes(parameters, parts['weights'], recipe):.0f} min"
    )
    if GPU:
        torch.cuda.empty_cache()  # give back what the estimate used


# --- model -------------------------------------------------------------------------------------------


def load_base_model(recipe: Recipe, max_num_seqs: int):
    """The policy without a LoRA, and its tokenizer: through unsloth on a GPU, in float32 through transformers on a CPU.

    `max_num_seqs`: how many completions vLLM generates at once.
    """
    check_machine(recipe)
    if not GPU:
        try:
            model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
            return model, AutoTokenizer.from_pretrained(recipe.model)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot load the model {recipe.model}: {str(error).splitlines()[0]}") from error
    if recipe.use_vllm:
        import vllm.envs

        # unsloth sets this variable to 1 where it finds nvcc, and FlashInfer then compiles itself for a minute at the
        # first start, for top-p and top-k sampling that training does not use.
        vllm.envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"] = lambda: False
    share = recipe.gpu_memory_utilization
    if recipe.vram_gib:
        total = torch.cuda.mem_get_info()[1] / GIB
        torch.cuda.set_per_process_memory_fraction(min((recipe.vram_gib - CUDA_GIB) / total, 1.0))
        share *= recipe.vram_gib / total  # vLLM takes a share of the whole card
    vllm = {
        "fast_inference": True,
        "gpu_memory_utilization": share,
        "max_lora_rank": recipe.lora_rank,
        "max_num_seqs": max_num_seqs,  # unsloth would take 16 on a T4
    }
    return FastLanguageModel.from_pretrained(
        recipe.model,
        max_seq_length=recipe.max_prompt_length + recipe.max_completion_length,
        load_in_4bit=recipe.load_in_4bit,
        dtype=compute_dtype(recipe),
        random_state=recipe.seed,
        **(vllm if recipe.use_vllm else {}),
    )


def attach_lora(model, recipe: Recipe):
    """A fresh LoRA on all seven linear layers; B is zero, so that the policy starts as the base model."""
    if GPU:
        return FastLanguageModel.get_peft_model(
            model,
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_rank,
            target_modules=LORA_TARGETS,
            use_gradient_checkpointing="unsloth",
            random_state=recipe.seed,
        )
    torch.manual_seed(recipe.seed)
    return get_peft_model(
        model, LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=LORA_TARGETS)
    )


def training_arguments(recipe: Recipe) -> GRPOConfig:
    """TRL's settings. Every number that matters is here: TRL and unsloth have defaults of their own, and change them."""
    dtype = compute_dtype(recipe)
    arguments = {
        "output_dir": recipe.output_dir,
        "max_steps": recipe.max_steps,
        # TRL counts completions, not prompts; all of a step's are generated in one go, then trained on in micro-batches
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.prompts_per_step * recipe.num_generations // recipe.micro_batch_size,
        "num_generations": recipe.num_generations,
        "num_iterations": 1,
        "max_completion_length": recipe.max_completion_length,
        "temperature": recipe.temperature,
        "top_p": 1.0,
        "use_vllm": recipe.use_vllm,
        "vllm_mode": "colocate",
        "vllm_importance_sampling_correction": False,  # one more forward pass, and vLLM computes with the same weights
        "loss_type": recipe.loss_type,
        "scale_rewards": recipe.scale_rewards,
        "importance_sampling_level": "token",
        "mask_truncated_completions": False,  # a cut-off answer earns little, and should
        "beta": recipe.beta,
        "epsilon": recipe.epsilon,
        "epsilon_high": recipe.epsilon,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "warmup_steps": round(recipe.warmup_ratio * recipe.max_steps),  # transformers 5 has no warmup_ratio
        "optim": recipe.optim,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": GPU,
        "dataloader_pin_memory": GPU,
        "use_cpu": not GPU,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not a number shall be seen
        "shuffle_dataset": False,  # training_questions has put them in order
        "save_steps": recipe.save_steps,
        "save_total_limit": 3,
        "seed": recipe.seed,
    }
    try:
        config = GRPOConfig(**arguments, report_to=recipe.report_to)
    except ValueError as error:  # a name that transformers does not know
        raise UserError(" ".join(str(error).split())) from error
    taken = {name: getattr(config, name, None) for name in arguments}
    changed = {name: value for name, value in taken.items() if value != arguments[name]}
    if changed:
        raise UserError(
            f"the installed trl or unsloth does not take these settings as given, but makes them {changed}."
        )
    return config


# --- checkpoints -------------------------------------------------------------------------------------

# A run with another value for one of these is another run, or cannot take over the optimiser's state.
FIXED = ["model", "dataset", "system_prompt", "lora_rank", "load_in_4bit", "optim", "seed"]


def write_json(path: Path, content) -> None:
    """In one piece: whoever is killed while writing leaves the old file as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_recipe(recipe: Recipe) -> None:
    settings = dataclasses.asdict(recipe) | {"resume": ""}
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    (Path(recipe.output_dir) / "recipe.yaml").write_text(text, encoding="utf-8")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in `out`, complete or not, newest first."""
    return sorted((path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()), key=step_of, reverse=True)


def mark_complete(checkpoint: Path, recipe: Recipe) -> None:
    """Writes complete.json, last: the recipe, and a digest of every file. A checkpoint without it was not finished."""
    (checkpoint / "complete.json").unlink(missing_ok=True)
    files = {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_json(checkpoint / "complete.json", {"recipe": dataclasses.asdict(recipe), "files": files})


def flaw(checkpoint: Path) -> str | None:
    """Why no run can continue from `checkpoint`; None if one can."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return "its complete.json is damaged"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
            return f"{name} is damaged"
    return None


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to continue from, None to start at step 1. Raises UserError where neither is what was asked for."""
    out = Path(recipe.output_dir)
    found = checkpoints(out)
    if not recipe.resume:
        if found or (out / "adapter").exists():
            raise UserError(
                f"{out} already holds a run. Continue it: {command(recipe, '--resume')} or start another: "
                f"{command(recipe, '--output_dir', f'{out}-2')}"
            )
        return None
    if recipe.resume in ("newest", "auto"):
        for checkpoint in found:
            if not (reason := flaw(checkpoint)):
                return checkpoint
            print(f"skipped     {checkpoint}: {reason}")
        if recipe.resume == "auto":
            return None
        raise UserError(f"there is no checkpoint in {out} to continue from: leave --resume out, or give --resume auto.")
    named = Path(recipe.resume)
    if named.resolve() not in [path.resolve() for path in found]:
        held = ", ".join(path.name for path in found) or "none"
        raise UserError(f"--resume {named} is no checkpoint in {out}, which holds {held}.")
    if reason := flaw(named):
        raise UserError(f"{named} cannot be continued from: {reason}. --resume alone takes the newest that can.")
    return out / named.name


def check_same_run(recipe: Recipe, checkpoint: Path) -> None:
    """Lists the settings that differ from the checkpoint's. Raises UserError for one that makes it another run."""
    before = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["recipe"]
    for name, value in dataclasses.asdict(recipe).items():
        if name in ("resume", "output_dir") or before.get(name) == value:
            continue
        if name in FIXED:
            raise UserError(
                f"{checkpoint} belongs to a run with {name} {before.get(name)!r}, not {value!r}: continue it with that, or "
                "start another run with another --output_dir."
            )
        print(f"changed     {name}: {before.get(name)} before, {value} from here on")


def go_back_to(checkpoint: Path | None, recipe: Recipe) -> None:
    """Removes what the output folder holds from after `checkpoint` (None: everything)."""
    out = Path(recipe.output_dir)
    step = step_of(checkpoint) if checkpoint else 0
    for later in checkpoints(out):
        if step_of(later) > step:
            print(f"removed     {later}, which comes after step {step}")
            shutil.rmtree(later)
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = read_json_lines(out / name)
        write_json_lines(out / name, [line for line in lines if line["step"] <= step])
    if checkpoint:
        # transformers would go on with the micro-batches that it finds here
        path = checkpoint / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["train_batch_size"] != recipe.micro_batch_size:
            write_json(path, state | {"train_batch_size": recipe.micro_batch_size})
            mark_complete(checkpoint, recipe)


def command(recipe: Recipe, *arguments: str) -> str:
    """A shell command that runs this recipe again, with further `arguments`."""
    written = Path(recipe.output_dir) / "recipe.yaml"
    return shlex.join([sys.executable, sys.argv[0], "--config", str(written), *arguments])


# --- what the run writes while it goes ---------------------------------------------------------------


def recording(reward_func, batch: dict):
    """`reward_func`, which also leaves what it was given and what it gave in `batch`, for samples.jsonl."""

    @functools.wraps(reward_func)  # TRL logs a reward under the function's name
    def wrapper(prompts, completions, answer, **kwargs):
        rewards = reward_func(prompts=prompts, completions=completions, answer=answer, **kwargs)
        batch.update({"prompts": prompts, "completions": completions, "answers": answer, reward_func.__name__: rewards})
        return rewards

    return wrapper


def divergence(history: list[dict], fp16: bool) -> str | None:
    """What is wrong with the policy after the steps in `history` (lines of metrics.jsonl); None if nothing is.

    float16 training skips a step whose gradient overflows and lowers its scale, so that a few in a row are normal.
    """
    last = history[-1]
    if not math.isfinite(last["loss"]):
        return f"the loss is {last['loss']}"
    if not any(math.isfinite(line["grad_norm"]) for line in history[-20 if fp16 else -1 :]):
        return "the gradient is not finite"
    window = 10
    means = [sum(line["reward"] for line in history[i : i + window]) / window for i in range(len(history) - window + 1)]
    if means and max(means) - means[-1] > max(0.5, max(means) / 2):
        start = means.index(max(means))
        return (
            f"the reward fell from {max(means):.2f} in the steps {history[start]['step']} to "
            f"{history[start + window - 1]['step']} to {means[-1]:.2f} in the last {window}"
        )
    return None


class Report(ProgressCallback):
    """tqdm's bar; a readable line a step; metrics.jsonl, samples.jsonl and reward_curve.png; a clean stop on a signal."""

    def __init__(self, recipe: Recipe, batch: dict):
        super().__init__()
        self.recipe, self.batch, self.out = recipe, batch, Path(recipe.output_dir)
        self.metrics, self.samples = (read_json_lines(self.out / f"{name}.jsonl") for name in ("metrics", "samples"))
        self.stop_signal = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.update(state.global_step)
        self.step_start = time.perf_counter()
        self.seconds = []

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.stop_signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        now = time.perf_counter()
        self.seconds.append(now - self.step_start)
        self.step_start = now
        # the most memory held so far; on a CPU, by the whole process
        peak = torch.cuda.max_memory_reserved() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"step": state.global_step}
        metrics |= {
            key.removesuffix("/mean") if key.startswith("rewards/") else key: value for key, value in logs.items()
        }
        metrics |= {"seconds": self.seconds[-1], "gib": peak / GIB}
        samples = [
            {
                "step": state.global_step,
                "question": prompt[-1]["content"],
                "completion": completion[-1]["content"],
                "answer": answer,
                **{name: rewards[i] for name, rewards in self.batch.items() if name.endswith("_reward_func")},
            }
            for i, (prompt, completion, answer) in enumerate(
                zip(self.batch["prompts"], self.batch["completions"], self.batch["answers"], strict=True)
            )
        ]
        self.metrics.append(metrics)  # in memory too: output_dir may be a mounted folder, and go away
        self.samples += samples
        write_json_lines(self.out / "metrics.jsonl", [metrics], "a")
        write_json_lines(self.out / "samples.jsonl", samples, "a")
        if reason := divergence(self.metrics, args.fp16):
            good = [path for path in checkpoints(self.out) if not flaw(path)]
            advice = (
                f"Continue from before that, more slowly: {command(self.recipe, '--resume', str(good[0]), '--learning_rate', f'{self.recipe.learning_rate / 2:g}')}"
                if good
                else f"There is no checkpoint yet: start again with --learning_rate {self.recipe.learning_rate / 2:g}."
            )
            raise UserError(f"stopped after step {state.global_step}, because {reason}. {advice}")

        def short(name):
            return name.removesuffix("_reward_func").removesuffix("_format")

        left = (state.max_steps - state.global_step) * sum(self.seconds[-10:]) / len(self.seconds[-10:]) / 60
        parts = " + ".join(f"{short(f.__name__)} {metrics[f'rewards/{f.__name__}']:.2f}" for f in REWARD_FUNCS)
        self.training_bar.write(
            f"step {state.global_step:3}  reward {metrics['reward']:.2f} = {parts}  "
            f"no variance {metrics['frac_reward_zero_std']:.0%}  length {metrics['completions/mean_length']:.0f}  "
            f"cut off {metrics['completions/clipped_ratio']:.0%}  {metrics['seconds']:.1f} s  {metrics['gib']:.1f} GiB  "
            f"{left:.0f} min left"
        )
        if state.global_step % self.recipe.sample_steps == 0:
            sample = samples[0]
            rewards = ", ".join(
                f"{short(key)} {value:g}" for key, value in sample.items() if key.endswith("_reward_func")
            )
            text = f"question: {sample['question']}\n{sample['completion']}\nexpected: {sample['answer']}; rewards: {rewards}"
            self.training_bar.write("    " + text.replace("\n", "\n    "))
            draw_reward_curve(self.out)

    def on_save(self, args, state, control, **kwargs):
        draw_reward_curve(self.out)
        mark_complete(self.out / f"checkpoint-{state.global_step}", self.recipe)

    def save_after_error(self, trainer: GRPOTrainer) -> None:
        """A checkpoint of the last step that was finished; in a new folder, if output_dir can no longer be written to."""
        recipe, step = self.recipe, trainer.state.global_step
        try:
            if flaw(self.out / f"checkpoint-{step}"):
                trainer._save_checkpoint(trainer.model, trial=None)
                mark_complete(self.out / f"checkpoint-{step}", recipe)
        except OSError:
            self.out = Path(tempfile.mkdtemp(prefix="rescued-", dir=Path(__file__).parent))
            recipe.output_dir = trainer.args.output_dir = str(self.out)
            write_recipe(recipe)
            write_json(self.out / "eval.json", self.evaluations)
            write_json_lines(self.out / "metrics.jsonl", self.metrics)
            write_json_lines(self.out / "samples.jsonl", self.samples)
            trainer._save_checkpoint(trainer.model, trial=None)
            mark_complete(self.out / f"checkpoint-{step}", recipe)


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file; none if there is no file. A last line that was not finished is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def write_json_lines(path: Path, records: list[dict], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def draw_reward_curve(out: Path) -> None:
    """reward_curve.png from metrics.jsonl: the total and its five parts, each step pale, their running mean on top."""
    os.environ["MPLBACKEND"] = "agg"  # Colab's own setting names a backend that is not installed here
    import pandas
    from matplotlib.figure import Figure

    metrics = pandas.read_json(out / "metrics.jsonl", lines=True).set_index("step")
    smooth = metrics.ewm(span=max(5, len(metrics) / 10)).mean()
    figure = Figure(figsize=(8, 7), layout="constrained")
    total, parts = figure.subplots(2, sharex=True)
    # colours of Okabe and Ito, which the colour-blind can tell apart
    colors = ["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]
    names = ["reward"] + [f"rewards/{f.__name__}" for f in REWARD_FUNCS]
    for name, color in zip(names, colors, strict=True):
        axes = total if name == "reward" else parts
        axes.plot(metrics.index, metrics[name], color=color, alpha=0.25, linewidth=1)
        axes.plot(smooth.index, smooth[name], color=color, linewidth=2, label=name.removeprefix("rewards/"))
    total.set(ylabel="reward (of 4.0)", title="Mean reward of a step's completions")
    parts.set(ylabel="its five parts", xlabel="step")
    for axes in (total, parts):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "reward_curve.png", dpi=120)


def installed_versions() -> dict[str, str]:
    names = ["torch", "transformers", "trl", "peft", "datasets", "unsloth", "unsloth_zoo", "vllm", "bitsandbytes"]
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in names if name in installed}


# --- the run -----------------------------------------------------------------------------------------


def training_questions(questions, recipe: Recipe):
    """The questions of all steps in their order: each epoch shuffled anew.

    TRL's own sampler would shuffle too, but a resumed run would start its first order over again after the first epoch.
    """
    rows, epochs = recipe.max_steps * recipe.prompts_per_step, []
    while sum(map(len, epochs)) < rows:
        epochs.append(questions.shuffle(seed=recipe.seed + len(epochs)))
    return concatenate_datasets(epochs).select(range(rows))


def run(recipe: Recipe) -> None:
    start = time.perf_counter()
    out = Path(recipe.output_dir)
    checkpoint = find_checkpoint(recipe)
    if checkpoint:
        check_same_run(recipe, checkpoint)

    # Preflight: all that can be known before anything slow.
    preflight(recipe)
    config = training_arguments(recipe)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    except FileExistsError as error:
        raise UserError(f"--output_dir {out} is a file: give a folder.") from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"cannot write to {out} or load the tokenizer of {recipe.model}: {error}".split("\n")[0]
        ) from error

    # Data.
    train_split, test_split = train_and_test_splits(recipe.dataset)
    train = load_questions(recipe.dataset, train_split, tokenizer, recipe.max_prompt_length, recipe.system_prompt)
    test = load_questions(recipe.dataset, test_split, tokenizer, recipe.max_prompt_length, recipe.system_prompt)
    test = test.select(range(min(recipe.eval_samples, len(test))))
    print(f"questions   {len(train)} to train on, {len(test)} held out")
    go_back_to(checkpoint, recipe)
    write_recipe(recipe)

    # Model.
    model, tokenizer = load_base_model(recipe, recipe.prompts_per_step * recipe.num_generations)
    model = attach_lora(model, recipe)

    # Rewards and trainer.
    batch = {}
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[recording(func, batch) for func in REWARD_FUNCS],
        args=config,
        train_dataset=training_questions(train, recipe),
        processing_class=tokenizer,
    )
    report = Report(recipe, batch)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(report)

    def measure(adapter: Path | None) -> dict[str, float]:
        completions = generate(
            trainer.model, tokenizer, list(test["prompt"]), recipe.max_completion_length, adapter=adapter
        )
        return evaluate(completions, list(test["answer"]))

    # Evaluation before the first step; a resumed run has it already.
    if checkpoint and (out / "eval.json").exists():
        evaluations = {"before": json.loads((out / "eval.json").read_text(encoding="utf-8"))["before"]}
    else:
        evaluations = {"before": measure(None)}
        write_json(out / "eval.json", evaluations)
    print(evaluation_table(evaluations))
    report.evaluations = evaluations

    # Training. Ctrl-C and SIGTERM finish the step and save a checkpoint; a second Ctrl-C does not wait.
    def stop(signum, frame):
        report.stop_signal = signum
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"\n{signal.Signals(signum).name}: finishing this step, then saving a checkpoint", flush=True)

    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    training_start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UserError:  # the policy has diverged, and is not worth keeping
        raise
    except Exception as error:
        if trainer.state.global_step == 0:
            raise
        report.save_after_error(trainer)
        saved = f"The checkpoint of step {trainer.state.global_step} is in {report.out}. Continue with: {command(recipe, '--resume')}"
        if report.out != out:
            raise UserError(f"{out} can no longer be written to ({error}). {saved}") from error
        if is_out_of_memory(error):
            raise UserError(f"out of GPU memory: {memory_advice(recipe)} {saved}, with one of these.") from error
        print(saved, file=sys.stderr)
        raise
    training_seconds = time.perf_counter() - training_start
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if report.stop_signal:
        print(f"stopped after step {trainer.state.global_step}; the checkpoint is in {checkpoints(out)[0]}")
        print(f"continue with: {command(recipe, '--resume')}")
        sys.exit(128 + report.stop_signal)

    # The adapter, and the evaluation through it as it was saved.
    trainer.model.save_pretrained(out / "adapter")
    tokenizer.save_pretrained(out / "adapter")
    evaluations |= {
        "after": measure(out / "adapter"),
        "gpu": torch.cuda.get_device_name() if GPU else None,
        "seconds": {"training": round(training_seconds, 1), "total": round(time.perf_counter() - start, 1)},
        "versions": installed_versions(),
    }
    write_json(out / "eval.json", evaluations)
    print(f"\n{len(test)} held-out questions, greedy, same prompt and parser before and after:")
    print(evaluation_table({name: evaluations[name] for name in ("before", "after")}))
    ask = [sys.executable, "infer.py", "--adapter", str(out / "adapter"), test[0]["prompt"][-1]["content"]]
    print(f"\nThe LoRA is in {out}/adapter. Ask it: {shlex.join(ask)}")


def is_out_of_memory(error: Exception) -> bool:
    """Of the GPU. unsloth wraps vLLM's error into one of its own."""
    return isinstance(error, RuntimeError) and (
        "out of memory" in str(error).lower() or "memory for the cache" in str(error)
    )


def main() -> None:
    recipe = parse_recipe(sys.argv[1:])
    try:
        run(recipe)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of GPU memory: {memory_advice(recipe)}") from error


if __name__ == "__main__":
    run_script(main)
