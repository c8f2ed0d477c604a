"""The rewards, as lists of completions that earn them and completions that do not, each with its reason.

python -m pytest tests/test_rewards.py
"""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import (
    MAX_REWARDS,
    REWARD_FUNCS,
    correctness_reward_func,
    extract_answer,
    int_reward_func,
    is_correct,
    last_number,
    parse_number,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

PERFECT = "<reasoning>\n48÷2=24\n\n48+24=72\n</reasoning>\n<answer>\n72\n</answer>"


def score(func, text, label=72):
    """One completion as TRL hands it over: a list with one message."""
    (reward,) = func(
        prompts=[[{"role": "user", "content": "?"}]],
        completions=[[{"role": "assistant", "content": text}]],
        answer=[label],
        completion_ids=[[1, 2]],
    )
    return reward


# --- correctness ---------------------------------------------------------------------------------

CORRECT = [
    (PERFECT, 72, "the perfect completion, reasoning over several lines"),
    (PERFECT, "72", "a label that is a string"),
    (PERFECT, 72.0, "a label that is a float"),
    (PERFECT, np.int64(72), "a label from a table"),
    (PERFECT, np.float32(72), "a label from a table, as a float"),
    ("<answer>1,080</answer>", 1080, "thousands separator in the answer"),
    ("<answer>1080</answer>", "1,080", "thousands separator in the label"),
    ("<answer>1080.0</answer>", 1080, "a decimal form of an integer"),
    ("<answer>１０８０</answer>", 1080, "full-width digits"),
    ("<answer>１，０８０．０</answer>", 1080, "full-width comma and point"),
    ("<answer>$1,080</answer>", 1080, "currency sign"),
    ("<answer>1080元</answer>", 1080, "a unit"),
    ("<answer>1080 个苹果</answer>", 1080, "a unit and a noun"),
    ("<answer>3 个一斤的苹果</answer>", 3, "a Chinese numeral in the unit is a letter, not a second number"),
    ("<answer>-5</answer>", -5, "a negative number"),
    ("<answer>−5</answer>", -5, "the Unicode minus sign"),
    ("<answer>–5</answer>", -5, "an en dash for it"),
    ("<answer>负5</answer>", -5, "the Chinese one"),
    ("<answer>負 5 元</answer>", -5, "with a space"),
    ("<answer>——5</answer>", 5, "a Chinese dash is no sign"),
    ("<answer>3千克</answer>", 3, "kilograms are a unit"),
    ("<answer>-$5</answer>", -5, "sign before the currency"),
    ("<answer>.5</answer>", 0.5, "no digit before the point"),
    ("<answer>0.1</answer>", 0.1, "a float label means what it prints"),
    ("<answer>5</answer> 不对 <answer>72</answer>", 72, "the last answer counts"),
    ("<answer>72</answer> 还是 <answer>5", 72, "an answer that never closes is none"),
    ("<answer>72</answer></answer>", 72, "a stray closing tag"),
    ("<answer><answer>72</answer>", 72, "a stray opening tag"),
]
INCORRECT = [
    ("72", 72, "no tags, no answer"),
    ("<answer>72", 72, "never closed"),
    ("72</answer>", 72, "never opened"),
    ("</answer>72<answer>", 72, "tags the wrong way round"),
    ("<answer></answer>", 72, "empty"),
    ("<answer>73</answer>", 72, "another number"),
    ("<answer>5</answer>", -5, "another sign"),
    ("<answer>-5</answer>", 5, "another sign"),
    ("<answer>−5</answer>", 5, "another sign, Unicode"),
    ("<answer>72</answer> 还是 <answer>5</answer>", 72, "the last answer counts, even a wrong one"),
    ("<answer>1080 或 1090</answer>", 1080, "two numbers"),
    ("<answer>10 80</answer>", 1080, "two numbers"),
    ("<answer>3/4</answer>", 3, "a fraction is two numbers"),
    ("<answer>1,08</answer>", 108, "not a thousands separator"),
    ("<answer>1,0800</answer>", 10800, "not a thousands separator"),
    ("<answer>²</answer>", 2, "a superscript is no number"),
    ("<answer>5²</answer>", 52, "and no digit"),
    ("<answer>5²</answer>", 5, "25 is not 5"),
    ("<answer>1½</answer>", 1, "one and a half is not 1"),
    ("<answer>٧٢</answer>", 72, "Arabic digits"),
    ("<answer>七十二</answer>", 72, "Chinese numerals are not read"),
    ("<answer>1万元</answer>", 1, "ten thousand is not 1"),
    ("<answer>3百</answer>", 3, "three hundred is not 3"),
    ("<answer>2千</answer>", 2, "two thousand is not 2"),
    ("<answer>3萬</answer>", 3, "nor in traditional characters"),
    ("<answer>5拾</answer>", 5, "nor as on cheques"),
    ("<answer>负 5</answer>", 5, "another sign, with a space"),
    ("<answer>–5</answer>", 5, "another sign, an en dash"),
    ("<answer>72</answer>", True, "a truth value is no label"),
    ("<answer>72</answer>", 10**400, "a label too large for a float"),
    ("<answer>72</answer>", float("inf"), "nor is infinity"),
    ("<answer>7.2</answer>", 72, "a decimal point is not dropped"),
    ("<answer>nan</answer>", float("nan"), "nothing equals nan"),
]


@pytest.mark.parametrize("text, label, why", CORRECT)
def test_correct(text, label, why):
    assert score(correctness_reward_func, text, label) == 2.0, why


@pytest.mark.parametrize("text, label, why", INCORRECT)
def test_incorrect(text, label, why):
    assert score(correctness_reward_func, text, label) == 0.0, why


# --- integer -------------------------------------------------------------------------------------

INTEGER = [
    (PERFECT, "white space around it"),
    ("<answer>-5</answer>", "negative"),
    ("<answer>１０８０</answer>", "full-width digits"),
    ("<answer>　72　</answer>", "ideographic spaces around it"),
    ("<answer>007</answer>", "leading zeros"),
    ("<answer>" + "9" * 5000 + "</answer>", "more digits than int() takes"),
]
NOT_INTEGER = [
    ("72", "no tags"),
    ("<answer></answer>", "empty"),
    ("<answer>72元</answer>", "a unit"),
    ("<answer>$72</answer>", "a currency sign"),
    ("<answer>72.0</answer>", "a decimal point"),
    ("<answer>1,080</answer>", "a separator"),
    ("<answer>²</answer>", "isdigit() takes it, int() does not"),
    ("<answer>٧٢</answer>", "Arabic digits"),
    ("<answer>--5</answer>", "two signs"),
    ("<answer>7 2</answer>", "a space inside"),
]


@pytest.mark.parametrize("text, why", INTEGER)
def test_integer(text, why):
    assert score(int_reward_func, text) == 0.5, why


@pytest.mark.parametrize("text, why", NOT_INTEGER)
def test_not_integer(text, why):
    assert score(int_reward_func, text) == 0.0, why


# --- the two format rewards ----------------------------------------------------------------------

STRICT = [
    (PERFECT, "reasoning over several lines"),
    (PERFECT + "\n", "a final newline"),
    ("<reasoning>\n一\n</reasoning>\n<answer>\n未知\n</answer>", "the format does not look at the number"),
    ("<reasoning>\n\n1<2, a>b\n\n</reasoning>\n<answer>\n1\n</answer>", "angle brackets and blank lines"),
]
NOT_STRICT = [
    ("", "nothing"),
    ("72", "no tags"),
    ("答：" + PERFECT, "text before"),
    (PERFECT + "完", "text after"),
    (PERFECT + "\n\n", "two final newlines"),
    (PERFECT.replace("\n", ""), "no newlines"),
    (PERFECT.replace("</reasoning>\n", "</reasoning>"), "a newline is missing"),
    (PERFECT.replace("</reasoning>\n", "</reasoning>\n\n"), "a newline too many"),
    (PERFECT + "\n" + PERFECT, "twice"),
    (PERFECT.replace("48÷2", "<answer>"), "a tag within a block"),
    ("<answer>\n72\n</answer>\n<reasoning>\n一\n</reasoning>", "the wrong order"),
    ("<reasoning>\n \n</reasoning>\n<answer>\n72\n</answer>", "no reasoning"),
    ("<reasoning>\n一\n</reasoning>\n<answer>\n\n</answer>", "no answer"),
    ("<reasoning>\n一\n</reasoning>\n<answer>\n72", "cut off by the length limit"),
]
SOFT = [
    (PERFECT, "all that is strict is soft"),
    (PERFECT.replace("\n", ""), "no newlines"),
    ("好的。" + PERFECT + "\n希望有帮助！", "text around"),
    ("<reasoning>一</reasoning> 所以 <answer>72</answer>", "text between"),
    ("<answer>1</answer>" + PERFECT, "a block too many"),
]
NOT_SOFT = [
    ("", "nothing"),
    ("<answer>72</answer>", "no reasoning"),
    ("<reasoning>一</reasoning>", "no answer"),
    ("<answer>72</answer><reasoning>一</reasoning>", "the wrong order"),
    ("<reasoning>一<answer>72</answer></reasoning>", "one inside the other"),
    ("<reasoning>一</reasoning><answer>72", "cut off by the length limit"),
    ("<think>一</think><answer>72</answer>", "another tag"),
]


@pytest.mark.parametrize("text, why", STRICT)
def test_strict(text, why):
    assert score(strict_format_reward_func, text) == 0.5, why


@pytest.mark.parametrize("text, why", NOT_STRICT)
def test_not_strict(text, why):
    assert score(strict_format_reward_func, text) == 0.0, why


@pytest.mark.parametrize("text, why", SOFT)
def test_soft(text, why):
    assert score(soft_format_reward_func, text) == 0.5, why


@pytest.mark.parametrize("text, why", NOT_SOFT)
def test_not_soft(text, why):
    assert score(soft_format_reward_func, text) == 0.0, why


# --- xmlcount ------------------------------------------------------------------------------------

XMLCOUNT = [
    (PERFECT, 0.5, "every tag once"),
    (PERFECT + " \n\n", 0.5, "white space at the end costs nothing"),
    (PERFECT + "完了", 0.498, "two characters after the answer"),
    (PERFECT + " 完了", 0.497, "white space before them counts"),
    ("<reasoning>一</reasoning>72", 0.25, "half of the tags"),
    ("<reasoning><reasoning>一</reasoning><answer>72</answer>", 0.375, "a tag twice"),
    ("72", 0.0, "no tags"),
    ("</answer>" + "啊" * 300, 0.125 - 0.3, "a long tail costs more than the tags earn"),
    ("</answer><reasoning></reasoning>", 0.125 - 0.023, "tags after the answer earn nothing"),
]


@pytest.mark.parametrize("text, reward, why", XMLCOUNT)
def test_xmlcount(text, reward, why):
    assert score(xmlcount_reward_func, text) == pytest.approx(reward, abs=1e-12), why


# --- the parser ----------------------------------------------------------------------------------


def test_extract_answer():
    assert extract_answer("<answer>\n72\n</answer>") == "\n72\n"
    assert extract_answer("<answer></answer>") == ""
    assert extract_answer("72") is None


def test_last_number_is_the_lenient_reading():
    assert last_number("先有 10 个，答案是 72。") == 72
    assert last_number("<answer>72</answer>") == 72
    assert last_number("没有") is None


# --- properties ----------------------------------------------------------------------------------

# Text in which the tags really occur, beside text of any kind.
PIECES = st.sampled_from(
    ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", "72", "-5", "1,080", "，", "²", " ", "一", "<", "/"]
)
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=3)).map("".join)


