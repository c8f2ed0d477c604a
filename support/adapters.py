"""Adapters: what one was trained with, whether it fits its base model, putting it in, merging it."""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

from data import UserError


def recipe_of(adapter: Path) -> tuple:
    """The recipe that the LoRA in `adapter` was trained with, from the recipe.yaml beside it, and the name of its base model.

    Without a recipe.yaml, the default one with that base model. Raises UserError for a folder that PEFT did not write.
    """
    from train_grpo import GPU, load_recipe

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
    from transformers import AutoConfig

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
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the adapter {adapter} cannot be put into this model: {reason}") from error


def export(adapter: Path, recipe, out: Path, gguf: bool) -> None:
    """Writes the base model with the adapter merged into it to the folder `out`: 16-bit, or as GGUF by unsloth."""
    from train_grpo import GPU, load_base_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: give a new folder.")
    if gguf and not GPU:
        raise UserError(
            "GGUF is written by unsloth's converter, which needs unsloth and a CUDA GPU: "
            "use --merge DIR, then llama.cpp's convert_hf_to_gguf.py DIR."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").touch()  # that the folder takes files is known before the model is loaded
        (out / "config.json").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}.") from error
    if GPU:
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), load_in_4bit=recipe.load_in_4bit)
        try:
            if gguf:
                model.save_pretrained_gguf(str(out), tokenizer, quantization_method="q8_0")
            else:
                model.save_pretrained_merged(str(out), tokenizer, save_method="merged_16bit")
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(f"unsloth could not write {out}: {' '.join(str(error).split())}") from error
    else:
        model, tokenizer = load_base_model(recipe, max_num_seqs=1)
        model = add_adapter(model, adapter).merge_and_unload().to(torch.bfloat16)
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except Exception as error:  # safetensors has types of its own
            raise UserError(f"cannot write the model to {out}: {error}".split("\n")[0]) from error
    print(f"The merged model is in {out}.")
