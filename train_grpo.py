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

import json
import math
import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from support.preflight import (
    CUDA_GIB,
    GIB,
    GPU,
    MODEL_ERRORS,
    check_chat_template,
    check_machine,
    compute_dtype,
    is_out_of_memory,
    memory_advice,
    model_error,
    preflight,
)

if GPU:
    # No torch.compile, in any library: it takes a minute or more before the end of the first step, more on Colab's two
    # cores, for steps that hardly get faster. unsloth unrolls its loss for it, unless its own variable is set.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    # FlashInfer, which vLLM imports and does not use here, would compile a C++ extension at its first import.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    # The logits of a micro-batch are gigabytes: compute them again in the backward pass instead of keeping them.
    os.environ.setdefault("UNSLOTH_GRPO_LOGPROB_RECOMPUTE", "1")
    # before trl, transformers and peft, which it patches, and before CUDA starts, whose allocator it sets up
    from unsloth import FastLanguageModel

    if torch.cuda.get_device_capability() < (8, 0):  # T4: no FlashAttention 2; XFORMERS fails at the first token
        os.environ.setdefault("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")

from datasets import concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, ProgressCallback
from trl import GRPOConfig

from data import HUB_ID, SYSTEM_PROMPT, UserError, load_questions, run_script, train_and_test_splits
from infer import evaluate, evaluation_table, generate
from rewards import REWARD_FUNCS
from support.checkpoints import (
    check_present,
    check_same_run,
    checkpoints,
    command,
    find_checkpoint,
    go_back_to,
    step_of,
    write_json,
    write_recipe,
)
from support.report import Report, installed_versions, recording
from support.settings import parse_settings, setting
from support.trainer import Trainer

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- settings ----------------------------------------------------------------------------------------


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
        "if there is one, else from the beginning; not given: a new run",
        nargs="?",
        const="newest",
    )

    max_steps: int = setting(250, "optimiser steps")
    prompts_per_step: int = setting(8, "questions a step")
    num_generations: int = setting(6, "answers to each question: the group whose mean is the baseline")
    micro_batch_size: int = setting(12, "answers in one backward pass; lower it when memory runs out")
    max_prompt_length: int = setting(256, "tokens; longer questions are dropped")
    max_completion_length: int = setting(256, "tokens; longer answers are cut off")
    temperature: float = setting(0.7, "answers are sampled, and their probabilities trained, at this temperature")

    learning_rate: float = setting(
        2e-5, "the highest of the schedule; a LoRA takes about ten times the rate of full fine-tuning"
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "how the learning rate goes on after the warmup"
    )
    warmup_ratio: float = setting(0.05, "share of max_steps in which the learning rate rises from 0")
    optim: str = setting("adamw_8bit", "a transformers optimiser name; 8 bit saves 6 bytes a LoRA parameter")
    adam_beta1: float = setting(0.9, "AdamW's running mean of gradients keeps this share of itself at each step")
    adam_beta2: float = setting(0.99, "the same for their squares: less than 0.999, for a run of a few hundred steps")
    weight_decay: float = setting(0.0, "AdamW's; it would pull the LoRA back to the base model")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = setting(
        "dapo", "what the loss is the mean of; dapo weighs every token of a step alike"
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "advantages are divided by the standard deviation of their group, of all, or not"
    )
    beta: float = setting(0.0, "weight of the KL term against the base model; 0 leaves it out")
    epsilon: float = setting(0.2, "PPO clip range; idle as long as every answer is used once")

    lora_rank: int = setting(16, "LoRA rank; alpha is the same")
    load_in_4bit: bool = setting(True, "NF4 base weights; needs a GPU")
    dtype: Literal["auto", "float16", "bfloat16"] = setting(
        "auto", "auto: bfloat16 from compute capability 8.0, else float16"
    )
    use_vllm: bool = setting(True, "generate with vLLM in the same process; needs a GPU")
    gradient_checkpointing: bool = setting(
        True, "recompute activations in the backward pass: a third slower, and takes far less memory; on a GPU"
    )
    gpu_memory_utilization: float = setting(0.6, "share of the card for vLLM: weights and KV cache")
    vram_gib: float = setting(0.0, "stay under so many GiB of GPU memory; 0: the whole card")

    eval_samples: int = setting(200, "held-out questions, answered greedily before the first step and after the last")
    save_steps: int = setting(50, "steps between checkpoints")
    sample_steps: int = setting(10, "steps between the sample answers that are printed")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "none", "where to log besides output_dir; install it first"
    )
    seed: int = setting(3407, "for the LoRA weights, the order of the questions and sampling")


def load_recipe(config: str | Path | None = None) -> Recipe:
    """The recipe in the YAML file `config`, or the default one. Raises UserError for a key that is none of Recipe's."""
    return parse_recipe(["--config", str(config)] if config else [])


