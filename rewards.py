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

import numbers
import re
import unicodedata
from array import array
from decimal import Decimal
from fractions import Fraction

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")

# Full-width ASCII and what stands for a minus, not the Chinese dash (——), ！ and ，. Not NFKC: it turns 5² into 52.
_FOLD = {c: c - 0xFEE0 for c in range(0xFF02, 0xFF5F) if c != 0xFF0C} | dict.fromkeys(map(ord, "−‐‑‒–﹣"), "-")
# What LaTeX and Markdown write for other signs, or for none. \sqrt, \pi and all that is not named here stays.
_MARKUP = {
    r"(?<=[0-9])(?:\{,\}|\\,|,\\!)(?=[0-9]{3})": ",",  # 9{,}500
    r"\^ ?\{? ?\\circ(?![A-Za-z])": "°",
    r"\} ?\{": "/",  # \frac{1}{2}
    r"\\(?:(?:boxed|[fm]box|text[a-z]*|math(?:rm|bf|it|sf|tt)|left|right|q?quad)(?![A-Za-z])|[,;:!>()\[\]\s])": " ",
    r"(?<![A-Za-z0-9])(\*{1,3}|_{1,4})([^*_\n]+)\1": r" \2 ",  # **72**
    r"[{}`∴→⇒∠]|\\(?=[$%#])|~(?=\\)|(?m:^ *\* )": " ",
}
_LATIN, _HAN = "A-Za-zµÀ-ÖØ-öø-ʯͰ-Ͽ𝐀-𝟋", r"[^\W\d_A-Za-z]"  # the letters of formulas; all others are words
# The units that may touch the digits, as in 5kg. Any other letter there makes them a term, 5x, or another number, 2e3.
_UNIT = (
    r"(?:[nμµmcdk]?m|[μµm]?g|kgs?|[mcdk]?[lL]|[th]|m?s|[mkMG]?(?:Wh?|V|Hz|h?Pa|Ω)|[mk][AJN]|k?cal|[kmKMGT]i?[Bb](?:ps)?"
    rf"|ha|in|ft|yd|mi|lbs?|oz|hrs?|mins?|secs?|[ap]m|mph|pcs|st|nd|rd|th|RMB|CNY|USD|HKD|EUR|GBP|JPY)(?![{_LATIN}])"
)
_SUFFIX = rf" ?%| ?\(?(?:[mcdk]?m[23](?![\w.])|(?:{_UNIT}|{_HAN}?[米里秒]|[/·]){{1,5}}(?: ?\^ ?[23](?![0-9])|[²³])?)|"
_CURRENCY = r"(?:(?<![A-Za-z])(?:[A-Z]{1,2}\$|RMB|CNY|USD|HKD|EUR|GBP|JPY)|[$¥￥€£￡₩₹]|(?<![0-9])(?:人民币|美元))"
# A minus is a sign where there is nothing to take from; after a word only if it touches the number, as 是-5 does.
_SIGN = rf"(?<![\w)\]%°-])(?<![\w)\]%°] )[-+] ?|(?:(?<={_HAN})|(?<=[^\W\d_]{{2}} ))[-+]|(?:(?<!正)[负負]|零下(?:[摄华]氏)?) ?"
_PREFIX = re.compile(rf"(?:({_SIGN})(?:{_CURRENCY} ?)?|{_CURRENCY} ?({_SIGN})?|)\Z")
# 1,080 or 1080 or .5, with decimals. [0-9], because \d also matches Arabic digits; ahead of all else, as it is fast.
_DIGITS = re.compile(r"(?=[.0-9])(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)")
# What makes digits a part of something else: x2, m^2, f(5), 3/4, 3:4, 三分之5 (but 百分之5 is 5 per cent), \sqrt 5 …
_FUNCTION = r"(?:sqrt|[dt]?frac|(?:arc)?(?:sin|cos|tan|cot)|log|ln|lg|exp|abs)"
_PART_BEFORE = re.compile(
    rf"(?:[{_LATIN}0-9_十百千万亿]|\^ ?-? ?|[{_LATIN}]\(|[0-9][/:]|(?<!百)分之 ?|(?:√|根号下?|(?<![A-Za-z]){_FUNCTION}) ?\(? ?)\Z"
)
# … 5², 1½, 1.2.3, 5:x, 2^n, 3!, 4\pi, 3万, 3千 (but 3千克 and 1013百帕 are units), 3 million, 3个半, 5x, 5 x, 5/x.
_PART_AFTER = re.compile(
    rf"[²³¹¼-¾⁰-₉⅐-⅞\u0300-\u036f_]|\.[0-9]|:\S|[/·](?!{_HAN}|{_UNIT}|[a-z]{{3}})|(?!{_UNIT})[{_LATIN}]"
    rf"|[ ($]{{1,3}}(?!{_UNIT}|a [a-z]|[apAP]\.)[{_LATIN}](?![{_LATIN}&-])| ?(?:[!^πΠ‰‱√]|\\(?:pi|{_FUNCTION}))"
    r"| ?(?:[十拾佰仟万萬亿億]|百(?!帕)|千(?!克(?!拉)|欧(?!元)|[米瓦焦卡伏赫帕安升牛]|字节|比特|电子伏)|[个小时天年月岁元米]{0,2}半(?![径圆])|分之)"
    r"| ?(?i:hundred|thousand|million|billion|trillion|dozen|squared|cubed|(?:and )?(?:a )?half)"
)
# What may join words (T-shirt, km/h, 千瓦·时), and words that make it no number wherever they stand.
_JOINT = rf"[-/·](?:(?<=[a-z一]-)(?=[a-z]{{3}})|(?<!-)(?:(?<={_HAN}.)|(?<=[a-z][a-z].)|(?<=m.))(?=[^\W\d_]))"
_NO_WORDS = "半|分之|正负|大于|小于|不等于|乘以|除以|次方|阶乘|倒数|相反数|绝对值|根号|方根|的平方|的立方|half of。| plus| minus|negative"


