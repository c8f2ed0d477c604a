"""reward_curve.png: what is drawn of which file. Looks at the figure, and at the file where that is the point."""

import json
import math

import pytest

from rewards import MAX_REWARDS, REWARD_FUNCS
from support import picture
from support.picture import draw_reward_curve, reward_curve, spread

MAXIMA = {func.__name__: best for func, best in zip(REWARD_FUNCS, MAX_REWARDS, strict=True)}


def metrics(steps, **parts):
    """Lines of metrics.jsonl. `parts`: of each reward function its mean at step 1, growing by as much a step."""
    parts = parts or {name: best / 200 for name, best in MAXIMA.items()}
    return [
        {"step": step, "reward": step * sum(parts.values()), "seconds": 1.5, "frac_reward_zero_std": 0.0}
        | {"completions/mean_length": 100.0 + step, "completions/clipped_ratio": 0.25}
        | {f"rewards/{name}": step * value for name, value in parts.items()}
        | {f"rewards/{name}/std": 7.0 for name in parts}
        for step in range(1, steps + 1)
    ]


def evaluation(step, strict):
    return {"step": step, "n": 128, "strict": strict, "strict_low": strict - 0.08, "strict_high": strict + 0.07}


EVALUATIONS = [evaluation(step, strict) for step, strict in [(0, 0.3), (10, 0.6), (20, 0.5), (30, 0.6), (40, 0.4)]]
TEST = {"before": evaluation(0, 0.25) | {"n": 300}, "after": evaluation(0, 0.75) | {"n": 300}}


def figure(metrics, evaluations=(), test=None, maxima=MAXIMA, chinese=False):
    """The figure's panels by name."""
    drawn = reward_curve(metrics, list(evaluations), test or {}, maxima, chinese)
    return {axes.get_label(): axes for axes in drawn.axes}


