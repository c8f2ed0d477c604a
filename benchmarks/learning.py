"""Learning against wall-clock time: recipes, one run after another, measured on held-out questions while they train.

    python -m benchmarks.learning OUT recipes/t4.yaml recipes/article.yaml --seeds 1 2 --model MODEL --dataset DATASET [--SETTING VALUE ...]
    python -m benchmarks.learning OUT        the table and the picture again, from what is in OUT

--SETTING VALUE goes to every recipe; a recipe may bring settings of its own, which win: "recipes/small.yaml --micro_batch_size 32".
Every --interval seconds of training, the policy of the moment answers --eval_samples held-out questions, greedily, in at most
--eval_length tokens. The time that this takes is not counted, nor is that of the run's own evaluations; everything else is, from
the start of the process. vLLM is set up for at least 128 answers at once, whatever the recipe, to measure quickly. Writes
OUT/RECIPE-SEED/curve.jsonl, a line a measurement, beside what the run itself writes, and OUT/learning.png.
Prints how long each recipe took to reach the accuracy at which the last recipe ended, since the start of the process and
since the start of training.
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path


def measure(config: str, settings: list[str], started: float, interval: float, eval_length: int) -> None:
    """One run, in this process."""
    import train_grpo  # imports unsloth, which must come before transformers

    # isort: split
    from transformers import TrainerCallback

    from data import load_questions, train_and_test_splits
    from support.evaluation import measure as measure_policy
    from support.step_report import Report

    config, *own = shlex.split(config)
    recipe = train_grpo.parse_recipe(["--config", config, *settings, *own])
    recipe.dev_samples = 0  # what is measured on the way are the held-out questions, below
    out = Path(recipe.output_dir)
    measuring = 0.0  # seconds

    class Curve(TrainerCallback):
        def __init__(self, trainer):
            self.trainer, self.last = trainer, None
            _, split = train_and_test_splits(recipe.dataset)
            tokenizer = trainer.processing_class
            test = load_questions(recipe.dataset, split, tokenizer, recipe.max_prompt_length, recipe.system_prompt)
            self.test = test.select(range(min(recipe.eval_samples, len(test))))

        def measure(self, step: int) -> None:
            nonlocal measuring
            start = time.time()
            adapter = None
            if step:
                adapter = out / f"measured-{step}"
                self.trainer.model.save_pretrained(adapter)
            model, tokenizer = self.trainer.model, self.trainer.processing_class
            figures = measure_policy(model, tokenizer, self.test, eval_length, adapter=adapter)
            point = {"step": step, "seconds": start - started - measuring, **figures}
            with (out / "curve.jsonl").open("a") as file:
                file.write(json.dumps(point) + "\n")
            self.last = time.time()
            measuring += self.last - start
            for callback in self.trainer.callback_handler.callbacks:
                if step and isinstance(callback, Report):
                    callback.step_start += self.last - start  # not part of the step's seconds either

        def on_train_begin(self, args, state, control, **kwargs):
            self.measure(0)

        def on_step_end(self, args, state, control, **kwargs):
            if time.time() - self.last >= interval or state.global_step == state.max_steps:
                self.measure(state.global_step)

    class Measured(train_grpo.Trainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.add_callback(Curve(self))

    def uncounted(*args, **kwargs):
        nonlocal measuring
        start = time.time()
        figures = measure_policy(*args, **kwargs)
        measuring += time.time() - start
        return figures

    load_base_model = train_grpo.load_base_model

    def load(recipe, max_num_seqs):  # article.yaml's six answers at once would take minutes to measure
        return load_base_model(recipe, max(max_num_seqs, 128))

    train_grpo.Trainer, train_grpo.measure, train_grpo.load_base_model = Measured, uncounted, load
    train_grpo.run(recipe)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seconds_to(curve: list[dict], strict: float) -> float | None:
    """When `curve` first reached `strict`, on the straight line between two measurements."""
    if curve[0]["strict"] >= strict:
        return curve[0]["seconds"]
    for before, after in itertools.pairwise(curve):
        if after["strict"] >= strict:
            share = (strict - before["strict"]) / (after["strict"] - before["strict"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def report(out: Path, recipes: list[str]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from support.picture import COLORS

    runs = {name: sorted(out.glob(f"{name}-*/curve.jsonl")) for name in recipes}
    curves = {name: [read(path) for path in paths] for name, paths in runs.items()}
    target = statistics.mean(curve[-1]["strict"] for curve in curves[recipes[-1]])
    print(f"\n{'recipe':10}{'seed':>6}{'strict':>16}{'lenient':>16}{'steps':>7}{'seconds':>9}{f'to {target:.1%}':>22}")
    for name in recipes:
        for path, curve in zip(runs[name], curves[name], strict=True):
            first, last, reached = curve[0], curve[-1], seconds_to(curve, target)
            times = f"{reached:.0f} s, {reached - first['seconds']:.0f} training" if reached else "never"
            print(
                f"{name:10}{path.parent.name.split('-')[-1]:>6}{first['strict']:8.1%} →{last['strict']:6.1%}"
                f"{first['lenient']:8.1%} →{last['lenient']:6.1%}{last['step']:7}{last['seconds']:9.0f}{times:>22}"
            )
    figure = Figure(figsize=(8, 7), layout="constrained")
    accuracy, reward = figure.subplots(2, sharex=True)
    for name, color in zip(recipes, COLORS, strict=False):
        for number, (path, curve) in enumerate(zip(runs[name], curves[name], strict=True)):
            minutes = [point["seconds"] / 60 for point in curve]
            label = name if number == 0 else None
            accuracy.plot(minutes, [point["strict"] for point in curve], ".-", color=color, label=label)
            low, high = ([point[key] for point in curve] for key in ("strict_low", "strict_high"))
            accuracy.fill_between(minutes, low, high, color=color, alpha=0.08)
            metrics = read(path.with_name("metrics.jsonl"))
            left = minutes[0] * 60
            times = [(left := left + line["seconds"]) / 60 for line in metrics]
            window = max(len(metrics) // 20, 1)
            smooth = [
                statistics.mean(line["reward"] for line in metrics[max(i - window, 0) : i + 1])
                for i in range(len(metrics))
            ]
            reward.plot(times, smooth, color=color, label=label)
    accuracy.set(title="Held-out questions right, greedy, with 95 % Wilson intervals", ylabel="strict accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    reward.set(
        title="Mean reward of a step, running mean", ylabel="reward", xlabel="minutes since the start of the process"
    )
    for axes in (accuracy, reward):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.savefig(out / "learning.png", dpi=120)
    print(f"The curves are in {out}/learning.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is a setting, not short for --seeds
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", help="YAML files; the last one's final accuracy is the one to reach")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--interval", type=float, default=30, help="seconds of training between measurements")
    parser.add_argument("--eval_length", type=int, default=256)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    if args.child:
        return measure(args.recipes[0], settings, args.child, args.interval, args.eval_length)
    names = [Path(shlex.split(config)[0]).stem for config in args.recipes]
    if len(set(names)) < len(names):
        parser.error("give each recipe in a file of its own name")
    for seed in args.seeds if names else []:
        for name, config in zip(names, args.recipes, strict=True):
            run = ["--output_dir", str(args.out / f"{name}-{seed}"), "--seed", str(seed)]
            print(f"--- {name}, seed {seed}", flush=True)
            command = [sys.executable, "-m", "benchmarks.learning", str(args.out), config, *settings, *run]
            command += ["--interval", str(args.interval), "--eval_length", str(args.eval_length)]
            subprocess.run([*command, "--child", str(time.time())], check=True)
    if names:
        (args.out / "recipes.json").write_text(json.dumps(names))
    report(args.out, json.loads((args.out / "recipes.json").read_text()))


if __name__ == "__main__":
    main()
