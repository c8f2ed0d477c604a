"""Adapters: what one was trained with, whether it fits its base model, putting it in."""

import json
import re
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig

from support.errors import UserError
from support.places import find_model
from support.preflight import GPU
from support.screen import note
from support.settings import Recipe, load_recipe


def read_config(adapter: Path) -> dict:
    """adapter_config.json. Raises UserError for a folder that PEFT did not write, or that holds no LoRA."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
        if kind == "LORA" and isinstance(config["r"], int) and isinstance(config["base_model_name_or_path"], str):
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} is not what PEFT writes: save the adapter anew.") from error
    if kind == "LORA":
        raise UserError(f"{adapter / 'adapter_config.json'} is not what PEFT writes: save the adapter anew.")
    raise UserError(f"{adapter} is an adapter of the kind {kind}, and this script takes LoRAs only.")


def recipe_of(adapter: Path) -> tuple[Recipe, str]:
    """The recipe that the LoRA in `adapter` was trained with, from the recipe.yaml beside it, and the name of its base model.

    Without a recipe.yaml, the default one with that base model, which is said. Raises UserError for what is no LoRA.
    """
    config = read_config(adapter)
    base = config["base_model_name_or_path"]
    # beside what the path says, and beside what it leads to: `.` and links have another parent
    beside = [path.parent / "recipe.yaml" for path in (adapter.absolute(), adapter.resolve())]
    found = next((path for path in beside if path.is_file()), None)
    if found:
        recipe = load_recipe(found)
    else:
        note(f"note: there is no recipe.yaml beside {adapter}; prompt and lengths are the default ones")
        recipe = load_recipe()
        recipe.model = base
        recipe.load_in_4bit = recipe.use_vllm = GPU
    # vLLM answers with neither: transformers then generates, through unsloth's model
    recipe.use_vllm = recipe.use_vllm and not config.get("use_dora") and not config.get("modules_to_save")
    recipe.lora_rank = max(config["r"], *(config.get("rank_pattern") or {"": 0}).values())
    return recipe, base


def check_adapter(adapter: Path, model: str) -> None:
    """Raises UserError where the LoRA in `adapter` does not fit `model`: other layers, other widths."""
    try:
        config = AutoConfig.from_pretrained(find_model(model))
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except Exception as error:  # safetensors and transformers raise their own types
        raise UserError(
            f"cannot read the adapter {adapter} or its base model {model}: {error}".split("\n")[0]
        ) from error
    layers = {int(found[1]) for name in shapes if (found := re.search(r"\.layers\.(\d+)\.", name))}
    widths = {shape[1] for name, shape in shapes.items() if re.search(r"\.(q|k|v|gate|up)_proj\.lora_A\.", name)}
    lora = read_config(adapter)
    # A list of modules is on all layers; a pattern, or an exception from it, may be on some.
    some = isinstance(lora.get("target_modules"), str) or any(
        lora.get(name) is not None for name in ("layers_to_transform", "exclude_modules")
    )
    some = some or any(re.search(r"\d", name) for name in lora.get("target_modules") or [])
    fits = layers <= set(range(config.num_hidden_layers)) if some else len(layers) == config.num_hidden_layers
    if not fits or widths - {config.hidden_size}:
        raise UserError(
            f"the adapter {adapter} was trained on another model: it has {len(layers)} layers of width "
            f"{', '.join(map(str, sorted(widths)))}, {model} has {config.num_hidden_layers} of {config.hidden_size}."
        )


def add_adapter(model, adapter: Path):
    """`model` with the LoRA in the folder `adapter`. Raises UserError where they do not go together."""
    try:
        with_adapter = PeftModel.from_pretrained(model, adapter)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {adapter} cannot be put into this model: {reason}") from error
    for name, weights in with_adapter.named_parameters():
        if ".lora_" in name:  # PEFT makes them float32, in which DoRA's answers would leave each layer
            weights.data = weights.data.to(model.dtype)
    return with_adapter
