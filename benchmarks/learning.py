"""Runs side by side: what they learned, in how many minutes, as one table and one picture, from the files they left.

    for seed in 1 2 3; do python train_grpo.py --config recipes/small.yaml --seed $seed --output_dir RUNS/small-$seed; done
    python -m benchmarks.learning RUNS [--reach 0.5]

Every folder in RUNS that holds a recipe.yaml and a metrics.jsonl is a run; those whose names differ in a last number alone
are one recipe with several seeds, and have one colour. A line a run: its strict and lenient accuracy on the test questions
before training, of the policy that was kept (its step in brackets), and of the last one; the minutes of its steps; and how many of these it took
until the accuracy on the way, on the development questions, was --reach or more. Where a recipe has several seeds, their means follow.
The picture, RUNS/learning.png: accuracy on the way and the running mean of the reward, of the functions that all runs have,
against the minutes of steps; what evaluations, checkpoints and the start take is not in them.
"""

import argparse
import itertools
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import yaml

from support.picture import COLORS
from support.resuming import read_json_lines


class Run(NamedTuple):
    """What a run left: lines of metrics.jsonl and evaluations.jsonl, eval.json, and the minutes of its steps up to each."""

    recipe: str
    seed: str
    answers: int  # a step
    metrics: list[dict]
    development: list[dict]
    test: dict
    minutes: dict[int, float]

    def minutes_to(self, strict: float) -> float | None:
        """The minutes of steps until the development questions were first answered so well."""
        return next((self.minutes[line["step"]] for line in self.development if line["strict"] >= strict), None)


def read_run(folder: Path) -> Run:
    recipe, _, seed = re.fullmatch(r"(.*?)(-(\d+))?", folder.name).groups()
    metrics = read_json_lines(folder / "metrics.jsonl")
    minutes = dict(enumerate(itertools.accumulate((line["seconds"] / 60 for line in metrics), initial=0.0)))
    test = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    return Run(
        recipe,
        seed or "",
        settings["prompts_per_step"] * settings["num_generations"],
        metrics,
        read_json_lines(folder / "evaluations.jsonl"),
        test,
        minutes,
    )


def table(runs: dict[str, list[Run]], reach: float) -> str:
    """The table in Markdown."""
    heads = ["recipe", "seed", "answers a step", "steps", "strict", "lenient", "last", "minutes", f"to {reach:.0%}"]
    lines = [heads, ["---"] * len(heads)]
    for recipe, group in runs.items():
        for run in group:
            before, after = run.test["before"], run.test.get("after")
            last = run.test.get("last", after)
            minutes = run.minutes_to(reach)
            lines.append(
                [
                    recipe,
                    run.seed,
                    f"{run.answers}",
                    f"{len(run.metrics)}",
                    f"{before['strict']:.1%} → "
                    + (f"{after['strict']:.1%} ({run.test['best_step']})" if after else "…"),
                    f"{before['lenient']:.1%} → " + (f"{after['lenient']:.1%}" if after else "…"),
                    f"{last['strict']:.1%}" if last else "…",
                    f"{run.minutes[len(run.metrics)]:.1f}",
                    ("never" if run.development else "–") if minutes is None else f"{minutes:.1f}",
                ]
            )
        done = [run.test["after"]["strict"] for run in group if "after" in run.test]
        if len(done) > 1:
            mean = f"mean {statistics.mean(done):.1%} ({min(done):.1%} to {max(done):.1%})"
            lines.append([recipe, f"{len(done)} seeds", "", "", f"**{mean}**", "", "", "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(runs: dict[str, list[Run]]):
    """The matplotlib Figure: accuracy on the way above, the sum of the rewards that all runs have below, a colour a recipe."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    lines = [line for group in runs.values() for run in group for line in run.metrics]
    names = sorted(
        set.intersection(*({name for name in line if re.fullmatch("rewards/[^/]+", name)} for line in lines))
    )
    figure = Figure(figsize=(8, 7), layout="constrained")
    accuracy, reward = figure.subplots(2, sharex=True)
    for (recipe, group), color in zip(runs.items(), itertools.cycle(COLORS)):
        for number, run in enumerate(group):
            label = {} if number else {"label": recipe}
            minutes = [run.minutes[line["step"]] for line in run.development]
            accuracy.plot(minutes, [line["strict"] for line in run.development], ".-", color=color, **label)
            window = max(len(run.metrics) // 10, 1)
            smooth = [
                statistics.mean(
                    sum(line[name] for name in names) for line in run.metrics[max(i - window + 1, 0) : i + 1]
                )
                for i in range(len(run.metrics))
            ]
            reward.plot([run.minutes[i + 1] for i in range(len(smooth))], smooth, color=color, **label)
    questions = {line["n"] for group in runs.values() for run in group for line in run.development}
    accuracy.set(
        title=f"Development questions right, of {', '.join(map(str, sorted(questions)))}", ylabel="strict accuracy"
    )
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    title = f"Mean reward of a step, of the {len(names)} functions that all runs have, over a tenth of a run"
    reward.set(title=title, xlabel="minutes of steps")
    for axes in (accuracy, reward):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--reach", type=float, default=0.5, help="an accuracy on the way")
    args = parser.parse_args()
    folders = [
        path.parent for path in sorted(args.runs.glob("*/recipe.yaml")) if (path.parent / "metrics.jsonl").exists()
    ]
    if not folders:
        parser.error(f"there is no run in {args.runs}.")
    runs = {}
    for run in map(read_run, folders):
        runs.setdefault(run.recipe, []).append(run)
    print(table(runs, args.reach))
    picture(runs).savefig(args.runs / "learning.png", dpi=120)
    print(f"\nThe curves are in {args.runs / 'learning.png'}")


if __name__ == "__main__":
    main()