@given(TEXTS, st.integers() | st.floats() | st.text())
def test_any_text_gives_a_finite_float_in_range(text, label):
    for func, maximum in zip(REWARD_FUNCS, MAX_REWARDS, strict=True):
        reward = score(func, text, label)
        assert type(reward) is float and math.isfinite(reward) and reward <= maximum
        if func is xmlcount_reward_func:
            assert reward >= -0.001 * len(text)
        else:
            assert reward in (0.0, maximum)


@given(st.integers(-(10**12), 10**12))
def test_every_way_to_write_a_number_is_that_number(n):
    full_width = str(n).translate({ord(c): ord(c) + 0xFEE0 for c in "-0123456789"})
    for written in (str(n), f"{n:,}", f"{n}.0", f" {n}元", full_width):
        assert parse_number(written) == n
        assert is_correct(f"<answer>{written}</answer>", n)


def test_a_perfect_completion_earns_all_of_every_reward():
    for text in (PERFECT, PERFECT + "\n"):
        assert [score(func, text) for func in REWARD_FUNCS] == MAX_REWARDS
    assert sum(MAX_REWARDS) == 4.0


@given(TEXTS)
def test_text_after_a_perfect_completion_never_raises_a_reward(suffix):
    for func, maximum in zip(REWARD_FUNCS, MAX_REWARDS, strict=True):
        assert score(func, PERFECT + suffix) <= maximum