def parse_recipe(argv: list[str]) -> Recipe:
    """The recipe from `--config FILE` and flags, which win. Raises UserError for what is unknown or makes no sense."""
    return parse_settings(Recipe, argv, description=__doc__.split("\n")[0])


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
        except MODEL_ERRORS as error:
            raise model_error(recipe.model, error) from error
    if recipe.use_vllm:
        import vllm.envs
        import vllm.model_executor.models.registry as registry

        # vLLM looks at the model's class in a process of its own, which imports torch and vllm once more: half a minute
        registry._run_in_subprocess = lambda look: look()
        # unsloth sets this variable to 1 where it finds nvcc, and FlashInfer then compiles itself for a minute at the
        # first start, for top-p and top-k sampling that training does not use.
        vllm.envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"] = lambda: False
    sequences = math.ceil(max_num_seqs / 8) * 8  # as CUDA graphs come
    if sequences == 256:  # unsloth's own default, for which it picks fewer by free memory
        sequences = 264
    share = recipe.gpu_memory_utilization
    if recipe.vram_gib:
        total = torch.cuda.mem_get_info()[1] / GIB
        cap = min(recipe.vram_gib, total)
        torch.cuda.set_per_process_memory_fraction((cap - CUDA_GIB) / total)
        share *= cap / total  # vLLM takes a share of the whole card
    vllm = {
        "fast_inference": True,
        "gpu_memory_utilization": share,
        "max_lora_rank": recipe.lora_rank,
        "max_num_seqs": sequences,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},  # no compiler, but CUDA graphs
    }
    try:
        return FastLanguageModel.from_pretrained(
            recipe.model,
            max_seq_length=recipe.max_prompt_length + recipe.max_completion_length,
            load_in_4bit=recipe.load_in_4bit,
            dtype=compute_dtype(recipe),
            random_state=recipe.seed,
            **(vllm if recipe.use_vllm else {}),
        )
    except MODEL_ERRORS as error:
        raise model_error(recipe.model, error) from error


def attach_lora(model, recipe: Recipe):
    """A fresh LoRA on all seven linear layers; B is zero, so that the policy starts as the base model."""
    if GPU:
        return FastLanguageModel.get_peft_model(
            model,
            r=recipe.lora_rank,
            lora_alpha=recipe.lora_rank,
            target_modules=LORA_TARGETS,
            use_gradient_checkpointing="unsloth" if recipe.gradient_checkpointing else False,
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
        # vLLM would put every token into words twice, and TRL does it once more
        "generation_kwargs": {"detokenize": False} if recipe.use_vllm else None,
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
        "gradient_checkpointing": GPU and recipe.gradient_checkpointing,
        "dataloader_pin_memory": GPU,
        "use_cpu": not GPU,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not a number shall be seen
        "shuffle_dataset": False,  # training_questions has put them in order
        "save_steps": recipe.save_steps,
        "save_total_limit": 3,
        "seed": recipe.seed,
    }
    if "max_prompt_length" in GRPOConfig.__dataclass_fields__:  # TRL 0.24 has it, at 512: more than vLLM may hold
        arguments["max_prompt_length"] = recipe.max_prompt_length
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
    changed, evaluations = [], {}
    if checkpoint:
        changed = check_same_run(recipe, checkpoint)
        written = out / "eval.json"
        if written.exists():
            evaluations = json.loads(written.read_text(encoding="utf-8"))
        done = "after" in evaluations and (out / "adapter").exists() and checkpoint == checkpoints(out)[0]
        if done and step_of(checkpoint) >= recipe.max_steps and not changed:
            print(f"The run in {out} is complete, with {step_of(checkpoint)} steps; --max_steps goes on from there.")
            print(evaluation_table({name: evaluations[name] for name in ("before", "after")}))
            return
        if step_of(checkpoint) > recipe.max_steps:
            raise UserError(f"{checkpoint} is past --max_steps {recipe.max_steps}: give {step_of(checkpoint)} or more.")
        print(f"resuming    after step {step_of(checkpoint)}, from {checkpoint}")

    # Preflight: all that can be known before anything slow.
    check_machine(recipe)
    try:
        model_config, tokenizer = AutoConfig.from_pretrained(recipe.model), AutoTokenizer.from_pretrained(recipe.model)
    except MODEL_ERRORS as error:
        raise model_error(recipe.model, error) from error
    check_chat_template(tokenizer, recipe.model)
    preflight(recipe, model_config)
    config = training_arguments(recipe)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # that files can be made there, too
    except FileExistsError as error:
        raise UserError(f"--output_dir {out} is a file: give a folder.") from error
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}. Give another --output_dir.") from error

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
    if not GPU:  # transformers would sample with the checkpoint's own top-p and penalties, if it brings some
        model.generation_config = GenerationConfig()
    model = attach_lora(model, recipe)

    # Rewards and trainer: TRL's, but answers that teach nothing cost nothing.
    batch = {}
    trainer = Trainer(
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

    with report.saving(trainer):  # what there is, on Ctrl-C, SIGTERM and errors
        # Evaluation before the first step; a resumed run has it already, unless it is of other questions or lengths.
        measured = evaluations.get("before", {}).get("n") == len(test)
        if measured and not {"max_prompt_length", "max_completion_length"} & set(changed):
            evaluations = {"before": evaluations["before"]}
        else:
            evaluations = {"before": measure(None)}
        print(evaluation_table(evaluations))
        write_json(out / "eval.json", evaluations)
        report.evaluations = evaluations

        # Training.
        training_start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        training_seconds = time.perf_counter() - training_start
        if report.stop_signal:
            print(f"stopped after step {trainer.state.global_step}; the checkpoint is in {checkpoints(out)[0]}")
            print(f"continue with: {command(recipe, '--resume')}")
            sys.exit(128 + report.stop_signal)
        trainer.model.save_pretrained(out / "adapter")
        tokenizer.save_pretrained(out / "adapter")

        # The evaluation through the adapter as it was saved.
        evaluations |= {
            "after": measure(out / "adapter"),
            "gpu": torch.cuda.get_device_name() if GPU else None,
            "seconds": {"training": round(training_seconds, 1), "total": round(time.perf_counter() - start, 1)},
            "versions": installed_versions(),
        }
        print(f"\n{len(test)} held-out questions, greedy, same prompt and parser before and after:")
        print(evaluation_table({name: evaluations[name] for name in ("before", "after")}))
        check_present(out)
        write_json(out / "eval.json", evaluations)
    ask = [sys.executable, "infer.py", "--adapter", str(out / "adapter"), test[0]["prompt"][-1]["content"]]
    print(f"\nThe LoRA is in {out}/adapter. Ask it: {shlex.join(ask)}")


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
