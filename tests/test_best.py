"""Accuracy on the way: the best policy on the development questions is what is left in adapter/, whatever happens meanwhile."""

import json
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_runs import in_process, jsonl

from support import best
from support.best import hold_out
from support.errors import UserError
from support.evaluation import best_evaluation
from support.resuming import checkpoints
from support.settings import Recipe
from support.step_report import Report

STEPS = ["--max_steps", 8, "--eval_steps", 2, "--save_steps", 3, "--save_total_limit", 2]
ACCURACY = {0: 0.2, 2: 0.3, 4: 0.5, 6: 0.5, 8: 0.1}  # 4 and 6 are equal: the later one is kept


def figures(strict, lenient=None):
    line = {"n": 40, "strict": strict, "strict_low": strict - 0.1, "strict_high": strict + 0.1, "format": 1.0}
    lenient = strict if lenient is None else lenient
    return line | {"lenient": lenient, "lenient_low": lenient - 0.1, "lenient_high": lenient + 0.1, "truncated": 0.0}


@pytest.fixture
def scripted(monkeypatch):
    """The development questions are answered as ACCURACY says; what was asked for is recorded."""
    asked = []

    def measure(model, tokenizer, questions, max_tokens, adapter=None, rules=None):
        step = int(adapter.name.split("-")[1]) if adapter else 0
        asked.append(step)
        return figures(ACCURACY[step]), []

    monkeypatch.setattr(best, "measure", measure)
    return asked


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_result(out):
    lines = jsonl(out / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    assert [line["strict"] for line in lines] == list(ACCURACY.values()) and all(line["seconds"] >= 0 for line in lines)
    evaluations = json.loads((out / "eval.json").read_text())
    assert evaluations["best_step"] == 6 and {"before", "after", "last"} <= set(evaluations)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-8", "checkpoint-6"]
    assert same(weights(out / "adapter"), weights(out / "checkpoint-6"))
    assert not same(weights(out / "adapter"), weights(out / "checkpoint-8"))
    return evaluations


def test_the_best_policy_is_kept(scripted, monkeypatch, tmp_path, capsys):
    in_process(monkeypatch, *STEPS, "--output_dir", tmp_path / "out")
    check_result(tmp_path / "out")
    assert scripted == [0, 2, 4, 6, 8]
    printed = capsys.readouterr().out
    assert "accuracy    step 4  strict 50.0% (40.0% to 60.0%)" in printed
    assert printed.count("kept so far") == 3
    assert "after: step 6, better on the way; last: step 8" in printed
    # After and last are of these two, without vLLM from the model in memory: infer.py says the same of adapter/.
    monkeypatch.undo()
    import infer

    json_file = tmp_path / "after.json"
    adapter = str(tmp_path / "out" / "adapter")
    monkeypatch.setattr(
        "sys.argv", ["infer.py", "--adapter", adapter, "--eval", "test", "--limit", "10", "--json", str(json_file)]
    )
    infer.main()
    assert json.loads(json_file.read_text()) == json.loads((tmp_path / "out" / "eval.json").read_text())["after"]


@pytest.mark.parametrize("step", [4, 7])  # in an evaluation that is due; after the best
def test_a_run_that_is_stopped_and_goes_on_keeps_the_same_best(scripted, monkeypatch, tmp_path, step):
    log = Report.on_log

    def stop_in_step(self, args, state, control, logs=None, **kwargs):
        log(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Report, "on_log", stop_in_step)
        in_process(patch, *STEPS, "--output_dir", tmp_path / "out")
    assert checkpoints(tmp_path / "out")[0].name == f"checkpoint-{step}"
    assert not (tmp_path / "out" / "adapter").exists()
    in_process(monkeypatch, *STEPS, "--output_dir", tmp_path / "out", "--resume")
    check_result(tmp_path / "out")
    assert sorted(scripted) == [0, 2, 4, 6, 8]  # none twice


def test_an_evaluation_that_was_not_finished_is_made_when_the_run_goes_on(scripted, monkeypatch, tmp_path):
    out = tmp_path / "out"
    in_process(monkeypatch, *STEPS, "--max_steps", 6, "--output_dir", out)
    lines = (out / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    (out / "evaluations.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while writing
    shutil.rmtree(out / "adapter")
    scripted.clear()
    in_process(monkeypatch, *STEPS, "--output_dir", out, "--resume")
    assert scripted == [6, 8]
    check_result(out)


def test_going_back_forgets_what_came_later(scripted, monkeypatch, tmp_path):
    out = tmp_path / "out"
    in_process(monkeypatch, *STEPS, "--save_total_limit", 9, "--output_dir", out)
    scripted.clear()
    in_process(monkeypatch, *STEPS, "--output_dir", out, "--resume", "checkpoint-3")
    assert scripted == [4, 6, 8]
    assert [line["step"] for line in jsonl(out / "evaluations.jsonl")] == [0, 2, 4, 6, 8]


def test_more_steps_go_on_from_the_last_policy_and_not_from_the_best(scripted, monkeypatch, tmp_path):
    out = tmp_path / "out"
    in_process(monkeypatch, *STEPS, "--max_steps", 6, "--output_dir", out)
    in_process(monkeypatch, *STEPS, "--output_dir", out, "--resume")
    check_result(out)


def test_the_last_good_checkpoint_stays_beside_the_best_and_the_newest(scripted, monkeypatch, tmp_path):
    monkeypatch.setattr("support.divergence.best_step", lambda history, window: 3)
    in_process(monkeypatch, *STEPS, "--save_total_limit", 3, "--output_dir", tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6", "checkpoint-3"]


def test_accuracies_under_another_length_are_not_compared(scripted, monkeypatch, tmp_path):
    in_process(monkeypatch, *STEPS, "--max_steps", 6, "--output_dir", tmp_path)
    scripted.clear()
    in_process(monkeypatch, *STEPS, "--resume", "--max_completion_length", 12, "--output_dir", tmp_path)
    assert scripted == [6, 8] == [line["step"] for line in jsonl(tmp_path / "evaluations.jsonl")]


def test_accuracies_under_another_length_are_not_compared_after_going_back(scripted, monkeypatch, tmp_path):
    """The files may be of a later part of the run than the checkpoint, and of another length."""
    in_process(monkeypatch, *STEPS, "--max_steps", 2, "--output_dir", tmp_path)
    longer = ["--max_steps", 4, "--save_total_limit", 9, "--max_completion_length", 12]
    in_process(monkeypatch, *STEPS, *longer, "--resume", "--output_dir", tmp_path)
    scripted.clear()
    in_process(monkeypatch, *STEPS, "--max_steps", 4, "--resume", "checkpoint-2", "--output_dir", tmp_path)
    assert scripted == [2, 4]
    before, after = (
        json.loads((tmp_path / "eval.json").read_text())[name]["mean_length"] for name in ("before", "after")
    )
    assert min(before, after) > 12


def test_another_number_of_development_questions_is_another_run(scripted, monkeypatch, tmp_path):
    in_process(monkeypatch, *STEPS, "--max_steps", 2, "--output_dir", tmp_path)
    with pytest.raises(UserError, match="dev_samples 128, not 64"):
        in_process(monkeypatch, *STEPS, "--output_dir", tmp_path, "--resume", "--dev_samples", 64)


def test_without_development_questions_the_last_policy_is_kept(monkeypatch, tmp_path):
    in_process(monkeypatch, "--max_steps", 2, "--dev_samples", 0, "--output_dir", tmp_path / "out")
    evaluations = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert evaluations["best_step"] == 2 and "last" not in evaluations
    assert jsonl(tmp_path / "out" / "evaluations.jsonl") == []
    assert same(weights(tmp_path / "out" / "adapter"), weights(tmp_path / "out" / "checkpoint-2"))


def test_development_questions_are_not_trained_on():
    train = Dataset.from_dict({"answer": [str(i) for i in range(1000)]})
    rest, dev = hold_out(train, Recipe())
    assert len(dev) == 100 and len(rest) == 900  # at most a tenth
    assert not set(rest["answer"]) & set(dev["answer"])
    assert hold_out(train, Recipe(seed=7))[1]["answer"] == dev["answer"]  # seeds are compared on the same ones
    assert len(hold_out(train, Recipe(dev_samples=20))[1]) == 20
    few, none = hold_out(train.select(range(9)), Recipe())
    assert (len(few), len(none)) == (9, 0)


def test_the_picture_has_every_evaluation(scripted, monkeypatch, tmp_path):
    """It is drawn when there is something new: the last time after the last evaluation of all."""
    drawn, out = [], tmp_path / "out"

    def draw(folder, maxima):
        lines = jsonl(folder / "evaluations.jsonl") if (folder / "evaluations.jsonl").exists() else []
        drawn.append((len(lines), "after" in json.loads((folder / "eval.json").read_text())))

    in_process(monkeypatch, *STEPS, "--output_dir", out, draw=draw)
    assert drawn[-1] == (5, True) and (5, False) in drawn


@pytest.mark.parametrize(
    "right, step",  # of 400 questions, whose standard error is 10 where 233 are right
    [
        ({}, None),
        ({0: 400}, None),
        ({0: 103, 22: 203}, 22),
        ({22: 203, 44: 233, 66: 233}, 66),
        ({22: 203, 44: 233, 66: 226, 88: 217, 110: 224}, 110),
        ({22: 203, 44: 233, 66: 226, 88: 217, 110: 223}, 66),
        ({22: 203, 44: 233, 66: 222, 88: 217, 110: 222}, 44),
        ({5: 0, 10: 0}, 10),
        ({5: 400, 10: 399}, 5),
    ],
)
def test_the_latest_within_one_standard_error_of_the_highest(right, step):
    line = best_evaluation([{"step": at, "n": 400, "strict": n / 400} for at, n in right.items()])
    assert line == step or line["step"] == step


def test_the_time_left_counts_the_evaluations():
    report = Report.__new__(Report)
    report.recipe = Recipe(max_steps=100, eval_steps=30)
    report.seconds, report.development = [9.0, 2.0, 2.0], [{"seconds": 5.0}]
    assert report.seconds_left(10, last=2) == 90 * 2.0 + 4 * 5.0  # after 30, 60, 90 and 100
    report.development = []
    assert report.seconds_left(99) == pytest.approx(13 / 3)
