"""reward_curve.png: what a run looks like while it goes."""

import os
from pathlib import Path

COLORS = ["#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]  # Okabe and Ito's, for the colour-blind
CHINESE_FONTS = [
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
]


def draw_reward_curve(out: Path, maxima: dict[str, float] | None = None) -> None:
    """reward_curve.png from metrics.jsonl: the reward, its parts, and the length of the completions.

    `maxima`: the best value of each reward function, by name; None: not known.

    Each step pale, its running mean on top. Titles are in Chinese too where matplotlib finds a font for it.
    """
    os.environ["MPLBACKEND"] = "agg"  # Colab's own setting names a backend that is not installed here
    import pandas
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    metrics = pandas.read_json(out / "metrics.jsonl", lines=True).set_index("step")
    smooth = metrics.ewm(span=max(5, len(metrics) / 10)).mean()
    installed = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in installed][:1]

    def line(axes, name, color, label, style="-"):
        axes.plot(metrics.index, metrics[name], color=color, alpha=0.2, linewidth=1, linestyle=style)
        return axes.plot(smooth.index, smooth[name], color=color, linewidth=2, linestyle=style, label=label)

    with rc_context({"font.family": ["DejaVu Sans", *chinese]}):
        figure = Figure(figsize=(8, 9), layout="constrained")
        total, parts, length = figure.subplots(3, sharex=True, height_ratios=[3, 3, 2])
        best = {name: f", at best {value}" for name, value in (maxima or {}).items()}
        line(total, "reward", COLORS[0], f"sum, at best {sum(maxima.values())}" if maxima else "sum")
        names = [key for key in metrics if key.startswith("rewards/") and key.count("/") == 1]
        for i, key in enumerate(names):
            name = key.removeprefix("rewards/")
            line(parts, key, COLORS[1 + i % 5], name.removesuffix("_reward_func") + best.get(name, ""))
        share = length.twinx()
        share.yaxis.set_major_formatter(PercentFormatter(1))
        lines = line(length, "completions/mean_length", COLORS[0], "mean length")
        lines += line(share, "completions/clipped_ratio", COLORS[5], "cut off at the limit", "--")
        total.set(title="Mean reward of a step" + ("  每步平均奖励" if chinese else ""), ylabel="reward")
        parts.set(title="Its parts" + ("  各个分量" if chinese else ""), ylabel="reward")
        length.set(
            title="Completions" + ("  回答长度" if chinese else ""), ylabel="tokens", ylim=(0, None), xlabel="step"
        )
        share.set(ylabel="share of completions", ylim=(0, 1))
        total.legend(loc="lower right")
        parts.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
        length.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False)
        for axes in (total, parts, length):
            axes.grid(alpha=0.3)
        partial = out / "reward_curve.partial.png"  # whoever looks at the picture never sees half of one
        figure.savefig(partial, dpi=120)
        os.replace(partial, out / "reward_curve.png")
