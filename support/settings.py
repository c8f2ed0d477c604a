"""Every setting of a run: its type, default and reason; from YAML and the command line; and what is wrong with a value."""

import argparse
import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml
from trl import TrlParser

from data import HUB_ID, SYSTEM_PROMPT
from support import screen
from support.errors import UserError, fail
from support.places import SCRIPTS, find_local
from support.rules import load_rules
from support.schedule import SCHEDULES


def setting(default, reason: str, **argument):
    """A dataclass field; TrlParser shows `reason` in --help."""
    return dataclasses.field(default=default, metadata={"help": reason, **argument})


@dataclass
class Recipe:
    """Every setting of a run. The defaults are for a 14 GB card; recipes/t4.yaml gives their arithmetic."""

    model: str = setting("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "the policy to start from: a hub id or a folder")
    dataset: str = setting(HUB_ID, "the questions: a hub id, a folder, or a JSONL, CSV or Parquet file")
    question_column: str = setting("", "the dataset's column of questions; not given: found by its name")
    answer_column: str = setting(
        "", "the dataset's column of answers, each with one number; not given: found by its name"
    )
    system_prompt: str = setting(SYSTEM_PROMPT, "the form that rewards.py scores, in words")
    rewards: str = setting(
        "",
        "a Python file in place of rewards.py: REWARD_FUNCS, as TRL calls them, and if need be MAX_REWARDS, "
        "SYSTEM_PROMPT, check_label(label) and is_correct(text, label), without which an answer is correct where the "
        "text inside <answer> is the label; examples/ has three",
    )
    output_dir: str = setting("outputs", "where everything that the run writes goes")
    resume: str = setting(
        "",
        "continue from the newest complete checkpoint in output_dir, or from the one named here; auto: from the newest "
        "if there is one, else from the beginning; not given: a new run",
        nargs="?",
        const="newest",
    )

    max_steps: int = setting(80, "optimiser steps")
    prompts_per_step: int = setting(8, "questions a step")
    num_generations: int = setting(6, "answers to each question: the group whose mean is the baseline")
    micro_batch_size: int = setting(12, "answers in one backward pass of one card; lower it when memory runs out")
    max_prompt_length: int = setting(256, "tokens; longer questions are dropped")
    max_completion_length: int = setting(256, "tokens; longer answers are cut off")
    temperature: float = setting(0.7, "answers are sampled, and their probabilities trained, at this temperature")

    learning_rate: float = setting(
        2e-5, "the highest of the schedule; a LoRA takes about ten times the rate of full fine-tuning"
    )
    lr_scheduler: Literal[SCHEDULES] = setting("cosine", "how the learning rate goes on after the warmup")
    warmup_ratio: float = setting(0.05, "share of max_steps in which the learning rate rises from 0")
    optim: str = setting("adamw_8bit", "a transformers optimiser name; 8 bit saves 6 bytes a LoRA parameter")
    adam_beta1: float = setting(0.9, "AdamW's running mean of gradients keeps this share of itself at each step")
    adam_beta2: float = setting(0.99, "the same for their squares: less than 0.999, for a run of a few hundred steps")
    weight_decay: float = setting(0.0, "AdamW's; it would pull the LoRA back to the base model")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = setting(
        "dapo",
        "what the loss is the mean of; dapo weighs every token of a step alike, bnpo every token of a micro-batch",
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "advantages are divided by the standard deviation of their group, of all, or not"
    )
    beta: float = setting(0.0, "weight of the KL term against the base model; 0 leaves it out")
    epsilon: float = setting(0.2, "PPO clip range; idle as long as every answer is used once")

    lora_rank: int = setting(16, "LoRA rank")
    lora_alpha: int = setting(0, "the LoRA counts alpha / rank times; 0: as much as the rank, so once")
    load_in_4bit: bool = setting(True, "NF4 base weights; needs a GPU")
    dtype: Literal["auto", "float16", "bfloat16"] = setting(
        "auto", "auto: bfloat16 from compute capability 8.0, else float16"
    )
    use_vllm: bool = setting(True, "generate with vLLM in the same process; needs a GPU")
    enforce_eager: bool = setting(
        False, "vLLM without CUDA graphs: slower; tried by itself where vLLM does not start with them"
    )
    gradient_checkpointing: bool = setting(
        True, "recompute activations in the backward pass: a third slower, and takes far less memory; on a GPU"
    )
    gpu_memory_utilization: float = setting(0.5, "share of the card for vLLM: weights and KV cache")
    vram_gib: float = setting(0.0, "stay under so many GiB of GPU memory; 0: the whole card")

    eval_samples: int = setting(200, "held-out questions, answered greedily before the first step and after the last")
    dev_samples: int = setting(
        128,
        "questions out of the training split, by which the policy to keep is chosen; at most a tenth of it; 0: the last one",
    )
    eval_steps: int = setting(20, "steps between answers to them, each with a checkpoint")
    save_steps: int = setting(10, "steps between checkpoints")
    save_total_limit: int = setting(3, "checkpoints that are kept: the newest ones, the best and the last good one")
    sample_steps: int = setting(10, "steps between the sample answers that are printed")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "where to log besides output_dir; install it first"
    )
    seed: int = setting(3407, "for the LoRA weights, the order of the questions and sampling")

    @property
    def alpha(self) -> int:
        """The LoRA's alpha, which `lora_alpha` 0 leaves to the rank."""
        return self.lora_alpha or self.lora_rank

    @property
    def completions(self) -> int:
        """Answers a step, of all processes."""
        return self.prompts_per_step * self.num_generations

    @property
    def processes(self) -> int:
        """How many processes torchrun or accelerate launch has started, each with a card of its own."""
        return screen.processes()

    @property
    def completions_each(self) -> int:
        """Answers a step of one process."""
        return self.completions // self.processes


