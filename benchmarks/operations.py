"""How many operations a micro-batch's training takes, counted by PyTorch's FlopCounterMode on fake tensors: no GPU, no weights.

    python -m benchmarks.operations --model MODEL [--SETTING VALUE ...]

MODEL needs no more than a config.json. The rows: a prompt computed for each of its answers; once for its group; and with
--kept layers that keep their activations, the others computing them again. All answers and prompts have the length that is
given. Attention is left out, less than a hundredth of the 7B model's; unsloth's own passes are the same products.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from support.settings import parse_recipe
from support.training_pass import keep_activations
from train_grpo import lora_arguments


def operations(config, recipe, kept: int, prompts: int, length: int) -> int:
    """Of the forward and the backward pass of a micro-batch with `prompts` prompts of `length` tokens in it, all answers full."""
    answers = recipe.micro_batch_size * recipe.max_completion_length
    policy = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**lora_arguments(recipe)))
    policy.enable_input_require_grads()
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    keep_activations(policy, kept)
    policy.train()
    # a token a row: nothing but attention minds where the tokens lie
    tokens = torch.zeros(answers + prompts * length, 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = policy.base_model.model.model(tokens).last_hidden_state
        policy.base_model.model.lm_head(hidden[:answers]).sum().backward()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=int, default=8, help="layers that keep their activations")
    parser.add_argument(
        "--prompt_length", type=int, default=85, help="tokens; 85 is the median of the default questions"
    )
    args, settings = parser.parse_known_args()
    recipe = parse_recipe(settings)
    config = AutoConfig.from_pretrained(recipe.model)
    every, groups = recipe.micro_batch_size, recipe.micro_batch_size // recipe.num_generations
    with FakeTensorMode():
        rows = {
            "a prompt for each answer": (0, every),
            "once for its group": (0, groups),
            f"and {args.kept} layers keep their activations": (args.kept, groups),
        }
        counts = {what: operations(config, recipe, *row, args.prompt_length) for what, row in rows.items()}
    for what, count in counts.items():
        print(f"{what:45}{count / 1e12:10.4g} TFLOP{count / counts['a prompt for each answer']:8.1%}")


if __name__ == "__main__":
    main()
