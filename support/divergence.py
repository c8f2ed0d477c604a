"""Whether the policy gets worse: a run that does ends, and names the checkpoint from before."""

import math
from pathlib import Path

from transformers import TrainerCallback

from support.errors import UserError
from support.resuming import checkpoints, command, flaw, step_of
from support.settings import Recipe


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


def diverged(recipe: Recipe, reason: str, last_good_step: int) -> UserError:
    """The error that ends a run whose policy has been worse since `last_good_step`, with the command that goes on from before."""
    rate = f"--learning_rate {recipe.learning_rate / 2:g}"
    out = Path(recipe.output_dir)
    good = [path for path in checkpoints(out) if step_of(path) <= last_good_step and not flaw(path)]
    if good:
        advice = f"Continue from before: {command(recipe, '--resume', str(good[0]), *rate.split())}"
    else:
        advice = f"There is no checkpoint from before: start again with {rate} and another --output_dir."
    return UserError(f"training stopped, because {reason}. {advice}")


class DivergenceCheck(TrainerCallback):
    """Ends a run that has diverged.

    `metrics`: the lines of metrics.jsonl, which the report adds to.
    """

    def __init__(self, recipe: Recipe, metrics: list[dict]):
        self.recipe, self.metrics = recipe, metrics
        self.window = max(10, math.ceil(40 / recipe.prompts_per_step))  # of fewer questions a mean can halve by chance

    def good(self) -> Path | None:
        """The newest checkpoint from before the reward fell, should it turn out to have fallen; None where there is none."""
        step = best_step(self.metrics, self.window) or 0
        return next((path for path in checkpoints(Path(self.recipe.output_dir)) if step_of(path) <= step), None)

    def on_step_end(self, args, state, control, model, **kwargs):
        # before a checkpoint is saved
        if not all(weights.isfinite().all() for weights in model.parameters() if weights.requires_grad):
            raise diverged(self.recipe, "the weights are not finite", state.global_step - 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs and (found := divergence(self.metrics, self.window)):
            raise diverged(self.recipe, *found)