@given(TEXTS, st.text(alphabet=st.characters(exclude_characters="<>")))
def test_text_after_any_answer_never_raises_a_reward(text, suffix):
    """Without a tag in it: a second answer replaces the first, as it should."""
    ended = text + "</answer>"
    for func in REWARD_FUNCS:
        assert score(func, ended + suffix) <= score(func, ended)


@given(TEXTS, TEXTS)
def test_nothing_after_the_first_answer_raises_xmlcount(text, suffix):
    ended = text + "</answer>"
    assert score(xmlcount_reward_func, ended + suffix) <= score(xmlcount_reward_func, ended)


HOSTILE = [
    ("<answer>" * 25_000, "half-open tags"),
    ("<" * 200_000, "half-open angle brackets"),
    ("<reasoning>\n" + "\n</reasoning>\n<answer>\n" * 8_700, "dividers without an end"),
    ("<reasoning>\n" + "\n</reasoning>\n<answer>\n" * 8_700 + "\n</answer>", "dividers with an end"),
    ("<answer>" + "1," * 100_000 + "</answer>", "many numbers"),
    ("<answer>" + "111," * 50_000 + "</answer>", "one separator too many"),
    ("<answer>" + "1" * 200_000 + "</answer>", "a very long number"),
    ("<answer>" + "１" * 200_000 + "</answer>", "a very long full-width number"),
    ("<answer>" + "-" * 200_000 + "</answer>", "signs without a number"),
    ("<answer>" + "一" * 200_000 + "</answer>", "Chinese numerals"),
    ("<answer>" + "\n " * 100_000 + "</answer>", "white space"),
]


@pytest.mark.parametrize("func", REWARD_FUNCS, ids=lambda func: func.__name__)
@pytest.mark.parametrize("text, why", HOSTILE)
def test_hostile_text_is_scored_in_under_50_ms(func, text, why):
    fastest = math.inf
    for _ in range(5):  # the fastest of five, in time of this process, so that a busy machine does not fail the test
        start = time.process_time()
        assert math.isfinite(score(func, text))
        fastest = min(fastest, time.process_time() - start)
    assert fastest < 0.05, why
