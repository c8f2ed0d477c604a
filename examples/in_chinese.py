"""Our five rewards, and a sixth that keeps the reasoning in Chinese; recipes/small.yaml has it.

    python train_grpo.py --rewards examples/in_chinese.py

Nothing in the five asks for Chinese. With them alone, Qwen2.5-Coder-1.5B went over to English in one run of five at a rate
of 5e-5 (65 % of the answers of the last twenty steps), and at 2e-4 in both whose answers were kept (docs/results.md).
DeepSeek-R1 has such a reward too, the share of words in the language wanted (https://arxiv.org/abs/2501.12948); here it is
all or nothing, so that groups of Chinese answers do not differ by it.
"""

from rewards import MAX_REWARDS as OUR_MAX
from rewards import REWARD_FUNCS as OUR_FUNCS
from rewards import is_correct, is_english  # noqa: F401  is_correct: labels are numbers, right is what was right


def chinese_reward(prompts, completions, **kwargs):
    """0.5 for an answer in Chinese, or in formulas alone; to a question in English for any."""
    pairs = zip(prompts, completions, strict=True)
    return [0.0 if is_english(a[-1]["content"]) and not is_english(q[-1]["content"]) else 0.5 for q, a in pairs]


REWARD_FUNCS = [*OUR_FUNCS, chinese_reward]
MAX_REWARDS = [*OUR_MAX, 0.5]
