"""Settings of a run from YAML and the command line, and what is wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from typing import TYPE_CHECKING, get_args

import yaml
from trl import TrlParser

from data import UserError, fail

if TYPE_CHECKING:
    from train_grpo import Recipe


def setting(default, reason: str, **argument):
    """A dataclass field; TrlParser shows `reason` in --help."""
    return dataclasses.field(default=default, metadata={"help": reason, **argument})


def parse_settings(recipe_class, argv: list[str], description: str):
    """A `recipe_class` from `--config FILE` and flags, which win. Raises UserError for what is unknown or makes no sense."""
    parser = TrlParser(
        recipe_class,
        usage="python train_grpo.py [--config FILE] [--SETTING VALUE ...]",
        description=description,
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
        names = [f.name for f in dataclasses.fields(recipe_class)]
        if not unknown[0].startswith("--"):
            raise UserError(f"settings are given as --SETTING VALUE; {unknown[0]} is neither. --help lists them all.")
        name = unknown[0].lstrip("-").split("=")[0]
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown setting {unknown[0]}; the nearest is --{nearest}. --help lists them all.")
    check_recipe(recipe)
    return recipe


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
        + ["eval_samples", "save_steps", "sample_steps"],
        1,
    )
    least |= {"num_generations": 2, "beta": 0, "epsilon": 0, "weight_decay": 0, "vram_gib": 0, "seed": 0}
    for name, low in least.items():
        if not getattr(recipe, name) >= low:
            raise UserError(f"--{name} {getattr(recipe, name)} is too small: give {low} or more.")
    if recipe.seed >= 2**32:
        raise UserError(f"--seed {recipe.seed} is too large: give less than {2**32}.")
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
