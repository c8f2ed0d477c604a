"""Reward hacking, to look at: our five rewards, and a bonus for long answers.

    python train_grpo.py --config recipes/tiny.yaml --output_dir outputs/length_bonus --rewards examples/length_bonus.py

Nothing that a longer answer says has to be right, so the policy learns to fill it: the reward and the length rise, the
accuracy does not, or falls. The bonus is worth as much as a right answer and is far easier to earn.
"""

from rewards import MAX_REWARDS as OUR_MAX
from rewards import REWARD_FUNCS as OUR_FUNCS
from rewards import is_correct  # noqa: F401  labels are numbers, and right is what was right

ENOUGH = 80  # characters, for the whole bonus: twice what the tiny policy writes


def length_bonus(completions, **kwargs):
    """Up to 2.0, for every character that is written."""
    return [2.0 * min(len(completion[-1]["content"]) / ENOUGH, 1.0) for completion in completions]


REWARD_FUNCS = [*OUR_FUNCS, length_bonus]
MAX_REWARDS = [*OUR_MAX, 2.0]
