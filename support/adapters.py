"""Adapters: what one was trained with, whether it fits its base model, putting it in."""

import json
import re
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig

from support.errors import UserError
from support.preflight import GPU
from support.settings import Recipe, load_recipe


def recipe_of(adapter: Path) -> tuple[Recipe, str]:
    """The recipe that the LoRA in `adapter` was trained with, from the recipe.yaml beside it, and the name of its base model.

    Without a recipe.yaml, the default one with that base model. Raises UserError for a folder that PEFT did not write.
    """
    try:
        adapter_config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        rank, base = adapter_config["r"], adapter_config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} is not what PEFT writes: save the adapter anew.") from error
    beside = adapter.parent / "recipe.yaml"
    if beside.is_file():
        recipe = load_recipe(beside)
    else:
        recipe = load_recipe()
        recipe.model = base
        recipe.load_in_4bit = recipe.use_vllm = GPU
    recipe.lora_rank = rank
    return recipe, base


def check_adapter(adapter: Path, model: str) -> None:
    """Raises UserError where the LoRA in `adapter` does not fit `model`: other layers, other widths."""
    try:
        config = AutoConfig.from_pretrained(model)
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except Exception as error:  # safetensors and transformers raise their own types
        raise UserError(
            f"cannot read the adapter {adapter} or its base model {model}: {error}".split("\n")[0]
        ) from error
    layers = {int(found[1]) for name in shapes if (found := re.search(r"\.layers\.(\d+)\.", name))}
    widths = {shape[1] for name, shape in shapes.items() if "q_proj.lora_A" in name}
    if len(layers) != config.num_hidden_layers or widths - {config.hidden_size}:
        raise UserError(
            f"the adapter {adapter} was trained on another model: it has {len(layers)} layers of width "
            f"{', '.join(map(str, sorted(widths)))}, {model} has {config.num_hidden_layers} of {config.hidden_size}."
        )


def add_adapter(model, adapter: Path):
    """`model` with the LoRA in the folder `adapter`. Raises UserError where they do not go together."""
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {adapter} cannot be put into this model: {reason}") from error
