"""What stops a run on the way: each fault is provoked, for real where a CPU can."""

import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_runs import SHORT, TINY, in_process, jsonl, one_line

import support.best
import support.evaluation
import support.step_report
import train_grpo
from support import preflight
from support.divergence import DivergenceCheck, divergence
from support.errors import UserError
from support.evaluation import Completion
from support.resuming import flaw
from support.rules import OURS
from support.settings import Recipe, load_recipe
from support.stopping import Saving

# --- a policy that diverges --------------------------------------------------------------------------


def history(rewards, loss=0.1, grad_norm=0.1, same=0.0):
    return [
        {"step": i, "reward": reward, "loss": loss, "grad_norm": grad_norm, "frac_reward_zero_std": same}
        for i, reward in enumerate(rewards, start=1)
    ]


@pytest.mark.parametrize(
    "lines, found",
    [
        (history([1.0] * 30 + [3.0] * 10 + [0.5] * 10), ("fell from 3.00 to 0.50", 40)),
        (history([2.0] * 50 + [2.0 - i / 100 for i in range(1, 110)]), ("fell from 2.00 to 0.95", 50)),
        (history([2.0] * 2 + [0.0] * 20, same=1), ("all worth the same", 2)),
        (history([1.0] * 30, loss=math.nan), ("not finite for 20 steps", 10)),
        (history([1.0] * 30, grad_norm=math.inf), ("not finite for 20 steps", 10)),
        (history([1.0, 3.0] * 20), None),  # noise
        (history([0.0] * 60, same=1), None),  # has not begun to learn
        (history([0.4] * 10 + [0.0] * 10), None),  # too little to tell
        (history([2.0] * 40, same=1), None),  # nothing left to learn
        (history([1.0] * 10) + history([1.0] * 3, grad_norm=math.inf), None),  # float16 finds its scale
    ],
)
def test_divergence(lines, found):
    result = divergence(lines, window=10)
    assert (result is None) == (found is None)
    if found:
        assert found[0] in result[0] and result[1] == found[1]


def test_a_few_questions_a_step_are_not_a_policy_that_diverges():
    # article.yaml, one question a step, Qwen2.5-Coder-1.5B-Instruct in NF4: a run that this had ended
    rewards = (
        "1.44 0.33 0.10 1.94 2.04 0.92 0.98 0.98 1.06 2.54 1.29 3.25 1.94 1.10 2.08 2.25 2.02 0.33 1.56 2.83 0.60 1.31"
        " 1.31 1.15 1.58 1.83 0.08 1.31 1.02 1.71 1.12 0.62 0.69 0.42 1.83 0.44"
    )
    rewards = [float(reward) for reward in rewards.split()]
    assert divergence(history(rewards), window=10)
    for recipe, window in (("article", 40), ("t4", 10)):
        assert DivergenceCheck(load_recipe(f"recipes/{recipe}.yaml"), []).window == window
    assert not divergence(history(rewards), window=40)
    assert divergence(history([2.0] * 40 + [0.5] * 40), window=40)[1] == 40


def test_weights_that_explode_stop_the_run_and_the_last_good_checkpoint_stays(monkeypatch, tmp_path):
    out = tmp_path / "out"
    in_process(monkeypatch, "--max_steps", 2, "--save_steps", 2, "--output_dir", out)
    resumed = ["--resume", "--max_steps", 6, "--save_steps", 2, "--output_dir", out, "--lr_scheduler", "constant"]
    with pytest.raises(UserError, match="not finite.*Continue from before: .*checkpoint-2 --learning_rate") as error:
        in_process(monkeypatch, *resumed, "--learning_rate", "1e30")
    one_line(error)
    assert not flaw(out / "checkpoint-2")
    monkeypatch.undo()
    in_process(monkeypatch, *resumed, "--learning_rate", "1e-3")  # the changed rate is the one that is used
    rates = [line["learning_rate"] for line in jsonl(out / "metrics.jsonl")]
    assert len(rates) == 6 and rates[3:] == [1e-3] * 3


def test_an_optimiser_whose_package_is_missing_is_said_before_anything_is_answered(monkeypatch, tmp_path, capsys):
    with pytest.raises(UserError, match="--optim adamw_apex_fused: .*apex is not installed") as error:
        in_process(monkeypatch, "--optim", "adamw_apex_fused", "--output_dir", tmp_path)
    one_line(error)
    assert "strict" not in capsys.readouterr().out


