"""The benchmarks run on the tiny policy without a GPU, and their arithmetic is right. Their figures are for a GPU."""

import json
import subprocess
import sys

import pytest

from benchmarks.learning import seconds_to


def run(*argv: str) -> str:
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_seconds_to_an_accuracy_lie_on_the_line_between_two_measurements():
    curve = [{"seconds": s, "strict": a} for s, a in [(50, 0.1), (80, 0.3), (110, 0.2), (140, 0.5)]]
    assert seconds_to(curve, 0.2) == pytest.approx(65)
    assert seconds_to(curve, 0.4) == pytest.approx(130)
    assert seconds_to(curve, 0.05) == 50
    assert seconds_to(curve, 0.6) is None


def test_learning_measures_the_policy_as_it_trains(tmp_path):
    recipe = "recipes/tiny.yaml --prompts_per_step 2 --micro_batch_size 16"
    settings = ["--max_steps", "3", "--eval_samples", "10", "--micro_batch_size", "999"]  # the recipe's own 16 wins
    settings += ["--max_completion_length", "24", "--eval_length", "24", "--interval", "0"]
    printed = run("benchmarks.learning", str(tmp_path), recipe, "--seeds", "7", *settings)
    curve = [json.loads(line) for line in (tmp_path / "tiny-7/curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [0, 1, 2, 3]
    assert all(point["n"] == 10 for point in curve)
    assert json.loads((tmp_path / "tiny-7/eval.json").read_text())["after"]["n"] == 10
    assert "seed: 7\n" in (tmp_path / "tiny-7/recipe.yaml").read_text()
    times = [point["seconds"] for point in curve]
    assert times == sorted(times)
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    assert "tiny" in printed
    assert run("benchmarks.learning", str(tmp_path)).strip() in printed  # again, from the files


def test_training_divides_a_step_into_its_parts(tmp_path):
    settings = "--model tiny --dataset tiny/questions --use_vllm false --load_in_4bit false --optim adamw_torch"
    settings += " --max_completion_length 32 --prompts_per_step 1 --micro_batch_size 6"
    figures = tmp_path / "figures.json"
    printed = run("benchmarks.training", "ours", "--no-cold", "--steps", "2", "--json", str(figures), *settings.split())
    assert "compl./s" in printed and "over floor" in printed
    (measured,) = json.loads(figures.read_text())
    assert [step["completions"] for step in measured["steps"]] == [6, 6]
    for step in measured["steps"]:
        assert 0 < step["scoring"] < step["generation"] < step["generate and score"] < step["step"]
    assert (
        0 < measured["warm marks"]["imported"] < measured["warm marks"]["loaded"] < measured["warm marks"]["first step"]
    )


def test_memory_tries_the_combinations_that_make_sense(tmp_path):
    settings = "--model tiny --dataset tiny/questions --use_vllm false --load_in_4bit false --optim adamw_torch"
    settings += " --max_prompt_length 60 --max_completion_length 16 --prompts_per_step 2"
    figures = tmp_path / "figures.jsonl"
    grid = ["--grid", "num_generations=4", "micro_batch_size=3,8"]  # 3 does not divide 8
    printed = run("benchmarks.memory", *settings.split(), *grid, "--json", str(figures))
    assert "estimate/reserved" in printed
    assert "train: every prompt has 60 tokens" in printed  # the longest in tiny/questions has 70
    (measured,) = map(json.loads, figures.read_text().splitlines())
    assert measured["micro_batch_size"] == "8" and "error" not in measured
    assert measured["estimate"] == pytest.approx(sum(measured["parts"].values()))
