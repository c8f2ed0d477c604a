"""infer.py: the figures it gives, on completions whose figures are known."""

import pytest

from infer import Completion, evaluate, evaluation_table

PERFECT = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n2\n</answer>"


def test_every_figure():
    completions = [
        Completion(PERFECT, 20, False),
        Completion("答案是2", 10, False),  # lenient only
        Completion("<answer>2</answer>", 10, False),  # right, but not the form
        Completion("<reasoning>\n1+1", 40, True),  # cut off
    ]
    assert evaluate(completions, ["2", 2, "2.0", "2"]) == {
        "n": 4,
        "strict": 0.5,
        "strict_low": pytest.approx(0.1500, abs=1e-4),
        "strict_high": pytest.approx(0.8500, abs=1e-4),
        "lenient": 0.75,
        "format": 0.25,
        "truncated": 0.25,
        "mean_length": 20.0,
    }


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # the example of Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_wilsons(right, n, low, high):
    completions = [Completion(PERFECT, 1, False)] * n
    result = evaluate(completions, ["2"] * right + ["3"] * (n - right))
    assert result["strict_low"] == pytest.approx(low, abs=1e-4)
    assert result["strict_high"] == pytest.approx(high, abs=1e-4)


def test_nothing_is_right_without_a_number():
    assert evaluate([Completion("没有数字", 4, False)], ["没有"])["lenient"] == 0.0


def test_the_table_is_aligned():
    result = evaluate([Completion(PERFECT, 20, False)], ["2"])
    header, *rows = evaluation_table({"before": result, "after": result}).split("\n")
    assert len(rows) == 2 and all(len(row) == len(header) for row in rows)
