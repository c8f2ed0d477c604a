"""What an answer is worth and when it is right: by our rules (rewards.py), or by those of a file of the user's.

Such a file, `--rewards FILE.py`, takes the place of ours everywhere: in training, in what is printed and drawn, in
every evaluation and in infer.py. It has

    REWARD_FUNCS             what TRL calls: func(prompts, completions, answer, **kwargs) → a number a completion
    MAX_REWARDS              the best value of each, for the picture
    SYSTEM_PROMPT            the form that is asked for; a system_prompt in the recipe or as a flag wins over it
    is_correct(text, label)  whether the completion `text` is right: the strict accuracy
    check_label(label)       the label as it shall be kept, a str; ValueError, with the reason, for what is none

and may leave out all but the first. Then the best values are not known, the prompt is the default one, a completion is
correct where the text inside `<answer>`, stripped, is the label, and a label is any text that is not empty. A file that
takes our is_correct (`from rewards import is_correct`) has numbers for labels, and so our check_label, lenient accuracy
and votes, too.
"""

import functools
import hashlib
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import rewards
from data import NOT_UTF8, number_label
from rewards import TAGS, extract_answer, label_number, last_number, parse_number
from support.errors import UserError
from support.screen import say

TRL = (
    "TRL calls a reward function as func(prompts, completions, answer, **kwargs), where a completion is a list of "
    "messages, and takes a list with a number, or None, for each completion"
)
TAKEN = {"prompts", "completions", "answers", "step", "question", "completion", "answer"}  # what samples.jsonl has, too


class RewardsError(UserError):
    """What is wrong with the user's file of rewards."""


@dataclass(frozen=True)
class Rules:
    """What an answer is worth, when it is right, and what a label is. `text` is a whole completion."""

    funcs: list[Callable]  # as TRL calls them
    maxima: dict[str, float]  # the best value of each, by name; empty: not known
    is_correct: Callable[[str, str], bool]  # text, label
    is_lenient: Callable[[str, str], bool]
    check_label: Callable[[object], str]  # the label as it is kept, or ValueError
    answer_of: Callable[[str], str | None]  # what of a text votes for the majority
    vote: Callable[[str], Hashable]  # answers with the same vote say the same
    system_prompt: str | None = None  # None: the default one
    file: Path | None = None  # None: ours
    source: bytes = b""  # the content of `file`

    @property
    def names(self) -> list[str]:
        return [func.__name__ for func in self.funcs]

    @property
    def digest(self) -> str | None:
        """What tells one content of the file from another; None for ours."""
        return hashlib.sha256(self.source).hexdigest() if self.file else None

    def say(self) -> None:
        """A line on whose rules these are, where they are the user's."""
        if self.file:
            best = self.maxima
            parts = [f"{name} (at best {best[name]:g})" if name in best else name for name in self.names]
            say(f"rewards     {self.file}: {', '.join(parts)}")

    def check_rewarded(self, rewarded: dict[str, list]) -> None:
        """Raises RewardsError where no function gave a completion a number. `rewarded`: a step's rewards, by name."""
        for i, values in enumerate(zip(*(rewarded[name] for name in self.names), strict=True)):
            if all(value is None for value in values):
                raise RewardsError(
                    f"{self.file}: {' and '.join(self.names)} gave None for completion {i + 1} of a step, which has "
                    "then no reward: let at least one of REWARD_FUNCS give a number for every completion."
                )


# --- ours, and what a file leaves out ----------------------------------------------------------------


def last_number_is(text: str, label) -> bool:
    """Whether the last number anywhere in `text` is the label."""
    number = last_number(text)
    return number is not None and number == label_number(label)


def number_vote(answer: str) -> Hashable:
    number = parse_number(answer)  # 72 and 72.0 vote for the same
    return answer.strip() if number is None else number


