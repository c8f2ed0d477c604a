"""GRPO on one GPU: Qwen2.5-7B-Instruct learns to reason in Chinese, from questions and final answers alone.

A step of GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300), as it is done here:

  - take a few questions and let the policy answer each of them several times (a group), with vLLM on the same card;
  - score every answer with five rules (rewards.py); there is no reward model and no value model;
  - the advantage of an answer is its reward less its group's mean, over the group's standard deviation;
  - raise the probability of the tokens of answers that beat their group, lower the others';
  - no KL term: the LoRA is small and the run is short. Every answer is used once, so nothing is clipped.

    python train_grpo.py                                          a free Colab T4 or better, the default settings
    python train_grpo.py --config recipes/24gb.yaml --max_steps 500
    python train_grpo.py --config recipes/tiny.yaml               a tiny policy, no GPU, a few minutes
    torchrun --nproc_per_node 2 train_grpo.py …                   two cards; several hosts: docs/scaling.md
    python train_grpo.py --check                                  what holds on this machine, in a few minutes
    python train_grpo.py --help                                   every setting

The order is: settings, preflight, data, model, rewards, evaluation, training, evaluation. What is not in this file: every
number of a run and its default (support/settings.py, recipes/*.yaml), checks and the memory estimate (preflight.py,
memory.py), what --check tries (check.py), what is printed and written for each step (step_report.py), schedules of the
learning rate (schedule.py), going on after an interruption (stopping.py, resuming.py), how answers are measured
(evaluation.py; when: `run`, below), files of questions (data.py, tables.py), rewards of your own (rules.py, examples/).
"""

from support import screen  # before what prints, as every library below does

if __name__ == "__main__":
    screen.start()

import importlib.util
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from support import turing
from support.memory import LOGIT_ROWS, is_out_of_memory, limit_memory, memory_advice, parameter_counts
from support.preflight import (
    GPU,
    MODEL_ERRORS,
    check_machine,
    check_processes,
    commit_of,
    compute_dtype,
    model_error,
    nvidia_driver,
    preflight,
    prepare_tokenizer,
)

if GPU:
    # No torch.compile, in any library: it takes a minute or more before the end of the first step, more on Colab's two
    # cores, for steps that hardly get faster. unsloth unrolls its loss for it, unless its own variable is set.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_DISABLE", "1")
    # No FlashInfer, which compiles itself for minutes at its first start.
    os.environ.setdefault("UNSLOTH_VLLM_NO_FLASHINFER", "1")
    # Prompts are shared through xFormers (training_pass.py). Without it unsloth takes FlexAttention, which fails on a T4.
    if importlib.util.find_spec("xformers") is None:
        os.environ["UNSLOTH_GRPO_PREFIX_GROUPER"] = "0"
    # The logits of a micro-batch are gigabytes: compute them again in the backward pass instead of keeping them.
    os.environ.setdefault("UNSLOTH_GRPO_LOGPROB_RECOMPUTE", "1")
    # before trl, transformers and peft, which it patches, and before CUDA starts, whose allocator it sets up
    from unsloth import FastLanguageModel

    turing.after_unsloth()

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, ProgressCallback
from trl import GRPOConfig

from data import columns_named, load_questions, revision_of, train_and_test_splits, without_repeats
from support.best import Development, hold_out, keep_adapter
from support.check import Check, trial
from support.divergence import DivergenceCheck
from support.engine import engine_arguments, generation, own_lora_folder, start_again
from support.errors import UserError, run_script
from support.evaluation import evaluation_table, measure
from support.places import SCRIPTS, find_model
from support.resuming import TABLE, check_present, checkpoints, find_start, hold, measured_with, step_of, wait_for
from support.rules import Rules, load_rules
from support.schedule import schedule_arguments
from support.screen import doing, say
from support.settings import Recipe, parse_recipe
from support.step_report import Report, comparison_text, installed_versions, recording
from support.stopping import Saving
from support.trainer import Trainer
from support.training_pass import fuse_qkv, keep_activations
from support.watch import Watch, cut_off, no_gain

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- model -------------------------------------------------------------------------------------------


