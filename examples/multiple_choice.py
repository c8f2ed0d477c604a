"""Multiple choice: the answer is one of the letters A to D.

    python train_grpo.py --dataset examples/multiple_choice.jsonl --rewards examples/multiple_choice.py
    python infer.py --adapter outputs/adapter --eval test

The 40 questions of multiple_choice.jsonl show the form: `question`, with the four options in it, and `answer`, a
letter. The last four of them are held out. A run that shall teach something needs some hundreds.
"""

import re

LETTER = re.compile(r"\s*[(（]?([A-Da-d])[)）]?[.．。、]?\s*")  # B, b, (B), B.

SYSTEM_PROMPT = """下面是一道选择题，只有一个选项正确。请按照如下格式回答，<answer> 中只写选项的字母：
<reasoning>
...
</reasoning>
<answer>
A
</answer>"""


def letter(text):
    """The letter inside the last <answer>…</answer>, None where there is anything else, or no answer."""
    answers = re.findall(r"<answer>([^<]*)</answer>", text)
    found = LETTER.fullmatch(answers[-1]) if answers else None
    return found[1].upper() if found else None


def is_correct(text, label):
    return letter(text) == label


def check_label(label):
    if found := LETTER.fullmatch(str(label)):
        return found[1].upper()
    raise ValueError("it is none of A, B, C and D")


def correct_reward(completions, answer, **kwargs):
    """2.0 for the right letter. What is rewarded is what is measured."""
    return [2.0 * is_correct(c[-1]["content"], label) for c, label in zip(completions, answer, strict=True)]


def letter_reward(completions, **kwargs):
    """0.5 for an answer that is one of the four letters, right or wrong."""
    return [0.5 if letter(c[-1]["content"]) else 0.0 for c in completions]


def tags_reward(completions, **kwargs):
    """0.5 for a reasoning and an answer: 0.125 for each of the four tags that is there once."""
    tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    return [0.125 * sum(c[-1]["content"].count(tag) == 1 for tag in tags) for c in completions]


REWARD_FUNCS = [correct_reward, letter_reward, tags_reward]
MAX_REWARDS = [2.0, 0.5, 0.5]
