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
# What LaTeX, Markdown and HTML write for other signs, or for none. \sqrt, \pi and all that is not named here stays.
_MARKUP = {
    r"\$(?<![A-Za-z\\].)\$?([^$\n]+)(?<!\\)\$\$?(?![0-9])|<(?<![A-Za-z].)/?(?:b|br|p|strong) ?/?>": r" \1 ",  # $72$, <b>
    r"(?<=[0-9])(?:\{,\}|\\,|,\\!)(?=[0-9]{3})": ",",  # 9{,}500
    r"\^ ?\{? ?(?:\\circ(?![A-Za-z])|°)|\\degree(?![A-Za-z])": "°",
    r"\} ?\{": "/",  # \frac{1}{2}
    r"[{}`∴→⇒∠~\\](?:(?<![~\\])|(?<=~)(?=[\\a-z])|(?<=\\)(?:[\\{},;:!>()\[\]\s]|(?=[$%#])|(?:boxed|[fm]box|text[a-z]*|math[a-z]{2}"
    r"|rm|bm|boldsymbol|underline|operatorname|displaystyle|left|right|q?quad|Omega|therefore|[Rr]ightarrow)(?![A-Za-z])))": " ",
    r"(?m:^ *(?:\* |[-+>] (?=\*\*)))|(?<![A-Za-z0-9])(\*{1,3}|_{1,4})([^*_\n]+)\1": r" \2 ",  # a bullet, **72**
}
_LATIN, _HAN = "A-Za-zµÀ-ÖØ-öø-ʯͰ-Ͽ𝐀-𝟋", r"[^\W\d_A-Za-z]"  # the letters of formulas; all others are words
_FUNCTION = r"(?i:sqrt|[dt]?frac|(?:a(?:rc)?)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp|abs|max|min|gcd|lcm|mod)"
# The units that may touch the digits, as in 5kg. Any other letter there makes them a term, 5x, or another number, 2e3.
_UNIT = (
    r"(?:[nmµμcdk]?m|[μµm]?g|kgs?|K[gGM]|[CM][ML]|[mcdk]?[lL]|[ht]|m?s|[mkMG]?(?:Wh?|V|Hz|h?Pa|Ω)|[mk][AJN]|k?cal|m?mol|ha"
    rf"|[kmKMGT]i?[Bb](?:ps)?|in|ft|yd|mi|lbs?|oz|hrs?|mins?|secs?|[ap]m|mph|pcs|st|[nr]d|th|RMB|CNY|USD|HKD|EUR|GBP|JPY)(?![{_LATIN}])"
)
_SUFFIX = rf" ?%| ?\(?(?:{_UNIT}|[A-Z](?=/)|[/·]){{1,5}}|"
_POWER = rf"((?<![{_LATIN}])[mcdk]?[ms]|[米里秒])(?: ?\^ ?[23]|[²³]|(?<=m)[23])(?![A-Za-z0-9]|\.[0-9])"  # of a unit: m², m^2, m2
_CURRENCY = r"(?:(?<![A-Za-z])(?:[A-Z]{1,2}\$|RMB|CNY|USD|HKD|EUR|GBP|JPY)|[$¥￥€£￡₩₹]|(?<![0-9])(?:人民币|美元))"
# A minus is a sign where there is nothing to take from; after a word only if it touches the number, as 是-5 does.
_SIGN = (
    rf"(?<![\w)\]%°-])(?<![\w)\]%°] )[-+][ (]?|(?:(?<={_HAN})|(?<={_HAN} )|(?<=[^\W\d_]{{2}} ))[-+]\(?"
    r"|(?:(?<!正)[负負]的?|零下(?:[摄华]氏)?) ?|(?i:negative|(?:^|(?<=is )|(?<=[=:] ))minus) "
)
_PREFIX = re.compile(rf"(?:({_SIGN})(?:{_CURRENCY} ?)?|{_CURRENCY} ?({_SIGN})?|)\Z")
# 1,080 or 1080 or .5, with decimals. [0-9], because \d also matches Arabic digits; ahead of all else, as it is fast.
_DIGITS = re.compile(r"(?=[.0-9])(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)")
# What makes digits a part of something else: x2, m^2, f(5), 3/4, 3:4, 三分之5 (but 百分之5 is 5 per cent), \sqrt 5 …
_PART_BEFORE = re.compile(
    rf"(?:[{_LATIN}0-9_十百千万亿又]|(?<!{_HAN})[一二两三四五六七八九]|\^ ?-? ?|[{_LATIN}][(\[]|(?<![{_LATIN}])[b-zͰ-Ͽ][ (\[]{{1,3}}|[0-9][/:]|(?:√"
    rf"|(?<!百)分之|根号下?|(?<![A-Za-z]){_FUNCTION}|[大小]于|(?<!不)[多少高低]于|不(?:等于|足|到)|正负|[负負]|乘以?|除以|(?<![增参添要])加上?|减去?|两个"
    r"|半个?|(?i:than|twice|double|half|root|plus|minus|times|divided by)(?: of)?)[ (“\"\[]{0,2})\Z"
)
# … 5², 1½, 1.2.3, 5:x, 5/x, 5x (but 5kg and 5days are words), and behind brackets too 5 x, 2^n, 3!, 4\pi, 3万, 3个半 …
_KILO = "克(?!拉)|米(?![粉饭线])|(?:[瓦焦卡伏赫帕安升牛欧][时安特兹顿]?|卡路里|字节|比特|电子伏)(?![^\\W\\d_A-Za-z每的以左时热能])"
_PART_AFTER = re.compile(
    rf"[²³¹¼-¾⁰-₉⅐-⅞\u0300-\u036f_零二两三四五六七八九多余几减乘除]|一(?!共)|加(?!仑)|来[个万人天年]|\.[0-9]|:\S|[/·](?!{_HAN}|{_UNIT}|[a-z]{{3}})"
    rf"|(?!{_UNIT}|(?!{_FUNCTION})[A-Z]?[a-z]{{4}})[{_LATIN}]|[ ()\[\]\"“”‘’「」，]{{0,4}}(?:[!^πΠ‰‱√]|\\?pi(?![A-Za-z])|\\{_FUNCTION}"
    rf"|(?<![\w.])(?!{_UNIT}|a [a-z]|[apAP]\.|[ACFJKNTVW](?!\w))[{_LATIN}](?![{_LATIN}&'’-])"
    rf"|[十拾佰仟]|个?[万萬亿億半](?![径圆价成])|兆(?![瓦帕赫焦欧字比位])|打(?![印开包])|成(?![人员年品])|百(?!帕)|千(?!{_KILO})|分之"
    r"|-?(?i:hundred|thousand|(?:m|b|tr|quadr)illion|mln|bn|grand|lakh|crore|score|dozen|squared|cubed|(?:and )?(?:a )?half)"
    r"(?:s|ths?)?(?![A-Za-z]))"
)
# What may join words (T-shirt, km/h, 千瓦·时), and words that make it another number: in its phrase.
_JOINT = rf"[-/·](?:(?<=[a-z一]-)(?=[a-z]{{3}})|(?<!-)(?:(?<={_HAN}.)|(?<=[a-z][a-z].)|(?<=m.))(?=[^\W\d_]))"
_NO_WORD_AFTER = re.compile(
    r"[^，。,;；：:是为占]{0,40}?(?:(?<![上下前后])半(?![径圆价年天月小成])|(?<![得积])分之|次[方幂]|阶乘|倒数|相反数|绝对值|方根|[平立]方(?![米里厘分毫千公英])"
    rf"|[两二三四五六七八九十百]倍|[乘除]以| (?:plus|minus|mod)(?![a-z])|(?<![{_LATIN}&'’.-])(?!{_UNIT})[b-zͰ-Ͽ](?![\w&'’-]))"
)


