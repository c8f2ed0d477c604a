"""Statistics of answers: intervals, pass@k, the majority, a paired test."""

import math
from collections import Counter
from statistics import NormalDist

from scipy.stats import binomtest

from rewards import extract_answer, label_number, parse_number


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of successes/n (Wilson 1927). Here, because scipy's takes whole successes only."""
    z, share = NormalDist().inv_cdf(0.975), successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(center - half, 0.0), min(center + half, 1.0)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, from n ≥ k samples of which `right` are: 1 − C(n−right, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts: list[str]) -> str | None:
    """The answer that most of `texts` give, as first written; of equally frequent ones the first. None without any."""
    answers = [answer for text in texts if (answer := extract_answer(text) or "").strip()]
    votes = Counter(vote(answer) for answer in answers)
    if not votes:
        return None
    winner = votes.most_common(1)[0][0]
    return next(answer.strip() for answer in answers if vote(answer) == winner)


def vote(answer: str):
    number = parse_number(answer)  # 72 and 72.0 vote for the same
    return answer.strip() if number is None else number


def is_majority_right(texts: list[str], label) -> bool:
    """Whether the answer that most of `texts` give is `label`; of a single text, the same as is_correct."""
    answer = majority(texts)
    return answer is not None and parse_number(answer) == label_number(label)


def mcnemar(before: list[bool], after: list[bool]) -> dict[str, float]:
    """How two policies differ on the same questions, with the p-value of McNemar's exact test (McNemar 1947).

    gained: right only after; lost: right only before. If neither policy were better, gained would be binomial with
    probability 1/2 among the gained and lost together.
    """
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    return {
        "gained": gained,
        "lost": lost,
        "p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }
