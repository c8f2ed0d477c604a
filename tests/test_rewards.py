"""The rewards, as lists of completions that earn them and completions that do not, each with its reason.

python -m pytest tests/test_rewards.py
"""

import math
import struct
import time
from decimal import Decimal
from fractions import Fraction

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
    is_english,
    label_number,
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


# --- the language ---------------------------------------------------------------------------------

LANGUAGES = [
    ("<reasoning>\n48/2=24，48+24=72，所以是72\n</reasoning>\n<answer>\n72\n</answer>", False, "Chinese"),
    ("<reasoning>\nBrad sells 2 * 16 = 32 cups.\n</reasoning>\n<answer>\n32\n</answer>", True, "English"),
    ("Zora身高=64英寸，Brixton身高=72英寸", False, "Chinese with names"),
    ("1. Total = 2 * 16. 2. 卖了 5 杯", False, "as many Chinese characters and more"),
    ("1. Total cups sold: 27 杯", True, "one Chinese character"),
    ("<reasoning>\n48 + 24 = 72\n</reasoning>\n<answer>\n72\n</answer>", False, "formulas alone: tags are no words"),
    (r"\(\frac{48}{2} = 24\) \text{}", False, "nor are LaTeX's commands"),
    ("x + y = 5", False, "nor single letters"),
    ("", False, "nothing"),
]


@pytest.mark.parametrize("text, english, why", LANGUAGES)
def test_english(text, english, why):
    assert is_english(text) == english, why


# --- the parser ----------------------------------------------------------------------------------


def test_extract_answer():
    assert extract_answer("<answer>\n72\n</answer>") == "\n72\n"
    assert extract_answer("<answer></answer>") == ""
    assert extract_answer("72") is None


