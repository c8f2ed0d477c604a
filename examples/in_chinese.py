"""Our five rewards, and a sixth that keeps the reasoning in Chinese.

    python train_grpo.py --config recipes/small.yaml --learning_rate 2e-4 --rewards examples/in_chinese.py

Nothing in the five asks for Chinese. With them alone, at this rate, Qwen2.5-Coder-1.5B had 0 % of its answers in English
up to step 40, 46 % in steps 51 to 60 and 98 % in the next ten (docs/results.md). DeepSeek-R1 has such a reward too, the share
of words in the language wanted (https://arxiv.org/abs/2501.12948); here it is all or nothing, so that groups of Chinese
answers do not differ by it.
"""

from rewards import MAX_REWARDS as OUR_MAX
from rewards import REWARD_FUNCS as OUR_FUNCS
from rewards import is_correct, is_english  # noqa: F401  is_correct: labels are numbers, right is what was right


def chinese_reward(completions, **kwargs):
    """0.5 for an answer in Chinese, or in formulas alone."""
    return [0.0 if is_english(completion[-1]["content"]) else 0.5 for completion in completions]


REWARD_FUNCS = [*OUR_FUNCS, chinese_reward]
MAX_REWARDS = [*OUR_MAX, 0.5]