def load_recipe(config: str | Path | None = None) -> Recipe:
    """The recipe in the YAML file `config`, or the default one. Raises UserError for a key that is none of Recipe's."""
    return parse_recipe(["--config", str(config)] if config else [])


def parse_recipe(argv: list[str]) -> Recipe:
    """The recipe from `--config FILE` and flags, which win. Raises UserError for what is unknown or makes no sense."""
    parser = TrlParser(
        Recipe,
        usage="python train_grpo.py [--config FILE] [--check] [--verbose] [--SETTING VALUE ...]",
        description="GRPO on one GPU: Qwen2.5-7B-Instruct learns to reason in Chinese, from questions and final answers alone.",
        epilog="--config FILE reads settings from a YAML file; flags win over it. Presets: recipes/*.yaml.",
        allow_abbrev=False,
    )
    parser.error = fail
    parser.print_help = screen.shown(parser.print_help)
    parser.add_argument(
        "--verbose", action="store_true", help="show what the libraries say, instead of writing it to a file"
    )
    parser.add_argument("--check", action="store_true", help="try all that this run needs, and say what holds")
    for action in parser._actions:  # --no_use_vllm and its like would repeat the help text of what they negate
        if action.dest.startswith("no_") or any(name.startswith("--no_") for name in action.option_strings):
            action.help = argparse.SUPPRESS
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if argv.count("--config") > 1:
        raise UserError("--config is given more than once: give one file, and what shall differ as --SETTING VALUE.")
    try:
        recipe, _, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    except OSError as error:
        recipes = {path.name: os.path.relpath(path) for path in (SCRIPTS / "recipes").glob("*.yaml")}
        ours = f"; there is {recipes[error.filename]}" if error.filename in recipes else ""
        raise UserError(f"cannot read the recipe {error.filename}: {error.strerror}{ours}.") from error
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
    if recipe.rewards:
        config, in_config, in_flags = given(argv)
        beside = config.parent / recipe.rewards if config else Path()
        if "rewards" not in in_flags and beside.is_file():  # as in the recipe.yaml of a run, which may have been moved
            recipe.rewards = str(beside)
        recipe.rewards = find_local(recipe.rewards)
        if "system_prompt" not in in_config | in_flags:
            recipe.system_prompt = load_rules(recipe.rewards).system_prompt or recipe.system_prompt
    return recipe


def given(argv: list[str]) -> tuple[Path | None, set[str], set[str]]:
    """The --config of a command line, the settings that it gives, and those that flags give."""
    flags = {arg[2:].split("=")[0].replace("-", "_"): i for i, arg in enumerate(argv) if arg.startswith("--")}
    config = Path(argv[flags["config"] + 1]) if "config" in flags else None
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config else None
    return config, set(settings or {}), set(flags)


def check_recipe(recipe: Recipe) -> None:
    """Raises UserError for values that cannot work, with the value that does."""
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if f.type is float and type(value) is int:
            setattr(recipe, f.name, float(value))
        elif f.type in (int, float, str, bool) and type(value) is not f.type:
            raise UserError(f"{f.name} is {value!r}: give a value of type {f.type.__name__}.")
        elif get_args(f.type) and value not in get_args(f.type):
            raise UserError(f"{f.name} is {value!r}: choose from {', '.join(get_args(f.type))}.")
    least = dict.fromkeys(
        ["max_steps", "prompts_per_step", "micro_batch_size", "max_prompt_length", "max_completion_length", "lora_rank"]
        + ["eval_samples", "eval_steps", "save_steps", "sample_steps"],
        1,
    )
    least |= {
        "num_generations": 2,
        "beta": 0,
        "epsilon": 0,
        "weight_decay": 0,
        "vram_gib": 0,
        "seed": 0,
        "lora_alpha": 0,
        "dev_samples": 0,
        "save_total_limit": 2,  # the newest and the best
    }
    for name, low in least.items():
        if not getattr(recipe, name) >= low:
            raise UserError(f"--{name} {getattr(recipe, name)} is too small: give {low} or more.")
    if recipe.seed >= 2**32:
        raise UserError(f"--seed {recipe.seed} is too large: give less than {2**32}.")
    for name in ("model", "dataset", "output_dir"):
        if not getattr(recipe, name):
            raise UserError(f"--{name} is empty: give it a value.")
    for name in ("learning_rate", "temperature", "max_grad_norm"):
        if not getattr(recipe, name) > 0:
            raise UserError(f"--{name} {getattr(recipe, name)} must be above 0.")
    for name in ("gpu_memory_utilization", "warmup_ratio", "adam_beta1", "adam_beta2"):
        if not 0 <= getattr(recipe, name) < 1:
            raise UserError(f"--{name} {getattr(recipe, name)} must lie between 0 and 1.")
    prompts, processes, completions = recipe.prompts_per_step, recipe.processes, recipe.completions_each
    if prompts % processes:
        raise UserError(
            f"{prompts} prompts a step cannot be shared out evenly among {processes} processes: "
            f"give --prompts_per_step {max(prompts // processes, 1) * processes}."
        )
    if completions % recipe.micro_batch_size:
        divisor = max(d for d in range(1, recipe.micro_batch_size) if completions % d == 0)
        raise UserError(
            f"{prompts} prompts × {recipe.num_generations} answers{f' ÷ {processes} processes' * (processes > 1)} = "
            f"{completions} completions do not divide into micro-batches of {recipe.micro_batch_size}: "
            f"give --micro_batch_size {divisor}."
        )