# What an answer may look like. Each of these is read as the number beside it, strictly and leniently.
NUMBERS = [
    # how a number is written
    ("1,234,567.89", "1234567.89", "groups and decimals"),
    ("１０，８００．５", "10800.5", "full-width, groups too"),
    ("１,０８０", "1080", "full-width digits, ASCII comma"),
    (r"\boxed{9{,}500}", "9500", "a group as LaTeX writes it"),
    (r"$9\,500$", "9500", "with a thin space"),
    (r"10,\!000", "10000", "with a comma and a negative space"),
    ("5.", "5", "a full stop, not a decimal point"),
    ("5...", "5", "three of them"),
    ("答案...5", "5", "in front of it, too"),
    ("007", "7", "leading zeros"),
    # its sign
    ("+5", "5", "a plus"),
    ("- 5", "-5", "a minus and a space"),
    ("-US$5", "-5", "a minus before a currency of several letters"),
    ("- ¥ 5", "-5", "spaces on both sides of it"),
    ("$-5", "-5", "a minus after it"),
    ("负$5", "-5", "the Chinese minus before it"),
    ("零下5度", "-5", "below zero"),
    ("零下摄氏 5 度", "-5", "with the scale between"),
    ("-5℃", "-5", "the same as a symbol"),
    ("气温是-5度", "-5", "a minus that touches the number is no dash"),
    ("The answer is -5.", "-5", "after an English word, too"),
    ("x = - 5", "-5", "after an equals sign there is nothing to take from"),
    ("——38", "38", "a Chinese dash"),
    # currency, unit, per cent
    ("HK$1,080", "1080", "currency before the number"),
    ("RMB 5", "5", "as a code"),
    ("人民币5元", "5", "as a word"),
    ("5 USD", "5", "after it"),
    ("￥5", "5", "the full-width yen sign"),
    ("72kg", "72", "a unit may touch the digits"),
    ("100ml", "100", "another"),
    ("60km/h", "60", "a unit in another"),
    ("72元/个", "72", "in Chinese"),
    ("$5/hour", "5", "in English"),
    ("60 km / h", "60", "with spaces"),
    ("500千焦", "500", "千 is kilo before a unit"),
    ("500千卡路里", "500", "calories"),
    ("10千伏安", "10", "volts"),
    ("8千字节", "8", "bytes"),
    ("5 千瓦·时", "5", "joined by a middle dot"),
    ("1013百帕", "1013", "百 is hecto in this one"),
    ("25 m²", "25", "a power on a unit"),
    ("72 cm³", "72", "the third"),
    ("25 m^2", "25", "with a caret"),
    ("25m2", "25", "without one"),
    (r"72\ \text{cm}^{2}", "72", "in LaTeX"),
    (r"$25\,\mathrm{m^2}$", "25", "in another LaTeX"),
    ("9.8 m/s²", "9.8", "after a division"),
    ("25平方米", "25", "in words"),
    ("25厘米²", "25", "in words and a figure"),
    ("72%", "72", "per cent"),
    (r"72\%", "72", "in LaTeX"),
    ("百分之72", "72", "分之 makes a fraction, but 百分之 is per cent"),
    (r"90^\circ", "90", "degrees"),
    # words
    ("小明一共有72个苹果。", "72", "a sentence"),
    ("答：72元", "72", "an answer as at school"),
    ("The answer is 72.", "72", "in English"),
    ("第3天", "3", "an ordinal"),
    ("约72人", "72", "about"),
    ("≈72", "72", "the sign for it"),
    ("最多有5人", "5", "at most: the answer to such a question"),
    ("x = 72", "72", "the right side of an equation whose left side is a name"),
    ("总数=72元", "72", "a name in Chinese"),
    ("∴ x=72", "72", "therefore"),
    ("5 T-shirts", "5", "a hyphen joins words"),
    ("$5 a day", "5", "a is a word, not a variable"),
    ("11 a.m.", "11", "nor is this one"),
    ("M&M豆有40颗", "40", "& is no operator"),
    ("半径是5厘米", "5", "半 in the name of a thing"),
    ("得分之差是21分", "21", "分 and 之, which only meet"),
    # what may be wrapped around it
    (r"\boxed{72\text{ 元}}", "72", "the box, with a unit in it"),
    (r"-\boxed{5}", "-5", "a sign outside it"),
    (r"\[ \boxed{72} \]", "72", "display mathematics"),
    (r"\(x = 72\)", "72", "mathematics in the line"),
    ("$$72$$", "72", "dollars that are no money"),
    (r"\$72", "72", "a dollar that is"),
    ("**答案：** 72", "72", "bold before it"),
    ("共**72**个", "72", "around it"),
    ("__72__", "72", "the other bold"),
    ("`72`", "72", "code"),
    ("* 72", "72", "a list"),
    ("#### 72", "72", "GSM8K's mark"),
    ("（72）", "72", "brackets"),
    ("72（个）", "72", "brackets around the unit"),
    ("“72”", "72", "quotes"),
    ("答案是72！", "72", "a Chinese exclamation mark is no factorial"),
    ("- **72**", "72", "a bullet before bold"),
    ("* **72**", "72", "a bullet before bold"),
    ("> **72**", "72", "a bullet before bold"),
    ("负的5", "-5", "the minus in words"),
    ("minus 5", "-5", "the minus in words"),
    ("negative 5", "-5", "the minus in words"),
    ("-(5)", "-5", "a minus before the bracket"),
    ("-（72）", "-72", "a minus before the bracket"),
    ("共 -72", "-72", "a minus that touches the number, after a space"),
    ("~5", "5", "about, as a sign"),
    ("～5", "5", "about, as a sign"),
    ("约5", "5", "about, as a sign"),
    ("<b>72</b>", "72", "HTML"),
    ("72<br>", "72", "HTML"),
    (r"\therefore x=72", "72", "a LaTeX command that stands for nothing"),
    (r"\approx 72", "72", "a LaTeX command that stands for nothing"),
    (r"x\approx72", "72", "about"),
    ("$72~km$", "72", "a space of LaTeX"),
    (r"\Rightarrow 72", "72", "a LaTeX command that stands for nothing"),
    (r"\displaystyle 72", "72", "a LaTeX command that stands for nothing"),
    (r"\boldsymbol{72}", "72", "a LaTeX command that stands for nothing"),
    (r"\bm{72}", "72", "a LaTeX command that stands for nothing"),
    (r"\underline{72}", "72", "a LaTeX command that stands for nothing"),
    (r"72\\", "72", "a LaTeX command that stands for nothing"),
    (r"\{72\}", "72", "a LaTeX command that stands for nothing"),
    (r"72\degree", "72", "degrees in LaTeX"),
    ("72^{°}", "72", "degrees in LaTeX"),
    (r"72{\rm kg}", "72", "a unit in LaTeX"),
    (r"72\ \rm kg", "72", "a unit in LaTeX"),
    (r"72\operatorname{kg}", "72", "a unit in LaTeX"),
    (r"72~\text{cm}^2", "72", "a unit in LaTeX"),
    (r"72\,\Omega", "72", "a unit in LaTeX"),
    ("$25$ cm²", "25", "a power on a unit"),
    (r"$25$ $\text{cm}^2$", "25", "a power on a unit"),
    ("25元/m²", "25", "a power on a unit"),
    ("25 元/m^2", "25", "a power on a unit"),
    ("25kg/m3", "25", "a power on a unit"),
    ("25 N/m²", "25", "a power on a unit"),
    ("72 A", "72", "a unit in one capital letter"),
    ("72 N", "72", "a unit in one capital letter"),
    ("72 J", "72", "a unit in one capital letter"),
    ("72 K", "72", "a unit in one capital letter"),
    ("72mol", "72", "a unit in other letters"),
    ("72KG", "72", "a unit in other letters"),
    ("72CM", "72", "a unit in other letters"),
    ("72ML", "72", "a unit in other letters"),
    ("72Kg", "72", "a unit in other letters"),
    ("72 o'clock", "72", "a word, not a factor"),
    ("72days", "72", "a word, not a factor"),
    ("72hours", "72", "a word, not a factor"),
    ("他吃了一半，还剩72个", "72", "the word belongs to something else"),
    ("半小时走72米", "72", "the word belongs to something else"),
    ("每半小时72米", "72", "the word belongs to something else"),
    ("半价72元", "72", "the word belongs to something else"),
    ("半年后是72元", "72", "the word belongs to something else"),
    ("它们的平方和是72", "72", "the word belongs to something else"),
    ("这个数的平方是72", "72", "the word belongs to something else"),
    ("这个数的倒数是72", "72", "the word belongs to something else"),
    ("三分之一是72", "72", "the word belongs to something else"),
    ("全程的五分之三是72千米", "72", "the word belongs to something else"),
    ("72千米是全程的五分之三", "72", "the word belongs to something else"),
    ("一半是72", "72", "the word belongs to something else"),
    ("增加72人", "72", "加 in the word 增加"),
    ("有72人参加", "72", "in 参加"),
    ("72加仑", "72", "in gallon"),
    ("72cm³的水", "72", "a power on a unit, in a phrase"),
    ("72兆字节", "72", "兆 is mega before a unit"),
    ("扣除72元", "72", "除 in a word"),
    ("初二72人", "72", "二 in a word"),
    ("不少于72", "72", "at least"),
    ("72个半成品", "72", "半 in the name of a thing"),
    ("72千克苹果", "72", "千 is kilo"),
    ("72千米路", "72", "千 is kilo"),
    ("72千瓦时", "72", "千 is kilo"),
    ("72千卡/天", "72", "千 is kilo"),
    ("72千牛。", "72", "千 is kilo"),
    ("72 km from A to B", "72", "letters that are no factors"),
    ("点A到B是72米", "72", "letters that are no factors"),
    ("72个A型零件", "72", "letters that are no factors"),
    ("72！！", "72", "emphasis, no factorial"),
]
NO_NUMBERS = [
    # a second number
    ("100，200", "a full-width comma separates ASCII digits"),
    ("每天卖出120，210，330个", "in a sentence, too"),
    ("12,34", "two digits are no group"),
    ("0,500", "no group begins with 0"),
    ("1.2.3", "a version"),
    ("3:30", "a time"),
    ("2024-05-06", "a date"),
    ("10~20", "a range"),
    ("1/2", "a fraction"),
    ("3 又 1/2", "a mixed one"),
    (r"\frac{1}{2}", "in LaTeX"),
    ("48+24=72", "a sum"),
    ("5 m 2", "a figure that is no power"),
    # an operator
    ("x>5", "a comparison"),
    ("≤5", "another"),
    ("大于5", "in words"),
    ("±5", "two numbers in one"),
    ("正负5", "in words"),
    ("5+", "an operator alone"),
    ("--5", "two signs"),
    ("x - 5", "a difference"),
    ("5-x", "the other way round"),
    ("x minus 5", "in words"),
    ("5*x", "a product"),
    ("5·x", "with a dot"),
    (r"5 \cdot x", "in LaTeX"),
    ("5/x", "a quotient"),
    ("x/y=5", "an equation whose left side is no name"),
    ("m^2=25", "another"),
    ("5=x", "the number on the left"),
    ("x=y=5", "two equals signs"),
    ("|-5|", "an absolute value"),
    ("∞", "no digits at all"),
    # a function or a power
    (r"\sqrt{5}", "a root"),
    ("√5", "as a sign"),
    ("根号5", "in words"),
    (r"\sin 30", "a sine"),
    ("sin 30", "without the backslash"),
    ("log(5)", "a logarithm"),
    ("f(5)", "any function"),
    (r"\overline{5}", "any other command"),
    ("3!", "a factorial"),
    ("5的阶乘", "in words"),
    ("5²", "a power on a number"),
    ("5^2", "with a caret"),
    ("5^{2}元", "in LaTeX"),
    ("2^n", "the exponent a letter"),
    ("x²=5", "a power on a name"),
    # a letter that touches the digits, or stands beside them as a factor does
    ("x2", "before them"),
    ("A4", "a name"),
    ("H2O", "on both sides"),
    ("x_2", "an index"),
    ("5x", "after them"),
    ("2n", "another"),
    ("3ab", "two of them"),
    ("5 x", "with a space"),
    ("2e3", "an exponent"),
    ("0x1F", "another base"),
    (r"4\pi", "a Greek one"),
    ("4π", "the same as a sign"),
    ("3D", "no unit"),
    ("2N", "one that is a variable more often"),
    # a word that makes it another number
    ("3千", "thousand"),
    ("3千人", "still"),
    ("3千元", "yuan have no kilo"),
    ("5千欧元", "nor euros, whatever ohms have"),
    ("3千克拉", "nor carats"),
    ("1.5亿", "a hundred million"),
    ("3十", "ten"),
    ("二十5", "from the other side"),
    ("5 thousand", "in English"),
    ("$3 million", "with currency"),
    ("2 dozen", "a dozen"),
    ("5k", "a suffix"),
    ("五分之3", "a fraction in words"),
    ("5 分之 3", "with spaces"),
    ("3个半", "three and a half"),
    ("2小时半", "two and a half hours"),
    ("5 and a half", "in English"),
    ("5‰", "per mille"),
    ("$5$万", "a magnitude behind a wrapper or a word"),
    ("$5$ 万元", "a magnitude behind a wrapper or a word"),
    ("“5”万", "a magnitude behind a wrapper or a word"),
    ("5，万元", "a magnitude behind a wrapper or a word"),
    ("5（万元）", "a magnitude behind a wrapper or a word"),
    ("5个亿", "a magnitude behind a wrapper or a word"),
    ("5个万", "a magnitude behind a wrapper or a word"),
    ("5多万", "some more than that many"),
    ("5余万", "some more than that many"),
    ("5几万", "some more than that many"),
    ("72多人", "some more than that many"),
    ("5余人", "some more than that many"),
    ("5来个", "some more than that many"),
    ("5打鸡蛋", "a dozen, a tenth, a million"),
    ("5打", "a dozen, a tenth, a million"),
    ("5成", "a dozen, a tenth, a million"),
    ("5兆", "a dozen, a tenth, a million"),
    ("$5m", "a magnitude in English"),
    ("5 mln", "a magnitude in English"),
    ("5 bn", "a magnitude in English"),
    ("5 grand", "a magnitude in English"),
    ("5 quadrillion", "a magnitude in English"),
    ("5 lakh", "a magnitude in English"),
    ("5 crore", "a magnitude in English"),
    ("5 score", "a magnitude in English"),
    ("5-thousand", "a magnitude in English"),
    ("5千牛奶", "thousand, before a word that only begins like a unit"),
    ("5千卡车", "thousand, before a word that only begins like a unit"),
    ("5千卡片", "thousand, before a word that only begins like a unit"),
    ("5千瓦片", "thousand, before a word that only begins like a unit"),
    ("5千米粉", "thousand, before a word that only begins like a unit"),
    ("负负5", "two signs"),
    ("负-5", "two signs"),
    ("(5)x", "a factor or an operator behind a bracket or a unit"),
    ("5%x", "a factor or an operator behind a bracket or a unit"),
    ("5元x", "a factor or an operator behind a bracket or a unit"),
    ("5元/x", "a factor or an operator behind a bracket or a unit"),
    ("5m x", "a factor or an operator behind a bracket or a unit"),
    ("(5)!", "a factor or an operator behind a bracket or a unit"),
    ("$5$!", "a factor or an operator behind a bracket or a unit"),
    ("72比x", "a factor or an operator behind a bracket or a unit"),
    ("72 mod x", "a factor or an operator behind a bracket or a unit"),
    ("f (5)", "a function"),
    ("f[5]", "a function"),
    ("Sin 30", "a function"),
    ("SIN 30", "a function"),
    ("LN 5", "a function"),
    ("sinh 5", "a function"),
    ("max 5", "a function"),
    ("gcd 5", "a function"),
    ("⌊5⌋", "a function"),
    (r"x\boxed{5}", "a factor before the box"),
    ("5abc", "three factors"),
    ("5xyz", "three factors"),
    ("5sinx", "three factors"),
    ("5的两倍", "a word after it that makes another number"),
    ("5的三倍", "a word after it that makes another number"),
    ("5的百分之十", "a word after it that makes another number"),
    ("5次幂", "a word after it that makes another number"),
    ("5平方", "a word after it that makes another number"),
    ("减5", "a word before it that makes another number"),
    ("减去5", "a word before it that makes another number"),
    ("加5", "a word before it that makes another number"),
    ("乘5", "a word before it that makes another number"),
    ("两个5", "a word before it that makes another number"),
    ("半个3", "a word before it that makes another number"),
    ("除以5", "a word before it that makes another number"),
    ("5加", "an operator alone, in words"),
    ("5除以", "another"),
    ("5 pi", "a Greek letter in Latin"),
    ("5 thousandths", "a thousandth"),
    ("多于5", "a comparison in words"),
    ("少于5", "a comparison in words"),
    ("高于5", "a comparison in words"),
    ("低于5", "a comparison in words"),
    ("不足5", "a comparison in words"),
    ("less than 5", "a comparison in words"),
    ("greater than 5", "a comparison in words"),
    ("more than 5", "a comparison in words"),
    ("twice 5", "another number in English"),
    ("half 5", "another number in English"),
    ("half of 5", "another number in English"),
    ("square root of 5", "another number in English"),
    ("五5", "a Chinese numeral that touches it"),
    ("5五", "a Chinese numeral that touches it"),
    ("3小时半", "halves"),
    ("5分之3", "halves"),
    # digits that are none
    ("1½", "a fraction in one character"),
    ("①", "in a circle"),
    ("0.3̇", "recurring"),
    ("٧٢", "Arabic"),
    ("七十二", "Chinese numerals are not read"),
    ("", "nothing"),
]