def load_base_model(recipe: Recipe, max_num_seqs: int):
    """The policy without a LoRA, and its tokenizer: through unsloth on a GPU, in float32 through transformers on a CPU.

    `max_num_seqs`: how many completions vLLM generates at once.
    """
    check_machine(recipe)
    name = find_model(recipe.model)
    try:
        if not GPU:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name)
        else:
            share = limit_memory(recipe)
            model, tokenizer = FastLanguageModel.from_pretrained(
                name,
                max_seq_length=recipe.max_prompt_length + recipe.max_completion_length,
                load_in_4bit=recipe.load_in_4bit,
                dtype=compute_dtype(recipe),
                random_state=recipe.seed,
                **(engine_arguments(recipe, max_num_seqs, share) if recipe.use_vllm else {}),
            )
    except MODEL_ERRORS as error:
        raise model_error(recipe.model, error) from error
    except Exception as error:  # of vLLM, Triton or CUDA
        if not recipe.use_vllm or is_out_of_memory(error):
            raise
        raise start_again(recipe, error) from error
    if hasattr(model, "vllm_engine"):  # which encodes the prompts, and ends the answers, with a tokenizer of its own
        prepare_tokenizer(model.vllm_engine.get_tokenizer(), recipe.model)
    return model, prepare_tokenizer(tokenizer, recipe.model)


def lora_arguments(recipe: Recipe) -> dict:
    """PEFT's settings: a LoRA on all seven linear layers."""
    return {"r": recipe.lora_rank, "lora_alpha": recipe.alpha, "target_modules": LORA_TARGETS}


def attach_lora(model, recipe: Recipe, kept: int = 0):
    """`model` with a fresh LoRA; its B is zero, so that the policy starts as the base model.

    `kept`: how many layers keep their activations on a GPU, although there is gradient checkpointing.
    """
    lora = lora_arguments(recipe)
    if GPU:
        checkpointing = "unsloth" if recipe.gradient_checkpointing else False
        model = FastLanguageModel.get_peft_model(
            model, **lora, use_gradient_checkpointing=checkpointing, random_state=recipe.seed
        )
        fuse_qkv(model)
        keep_activations(model, kept)
        return own_lora_folder(model) if recipe.use_vllm else model
    torch.manual_seed(recipe.seed)
    return get_peft_model(model, LoraConfig(**lora))


def load_policy(recipe: Recipe, kept: int):
    """The policy that is trained, and its tokenizer: the base model with a fresh LoRA; `kept` as in attach_lora."""
    doing("loading", recipe.model)
    at_once = max(recipe.completions_each, 48)  # more questions than that are measured
    model, tokenizer = load_base_model(recipe, at_once)
    if not GPU:  # transformers would sample with the checkpoint's own top-p and penalties, if it brings some
        model.generation_config = GenerationConfig()
    policy = attach_lora(model, recipe, kept)
    made = sum(weights.numel() for name, weights in policy.named_parameters() if ".lora_" in name)
    if made != parameter_counts(model.config, recipe.lora_rank)[0]:  # as of Phi-3, which has three layers in one
        raise UserError(f"{recipe.model} has other linear layers than {', '.join(LORA_TARGETS)}: give another --model.")
    return policy, tokenizer


# --- training ----------------------------------------------------------------------------------------


def training_arguments(recipe: Recipe) -> GRPOConfig:
    """TRL's settings. Every number that matters is here: TRL and unsloth have defaults of their own, and change them."""
    dtype = compute_dtype(recipe)
    arguments = {
        "output_dir": recipe.output_dir,
        "max_steps": recipe.max_steps,
        # TRL counts completions, not prompts; all of a step's are generated in one go, then trained on in micro-batches
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.completions_each // recipe.micro_batch_size,
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
        **schedule_arguments(recipe),
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
        "seed": recipe.seed,
    }
    if "max_prompt_length" in GRPOConfig.__dataclass_fields__:  # TRL 0.24 has it, at 512: more than vLLM may hold
        arguments["max_prompt_length"] = recipe.max_prompt_length
    if "unsloth_logit_chunk_multiplier" in GRPOConfig.__dataclass_fields__:  # in how many pieces an answer gets logits
        arguments["unsloth_logit_chunk_multiplier"] = math.ceil(recipe.max_completion_length / LOGIT_ROWS)
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


def training_questions(questions, recipe: Recipe, step: int = 0, used: int = 0):
    """The questions of all steps in their order: each epoch shuffled anew.

    TRL's own sampler would shuffle too, but a resumed run would start its first order over again after the first epoch.
    A run that goes on after `step` passes over the places of the steps before: behind them it goes on after the `used`
    questions, which are more or fewer where those steps had another number of prompts.
    """
    passed = step * recipe.prompts_per_step
    places = [*range(passed), *range(used, used + recipe.max_steps * recipe.prompts_per_step - passed)]
    epochs = []
    while sum(map(len, epochs)) <= max(places):
        epochs.append(questions.shuffle(seed=recipe.seed + len(epochs)))
    return concatenate_datasets(epochs).select(places)