def extract_answer(text: str) -> str | None:
    """The text of the last complete `<answer>…</answer>` in `text`, or None. No tags, no answer."""
    _, start, answer = text.rpartition("</answer>")[0].rpartition("<answer>")
    return answer.partition("</answer>")[0] if start else None


def _plain(text: str) -> str:
    if re.search("[＂-～−‐‑‒–﹣]", text):  # what _FOLD has; to translate is slow
        text = re.sub("，(?=[０-９]{3})(?<=[０-９]，)", ",", text).translate(_FOLD)
    if any(c in text for c in ("<b", "<p", "<strong", *"\\{*_`$°∴→⇒∠")):
        for pattern, plain in _MARKUP.items():
            text = re.sub(pattern, plain, text)
    return " ".join(text.split()).replace(" / ", "/").replace("\\approx", "≈")


def _read(match: re.Match) -> tuple[Decimal | None, int]:
    """The number that these digits are, None if they are a part of something else; and where its sign begins."""
    plain, (start, end) = match.string, match.span()
    prefix = _PREFIX.search(plain, max(start - 14, 0), start)
    start, million = prefix.start(), prefix[0][-1:] == "$" and plain[end : end + 1] == "m"  # $5m
    if million or _PART_AFTER.match(plain, end) or _PART_BEFORE.search(plain, max(start - 14, 0), start):
        return None, start
    digits, sign = match.group().replace(",", ""), prefix[1] or prefix[2] or "+"
    return Decimal(digits if sign[0] == "+" else "-" + digits), start