def lines(axes):
    """The points of the lines that have a name."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def ends(axes):
    """What is written at the right end of the lines, from top to bottom."""
    return [text.get_text() for text in sorted(axes.texts, key=lambda text: -text.xyann[1])]


def test_the_panels():
    panels = figure(metrics(40), EVALUATIONS, TEST)
    assert list(panels) == ["accuracy", "reward", "parts", "length", "cut off"]
    assert [len(panel.lines) for panel in panels.values()][1:] == [2, 10, 2, 2]  # each pale, and its running mean
    assert (ends(panels["reward"]), ends(panels["cut off"])) == (["0.76 of 4"], ["25%"])
    assert panels["reward"].lines[0].get_xydata().tolist() == [[step, step * 0.02] for step in range(1, 41)]


def test_accuracy():
    """The band, the later of the two best, and the test questions at step 0 and where adapter/ comes from."""
    axes = figure(metrics(40), EVALUATIONS, TEST | {"best_step": 30})["accuracy"]
    band = axes.collections[0].get_paths()[0].vertices.tolist()
    assert all([e["step"], e[key]] in band for e in EVALUATIONS for key in ("strict_low", "strict_high"))
    drawn = lines(axes)
    assert drawn["128 development questions"] == [[e["step"], e["strict"]] for e in EVALUATIONS]
    assert drawn["kept: 60.0% at step 30"] == [[30, 0.6]]
    (container,) = axes.containers
    points, _, (bars,) = container
    assert points.get_xydata().tolist() == [[0, 0.25], [30, 0.75]]
    assert [y for bar in bars.get_segments() for _, y in bar] == pytest.approx([0.17, 0.32, 0.67, 0.82])
    assert legend(axes)[-1] == "300 test questions: 25.0% → 75.0%"


def test_without_a_best_step_the_last_step_was_tested():
    points = figure(metrics(40), EVALUATIONS[:3], TEST)["accuracy"].containers[0][0]
    assert points.get_xdata().tolist() == [0, 40]


def test_before_anything_was_trained():
    axes = figure([], EVALUATIONS[:1], {"before": TEST["before"]})["accuracy"]
    assert legend(axes) == ["128 development questions", "300 test questions: 25.0%"]  # of one, none is the best


def test_no_evaluation_no_panel():
    assert list(figure(metrics(3), test={"generation": {}})) == ["reward", "parts", "length", "cut off"]
    assert legend(figure(metrics(3), test=TEST)["accuracy"]) == ["300 test questions: 25.0% → 75.0%"]


def test_parts_are_shares_of_their_best():
    axes = figure(metrics(100))["parts"]
    for line in axes.lines[::2]:
        assert line.get_ydata()[[0, -1]] == pytest.approx([0.005, 0.5])
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines[1::2]}) == 5
    assert ends(axes)[0] == "correctness 48% of 2"  # of equals the first is on top
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert all(above - below > 0.05 for below, above in zip(heights, heights[1:], strict=False))


def test_own_reward_functions():
    """One with a known best, one without, two penalties, of which one is known to be 0 at best, and one always 0."""
    own = {"short_reward": 0.01, "tone_reward_func": 0.02, "penalty": -0.03, "rude": -0.05, "never": 0.0}
    axes = figure(metrics(10, **own), maxima={"short_reward": 0.2, "rude": 0})["parts"]
    assert [line.get_ydata()[-1] for line in axes.lines[::2]] == pytest.approx([0.5, 1, -1, -1, 0])
    assert {text.split()[0]: text.split("of ")[1] for text in ends(axes)} == {
        "short": "0.2",
        "tone": "0.2*",
        "penalty": "0.3*",
        "rude": "0.5*",
        "never": "1*",
    }
    assert "* of the largest yet" in axes.get_title(loc="left")
    assert axes.get_ylim()[0] < -1


def test_more_than_the_best_that_was_given_is_in_the_picture_too():
    axes = figure(metrics(10, tone=0.3), maxima={"tone": 1.0})["parts"]
    assert axes.get_ylim()[1] > 3
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(3)


def test_chinese_where_there_is_a_font():
    panels = figure(metrics(3), EVALUATIONS, TEST, chinese=True)
    titles = [axes.get_title(loc="left") for axes in panels.values()]
    assert all(title[0].isascii() and not title.isascii() for title in titles)
    assert not any(text.isascii() for text in legend(panels["accuracy"]))
    english = figure(metrics(3), EVALUATIONS, TEST)
    assert all(axes.get_title(loc="left").isascii() for axes in english.values())


def test_a_broken_run_is_drawn_up_to_where_it_broke():
    broken = metrics(20)
    for line in broken[10:]:
        line |= {key: math.nan for key in line if key.startswith("reward")} | {"completions/mean_length": math.inf}
    panels = figure(broken)
    for name in ("reward", "parts", "length"):
        for line in panels[name].lines:
            assert [math.isnan(y) for y in line.get_ydata()] == [False] * 10 + [True] * 10
        assert all(text.xy[0] == 10 for text in panels[name].texts)


def nan(steps):
    return [line | {key: math.nan for key in line if key.startswith("reward")} for line in metrics(steps)]


@pytest.mark.parametrize(
    "steps, fonts",
    [
        pytest.param(metrics(250), picture.CHINESE_FONTS, id="any font"),
        pytest.param(metrics(250), [], id="no Chinese font"),
        pytest.param(metrics(1), [], id="one step"),
        pytest.param(nan(2), [], id="NaN"),
        pytest.param([], [], id="no step"),
    ],
)
def test_the_file(tmp_path, monkeypatch, recwarn, steps, fonts):
    import matplotlib

    monkeypatch.setattr(picture, "CHINESE_FONTS", fonts)
    before = dict(matplotlib.rcParams)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if len(steps) != 2:
        (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in EVALUATIONS))
        (tmp_path / "eval.json").write_text(json.dumps(TEST))
    files = {path.name for path in tmp_path.iterdir()}
    draw_reward_curve(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - files == {"reward_curve.png"}  # and nothing partial
    assert (tmp_path / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    # what importing pandas or matplotlib warns of, once a process, is not the picture's
    assert not [w for w in recwarn if issubclass(w.category, UserWarning) and "support/picture" in w.filename]
    assert not [w for w in recwarn if "Glyph" in str(w.message)]  # a character that the font lacks


@pytest.mark.parametrize(
    "heights, apart",
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.2, 0.6], [0.2, 0.6]),  # far enough
        ([0.5, 0.5, 0.1], [0.6, 0.5, 0.1]),
        ([0.9, 1.0, 0.98], [0.78, 0.98, 0.88]),  # from the top down
    ],
)
def test_spread(heights, apart):
    assert spread(heights, 0.1) == pytest.approx(apart)