@pytest.mark.parametrize("text, number, why", NUMBERS)
def test_number(text, number, why):
    assert parse_number(text) == Decimal(number), why
    assert last_number(text) == Decimal(number), why


@pytest.mark.parametrize("text, why", NO_NUMBERS)
def test_no_number(text, why):
    assert parse_number(text) is None, why
    assert label_number(text) is None, why


LENIENT = [
    ("先有 10 个，答案是 72。", "72", "the last of several"),
    ("<answer>72</answer>", "72", "tags or not"),
    ("48+24=72", "72", "an operator before it"),
    ("x>5", "5", "what stands around the last number does not matter"),
    ("10-5", "5", "a difference is no sign"),
    ("37 - 23", "23", "nor with spaces"),
    ("每天卖出120，210，330个", "330", "a full-width comma separates"),
    (r"所以 \boxed{9{,}500}", "9500", "groups as LaTeX writes them"),
    ("面积是 25 m^2", "25", "an exponent is not the last number"),
    ("面积是25m2", "25", "nor in this form"),
    ("买了72张A4纸", "72", "digits in a name are none"),
    ("有 72 个，即 5²+47", "47", "a power is none"),
    ("72 个，是 90 的 4/5", "90", "nor is a fraction"),
    ("早上 8 点到 11:30", "8", "nor a time"),
    ("先有 5 个，后来有 3万个", "5", "nor a magnitude"),
    ("没有", None, "none at all"),
    ("5²", None, "none that is one"),
]