def parse_number(text: str) -> Decimal | None:
    """The number that `text` is, or None if it is not one number with nothing around it but what may stand there.

        answer  =  around number around, also in \\boxed{}, \\text{}, $…$, \\(…\\), **…**, `…`, brackets, quotes
        around  =  words and punctuation; before it then = or ≈ (x = 72); after it first a unit with its power, % or °
        number  =  sign? currency? digits           -5, - 5, -US$5, $-5, 负5, 零下5
        digits  =  1080, 1080.5, .5, 1,080, in LaTeX 9{,}500 and 9\\,500; １０８０, １，０８０ (but 1，080 is two)

    Anything else makes it none: a second number (10 80, 3/4, 48+24=72), an operator or a function (x>5, 3!, \\sin 30),
    a letter that is no unit (x2, 5x, 2e3), a word that makes it another number (3千 but not 3千克, 3个半, 3 million), 5².
    """
    match = _DIGITS.search(plain := _plain(text))
    number, start = _read(match) if match else (None, 0)
    if number is None or match.span() == (0, len(plain)):  # nothing around it, as in most answers and labels
        return number
    before = re.sub(r"[=≈~]\Z", "", plain[:start].rstrip(" (\"'“‘「$[")).lower()
    after = re.sub(_SUFFIX, "", re.sub(_POWER, r"\1", plain[match.end() :].lstrip(")\"'”’」$]"), count=1), count=1)
    around = re.sub(_JOINT, "", f" {before}。一{after}".lower())  # 一 for the number: no digit in Unicode, but a letter
    strange = any(c in "*/\\_@%·-^π‰‱⌊⌋⌈⌉" or unicodedata.category(c) in ("Nd", "Nl", "No", "Sm") for c in set(around))
    return None if strange or _NO_WORD_AFTER.match(after) else number


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, whatever stands around it: the lenient reading of the evaluation."""
    return next((n for m in [*_DIGITS.finditer(_plain(text))][::-1] if (n := _read(m)[0]) is not None), None)


def label_number(label: int | float | str | Decimal) -> Decimal | None:
    """The label as a number, None if it is not one. A string may be written like an answer (`1,080`).

    A float means what it prints. But a float32 that prints 12 digits or more where 7 will do, as 0.1 does when it has
    been one (0.10000000149011612), means those 7; but for whole numbers below 2**53 and fractions of 12 bits (1/8192).
    """
    label = label[()] if getattr(label, "shape", None) == () else label  # NumPy's array of no dimension
    if isinstance(label, str | Fraction):
        return parse_number(str(label))
    if isinstance(label, bool) or not isinstance(label, Decimal | numbers.Real):
        return None
    number = Decimal(int(label) if isinstance(label, numbers.Integral) else str(label))  # NumPy's and pandas' too
    long = isinstance(label, float) and len(number.normalize().as_tuple().digits) > 11 and "0" * 10 not in label.hex()
    if long and array("f", [short := float(f"{label:.7g}")])[0] == label and (label % 1 or abs(label) >= 2**53):
        number = Decimal(str(short))
    return number if number.is_finite() else None


def is_strict_format(text: str) -> bool:
    """Whether the whole of `text` is the form above: each tag once, newlines as shown, neither block blank."""
    text = text.removesuffix("\n")
    head, _, answer = text.removesuffix("\n</answer>").partition("\n</reasoning>\n<answer>\n")
    reasoning = head.removeprefix("<reasoning>\n")
    whole = text == f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    return bool(whole and reasoning.strip() and answer.strip()) and all(text.count(tag) == 1 for tag in TAGS)


def is_soft_format(text: str) -> bool:
    """Whether `text` holds a reasoning block and, after it, an answer block, whatever else there is."""
    for tag in TAGS:
        _, found, text = text.partition(tag)  # where one is not found, nothing is left for the next
    return bool(found)


def xml_count(text: str) -> float:
    """0.125 for each tag that occurs exactly once, less 0.001 for every character after the answer.

    An opening tag counts only before the first `</answer>`, and the fine is counted from there, less white
    space at the very end: so nothing written after `</answer>` can raise the reward.
    """
    head, end_tag, tail = text.partition("</answer>")
    tags = sum(head.count(tag) == 1 and tag not in tail for tag in TAGS[:3])
    ended_once = bool(end_tag) and end_tag not in tail
    return 0.125 * (tags + ended_once) - 0.001 * len(tail.rstrip())


def is_english(text: str) -> bool:
    """Whether `text` has more words in Latin letters than Chinese characters; tags and LaTeX commands do not count."""
    text = re.sub(r"</?[a-z]+>|\\[A-Za-z]+", " ", text)
    return len(re.findall(r"[A-Za-z]{2,}", text)) > len(re.findall(r"[一-鿿]", text))


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
