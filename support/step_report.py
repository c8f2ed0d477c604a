"""What a run says and writes while it goes: a line a step, a sample answer, metrics.jsonl, samples.jsonl, the picture."""

import contextlib
import functools
import math
import os
import platform
import resource
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from support import screen
from support.evaluation import best_evaluation
from support.memory import GIB
from support.picture import draw_reward_curve
from support.preflight import GPU
from support.resuming import (
    Start,
    check_present,
    go_back_to,
    read_json_lines,
    write_json,
    write_json_lines,
    write_recipe,
)
from support.rules import OURS, TAKEN, Rules
from support.screen import say
from support.settings import Recipe


def recording(reward_func, rollout: dict, rules: Rules = OURS):
    """`reward_func`, one of `rules`, which also leaves what it was given and gave in `rollout`, for the report."""

    @functools.wraps(reward_func)  # TRL logs a reward under the function's name
    def wrapper(prompts, completions, answer, **kwargs):
        rewards = reward_func(prompts=prompts, completions=completions, answer=answer, **kwargs)
        rollout.update(
            {"prompts": prompts, "completions": completions, "answers": answer, reward_func.__name__: rewards}
        )
        if reward_func is rules.funcs[-1]:
            rules.check_rewarded(rollout)
        return rewards

    return wrapper


LONG = 4 * 3600  # seconds: a free Colab session may end in less


