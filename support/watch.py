"""What goes wrong while there is time: warnings with a way out, each once a run."""

import math

from transformers import TrainerCallback

from rewards import is_english
from support.evaluation import best_evaluation
from support.screen import say
from support.settings import Recipe
from support.step_report import Report

WINDOW = 20  # steps
SAME = 5  # first steps
DIFFERENCE = 0.2  # of log-probabilities; numbers of 16 bits make 0.001 to 0.08
SKIPPED = 5  # steps in a row: float16's scale begins high, and a few of the first ones overflow


def cut_off(before: dict, recipe: Recipe) -> str | None:
    """More than a fifth of the answers before training do not end."""
    if before["truncated"] > 0.2:
        length = math.ceil(recipe.max_completion_length * 1.5 / 64) * 64
        return (
            f"{before['truncated']:.0%} of the answers before training are cut off at {recipe.max_completion_length} tokens and "
            f"cannot be right: give --max_completion_length {length}, or ask for shorter ones in the system prompt"
        )
    return None


def no_variance(report: Report, recipe: Recipe) -> str | None:
    """In each of the last steps, most questions had answers that all earned the same, so that they taught nothing."""
    metrics = report.metrics
    if len(metrics) >= SAME and all(line["frac_reward_zero_std"] == 1 for line in metrics):
        return (
            f"all answers to a question have earned the same in each of the {len(metrics)} steps so far, {metrics[-1]['reward']:.2f} in the "
            "last, so that nothing was learned: look at their rewards in samples.jsonl, and whether the reward functions read a completion as they should"
        )
    last = metrics[-WINDOW:]
    if len(last) < WINDOW or not all(line["frac_reward_zero_std"] > 0.5 for line in last):
        return None
    texts = (completion[-1]["content"] for completion in report.rollout["completions"])
    right = list(map(report.rules.is_correct, texts, report.rollout["answers"]))
    share = sum(right) / len(right)
    way_out = (
        "stop here, or give harder questions"
        if share > 0.5
        else f"give easier questions, --num_generations {2 * recipe.num_generations} or a higher --temperature"
    )
    return f"for {WINDOW} steps most groups of answers have earned the same and taught nothing, and {share:.0%} of the last step's answers are right: {way_out}"


