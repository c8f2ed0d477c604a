"""reward_curve.png: what a run looks like, while it goes and when it is over."""

import json
import math
import os
from pathlib import Path

from accelerate import PartialState

from rewards import MAX_REWARDS, REWARD_FUNCS
from support.evaluation import best_evaluation
from support.resuming import read_json_lines

COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's
STYLES = ["-", (0, (6, 2)), (0, (3, 1.5)), (0, (1.5, 1)), (0, (6, 2, 1, 2))]  # lines on one another show by their gaps
CHINESE_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC"]  # JP: a file of all goes by its first
CHINESE_FONTS += ["WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei"]
LEADER = {"arrowstyle": "-", "ls": ":", "lw": 1.5, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}  # from line to text
LENGTH, CUT_OFF = "completions/mean_length", "completions/clipped_ratio"


def draw_reward_curve(out: Path, maxima: dict[str, float] | None = None) -> None:
    """reward_curve.png from metrics.jsonl, evaluations.jsonl and eval.json in `out`; the last two may be missing.

    `maxima`: the best value of each reward function, by its name; if None, of those in rewards.py. Titles and legend
    are in Chinese too where matplotlib finds a font for it.
    """
    if not PartialState().is_main_process:
        return
    os.environ["MPLBACKEND"] = "agg"  # Colab's own setting names a backend that is not installed here
    from matplotlib import font_manager, rc_context

    if maxima is None:
        maxima = {func.__name__: best for func, best in zip(REWARD_FUNCS, MAX_REWARDS, strict=True)}
    lines = [read_json_lines(out / f"{name}.jsonl") for name in ("metrics", "evaluations")]
    test = json.loads((out / "eval.json").read_text(encoding="utf-8")) if (out / "eval.json").exists() else {}
    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in installed][:1]
    with rc_context({"font.family": ["DejaVu Sans", *chinese], "font.size": 9}):
        partial = out / "reward_curve.partial.png"  # whoever looks at the picture never sees half of one
        reward_curve(*lines, test, maxima, bool(chinese)).savefig(partial, dpi=130)
        os.replace(partial, out / "reward_curve.png")