@pytest.mark.parametrize("text, number, why", LENIENT)
def test_last_number_is_the_lenient_reading(text, number, why):
    assert last_number(text) == (None if number is None else Decimal(number)), why


def float32(number: float) -> float:
    """What a float32 column gives for `number`: `datasets` hands it over as a Python float."""
    return struct.unpack("f", struct.pack("f", number))[0]


LABELS = [
    (72, "72", "int"),
    (np.int8(-72), "-72", "NumPy's"),
    (10**400, 10**400, "more than a float holds"),
    (72.5, "72.5", "float"),
    (0.1, "0.1", "it means what it prints"),
    (1e20, "1e20", "a large one"),
    (1 / 3, "0.3333333333333333", "one that no float32 is"),
    (float32(0.1), "0.1", "a float32 that became a float"),
    (float32(-1234.56), "-1234.56", "another"),
    (float32(12345.67), "12345.67", "with all the digits that float32 keeps"),
    (float32(1e20), "1e20", "a large one"),
    (1 / 8192, "0.0001220703125", "a float32 too, but nothing was rounded"),
    (2.0**-20, "9.5367431640625e-07", "another"),
    (123456784.0, "123456784", "another, an integer"),
    (9876543488.0, "9876543488", "a larger one"),
    (1234567.875, "1234567.875", "eighths"),
    ((3 / 4) ** 10, "0.056313514709472656", "a power, with all the bits of a float32"),
    ((7 / 8) ** 5, "0.512908935546875", "another"),
    (np.float32(0.1), "0.1", "NumPy's"),
    (np.float16(0.1), "0.1", "and the half of it"),
    (np.float64(0.1), "0.1", "and the double"),
    (np.array(72), "72", "an array of no dimension"),
    (np.array([72]), None, "an array of one"),
    ("9" * 5000, "9" * 5000, "more digits than int() takes"),
    (Decimal("72.50"), "72.5", "Decimal"),
    (Fraction(72), "72", "Fraction"),
    ("1,080 元", "1080", "a string is read as an answer is"),
    (Fraction(1, 2), None, "as an answer, 1/2 is none"),
    (Decimal("NaN"), None, "not a number"),
    (Decimal("-Infinity"), None, "nor this"),
    (float("nan"), None, "nor as a float"),
    (float("inf"), None, "nor this"),
    (True, None, "a truth value"),
    (np.bool_(True), None, "NumPy's"),
    (None, None, "a gap"),
    ([72], None, "a list"),
]