# --- on the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_behind", [Path.mkdir, Path.touch])
def test_a_folder_that_goes_away(monkeypatch, tmp_path, left_behind):
    """As a mounted Drive does, which leaves an empty folder: what was trained is saved elsewhere, and continues from there."""
    out = tmp_path / "drive" / "out"

    def unmount():
        while not (out / "metrics.jsonl").exists() or len(jsonl(out / "metrics.jsonl")) < 3:
            time.sleep(0.05)
        out.parent.rename(tmp_path / "gone")
        left_behind(out.parent)

    monkeypatch.setattr("support.stopping.__file__", str(tmp_path / "support" / "stopping.py"))  # rescued-… goes here
    thread = threading.Thread(target=unmount)
    thread.start()
    with pytest.raises(UserError, match="cannot write to .* any more .* Continue with: ") as error:
        in_process(monkeypatch, "--max_steps", 12, "--save_steps", 2, "--output_dir", out)
    thread.join()
    one_line(error)
    (rescued,) = tmp_path.glob("rescued-*")
    done = len(jsonl(rescued / "metrics.jsonl"))
    assert 3 <= done < 12 and not flaw(rescued / f"checkpoint-{done}")
    assert not out.exists()
    assert len(jsonl(rescued / "samples.jsonl")) == 8 * done
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--config", str(rescued / "recipe.yaml"), "--resume"])
    train_grpo.main()
    assert [line["step"] for line in jsonl(rescued / "metrics.jsonl")] == list(range(1, 13))
    assert (rescued / "adapter").is_dir()


def test_a_folder_that_goes_away_in_the_last_evaluation(monkeypatch, tmp_path, capsys):
    out = tmp_path / "drive" / "out"
    generate = support.evaluation.generate

    def unmount_and_generate(*arguments, adapter, **options):
        if adapter:
            out.parent.rename(tmp_path / "gone")
            out.mkdir(parents=True)
        return generate(*arguments, adapter=adapter, **options)

    monkeypatch.setattr("support.stopping.__file__", str(tmp_path / "support" / "stopping.py"))
    monkeypatch.setattr(support.evaluation, "generate", unmount_and_generate)
    with pytest.raises(UserError, match="cannot write to .* any more .*checkpoint of step 2 .*Continue with: "):
        in_process(monkeypatch, "--max_steps", 2, "--dev_samples", 0, "--output_dir", out)
    assert "\nafter " in capsys.readouterr().out  # what took hours is at least said
    monkeypatch.undo()
    (rescued,) = tmp_path.glob("rescued-*")
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--config", str(rescued / "recipe.yaml"), "--resume"])
    train_grpo.main()
    assert (rescued / "adapter").is_dir() and "after" in json.loads((rescued / "eval.json").read_text())


def test_one_error_of_the_disk_costs_nothing(monkeypatch, tmp_path):
    """As a mounted Drive has them: the first complete.json cannot be put in place."""
    out, replace, failures = tmp_path / "out", os.replace, [OSError(5, "Input/output error")]

    def replace_or_fail(source, target):
        if str(target).endswith("complete.json") and failures:
            raise failures.pop()
        replace(source, target)

    monkeypatch.setattr("os.replace", replace_or_fail)
    with pytest.raises(UserError, match="Input/output error.*checkpoint of step 2 is in .*Continue with: "):
        in_process(monkeypatch, "--max_steps", 4, "--save_steps", 2, "--output_dir", out)
    in_process(monkeypatch, "--max_steps", 4, "--save_steps", 2, "--output_dir", out, "--resume")
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_one_error_of_the_disk_loses_no_sample(monkeypatch, tmp_path):
    out, write, calls = tmp_path / "out", support.step_report.write_json_lines, []

    def write_or_fail(path, records, append=False):
        if append and path.name == "samples.jsonl":
            calls.append(1)
            if len(calls) == 3:
                raise OSError(5, "Input/output error")
        write(path, records, append)

    monkeypatch.setattr("support.step_report.write_json_lines", write_or_fail)
    with pytest.raises(UserError, match="checkpoint of step 3 is in"):
        in_process(monkeypatch, "--max_steps", 5, "--output_dir", out)
    in_process(monkeypatch, "--max_steps", 5, "--output_dir", out, "--resume")
    steps = [sample["step"] for sample in jsonl(out / "samples.jsonl")]
    assert steps == [step for step in range(1, 6) for _ in range(8)]


def test_a_folder_that_takes_no_files(monkeypatch):
    monkeypatch.setattr(preflight, "check_disk", lambda *arguments: None)
    with pytest.raises(UserError, match="cannot write to /proc: .*another --output_dir") as error:
        in_process(monkeypatch, "--output_dir", "/proc")
    one_line(error)