def reward_hacking(metrics: list[dict], development: list[dict], recipe: Recipe) -> str | None:
    """The reward rises while fewer development questions are answered right: strictly, or with the number anywhere.

    Fewer: the newest accuracy's 95 % interval lies below the highest one of before.
    """
    if len(development) < 2 or len(metrics) < 10:
        return None
    newest, half = development[-1], max(len(metrics) // 2, 5)
    first, last = (sum(line["reward"] for line in part) / len(part) for part in (metrics[:5], metrics[-half:]))
    for name in ("strict", "lenient"):
        highest = max(development[:-1], key=lambda line: line[name])
        if last > first and newest[f"{name}_high"] < highest[name]:
            return (
                f"the reward rises ({first:.2f} in the first steps, {last:.2f} in the last), and the {name} accuracy on the development "
                f"questions has fallen from {highest[name]:.1%} (step {highest['step']}) to {newest[name]:.1%}: the rewards pay for "
                f"something else than right answers. Look at samples.jsonl, change the rewards, or give --learning_rate {recipe.learning_rate / 2:g}"
            )
    return None


def no_gain(development: list[dict], recipe: Recipe) -> str | None:
    """The policy that is kept answers fewer development questions right than the base model did."""
    best = best_evaluation(development)
    if not best or development[0]["step"] or best["strict"] >= development[0]["strict"]:
        return None
    return (
        f"the policy that is kept answers {best['strict']:.1%} of the development questions right, and the base model {development[0]['strict']:.1%}: "
        f"look at samples.jsonl, and give --learning_rate {recipe.learning_rate / 2:g} and another --output_dir"
    )


def skipped(metrics: list[dict], recipe: Recipe) -> str | None:
    """float16's loss scaler has left out several steps in a row, whose gradients overflowed."""
    last = metrics[-SKIPPED:]
    if len(last) < SKIPPED or any(math.isfinite(line["grad_norm"]) for line in last):
        return None
    way_out = "--dtype bfloat16 where the card has it, or " if recipe.dtype != "bfloat16" else ""
    return (
        f"the gradients of the last {SKIPPED} steps were not finite, and nothing was learned in them: give {way_out}"
        f"--learning_rate {recipe.learning_rate / 2:g}"
    )


def disagreement(metrics: list[dict], recipe: Recipe) -> str | None:
    """The newest step's tokens have other log-probabilities in training than in generation, by more than numbers of 16 bits explain."""
    found = metrics[-1].get("sampling/sampling_logp_difference/mean", 0.0)
    if found <= DIFFERENCE:
        return None
    return (
        f"the log-probabilities of the answers are {found:.2f} apart, on average, in generation and in training (0.001 to 0.08 is "
        "usual): what is trained is not what answers. Stop here, and start with UNSLOTH_GRPO_PREFIX_GROUPER=0 in the environment "
        "or with --use_vllm false; --check tells whether that helps"
    )


def other_language(rollout: dict, recipe: Recipe) -> str | None:
    """Most answers of a step are in English, or in other words of Latin letters, and their questions are not."""
    questions, answers = ([turn[-1]["content"] for turn in rollout[name]] for name in ("prompts", "completions"))
    left = [
        is_english(answer) and not is_english(question) for question, answer in zip(questions, answers, strict=True)
    ]
    if 2 * sum(left) <= len(left):
        return None
    way_out = f"--learning_rate {recipe.learning_rate / 2:g}"
    if not recipe.rewards:  # which may have reasons of their own
        way_out = f"--rewards examples/in_chinese.py, which pays for Chinese, or {way_out}"
    return f"{sum(left) / len(left):.0%} of the last step's answers are in English, and their questions are not: give {way_out}"


def lora_without_effect(model, tokens: list[int]) -> str | None:
    """vLLM gives `tokens` the same log-probabilities with the LoRA as it is now and without it."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)

    def chances(lora) -> list[float]:
        prompt = {"prompt_token_ids": tokens}
        output = model.vllm_engine.generate([prompt], sampling, lora_request=lora, use_tqdm=False)[0]
        ids, logged = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
        return [found[token].logprob for token, found in zip(ids, logged, strict=True)]

    if chances(None) != chances(model.load_lora("watch", load_tensors=True)):
        return None
    return (
        "the LoRA has been trained and changes nothing in vLLM, which goes on answering as the base model: stop here, give "
        "--use_vllm false, and report it with check.json (--check)"
    )


class Watch(TrainerCallback):
    """Says each of these once, after the step that shows it."""

    def __init__(self, recipe: Recipe, report: Report):
        self.recipe, self.report, self.said = recipe, report, set()
        self.looked = False  # whether the LoRA arrives in vLLM

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        trained = (weights for name, weights in model.named_parameters() if ".lora_B." in name)
        if not self.looked and hasattr(model, "vllm_engine") and any(weights.any() for weights in trained):
            self.looked, rollout = True, self.report.rollout
            prompt = processing_class.apply_chat_template(
                rollout["prompts"][0], add_generation_prompt=True, tokenize=False
            )
            answer = rollout["completions"][0][-1]["content"]
            tokens = processing_class(prompt + answer, add_special_tokens=False)["input_ids"]
            longest = self.recipe.max_prompt_length + self.recipe.max_completion_length  # that vLLM has been set up for
            self.warn("LoRA", lora_without_effect(model, tokens[: longest - 1]))  # and one that it answers

    def warn(self, name: str, sentence: str | None) -> None:
        if sentence and name not in self.said:
            self.said.add(name)
            say(f"warning     {sentence}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:
            return
        metrics = self.report.metrics
        self.warn("no variance", no_variance(self.report, self.recipe))
        self.warn("skipped", skipped(metrics, self.recipe))
        self.warn("disagreement", disagreement(metrics, self.recipe))
        self.warn("language", other_language(self.report.rollout, self.recipe))

    def on_save(self, args, state, control, **kwargs):  # after the accuracy on the way
        self.warn("hacking", reward_hacking(self.report.metrics, self.report.development, self.recipe))