@pytest.mark.parametrize("label, number, why", LABELS)
def test_label(label, number, why):
    assert label_number(label) == (None if number is None else Decimal(number)), why


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


DECIMALS = st.decimals(-(10**12), 10**12, allow_nan=False, places=0) | st.decimals(-(10**6), 10**6, places=3)
FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
# N is the number, in one of these ways …
WRITTEN = {
    "plain": lambda n: f"{n:f}",
    "groups": lambda n: f"{n:,f}",
    "full-width": lambda n: f"{n:f}".translate(FULL_WIDTH),
    "full-width groups": lambda n: f"{n:,f}".translate(FULL_WIDTH),
    "LaTeX groups": lambda n: f"{n:,f}".replace(",", "{,}"),
    "thin spaces": lambda n: f"{n:,f}".replace(",", r"\,"),
}
# … and what stands around it: any of the first with any of the second is the number, wrapped in any of the third.
BEFORE = ["", "答：", "共", "约", "答案是 ", "The answer is ", "x = ", "x=", "≈", "每小时", "#### ", "价格为："]
AFTER = [
    "",
    "元",
    " 个苹果",
    "kg",
    " km/h",
    "元/个",
    "%",
    r"\%",
    "°",
    " m²",
    " cm^3",
    r"\text{ m}^{2}",
    "千米",
    "千焦",
    "（个）",
    " apples",
]
WRAPPED = [
    "N",
    "N。",
    "N.",
    "N\n",
    r"\boxed{N}",
    r"\(N\)",
    "$N$",
    r"$\boxed{N}$。",
    "**N**",
    "`N`",
    "（N）",
    "“N”",
    r"\text{N}",
    "　N　",
]
# With any of these around it, whatever else stands there, it is none.
SPOILT = [
    "1 N",
    "N 2",
    "N 或 3",
    "N/2",
    "3:N",
    "N+",
    "2×N",
    "N×",
    "x>N",
    "±N",
    "N-x",
    "N*x",
    r"\sqrt{N}",
    r"\frac{N}{x}",
]
SPOILT += [
    "√N",
    "sin N",
    "f(N)",
    "N!",
    "N²",
    "N^2",
    "N^{x}",
    "N½",
    "xN",
    "N x",
    "Nx",
    "Nn",
    r"N\pi",
    "Nπ",
    "Ne3",
    "x_N",
]
SPOILT += ["N‰", "N万", "N千", "N百万元", "N million", "N分之三", "三分之N", "N个半", "N的平方", "|N|", "N=x", "N，1"]