def reward_curve(metrics: list[dict], evaluations: list[dict], test: dict, maxima: dict[str, float], chinese: bool):
    """The matplotlib Figure: each step pale, its running mean on top, and at the right what that mean came to.

    `metrics`, `evaluations`: the lines of those files; `test`: eval.json. Reward functions are drawn as shares of their
    best in `maxima`, and those without one of the highest mean of a step (penalties: of the lowest).
    """
    import pandas
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = dict.fromkeys(key for line in metrics for key in line if key.startswith("rewards/"))
    names = [name for name in names if name.count("/") == 1]  # not rewards/<function>/std
    table = pandas.DataFrame(metrics, columns=["step", "reward", *names, LENGTH, CUT_OFF]).set_index("step")
    table = table.astype(float).replace([math.inf, -math.inf], math.nan)
    known = [max(maxima.get(name.removeprefix("rewards/")) or 0, 0) for name in names]
    bests = [known[i] or max(table[name].max(), 0) or -table[name].min() or 1 for i, name in enumerate(names)]
    table[names] /= bests
    smooth = table.ewm(span=max(5, len(table) / 10)).mean().where(table.notna())  # a run that broke ends where it did
    steps = [*table.index, 0]
    tests = [(0, test.get("before")), (test.get("best_step", max(steps)), test.get("after"))]
    tests = [(step, result) for step, result in tests if result]
    steps += [line["step"] for line in evaluations] + [step for step, _ in tests]

    def both(english: str, in_chinese: str) -> str:
        return f"{english}  {in_chinese}" if chinese else english

    star = "" if all(known) else "; * of the largest yet"
    panels = {  # the title of each, and its height in inches
        "accuracy": (both("Accuracy on held-out questions, 95 % intervals", "留出题正确率"), 2.8),
        "reward": (both("Mean reward of a step", "每步平均奖励"), 1.9),
        "parts": (both(f"Its parts, as shares of their best{star}", "各分量占其满分的比例"), 2.8),
        "length": (both("Mean length of an answer, in tokens", "回答平均长度"), 1.2),
        "cut off": (both("Answers cut off at the limit", "被长度上限截断的回答"), 1.2),
    }
    if not evaluations and not tests:
        del panels["accuracy"]
    heights = [height for _, height in panels.values()]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    axes_of = dict(zip(panels, figure.subplots(len(panels), sharex=True, height_ratios=heights), strict=True))
    pad = 38 if len(evaluations) > 1 and tests else 24  # the legend's lines are below it
    for name, axes in axes_of.items():
        axes.set_title(panels[name][0], loc="left", fontweight="bold", pad=pad if name == "accuracy" else 8)
        axes.set_label(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(4 if panels[name][1] < 1.5 else 6, steps=[1, 2, 5, 10]))
        if name not in ("reward", "length"):
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel=both("step", "步"), xlim=(-0.025 * max(1, *steps), 1.025 * max(1, *steps)))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))

    def draw(axes, name, text, color=COLORS[0], style="-"):
        marker = "o" if len(table) == 1 else None
        axes.plot(table.index, table[name], color=color, alpha=0.2, linewidth=1)
        (line,) = axes.plot(smooth.index, smooth[name], color=color, ls=style, marker=marker, linewidth=2, label=name)
        return [(step, mean, text.format(mean), line) for step, mean in smooth[name].dropna().tail(1).items()]

    whole = f" of {sum(known):g}" if known and all(known) else ""
    ends = {"reward": draw(axes_of["reward"], "reward", "{:.2f}" + whole), "parts": []}
    ends["length"] = draw(axes_of["length"], LENGTH, "{:.0f}")
    ends["cut off"] = draw(axes_of["cut off"], CUT_OFF, "{:.0%}")
    for i, name in enumerate(names):
        short = name.removeprefix("rewards/").removesuffix("_func").removesuffix("_reward")
        text = f"{short if len(short) < 20 else short[:18] + '…'} {{:.0%}} of {bests[i]:.3g}{'' if known[i] else '*'}"
        ends["parts"] += draw(axes_of["parts"], name, text, COLORS[1 + i % 6], STYLES[i % 5])
    lowest, highest = min([0, *table[names].min()]), max([1, *table[names].max()])
    axes_of["parts"].set_ylim(max(lowest, -1) - 0.04 * (highest - lowest), highest + 0.04 * (highest - lowest))
    for name in ("length", "cut off"):
        top = max(0.1, axes_of[name].get_ylim()[1])
        axes_of[name].set_ylim(-0.03 * top, top)

    if axes := axes_of.get("accuracy"):
        if evaluations:
            keys = ("step", "strict", "strict_low", "strict_high")
            at, strict, low, high = ([line[key] for line in evaluations] for key in keys)
            axes.fill_between(at, low, high, color=COLORS[1], alpha=0.15, linewidth=0 if len(at) > 1 else 6)
            label = both(f"{evaluations[0]['n']} development questions", "开发题")
            axes.plot(at, strict, "o-", color=COLORS[1], linewidth=2, markersize=4, label=label)
        if tests:
            at, results = zip(*tests, strict=True)
            strict = [result["strict"] for result in results]
            error = [[max(0, r["strict"] - r["strict_low"]), max(0, r["strict_high"] - r["strict"])] for r in results]
            label = both(f"{results[0]['n']} test questions", "测试题") + ": " + " → ".join(f"{s:.1%}" for s in strict)
            axes.errorbar(at, strict, [*zip(*error, strict=True)], fmt="D", color=COLORS[2], capsize=3, label=label)
        if best := best_evaluation(evaluations):
            label = both(f"kept: {best['strict']:.1%} at step {best['step']}", "保留")
            axes.plot(best["step"], best["strict"], "o", color=COLORS[0], mfc="none", mew=1.5, ms=13, label=label)
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), ncols=2, frameon=False)
        legend.set_in_layout(False)  # a wide one must not make the panels narrow
    for name, lines in ends.items():
        write_ends(axes_of[name], lines, 0.2 / panels[name][1])
    return figure


def write_ends(axes, ends: list[tuple], gap: float) -> None:
    """Writes at the right of `axes` what its lines came to, each at its height, but `gap` of the axes apart."""
    low, high = axes.get_ylim()
    heights = [min(max((height - low) / (high - low), 0), 1) for _, height, _, _ in ends]
    for (step, _, text, line), height, place in zip(ends, heights, spread(heights, gap), strict=True):
        arrow = LEADER | {"color": line.get_color()}
        axes.annotate(
            text, (step, height), (1.04, place), ("data", "axes fraction"), "axes fraction", arrow, False, va="center"
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """`heights`, moved until they are `gap` apart, in the same order, up to 0.98. Of equals the first is on top."""
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    order, places = sorted(range(len(heights)), key=lambda i: (heights[i], -i)), list(heights)
    for below, i in zip(order, order[1:], strict=False):
        places[i] = max(places[i], places[below] + gap)
    for rank, i in enumerate(reversed(order)):
        places[i] = min(places[i], 0.98 - rank * gap)
    return places
