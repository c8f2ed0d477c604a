"""What a run prints and writes while it goes, and what it saves when something goes wrong."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import ProgressCallback
from trl import GRPOTrainer

from data import UserError
from rewards import MAX_REWARDS, REWARD_FUNCS
from support.checkpoints import (
    check_present,
    checkpoints,
    command,
    flaw,
    mark_complete,
    read_json_lines,
    step_of,
    write_json,
    write_json_lines,
    write_recipe,
)
from support.preflight import GIB, GPU, is_out_of_memory, memory_advice

if TYPE_CHECKING:
    from train_grpo import Recipe

COLORS = ["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]  # Okabe and Ito's, for the colour-blind
CHINESE_FONTS = [
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
]


def recording(reward_func, batch: dict):
    """`reward_func`, which also leaves what it was given and what it gave in `batch`, for samples.jsonl."""

    @functools.wraps(reward_func)  # TRL logs a reward under the function's name
    def wrapper(prompts, completions, answer, **kwargs):
        rewards = reward_func(prompts=prompts, completions=completions, answer=answer, **kwargs)
        batch.update({"prompts": prompts, "completions": completions, "answers": answer, reward_func.__name__: rewards})
        return rewards

    return wrapper


def window_means(history: list[dict], window: int) -> list[float]:
    """The mean reward of steps 1 to `window`, of 2 to `window` + 1, and so on."""
    return [sum(line["reward"] for line in history[i : i + window]) / window for i in range(len(history) - window + 1)]


def best_step(history: list[dict], window: int) -> int | None:
    """The last of the `window` steps with the highest mean reward, of several equal ones the latest; None before they are full."""
    steps = (line["step"] for line in history[window - 1 :])
    return max(zip(window_means(history, window), steps, strict=True), default=(0, None))[1]


def divergence(history: list[dict], window: int) -> tuple[str, int] | None:
    """What is wrong after the steps in `history` (lines of metrics.jsonl), and the last step before it; None if nothing is.

    A reward has fallen when its mean over `window` steps has halved.

    float16 training skips a step whose loss or gradient overflows and lowers its scale: a few in a row are normal.
    """
    if len(history) >= 20 and not any(math.isfinite(line["loss"] + line["grad_norm"]) for line in history[-20:]):
        return "the loss or the gradient was not finite for 20 steps", history[-20]["step"] - 1
    rewards = [line["reward"] for line in history]
    same = all(line["frac_reward_zero_std"] == 1 for line in history[-20:])
    if len(history) >= 20 and same and sum(rewards[-20:]) / 20 < sum(rewards[:3]) / 3 / 4:
        return "20 steps of answers are all worth the same, and less than the first ones", history[-20]["step"] - 1
    means = window_means(history, window)
    if means and max(means) - means[-1] > max(0.5, max(means) / 2):
        fell = f"the mean reward of {window} steps fell from {max(means):.2f} to {means[-1]:.2f}"
        return fell, best_step(history, window)
    return None


class Report(ProgressCallback):
    """tqdm's bar; a readable line a step; metrics.jsonl, samples.jsonl and reward_curve.png; a clean stop on a signal."""

    def __init__(self, recipe: Recipe, batch: dict):
        super().__init__()
        self.recipe, self.batch, self.out = recipe, batch, Path(recipe.output_dir)
        self.metrics, self.samples = (read_json_lines(self.out / f"{name}.jsonl") for name in ("metrics", "samples"))
        self.stop_signal, self.in_training = None, False
        self.window = max(10, math.ceil(40 / recipe.prompts_per_step))  # of fewer questions a mean can halve by chance

    @contextlib.contextmanager
    def saving(self, trainer: GRPOTrainer):
        """Within it, Ctrl-C, SIGTERM and errors leave a checkpoint and say how to go on.

        In training a signal finishes the step. At any other time, and a second time, it does not wait.
        """
        handlers = {signum: signal.signal(signum, self.on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except UserError:  # the policy has diverged, and is not worth keeping
            raise
        except Exception as error:
            self.save_after_error(trainer, error)
            raise
        finally:
            if self.training_bar:  # or it would draw itself once more, after the error
                self.training_bar.close()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)

    def on_signal(self, signum, frame):
        waits = self.in_training and not self.stop_signal
        if waits:
            self.stop_signal = signum
            words = "finishing this step, then saving a checkpoint"
        else:
            newest = next((path for path in checkpoints(self.out) if not flaw(path)), None)
            how = command(self.recipe, "--resume", *([] if newest else ["auto"]))
            words = f"the newest checkpoint is {newest}. Go on with: {how}"
        with contextlib.suppress(BrokenPipeError):  # of `| tee`, which Ctrl-C ends too
            print(f"\n{signal.Signals(signum).name}: {words}", flush=True)
        if not waits:
            sys.exit(128 + signum)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self.in_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.in_training = True
        self.step_start = time.perf_counter()
        self.seconds = []
        # A resumed run takes its rate from the recipe, which may have changed, not from the optimiser's state.
        scheduler = kwargs["lr_scheduler"]
        scheduler.base_lrs = [args.learning_rate] * len(scheduler.base_lrs)
        for group, factor in zip(kwargs["optimizer"].param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = args.learning_rate * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in kwargs["optimizer"].param_groups]  # what is logged

    def show(self, write, *arguments, **kwargs) -> None:
        """Calls `write`; where nobody reads it any more, ends the run after this step, with a checkpoint."""
        try:
            write(*arguments, **kwargs)
        except BrokenPipeError:
            self.stop_signal = signal.SIGPIPE

    def on_step_end(self, args, state, control, **kwargs):
        self.show(super().on_step_end, args, state, control, **kwargs)
        # before a checkpoint is saved
        if not all(weights.isfinite().all() for weights in kwargs["model"].parameters() if weights.requires_grad):
            raise self.diverged("the weights are not finite", state.global_step - 1)
        if self.stop_signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in logs:  # the summary at the end
            return
        now = time.perf_counter()
        self.seconds.append(now - self.step_start)
        self.step_start = now
        # the most memory held so far; on a CPU, by the whole process
        peak = torch.cuda.max_memory_reserved() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {"step": state.global_step}
        metrics |= {
            key.removesuffix("/mean") if key.startswith("rewards/") else key: value for key, value in logs.items()
        }
        metrics |= {"seconds": self.seconds[-1], "gib": peak / GIB}
        samples = [
            {
                "step": state.global_step,
                "question": prompt[-1]["content"],
                "completion": completion[-1]["content"],
                "answer": answer,
                **{name: rewards[i] for name, rewards in self.batch.items() if name.endswith("_reward_func")},
            }
            for i, (prompt, completion, answer) in enumerate(
                zip(self.batch["prompts"], self.batch["completions"], self.batch["answers"], strict=True)
            )
        ]
        self.metrics.append(metrics)  # in memory too: output_dir may be a mounted folder, and go away
        self.samples += samples
        check_present(self.out)
        write_json_lines(self.out / "metrics.jsonl", [metrics], append=True)
        write_json_lines(self.out / "samples.jsonl", samples, append=True)
        if found := divergence(self.metrics, self.window):
            raise self.diverged(*found)

        def short(name):
            return name.removesuffix("_reward_func").removesuffix("_format")

        left = (state.max_steps - state.global_step) * sum(self.seconds[-10:]) / len(self.seconds[-10:]) / 60
        parts = " + ".join(f"{short(f.__name__)} {metrics[f'rewards/{f.__name__}']:.2f}" for f in REWARD_FUNCS)
        self.show(
            self.training_bar.write,
            f"step {state.global_step:3}  reward {metrics['reward']:.2f} = {parts}  "
            f"no variance {metrics['frac_reward_zero_std']:.0%}  length {metrics['completions/mean_length']:.0f}  "
            f"cut off {metrics['completions/clipped_ratio']:.0%}  {metrics['seconds']:.1f} s  {metrics['gib']:.1f} GiB  "
            f"{left:.0f} min left",
        )
        if state.global_step % self.recipe.sample_steps == 0:
            sample = samples[0]
            rewards = ", ".join(
                f"{short(key)} {value:g}" for key, value in sample.items() if key.endswith("_reward_func")
            )
            text = f"question: {sample['question']}\n{sample['completion']}\nexpected: {sample['answer']}; rewards: {rewards}"
            self.show(self.training_bar.write, "    " + text.replace("\n", "\n    "))
            draw_reward_curve(self.out)
        if self.stop_signal:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        draw_reward_curve(self.out)
        mark_complete(self.out / f"checkpoint-{state.global_step}", self.recipe)
        # transformers keeps the newest two and this one: should the policy diverge later, here is where it was good
        best = best_step(self.metrics, self.window) or 0
        good = next((path for path in checkpoints(self.out) if step_of(path) <= best), None)
        state.best_model_checkpoint = str(good) if good else None

    def diverged(self, reason: str, last_good_step: int) -> UserError:
        rate = f"--learning_rate {self.recipe.learning_rate / 2:g}"
        good = [path for path in checkpoints(self.out) if step_of(path) <= last_good_step and not flaw(path)]
        if good:
            advice = f"Continue from before: {command(self.recipe, '--resume', str(good[0]), *rate.split())}"
        else:
            advice = f"There is no checkpoint from before: start again with {rate} and another --output_dir."
        return UserError(f"training stopped, because {reason}. {advice}")

    def save_after_error(self, trainer: GRPOTrainer, error: Exception) -> None:
        """Saves a checkpoint of the last finished step, in a new folder if output_dir can no longer be written to.

        Raises UserError for what the user can put right; prints where the checkpoint is for any other `error`.
        """
        recipe, out, step = self.recipe, self.out, trainer.state.global_step
        if "probability tensor" in str(error):  # the weights are finite, but the next token's chances are not
            raise self.diverged("the policy's probabilities are not finite", step - 1) from error
        if step == 0:
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise UserError(f"cannot write to {out}: {error}. No step was finished.") from error
            if isinstance(error, ImportError):  # of an optimiser that needs a package of its own
                raise UserError(" ".join(str(error).split())) from error
            return

        def save():
            trainer._save_checkpoint(trainer.model, trial=None)
            mark_complete(self.out / f"checkpoint-{step}", recipe)

        try:
            check_present(out)  # before saving makes a folder in its place
            if flaw(out / f"checkpoint-{step}"):
                save()
            write_json_lines(out / "metrics.jsonl", self.metrics)
            write_json_lines(out / "samples.jsonl", self.samples)
        except Exception:  # OSError, and what torch and safetensors make of one
            try:
                self.out = Path(tempfile.mkdtemp(prefix="rescued-", dir=Path(__file__).parents[1]))
                recipe.output_dir = trainer.args.output_dir = str(self.out)
                write_recipe(recipe)
                write_json(self.out / "eval.json", self.evaluations)
                write_json_lines(self.out / "metrics.jsonl", self.metrics)
                write_json_lines(self.out / "samples.jsonl", self.samples)
                save()
            except Exception as second:
                raise UserError(f"training stopped ({error}), and nothing could be saved: {second}") from error
        saved = f"The checkpoint of step {step} is in {self.out}. Continue with: {command(recipe, '--resume')}"
        if self.out != out:
            raise UserError(f"cannot write to {out} any more ({error}). {saved}") from error
        if is_out_of_memory(error):
            advice = memory_advice(recipe, resumed=True)
            saved = saved.replace("Continue with: ", "Continue with one of these after: ")
            raise UserError(f"out of GPU memory: {advice} {saved}") from error
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot read or write {error.filename or out} ({error}). {saved}") from error
        print(saved, file=sys.stderr)


def draw_reward_curve(out: Path) -> None:
    """reward_curve.png from metrics.jsonl: the reward, its five parts, and the length of the completions.

    Each step pale, its running mean on top. Titles are in Chinese too where matplotlib finds a font for it.
    """
    os.environ["MPLBACKEND"] = "agg"  # Colab's own setting names a backend that is not installed here
    import pandas
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    metrics = pandas.read_json(out / "metrics.jsonl", lines=True).set_index("step")
    smooth = metrics.ewm(span=max(5, len(metrics) / 10)).mean()
    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in installed][:1]

    def line(axes, name, color, label, style="-"):
        axes.plot(metrics.index, metrics[name], color=color, alpha=0.2, linewidth=1, linestyle=style)
        return axes.plot(smooth.index, smooth[name], color=color, linewidth=2, linestyle=style, label=label)

    with rc_context({"font.family": ["DejaVu Sans", *chinese]}):
        figure = Figure(figsize=(8, 9), layout="constrained")
        total, parts, length = figure.subplots(3, sharex=True, height_ratios=[3, 3, 2])
        line(total, "reward", COLORS[0], "sum of the five, at best 4.0")
        for func, best, color in zip(REWARD_FUNCS, MAX_REWARDS, COLORS[1:], strict=True):
            line(
                parts,
                f"rewards/{func.__name__}",
                color,
                f"{func.__name__.removesuffix('_reward_func')}, at best {best}",
            )
        share = length.twinx()
        share.yaxis.set_major_formatter(PercentFormatter(1))
        lines = line(length, "completions/mean_length", COLORS[0], "mean length")
        lines += line(share, "completions/clipped_ratio", COLORS[5], "cut off at the limit", "--")
        total.set(title="Mean reward of a step" + ("  每步平均奖励" if chinese else ""), ylabel="reward")
        parts.set(title="Its five parts" + ("  五个分量" if chinese else ""), ylabel="reward")
        length.set(
            title="Completions" + ("  回答长度" if chinese else ""), ylabel="tokens", ylim=(0, None), xlabel="step"
        )
        share.set(ylabel="share of completions", ylim=(0, 1))
        total.legend(loc="lower right")
        parts.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
        length.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False)
        for axes in (total, parts, length):
            axes.grid(alpha=0.3)
        partial = out / "reward_curve.partial.png"  # whoever looks at the picture never sees half of one
        figure.savefig(partial, dpi=120)
        os.replace(partial, out / "reward_curve.png")


def installed_versions() -> dict[str, str]:
    names = ["torch", "transformers", "trl", "peft", "datasets", "unsloth", "unsloth_zoo", "vllm", "bitsandbytes"]
    # of two copies on the path Python imports the first
    installed = {d.name: d.version for d in reversed(list(importlib.metadata.distributions()))}
    return {"python": platform.python_version()} | {name: installed[name] for name in names if name in installed}
