"""The five rule-based rewards and the answer parser that the evaluation shares with them.

A completion is asked for in this form (the prompt is in data.py):

    <reasoning>
    ...
    </reasoning>
    <answer>
    ...
    </answer>

    correctness_reward_func     2.0    the one number inside <answer> equals the label
    int_reward_func             0.5    the answer is an integer and nothing else
    strict_format_reward_func   0.5    the whole completion is the form above
    soft_format_reward_func     0.5    both blocks are there, in this order, anywhere
    xmlcount_reward_func        0.5    0.125 a tag, less 0.001 for every character after the answer

A perfect completion earns 4.0, with or without a newline at its end. Any string is scored, in time linear in
its length. This file imports nothing but the standard library: copy it into a notebook as it is.
"""

import math
import numbers
import re
import unicodedata
from collections import deque
from decimal import Decimal

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# Full-width ASCII (U+FF01 to U+FF5E), and what is written for a minus sign, but not the dash that Chinese uses (——).
# Not NFKC: that would turn 5² into 52.
_FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "−‐‑‒–﹣"), ord("-"))
_TO_FOLD = re.compile("[！-～−‐-–﹣]")

# The stretches in which _NUMBER can match: skipping to them makes long texts without a number three times faster.
_NUMERIC = re.compile(r"[.,0-9]+")
# 1,080 or 1080 or .5, with decimals. [0-9], because \d also matches Arabic digits.
_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
# What makes a number that follows negative, looked for only where one does: -5, 负5, 负 5, -$5.
_SIGN = re.compile(r"(?:-|[负負]\s?)[$¥￥€£]?\Z")
# 1万 is not 1; but 3千克 and 3千米 are 3.
_MAGNITUDE = re.compile(r"[0-9]\s?(?:[十拾百佰仟万萬亿億]|千(?![克米瓦]))")


def extract_answer(text: str) -> str | None:
    """The text of the last complete `<answer>…</answer>` in `text`, or None. No tags, no answer."""
    start = text.rfind("<answer>", 0, text.rfind("</answer>") + 1)
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)]


def _fold(text: str) -> str:
    return text.translate(_FOLD) if _TO_FOLD.search(text) else text


def _numbers(folded: str):
    for stretch in _NUMERIC.finditer(folded):
        for match in _NUMBER.finditer(folded, *stretch.span()):
            start = match.start()
            sign = "-" if _SIGN.search(folded, max(start - 3, 0), start) else ""
            yield Decimal(sign + match.group().replace(",", ""))


def parse_number(text: str) -> Decimal | None:
    """The number in `text` if there is exactly one: 1080 for `1,080`, `１０８０`, `$1,080` and `1080 个苹果`.

    None for `1080 或 1090`, `10 80` and `3/4`, which hold two, and for `5²`, `1½` and `1万`, which mean another
    number than their ASCII digits.
    """
    folded = _fold(text)
    # isnumeric() is also true of 一 and 千, which are letters (Lo) and may stand in `1080 个一斤的苹果`.
    if any(c.isnumeric() and not c.isascii() and unicodedata.category(c) != "Lo" for c in set(folded)):
        return None
    if _MAGNITUDE.search(folded):
        return None
    found = _numbers(folded)
    first = next(found, None)
    return first if next(found, None) is None else None


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, tags or not: the lenient reading that the evaluation reports."""
    last = deque(_numbers(_fold(text)), maxlen=1)
    return last[0] if last else None


def label_number(label: int | float | str) -> Decimal | None:
    """The label as a number, None if it is not one. A string may be written like an answer (`1,080`)."""
    if isinstance(label, str):
        return parse_number(label)
    if isinstance(label, bool):
        return None
    if isinstance(label, numbers.Integral):  # NumPy's and pandas' too
        return Decimal(int(label))
    return Decimal(str(label)) if isinstance(label, numbers.Real) and math.isfinite(label) else None


def is_strict_format(text: str) -> bool:
    """Whether the whole of `text` is the form above: each tag once, newlines as shown, neither block blank."""
    text = text.removesuffix("\n")
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    if not (text.startswith("<reasoning>\n") and text.endswith("\n</answer>")):
        return False
    body = text[len("<reasoning>\n") : -len("\n</answer>")]
    reasoning, divider, answer = body.partition("\n</reasoning>\n<answer>\n")
    return bool(divider and reasoning.strip() and answer.strip())


def is_soft_format(text: str) -> bool:
    """Whether `text` holds a reasoning block and, after it, an answer block, whatever else there is."""
    position = 0
    for tag in TAGS:
        position = text.find(tag, position)
        if position < 0:
            return False
        position += len(tag)
    return True


def xml_count(text: str) -> float:
    """0.125 for each tag that occurs exactly once, less 0.001 for every character after the answer.

    An opening tag counts only before the first `</answer>`, and the fine is counted from there, less white
    space at the very end: so nothing written after `</answer>` can raise the reward.
    """
    head, end_tag, tail = text.partition("</answer>")
    tags = sum(head.count(tag) == 1 and tag not in tail for tag in TAGS[:3])
    ended_once = bool(end_tag) and end_tag not in tail
    return 0.125 * (tags + ended_once) - 0.001 * len(tail.rstrip())


def _texts(completions: list) -> list[str]:
    """TRL hands over a list of messages for each chat completion, a string for a plain one."""
    return [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]


def is_correct(text: str, label: int | float | str) -> bool:
    """Whether the one number inside `<answer>` equals the label, compared as numbers: the strict accuracy."""
    answer = extract_answer(text)
    number = None if answer is None else parse_number(answer)
    return number is not None and number == label_number(label)


# TRL calls each of these with the completions of a step (and the dataset's columns by name) and adds the results up.


def correctness_reward_func(completions: list, answer: list, **kwargs) -> list[float]:
    """2.0 for the right number inside `<answer>`, else 0.0. `answer`: one label a completion."""
    return [2.0 if is_correct(text, label) else 0.0 for text, label in zip(_texts(completions), answer, strict=True)]


def int_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 if the answer is an integer and nothing else (`-?[0-9]+`, folded and stripped), else 0.0."""
    answers = (_fold(extract_answer(text) or "").strip() for text in _texts(completions))
    return [0.5 if re.fullmatch(r"-?[0-9]+", answer) else 0.0 for answer in answers]


def strict_format_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 if the whole completion is the form asked for, else 0.0."""
    return [0.5 if is_strict_format(text) else 0.0 for text in _texts(completions)]


def soft_format_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 if both blocks are there in order, else 0.0."""
    return [0.5 if is_soft_format(text) else 0.0 for text in _texts(completions)]


def xmlcount_reward_func(completions: list, **kwargs) -> list[float]:
    """Up to 0.5, tag by tag: see xml_count. Negative for a completion that rambles on after its answer."""
    return [xml_count(text) for text in _texts(completions)]


REWARD_FUNCS = [
    correctness_reward_func,
    int_reward_func,
    strict_format_reward_func,
    soft_format_reward_func,
    xmlcount_reward_func,
]
MAX_REWARDS = [2.0, 0.5, 0.5, 0.5, 0.5]