OURS = Rules(
    funcs=rewards.REWARD_FUNCS,
    maxima={func.__name__: best for func, best in zip(rewards.REWARD_FUNCS, rewards.MAX_REWARDS, strict=True)},
    is_correct=rewards.is_correct,
    is_lenient=last_number_is,
    check_label=number_label,
    answer_of=extract_answer,
    vote=number_vote,
)


def last_line(text: str) -> str:
    """The last line of `text` that is not blank, its tags taken out."""
    for tag in TAGS:
        text = text.replace(tag, "\n")
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def answer_is(text: str, label: str) -> bool:
    return (extract_answer(text) or "").strip() == label


def last_line_has(text: str, label: str) -> bool:
    """Whether the label stands in the last line of `text`, and not as a part of a Latin word or a number."""
    return bool(re.search(rf"(?<![A-Za-z0-9]){re.escape(label)}(?![A-Za-z0-9])", last_line(text)))


def text_label(label) -> str:
    if label is None or label != label or not str(label).strip():
        raise ValueError("it is empty")
    return str(label).strip()


def answer_or_last_line(text: str) -> str | None:
    answer = extract_answer(text)
    return last_line(text) if answer is None else answer


TEXT = replace(
    OURS,
    is_correct=answer_is,
    is_lenient=last_line_has,
    check_label=text_label,
    answer_of=answer_or_last_line,
    vote=str.strip,
)


# --- the user's --------------------------------------------------------------------------------------


def load_rules(file: str) -> Rules:
    """The rules of the Python file `file`, ours for an empty name. Raises RewardsError where TRL could not use it."""
    if not file:
        return OURS
    try:
        source = Path(file).read_bytes()
    except OSError as error:
        raise RewardsError(f"cannot read the rewards {file}: {error.strerror}.") from None
    return _load(file, source)


@functools.cache  # the recipe's parser asks for the prompt, and the run for all of it: a file is executed once
def _load(file: str, source: bytes) -> Rules:
    module = ModuleType("own_rewards")
    module.__file__ = file
    sys.modules[module.__name__] = module  # as dataclasses and pickle look there
    try:
        code = compile(source, file, "exec")
    except (SyntaxError, ValueError) as error:  # ValueError: a zero in it
        line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
        raise RewardsError(f"{file}{line}: this is not Python: {getattr(error, 'msg', error)}.") from None
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        hint = "Installed packages and this project's rewards.py can be imported; the file itself is copied, alone"
        raise _failed(file, error, hint) from None

    funcs = getattr(module, "REWARD_FUNCS", None)
    if not isinstance(funcs, list | tuple) or not funcs:
        raise RewardsError(f"{file} has no list REWARD_FUNCS of reward functions. {TRL}.")
    for func in funcs:
        if not callable(func) or not isinstance(getattr(func, "__name__", None), str):
            raise RewardsError(f"{file}: REWARD_FUNCS holds {func!r}, which is no function. {TRL}.")
    names = [func.__name__ for func in funcs]
    for name in names:
        if names.count(name) > 1 or name in TAKEN:
            said = f"{names.count(name)} functions {name}" if names.count(name) > 1 else f"a function {name}"
            raise RewardsError(f"{file}: REWARD_FUNCS has {said}: rewards are logged by name, so give it another.")
    best = getattr(module, "MAX_REWARDS", None)
    if best is not None and (not isinstance(best, list | tuple) or len(best) != len(funcs)):
        count = f"{len(best)} values" if isinstance(best, list | tuple) else f"{best!r}"
        raise RewardsError(f"{file}: MAX_REWARDS is {count} for {len(funcs)} REWARD_FUNCS: give a list, a number each.")
    for value in best or []:
        if not is_number(value):
            raise RewardsError(f"{file}: MAX_REWARDS holds {value!r}: give a list, a number for each of REWARD_FUNCS.")
    prompt = getattr(module, "SYSTEM_PROMPT", None)
    if prompt is not None and not isinstance(prompt, str):
        raise RewardsError(f"{file}: SYSTEM_PROMPT is {prompt!r}: give a text.")
    for name in ("is_correct", "check_label"):
        if not callable(getattr(module, name, str)) and getattr(module, name) is not None:
            raise RewardsError(f"{file}: {name} is {getattr(module, name)!r}: give a function.")

    is_correct, check_label = (getattr(module, name, None) for name in ("is_correct", "check_label"))
    rules = OURS if is_correct is OURS.is_correct else TEXT
    if is_correct and rules is TEXT:
        is_right = _checked_is_correct(file, is_correct)
        rules = replace(
            rules,
            is_correct=is_right,
            is_lenient=lambda text, label: is_right(text, label) or last_line_has(text, label),
        )
    return replace(
        rules,
        funcs=[_checked(file, func) for func in funcs],
        maxima=dict(zip(names, map(float, best), strict=True)) if best else {},
        check_label=_checked_label(file, check_label or rules.check_label),
        system_prompt=prompt,
        file=Path(file),
        source=source,
    )