@pytest.fixture
def hangup():
    """SIGHUP as it is on a terminal, whatever the tests run under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "evaluation, words", [("before", "there is no checkpoint yet. Begin anew with"), ("after", "checkpoint-2. Go on")]
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_an_evaluation(monkeypatch, tmp_path, capsys, evaluation, words, signum, hangup):
    def interrupted(*arguments, adapter, **options):
        if (evaluation == "after") == (adapter is not None):
            os.kill(os.getpid(), signum)
        return [Completion("", range(1), False)] * 10

    monkeypatch.setattr(support.evaluation, "generate", interrupted)
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as end:
        in_process(monkeypatch, "--max_steps", 2, "--dev_samples", 0, "--output_dir", tmp_path / "out")
    assert end.value.code == 128 + signum
    assert words in capsys.readouterr().out
    assert signal.getsignal(signum) == before


def test_nohup_is_left_alone(hangup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Saving(Recipe(), None, None) as saving:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == saving.on_signal


def test_a_signal_in_an_evaluation_on_the_way(monkeypatch, tmp_path, capsys):
    """It ends the run behind it, with no further step."""
    measure = support.best.measure

    def interrupted(*arguments, rules):
        if arguments[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*arguments, rules=rules)

    monkeypatch.setattr(support.best, "measure", interrupted)
    settings = ["--max_steps", 6, "--eval_steps", 2, "--dev_samples", 5, "--output_dir", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        in_process(monkeypatch, *settings)
    assert end.value.code == 128 + signal.SIGTERM
    assert "stopped after step 2; the checkpoint is in" in capsys.readouterr().out
    monkeypatch.undo()
    in_process(monkeypatch, *settings, "--resume")
    lines = (tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4, 6]


def test_a_folder_that_goes_away_in_an_evaluation_on_the_way(monkeypatch, tmp_path):
    out, measure = tmp_path / "drive" / "out", support.best.measure

    def unmount_and_measure(*arguments, rules):
        if arguments[-1]:
            out.parent.rename(tmp_path / "gone")
        return measure(*arguments, rules=rules)

    monkeypatch.setattr("support.stopping.__file__", str(tmp_path / "support" / "stopping.py"))
    monkeypatch.setattr(support.best, "measure", unmount_and_measure)
    with pytest.raises(UserError, match="cannot write to .* any more .*checkpoint of step 2 .*Continue with: "):
        in_process(monkeypatch, "--max_steps", 4, "--eval_steps", 2, "--output_dir", out)
    monkeypatch.undo()
    (rescued,) = tmp_path.glob("rescued-*")
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--config", str(rescued / "recipe.yaml"), "--resume"])
    train_grpo.main()
    lines = (rescued / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]


def test_a_second_signal_does_not_wait(monkeypatch, tmp_path, capsys):
    """Before the first checkpoint: the command that is named begins anew, and is not refused."""

    def xmlcount_reward_func(completions, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return [0.0] * len(completions)

    monkeypatch.setattr(
        train_grpo, "load_rules", lambda file: replace(OURS, funcs=[*OURS.funcs[:4], xmlcount_reward_func])
    )
    with pytest.raises(SystemExit) as end:
        in_process(monkeypatch, "--max_steps", 4, "--output_dir", tmp_path / "out")
    assert end.value.code == 130
    said = capsys.readouterr().out
    assert "finishing this step" in said and "there is no checkpoint yet. Begin anew with: " in said
    monkeypatch.undo()
    *_, arguments = said.rpartition("train_grpo.py ")
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", *shlex.split(arguments), "--max_steps", "2"])
    train_grpo.main()
    assert [line["step"] for line in jsonl(tmp_path / "out" / "metrics.jsonl")] == [1, 2]


def test_when_nobody_reads_the_output_any_more(tmp_path):
    """The run ends with a checkpoint of its last step, and no step is missing from its files."""
    command = [sys.executable, *TINY, *SHORT, "--max_steps", "200", "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"step   2" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    steps = [line["step"] for line in jsonl(tmp_path / "out" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 100
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{steps[-1]}" and not flaw(checkpoint)


def test_the_last_good_checkpoint_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("support.divergence.best_step", lambda history, window: 3)
    in_process(monkeypatch, "--max_steps", 10, "--save_steps", 2, "--output_dir", tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-8", "checkpoint-10"}


def test_a_disk_that_is_full(monkeypatch, tmp_path):
    """A limit on the size of files: checkpoints cannot be written, here or elsewhere."""
    monkeypatch.setattr("support.stopping.__file__", str(tmp_path / "support" / "stopping.py"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match="training stopped .*nothing could be saved") as error:
            in_process(monkeypatch, "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert len(jsonl(tmp_path / "out" / "metrics.jsonl")) == 2
    assert all(flaw(path) for path in (tmp_path / "out").glob("checkpoint-*"))


def test_out_of_memory_on_the_way(monkeypatch, tmp_path):
    """A CPU has no such error: the reward function, which TRL calls in every step, raises it in the third."""
    calls = []

    def xmlcount_reward_func(completions, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [0.0] * len(completions)

    monkeypatch.setattr(
        train_grpo, "load_rules", lambda file: replace(OURS, funcs=[*OURS.funcs[:4], xmlcount_reward_func])
    )
    with pytest.raises(
        UserError, match="out of GPU memory: try --micro_batch_size 2. .*step 2 is in .*one of these after: .*--resume$"
    ) as error:
        in_process(monkeypatch, "--max_steps", 6, "--output_dir", tmp_path / "out")
    one_line(error)
    monkeypatch.undo()
    in_process(monkeypatch, "--max_steps", 4, "--output_dir", tmp_path / "out", "--resume", "--micro_batch_size", 2)
    assert [line["step"] for line in jsonl(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
    samples = jsonl(tmp_path / "out" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in (1, 2, 3, 4) for _ in range(8)]