def extract_answer(text: str) -> str | None:
    """The text of the last complete `<answer>…</answer>` in `text`, or None. No tags, no answer."""
    start = text.rfind("<answer>", 0, text.rfind("</answer>") + 1)
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)]


def _plain(text: str) -> str:
    text = re.sub("，(?=[０-９]{3})(?<=[０-９]，)", ",", text).translate(_FOLD)
    if any(c in text for c in "\\{*_`∴→⇒∠"):
        for pattern, plain in _MARKUP.items():
            text = re.sub(pattern, plain, text)
    return " ".join(text.split()).replace(" / ", "/")


def _read(match: re.Match) -> tuple[Decimal | None, int]:
    """The number that these digits are, None if they are a part of something else; and where its sign begins."""
    plain, (start, end) = match.string, match.span()
    prefix = _PREFIX.search(plain, max(start - 8, 0), start)
    start = prefix.start()
    if _PART_AFTER.match(plain, end) or _PART_BEFORE.search(plain, max(start - 10, 0), start):
        return None, start
    digits, sign = match.group().replace(",", ""), prefix[1] or prefix[2] or "+"
    return Decimal(digits if sign[0] == "+" else "-" + digits), start


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is, or None if it is not one number with nothing around it but what may stand there.

        answer  =  around number around, also in \\boxed{}, \\text{}, $…$, \\(…\\), **…**, `…`, brackets, quotes
        around  =  words and punctuation; before it then = or ≈ (x = 72); after it first a unit with its power, % or °
        number  =  sign? currency? digits           -5, - 5, -US$5, $-5, 负5, 零下5
        digits  =  1080, 1080.5, .5, 1,080, in LaTeX 9{,}500 and 9\\,500; １０８０, １，０８０ (but 1，080 is two)

    Anything else makes it none: a second number (10 80, 3/4, 48+24=72), an operator or a function (x>5, 2^n, 3!,
    √5, \\sin 30), a letter that touches the digits and is no unit (x2, 5x, 2e3), a word that makes it another
    number (3万, 3千 but not 3千克, 五分之3, 3个半, 3 million), digits that are not 0 to 9 (5², 1½).
    """
    plain = _plain(text)
    match = _DIGITS.search(plain)
    number, start = _read(match) if match else (None, 0)
    if number is None or match.span() == (0, len(plain)):  # nothing around it, as in most answers and labels
        return number
    before, after = plain[:start].rstrip(" (\"'“‘「$["), re.sub(_SUFFIX, "", plain[match.end() :], count=1)
    around = f" {before.removesuffix('≈' if before.endswith('≈') else '=')}。一{after}".lower()  # 一 for the number
    around = re.sub(_JOINT, "", re.sub("半[径圆]|[上下前后]半|[百得积]分之", "", around))
    # Digits and mathematical symbols (Sm), as Unicode has them. 一 and 千 are letters there: `3 个一斤的苹果`.
    strange = any(c in "*/\\_@%·-^π‰‱" or unicodedata.category(c) in ("Nd", "Nl", "No", "Sm") for c in set(around))
    return None if strange or any(word in around for word in _NO_WORDS.split("|")) else number


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, whatever stands around it: the lenient reading of the evaluation."""
    return next((n for m in [*_DIGITS.finditer(_plain(text))][::-1] if (n := _read(m)[0]) is not None), None)


def label_number(label: int | float | str | Decimal) -> Decimal | None:
    """The label as a number, None if it is not one. A string may be written like an answer (`1,080`).

    A float means what it prints. But one that is a float32 and prints more digits than a float32 has, as 0.1 does when
    it has been one (0.10000000149011612), means the shortest decimal that is that float32; 1/8192 means itself.
    """
    if isinstance(label, str | Fraction):
        return parse_number(str(label))
    if isinstance(label, bool) or not isinstance(label, Decimal | numbers.Real):
        return None
    number = Decimal(int(label) if isinstance(label, numbers.Integral) else str(label))  # NumPy's and pandas' too
    if isinstance(label, float) and len(number.normalize().as_tuple().digits) > 9 and "0" * 10 not in label.hex():
        shorter = (f"{label:.{digits}g}" for digits in range(1, 10))
        number = next((Decimal(s) for s in shorter if array("f", [float(s)])[0] == label), number)
    return number if number.is_finite() else None


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
    number = parse_number(extract_answer(text) or "")
    return number is not None and number == label_number(label)


# TRL calls each of these with the completions of a step (and the dataset's columns by name) and adds the results up.


def correctness_reward_func(completions: list, answer: list, **kwargs) -> list[float]:
    """2.0 for the right number inside `<answer>`, else 0.0. `answer`: one label a completion."""
    return [2.0 if is_correct(text, label) else 0.0 for text, label in zip(_texts(completions), answer, strict=True)]


def int_reward_func(completions: list, **kwargs) -> list[float]:
    """0.5 if the answer is an integer and nothing else (`-?[0-9]+`, folded and stripped), else 0.0."""
    answers = ((extract_answer(text) or "").translate(_FOLD).strip() for text in _texts(completions))
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