class Report(TrainerCallback):
    """A readable line a step, metrics.jsonl, samples.jsonl, eval.json, answers.jsonl and reward_curve.png.

    `questions`: how many there are to train on. `rollout`: what `recording` leaves there, of the functions of `rules`.
    `measured_with`: as of support/resuming.py, now.
    """

    def __init__(self, recipe: Recipe, start: Start, questions: int, rollout: dict, rules: Rules, measured_with: dict):
        self.recipe, self.start, self.questions, self.rollout, self.rules = recipe, start, questions, rollout, rules
        self.metrics, self.samples, self.development = (
            [line for line in read_json_lines(self.out / f"{name}.jsonl") if start.step and line["step"] <= start.step]
            for name in ("metrics", "samples", "evaluations")
        )
        if not start.measured_as(measured_with, "dev"):
            self.development = []
        self.evaluations = {"measured_with": measured_with}  # what eval.json holds
        kept = ("question", "expected", "before", "before_correct")
        answers = read_json_lines(self.out / "answers.jsonl") if start.step else []
        self.answers = [{name: line[name] for name in kept if name in line} for line in answers]
        self.seconds = []  # of each step
        self.begun = False

    @property
    def out(self) -> Path:
        return Path(self.recipe.output_dir)  # it changes when a run is rescued

    def begin(self) -> None:
        """Makes the folder this run's, when the first step is done: what it holds from after the checkpoint goes.

        So a run that fails before leaves the folder as it was.
        """
        if not self.begun:
            check_present(self.out)
            go_back_to(self.start.checkpoint, self.recipe)
            write_recipe(self.recipe, self.rules)
            write_json(self.out / "eval.json", self.evaluations)
            write_json_lines(self.out / "evaluations.jsonl", self.development)
            write_json_lines(self.out / "answers.jsonl", self.answers)
            self.begun = True

    def write_evaluations(self, **evaluations) -> None:
        """Adds to eval.json, and writes answers.jsonl."""
        self.evaluations |= evaluations
        check_present(self.out)
        write_json_lines(self.out / "answers.jsonl", self.answers)
        write_json(self.out / "eval.json", self.evaluations)
        draw_reward_curve(self.out, self.rules.maxima)

    def add_answers(self, name: str, questions, texts: list[str]) -> None:
        """Adds to what answers.jsonl will hold, a line a held-out question, what the policy `name` (before, after, last) answers."""
        lines = [
            {"question": prompt[-1]["content"], "expected": label}
            for prompt, label in zip(questions["prompt"], questions["answer"], strict=True)
        ]
        if [{key: line[key] for key in ("question", "expected")} for line in self.answers] != lines:
            self.answers = lines
        for line, text in zip(self.answers, texts, strict=True):
            line |= {name: text, f"{name}_correct": self.rules.is_correct(text, line["expected"])}

    def write_development(self, step: int, figures: dict, seconds: float) -> None:
        """One line, and one of evaluations.jsonl: what the policy after `step` makes of the development questions."""
        line = {"step": step, **figures, "seconds": round(seconds, 2)}
        self.development.append(line)
        if self.begun:
            check_present(self.out)
            write_json_lines(self.out / "evaluations.jsonl", [line], append=True)
            draw_reward_curve(self.out, self.rules.maxima)
        say(
            f"accuracy    step {step}  strict {line['strict']:.1%} ({line['strict_low']:.1%} to {line['strict_high']:.1%})  "
            f"lenient {line['lenient']:.1%}  format {line['format']:.1%}  of {line['n']} development questions  {seconds:.1f} s"
            + ("  kept so far" if best_evaluation(self.development) is line else "")
        )

    def seconds_left(self, step: int, last: int = 10) -> float:
        """What the run takes after `step` at the pace of the `last` steps, with the accuracy on the way."""
        paces, steps = self.seconds[-last:], range(step + 1, self.recipe.max_steps + 1)
        evaluations = sum(i % self.recipe.eval_steps == 0 or i == self.recipe.max_steps for i in steps)
        evaluation = self.development[-1]["seconds"] if self.development else 0.0
        return len(steps) * sum(paces) / len(paces) + evaluations * evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        screen.advance(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_start = (
            time.perf_counter()
        )  # not after the last step: what lies between, as a checkpoint, is none of this

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        self.seconds.append(time.perf_counter() - self.step_start)
        self.begin()
        metrics, samples = self.metrics_of(state.global_step, logs), self.samples_of(state.global_step)
        self.metrics.append(metrics)  # in memory too: output_dir may be a mounted folder, and go away
        self.samples += samples
        check_present(self.out)
        write_json_lines(self.out / "metrics.jsonl", [metrics], append=True)
        write_json_lines(self.out / "samples.jsonl", samples, append=True)

        left = self.seconds_left(state.global_step)
        parts = " + ".join(
            f"{short(name)} {reward_text(metrics[f'rewards/{name}'], '.2f')}" for name in self.rules.names
        )
        say(
            f"step {state.global_step:3}  reward {metrics['reward']:.2f} = {parts}  "
            f"no variance {metrics['frac_reward_zero_std']:.0%}  length {metrics['completions/mean_length']:.0f}  "
            f"cut off {metrics['completions/clipped_ratio']:.0%}  {metrics['seconds']:.1f} s  {metrics['gib']:.1f} GiB  "
            f"{duration(left)} left",
        )
        screen.advance(state.global_step)
        if len(self.seconds) == 3 and state.global_step < state.max_steps:
            self.say_hours(state.global_step)
        if state.global_step % self.recipe.sample_steps == 0:
            say("    " + sample_text(samples[0]).replace("\n", "\n    "))
            if not control.should_save:  # which draws it
                draw_reward_curve(self.out, self.rules.maxima)

    def say_hours(self, step: int) -> None:
        """How long the run takes, once its steps have found their pace: the first of this process is the slowest."""
        seconds = self.seconds_left(step, last=2)
        say(
            f"time        {duration(seconds)} left, for {self.recipe.max_steps - step} of {self.recipe.max_steps} steps"
        )
        if seconds > LONG and not on_mounted_folder(self.out):
            say(
                f"            a Colab runtime may end before that, and its disk with it: put --output_dir on a mounted folder "
                f"(Drive), or give fewer --max_steps; a checkpoint is written every {self.recipe.save_steps} steps"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.begin()  # where no step was left to do

    def on_save(self, args, state, control, **kwargs):
        draw_reward_curve(self.out, self.rules.maxima)

    def metrics_of(self, step: int, logs: dict) -> dict:
        """The line of metrics.jsonl for a step, from what TRL logged of it."""
        # the most memory held so far; on a CPU, by the whole process
        peak = torch.cuda.max_memory_reserved() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {
            key.removesuffix("/mean") if key.startswith("rewards/") else key: value for key, value in logs.items()
        }
        # of a function that gave no completion of the step a number
        metrics |= {key: None for key, value in metrics.items() if key.startswith("rewards/") and math.isnan(value)}
        epoch = self.used(step) / self.questions  # TRL's is the share of the run that is over
        return {"step": step, **metrics, "epoch": epoch, "seconds": self.seconds[-1], "gib": peak / GIB}

    def used(self, step: int) -> int:
        """How many questions have been used up to `step`, one that came again counted again."""
        return self.start.used + (step - self.start.step) * self.recipe.prompts_per_step

    def samples_of(self, step: int) -> list[dict]:
        """The lines of samples.jsonl for a step: every completion, of every process, with its rewards."""
        rollout = self.rollout
        rows = zip(rollout["prompts"], rollout["completions"], rollout["answers"], strict=True)
        lines = [
            {
                "step": step,
                "question": prompt[-1]["content"],
                "completion": completion[-1]["content"],
                "answer": answer,
                **{name: rollout[name][i] for name in self.rules.names},
            }
            for i, (prompt, completion, answer) in enumerate(rows)
        ]
        return gather_object(lines)


def duration(seconds: float) -> str:
    """A duration in words: seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} hours"


def on_mounted_folder(folder: Path) -> bool:
    """Whether `folder` lies on a file system of its own, as a Drive does, and not on the machine's."""
    return any(os.path.ismount(path) for path in [folder.resolve(), *folder.resolve().parents][:-1])


def reward_text(reward: float | None, form: str) -> str:
    return "none" if reward is None else format(reward, form)


def short(name: str) -> str:
    """A reward function's name, as the lines have it."""
    return name.removesuffix("_reward_func")


def sample_text(sample: dict) -> str:
    """A line of samples.jsonl, to read."""
    rewards = ", ".join(f"{short(key)} {reward_text(value, 'g')}" for key, value in sample.items() if key not in TAKEN)
    return f"question: {sample['question']}\n{sample['completion']}\nexpected: {sample['answer']}; rewards: {rewards}"


def comparison_text(line: dict) -> str:
    """A line of answers.jsonl, to read."""
    answers = [
        f"{name}, {'right' if line[f'{name}_correct'] else 'wrong'}:\n{line[name]}"
        for name in ("before", "after")
        if name in line
    ]
    return "\n".join([f"question: {line['question']}", *answers, f"expected: {line['expected']}"])


def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in "torch", "transformers", "trl", "peft", "datasets", "unsloth", "unsloth-zoo", "vllm", "bitsandbytes":
        with contextlib.suppress(PackageNotFoundError):
            versions[name.replace("-", "_")] = version(name)
    return versions