@given(DECIMALS, *map(st.sampled_from, (list(WRITTEN.values()), BEFORE, AFTER, WRAPPED)))
def test_any_number_in_any_allowed_surrounding_is_that_number(n, write, before, after, wrapped):
    text = wrapped.replace("N", before + write(n) + after)
    assert parse_number(text) == n == last_number(text)
    assert is_correct(f"<answer>{text}</answer>", f"{n:f}")


SIGNS = ["-", "- ", "−", "－", "-$", "- US$", "-¥ ", "$-", "¥ -", "负", "負 ", "负人民币", "零下", "零下 "]


@given(
    DECIMALS.filter(lambda n: n > 0),
    *map(st.sampled_from, (list(WRITTEN.values()), SIGNS, ["", "答：", "x = "], AFTER)),
)
def test_any_sign_makes_any_number_negative(n, write, sign, before, after):
    assert parse_number(before + sign + write(n) + after) == -n


@given(DECIMALS.filter(lambda n: n >= 0), *map(st.sampled_from, (list(WRITTEN.values()), SPOILT, WRAPPED)))
def test_any_number_in_any_other_surrounding_is_none(n, write, spoilt, wrapped):
    assert parse_number(wrapped.replace("N", spoilt).replace("N", write(n))) is None


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_float32_label_is_the_shortest_decimal_that_is_that_float32(x):
    assert float32(float(label_number(x))) == x
    assert label_number(np.float32(x)) == Decimal(str(np.float32(x)))


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
    ("<answer>" + " " * 100_000 + "1" + " " * 100_000 + "m</answer>", "white space around a number"),
    ("<answer>" + "１，０００" * 40_000 + "</answer>", "full-width groups"),
    ("<answer>1" + "{,}000" * 33_000 + "</answer>", "LaTeX groups"),
    ("<answer>" + "\\boxed{" * 28_000 + "1</answer>", "boxes that never close"),
    ("<answer>1" + "}{" * 100_000 + "</answer>", "braces"),
    ("<answer>" + "*" * 200_000 + "1</answer>", "asterisks"),
    ("<answer>" + "**_" * 66_000 + "1</answer>", "half-open emphasis"),
    ("<answer>" + "￥" * 200_000 + "5</answer>", "currency"),
    ("<answer>" + "=" * 200_000 + "5</answer>", "equals signs"),
    ("<answer>5" + "m/s/" * 50_000 + "</answer>", "units without an end"),
    ("<answer>5 " + "a-" * 100_000 + "</answer>", "hyphens"),
    ("<answer>5" + "一" * 200_000 + "半</answer>", "a word that spoils it, at the very end"),
    ("<answer>5" + "\0\ud800" * 100_000 + "</answer>", "characters that are no text"),
]


@pytest.mark.parametrize("func", REWARD_FUNCS, ids=lambda func: func.__name__)
@pytest.mark.parametrize("text, why", HOSTILE)
def test_hostile_text_is_scored_in_under_a_second(func, text, why):
    start = time.process_time()  # of this process alone: 0.07 s at most; a minute where it grows with the square
    assert math.isfinite(score(func, text))
    assert time.process_time() - start < 1, why