# --- the run -----------------------------------------------------------------------------------------


def read_model(recipe: Recipe):
    """The model's config and its tokenizer, after a look at the machine that is to load it."""
    check_machine(recipe)
    name = find_model(recipe.model)
    try:
        model_config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except MODEL_ERRORS as error:
        raise model_error(recipe.model, error) from error
    return model_config, prepare_tokenizer(tokenizer, recipe.model)


def read_questions(recipe: Recipe, tokenizer, rules: Rules):
    """The questions to train on, those to develop on, and the first `eval_samples` of those that are held out."""
    doing("reading", recipe.dataset)
    columns = columns_named(recipe.question_column, recipe.answer_column, rules.check_label)
    splits = train_and_test_splits(recipe.dataset, columns)
    length, system_prompt = recipe.max_prompt_length, recipe.system_prompt
    train, test = (load_questions(recipe.dataset, s, tokenizer, length, system_prompt, columns=columns) for s in splits)
    train, dev = hold_out(without_repeats(train, test), recipe)
    test = test.select(range(min(recipe.eval_samples, len(test))))
    say(f"questions   {len(train)} to train on, {len(dev)} to develop on, {len(test)} held out")
    return train, dev, test


def run(recipe: Recipe) -> None:
    clock, out = time.perf_counter(), Path(recipe.output_dir)
    rules = load_rules(recipe.rewards)  # ours, or the user's
    start = find_start(recipe, rules)  # a checkpoint of an earlier run, or step 1
    if start.complete:
        return say(evaluation_table(start.evaluations))

    # Preflight: all that can be known before anything slow.
    with PartialState().main_process_first():
        model_config, tokenizer = read_model(recipe)
    kept = preflight(recipe, model_config)
    rules.say()
    config = training_arguments(recipe)
    start.lock = start.lock or hold(out)  # one run at a time
    wait_for(out)
    screen.log_to(out)

    # Data and model.
    with PartialState().main_process_first():  # the others find what it has downloaded
        train, dev, test = read_questions(recipe, tokenizer, rules)
    now = measured_with(recipe, rules, train, dev, test)
    start.say_other_questions(now)
    model, tokenizer = load_policy(recipe, kept)

    # Rewards and trainer: TRL's, but answers that teach nothing cost nothing.
    rollout = {}  # a step's answers and rewards: `recording` puts them here, and the report writes them to samples.jsonl
    trainer = Trainer(
        model=model,
        reward_funcs=[recording(func, rollout, rules) for func in rules.funcs],
        args=config,
        train_dataset=training_questions(train, recipe, start.step, start.used),
        processing_class=tokenizer,
    )
    trainer.create_optimizer()  # says what it lacks before anything is answered
    report = Report(recipe, start, len(train), rollout, rules, now)
    report.evaluations["generation"] = generation(recipe, model)
    report.evaluations["revisions"] = {"model": commit_of(model_config), "dataset": revision_of(recipe.dataset)}
    saving = Saving(recipe, trainer, report)
    divergence = DivergenceCheck(recipe, report.metrics)
    development = Development(recipe, trainer, tokenizer, dev, report, saving, divergence)
    trainer.remove_callback(ProgressCallback)
    watch = Watch(recipe, report)
    for callback in (report, divergence, saving, development, watch):
        trainer.add_callback(callback)

    def held_out(name: str, adapter: Path | None = None) -> dict[str, float]:
        """The figures of the policy `name` on the held-out questions; its answers go to answers.jsonl."""
        doing("answering", f"{len(test)} held-out questions")
        figures, texts = measure(trainer.model, tokenizer, test, recipe.max_completion_length, adapter, rules)
        report.add_answers(name, test, texts)
        return figures

    with saving:  # what there is, on Ctrl-C, SIGTERM and errors
        # Evaluation before the first step; a resumed run has it already, unless it is of other questions or lengths.
        measured = start.measured_as(now, "test") and start.evaluations.get("before")
        before = measured or held_out("before")
        say(evaluation_table({"before": before}))
        report.evaluations["before"] = before
        watch.warn("cut off", cut_off(before, recipe))
        if development.due(start.step) and not start.checkpoint:
            development.evaluate(start.step)

        # Training.
        doing("training", f"{recipe.max_steps} steps", total=recipe.max_steps)
        training_clock = time.perf_counter()
        trainer.train(resume_from_checkpoint=start.checkpoint)
        training_seconds = time.perf_counter() - training_clock
        saving.leave_if_stopped()

        # adapter/ is the last policy, unless one before was clearly better; the evaluation after is of it, as it was saved.
        check_present(out)
        last, best = broadcast_object_list([checkpoints(out)[0], development.best() or checkpoints(out)[0]])
        evaluations = {"before": before}
        if best != last:
            evaluations["last"] = held_out("last", last)
            if not recipe.use_vllm:  # which reads the LoRA from the folder that `measure` is given
                trainer._load_from_checkpoint(str(best))
        keep_adapter(best, tokenizer, out)
        evaluations["after"] = held_out("after", out / "adapter")
        steps = f"after: step {step_of(best)}" + (f", better on the way; last: step {step_of(last)}" * (best != last))
        say(f"{len(test)} held-out questions, greedy, same prompt and parser; {steps}")
        say(evaluation_table({name: evaluations[name] for name in TABLE if name in evaluations}))
        say("The first of them; answers.jsonl has all:")
        say("    " + comparison_text(report.answers[0]).replace("\n", "\n    "))
        watch.warn("no gain", no_gain(report.development, recipe))
        report.write_evaluations(
            **evaluations,
            best_step=step_of(best),
            gpu=torch.cuda.get_device_name() if GPU else None,
            seconds={"training": round(training_seconds, 1), "total": round(time.perf_counter() - clock, 1)},
            versions=installed_versions(),
        )
    ask = [sys.executable, "infer.py", "--adapter", str(out / "adapter"), test[0]["prompt"][-1]["content"]]
    say(f"The LoRA is in {out}/adapter. Ask it: {shlex.join(ask)}")