def is_number(value) -> bool:
    """Whether `value` is one finite number, of Python, NumPy or torch."""
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) != ():
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def line_in(file: str, error: BaseException) -> int | None:
    """The line of `file` in which `error` was raised, or from which that was called; None if neither is in it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def _failed(
    file: str, error: BaseException, expected: str, name: str = "", func: Callable | None = None
) -> RewardsError:
    """A sentence for what the user's code raised: the file, the line in it, the function and what is expected of it."""
    code = getattr(func, "__code__", None)
    line = line_in(file, error) or (code.co_firstlineno if code and code.co_filename == file else None)
    where = f"{file}{f', line {line}' if line else ''}{f', in {name}' if name else ''}"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(" .:")
    return RewardsError(f"{where}: {reason}. {expected}.")


def _checked(file: str, func: Callable) -> Callable:
    """The reward function `func`; it raises RewardsError where that raises, or gives what TRL cannot take."""
    name = func.__name__

    @functools.wraps(func)
    def wrapper(*args, completions, **kwargs):
        try:
            given = func(*args, completions=completions, **kwargs)
            values = None if isinstance(given, str | dict) or not isinstance(given, Iterable) else list(given)
        except Exception as error:
            if "out of memory" in str(error):  # the run has advice of its own
                raise
            raise _failed(file, error, TRL, name, func) from None
        code = getattr(func, "__code__", None)
        where = f"{file}, line {code.co_firstlineno}" if code and code.co_filename == file else file
        if values is None:
            raise RewardsError(f"{where}: {name} gave {given!r}, and no list. {TRL}.")
        if len(values) != len(completions):
            raise RewardsError(f"{where}: {name} gave {len(values)} values for {len(completions)} completions. {TRL}.")
        for value in values:
            if value is not None and not is_number(value):
                raise RewardsError(f"{where}: {name} gave {value!r}, which is no finite number. {TRL}.")
        return [None if value is None else float(value) for value in values]

    return wrapper


def _checked_is_correct(file: str, func: Callable) -> Callable[[str, str], bool]:
    def is_correct(text: str, label: str) -> bool:
        try:
            return bool(func(text, label))
        except Exception as error:
            expected = "An is_correct(text, label) is called with a completion and its label, and gives True or False"
            raise _failed(file, error, expected, "is_correct", func) from None

    return is_correct


def _checked_label(file: str, func: Callable) -> Callable[[object], str]:
    def check_label(label) -> str:
        if isinstance(label, str) and re.search(NOT_UTF8, label):
            raise ValueError("which is not in UTF-8")
        expected = (
            "A check_label(label) gives the label as it shall be kept, a str, or raises ValueError with the reason"
        )
        try:
            kept = func(label)
        except ValueError as error:
            reason = " ".join(str(error).split()) or "ValueError"
            raise ValueError(reason if func is number_label else f"which is no label: {reason}".rstrip(" .")) from error
        except Exception as error:
            raise _failed(file, error, expected, "check_label", func) from None
        if not isinstance(kept, str):
            raise RewardsError(f"{file}: check_label gave {kept!r} for {label!r}. {expected}.")
        return kept

    return check_label
