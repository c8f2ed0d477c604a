"""infer.py: the figures it gives, what it reads and shows; the command itself is in test_asking.py."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import read_questions
from support.asking import StreamedAnswer, resume_output
from support.errors import UserError
from support.evaluation import Completion, evaluate, evaluation_table, majority, mcnemar, pass_at_k

PERFECT = "<reasoning>\n1+1=2\n</reasoning>\n<answer>\n2\n</answer>"


def test_every_figure():
    completions = [
        Completion(PERFECT, range(20), False),
        Completion("答案是2", range(10), False),  # lenient only
        Completion("<answer>2</answer>", range(10), False),  # right, but not the form
        Completion("<reasoning>\n1+1", range(40), True),  # cut off
    ]
    quarter = pytest.approx((0.0456, 0.6994), abs=1e-4)
    half = pytest.approx((0.1500, 0.8500), abs=1e-4)
    result = evaluate(completions, ["2", 2, "2.0", "2"])
    figures = {"n": 4, "strict": 0.5, "lenient": 0.75, "format": 0.25, "truncated": 0.25, "mean_length": 20.0}
    assert {key: result[key] for key in figures} == figures
    assert (result["strict_low"], result["strict_high"]) == half
    assert (1 - result["lenient_high"], 1 - result["lenient_low"]) == quarter
    assert (result["format_low"], result["format_high"]) == quarter
    assert (result["truncated_low"], result["truncated_high"]) == quarter


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
    completions = [Completion(PERFECT, range(1), False)] * n
    result = evaluate(completions, ["2"] * right + ["3"] * (n - right))
    assert result["strict_low"] == pytest.approx(low, abs=1e-4)
    assert result["strict_high"] == pytest.approx(high, abs=1e-4)


def test_nothing_is_right_without_a_number():
    assert evaluate([Completion("没有数字", range(4), False)], ["没有"])["lenient"] == 0.0


def test_the_table_is_aligned():
    result = evaluate([Completion(PERFECT, range(20), False)], ["2"])
    header, *rows = evaluation_table({"before": result, "after": result}).split("\n")
    assert len(rows) == 2 and all(len(row) == len(header) for row in rows)


def answered(answer):
    return f"<reasoning>\n…\n</reasoning>\n<answer>\n{answer}\n</answer>"


def test_several_samples():
    texts = [answered(x) for x in (2, 2, 3, 3)] + [answered(x) for x in (5, 7, 7, 4)]
    result = evaluate([Completion(text, range(10), False) for text in texts], [2, 7], samples=4)
    assert result["n"] == 2 and result["strict"] == result["pass@1"] == 0.5
    assert result["pass@2"] == pytest.approx(1 - 1 / 6)  # of the 6 pairs one has no right answer
    assert result["pass@4"] == 1.0
    assert result["maj@4"] == 1.0  # 2 comes before 3, and 7 twice
    assert "pass@2 83.3%" in evaluation_table({"base": result})


@pytest.mark.parametrize("n, right, k", [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, right, k):
    outcomes = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    "texts, winner",
    [
        ([answered(72), answered("72.0"), answered(9)], "72"),
        ([answered(9), answered("１，０８０"), answered("1080元")], "１，０８０"),
        (["72", "72", answered(3)], "3"),  # no tags, no vote
        ([answered(4), answered(5)], "4"),
        ([answered("不知道"), answered("不知道"), answered(5)], "不知道"),
        (["72"], None),
        ([answered(" "), answered(" "), answered(5)], "5"),
    ],
)
def test_majority(texts, winner):
    assert majority(texts) == winner


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_mcnemar_is_the_exact_sign_test(pairs):
    result = mcnemar([before for before, _ in pairs], [after for _, after in pairs])
    changed = [after for before, after in pairs if before != after]
    assert (result["gained"], result["lost"]) == (sum(changed), len(changed) - sum(changed))
    # every way in which the changed questions could have changed, equally likely; as uneven as seen, or more
    uneven = abs(2 * sum(changed) - len(changed))
    ways = list(itertools.product([0, 1], repeat=len(changed)))
    as_uneven = [way for way in ways if abs(2 * sum(way) - len(way)) >= uneven]
    assert result["p"] == pytest.approx(len(as_uneven) / len(ways))


def test_mcnemar_known():
    # 9 against 2 of 11: 2 × (C(11,0) + C(11,1) + C(11,2)) / 2^11
    result = mcnemar([False] * 9 + [True] * 2 + [True] * 5, [True] * 9 + [False] * 2 + [True] * 5)
    assert result == {"gained": 9, "lost": 2, "p": pytest.approx(2 * (1 + 11 + 55) / 2048)}


@pytest.mark.parametrize(
    "text, shown",
    [
        (PERFECT, "— reasoning\n1+1=2\n— answer\n2\n"),
        (PERFECT + "\n", "— reasoning\n1+1=2\n— answer\n2\n"),
        ("答案是 2 < 3\n", "答案是 2 < 3\n\n"),
        ("先想。<answer>2</answer>多说", "先想。\n— answer\n2\n多说\n"),
        ("<reasoning>\n1\n\n2", "— reasoning\n1\n\n2\n"),
        ("a<b", "a<b\n"),
        ("<answer", "<answer\n"),
    ],
)
def test_the_screen_shows_the_same_however_the_text_is_cut(text, shown, capsys):
    cuts = itertools.chain([()], ((i,) for i in range(len(text))), [range(1, len(text))])
    for cut in cuts:
        edges = [0, *cut, len(text)]
        screen = StreamedAnswer()
        for start, end in itertools.pairwise(edges):
            screen.write(text[start:end])
        screen.write("", end=True)
        assert capsys.readouterr().out == shown, cut


def test_questions_of_every_kind_of_file(tmp_path):
    (tmp_path / "q.txt").write_text("1加1\n\n2加2\n", encoding="utf-8")
    assert read_questions(str(tmp_path / "q.txt")) == (["1加1", "2加2"], [None, None])
    (tmp_path / "q.csv").write_text("问题,答案\n1加1,2\n", encoding="utf-8")
    assert read_questions(str(tmp_path / "q.csv")) == (["1加1"], [2])
    (tmp_path / "q.jsonl").write_text('{"question": "1加1"}\n', encoding="utf-8")
    assert read_questions(str(tmp_path / "q.jsonl")) == (["1加1"], [None])


def test_a_label_is_not_rounded(tmp_path):
    (tmp_path / "q.csv").write_text("question,answer\n一,0.12345678901234567890\n二,2.50\n三,1080\n")
    assert read_questions(str(tmp_path / "q.csv"))[1] == ["0.12345678901234567890", 2.5, 1080]


def test_asking_needs_no_labels(tmp_path, capsys):
    rows = [
        {"question": "1加1", "answer": a} for a in ("两个", None, "1 + 1 = 2\n#### 2", 2.5, "1,080", "?", "1 或 2", "…")
    ]
    rows += [{"question": "1加1", "answer": a} for a in ("9" * 299, "9" * 5000, "9" * 400 + ".5")]
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    labels = [None, None, 2, 2.5, 1080, None, None, None, int("9" * 299), None, None]
    assert read_questions(str(tmp_path / "q.jsonl")) == (["1加1"] * 11, labels)
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        "6 of 11 rows of" in line
        and "row 1 has '两个', row 6 has '?', row 7 has '1 或 2', … in answer, which is not one number: taken as unknown"
        in line
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("q.jsonl", '{"question": "1加1"}\n{"question": " "}\n', "question 2"),
        ("q.jsonl", '{"frage": "1加1"}\n', "no column"),
        ("q.jsonl", "{", "cannot load"),
        ("q.csv", "问题\n", "has no questions"),
        ("q.doc", "1加1", "cannot read"),
        ("q.txt", "\n\n", "no question"),
        (None, None, "no file"),
    ],
)
def test_unusable_files(tmp_path, name, content, words):
    if name:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_questions(str(tmp_path / (name or "missing.txt")))


def test_an_output_is_continued_after_its_last_whole_line(tmp_path):
    output = tmp_path / "out.jsonl"
    assert resume_output(output, ["a", "b"], {"model": "m"}) == 0
    whole = json.dumps({"index": 0, "question": "a", "model": "m"}) + "\n"
    output.write_text(whole + '{"index": 1, "quest')
    assert resume_output(output, ["a", "b"], {"model": "m"}) == 1
    assert output.read_text() == whole
    output.write_text(whole + '{"index": 1, "question": "b", "model": "m"}')  # only the end of the line is missing
    assert resume_output(output, ["a", "b"], {"model": "m"}) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        ("notes of mine\n", "holds something else than answers"),
        ("notes of mine", "holds something else than answers"),
        ('{"index": 0, "question": "x", "model": "m"}\n', "holds something else than answers"),
        ('{"index": 1, "question": "b", "model": "m"}\n', "holds something else than answers"),
        ('{"index": 0, "question": "my own notes"}', "holds something else than answers"),
        ("[1]\n", "holds something else than answers"),
        ('{"index": 0, "question": "a", "model": "other"}\n{"index"', "another model"),
    ],
)
def test_a_foreign_output_is_left_alone(tmp_path, content, words):
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(UserError, match=words):
        resume_output(output, ["a", "b"], {"model": "m"})
    assert output.read_text() == content


def test_a_file_name_is_not_a_pattern(tmp_path):
    (tmp_path / "q[1].txt").write_text("这一题\n", encoding="utf-8")
    (tmp_path / "q1.txt").write_text("另一题\n", encoding="utf-8")
    assert read_questions(str(tmp_path / "q[1].txt"))[0] == ["这一题"]


def test_a_byte_order_mark_is_no_part_of_the_question(tmp_path):
    (tmp_path / "q.txt").write_text("1加1\r\n\r\n2加2\n", encoding="utf-8-sig")
    assert read_questions(str(tmp_path / "q.txt"))[0] == ["1加1", "2加2"]
