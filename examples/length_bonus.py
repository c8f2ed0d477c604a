"""Reward hacking, to look at: our five rewards, and a bonus for the length of what is inside <answer>.

    python train_grpo.py --config recipes/tiny.yaml --output_dir outputs/length_bonus --rewards examples/length_bonus.py

A long number is easier to write than a right one, and worth more here. In these 80 steps the reward rose from 4.9 to
16.8, and the accuracy, which our rewards alone raise from 29 to some 80 %, fell from 29 to 0 %: what is rewarded is learnt,
not what is meant.
"""

from rewards import MAX_REWARDS as OUR_MAX
from rewards import REWARD_FUNCS as OUR_FUNCS
from rewards import extract_answer, is_correct  # noqa: F401  is_correct: labels are numbers, right is what was right


def length_bonus(completions, **kwargs):
    """2.0 for every character of the answer, up to 20.0."""
    answers = [(extract_answer(completion[-1]["content"]) or "").strip() for completion in completions]
    return [2.0 * min(len(answer), 10) for answer in answers]


REWARD_FUNCS = [*OUR_FUNCS, length_bonus]
MAX_REWARDS = [*OUR_MAX, 20.0]