def check(recipe: Recipe) -> None:
    """--check: tries all that a run of `recipe` needs, one step included, and says what holds; output_dir gets check.json."""
    recipe = replace(recipe, report_to="none", resume="")
    rules = load_rules(recipe.rewards)
    with Check(recipe) as checking:
        checking.packages()
        checking.begin("preflight", recipe.model)
        model_config, tokenizer = read_model(recipe)
        kept = preflight(recipe, model_config)
        rules.say()
        config = training_arguments(replace(recipe, max_steps=1))
        config.save_strategy = "no"
        lock = hold(Path(recipe.output_dir))  # noqa: F841  as long as it is open, no run begins beside this
        wait_for(Path(recipe.output_dir))
        screen.log_to(Path(recipe.output_dir))
        checking.machine()
        if GPU:
            checking.triton_kernel()
        if recipe.load_in_4bit:
            checking.four_bit_product(model_config)

        checking.begin("questions", recipe.dataset)
        train, _, _ = read_questions(recipe, tokenizer, rules)
        checking.begin("loading", recipe.model)
        start = time.perf_counter()
        model, tokenizer = load_policy(recipe, kept)
        checking.engine(model, time.perf_counter() - start)
        rollout = {}
        trainer = Trainer(
            model=model,
            reward_funcs=[trial(rules, rollout)],
            args=config,
            train_dataset=training_questions(train, replace(recipe, max_steps=1)),
            processing_class=tokenizer,
        )
        trainer.remove_callback(ProgressCallback)
        checking.log_probabilities(trainer, train["prompt"][:4])
        checking.step(trainer)
        checking.rewards(rules, rollout)
    say("check passed")


def main() -> None:
    argv = sys.argv[1:]
    config = any(arg.split("=")[0] == "--config" for arg in argv)
    if "--check" in argv and not config and not (torch.cuda.is_available() or nvidia_driver()):
        say("no GPU      recipes/tiny.yaml is checked, which needs none")
        argv += ["--config", str(SCRIPTS / "recipes" / "tiny.yaml")]
    recipe = parse_recipe(argv)
    check_processes(recipe)
    PartialState(cpu=not GPU)  # this process alone, or all that torchrun has started, which meet here
    try:
        check(recipe) if "--check" in argv else run(recipe)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of GPU memory: {memory_advice(recipe, error=error)}") from error


if __name__ == "__main__":
    run_script(main)
