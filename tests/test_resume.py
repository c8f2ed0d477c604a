"""A run that was killed and resumed is the run that was never killed: step by step, and in its weights."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_runs import SHORT, TINY, in_process, jsonl
from transformers import AutoTokenizer

import train_grpo
from data import load_questions
from support.best import hold_out
from support.errors import UserError
from support.resuming import (
    checkpoints,
    command,
    find_checkpoint,
    flaw,
    go_back_to,
    read_json_lines,
    write_json_lines,
)
from support.settings import load_recipe
from train_grpo import training_questions

STEPS, EVERY = 12, 3
LENGTH = ["--max_steps", str(STEPS), "--save_steps", str(EVERY)]
COMMAND = [*TINY, *SHORT, *LENGTH]
CLOCK = {"seconds", "gib"}  # the only figures of a step that may differ


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        resume(monkeypatch, out)
    return out


@pytest.fixture
def half(reference, tmp_path):
    """The reference run as it was when its ninth step had been saved: checkpoints 6 and 9 are left."""
    out = tmp_path / "half"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-12")
    return out


def resume(monkeypatch, out, *arguments):
    in_process(monkeypatch, *LENGTH, "--output_dir", out, *arguments)


def assert_same_run(out, reference):
    for line, expected in zip(jsonl(out / "metrics.jsonl"), jsonl(reference / "metrics.jsonl"), strict=True):
        assert {k: v for k, v in line.items() if k not in CLOCK} == {
            k: v for k, v in expected.items() if k not in CLOCK
        }
    for name in ("samples.jsonl", "answers.jsonl"):
        assert (out / name).read_text() == (reference / name).read_text()
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, expected in load_file(reference / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(weights[name], expected), name
    after, expected = (json.loads((folder / "eval.json").read_text())["after"] for folder in (out, reference))
    assert after == expected


def test_killed_and_resumed(reference, tmp_path):
    """kill -9 twice, at steps between checkpoints and at whatever the process is doing then."""
    out = tmp_path / "killed"
    command = [sys.executable, *COMMAND, "--output_dir", out, "--resume", "auto"]
    for step, wait in ((5, 0.0), (8, 0.3)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= step):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # killed while it wrote
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "resuming    after step " in said
    assert_same_run(out, reference)


def test_a_finished_run_says_so(reference, monkeypatch, capsys):
    before = {path: path.stat().st_mtime for path in reference.rglob("*")}
    resume(monkeypatch, reference, "--resume")
    assert "is complete, with 12 steps" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime for path in reference.rglob("*")}


def test_without_resume_the_two_commands_are_named(half, monkeypatch):
    with pytest.raises(
        UserError, match="already holds a run. Continue it: .*--resume or start another: .*--output_dir"
    ):
        resume(monkeypatch, half)


@pytest.mark.parametrize(
    "left, words",
    [
        ("adapter", "already holds a run, which cannot be continued. Start another: .*--output_dir"),
        (
            "metrics.jsonl",
            "run that had no checkpoint yet. Begin it anew: .*--resume auto or start another: .*--output_dir",
        ),
    ],
)
def test_whatever_a_run_left_is_not_written_over(reference, monkeypatch, tmp_path, left, words):
    out = tmp_path / "out"
    out.mkdir()
    (shutil.copytree if (reference / left).is_dir() else shutil.copy)(reference / left, out / left)
    with pytest.raises(UserError, match=words):
        resume(monkeypatch, out)


def test_the_commands_of_the_refusal_are_this_command(half, monkeypatch):
    with pytest.raises(UserError) as error:
        resume(monkeypatch, half, "--learning_rate", "2e-3")
    resumed, another = re.findall(r"train_grpo.py (.*?)(?: or start another: |$)", str(error.value))
    assert resumed.endswith("--learning_rate 2e-3 --resume") and another.endswith(f"2e-3 --output_dir {half}-2")


def test_auto_does_not_begin_anew_over_what_a_run_left(half, reference, monkeypatch):
    """Only what a run left that was killed before its first checkpoint was whole."""
    for path in checkpoints(half):
        truncate(path / "optimizer.pt")
    for arguments in (["--resume"], ["--resume", "auto"]):
        with pytest.raises(UserError, match="no checkpoint in .* can be continued from"):
            resume(monkeypatch, half, *arguments)
    for path in checkpoints(half):
        shutil.rmtree(path)
    shutil.copytree(reference / "adapter", half / "adapter")
    with pytest.raises(UserError, match="holds a trained adapter and no checkpoint"):
        resume(monkeypatch, half, "--resume", "auto")
    assert (half / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    shutil.rmtree(half / "adapter")
    (half / "checkpoint-3").mkdir()
    recipe = load_recipe(half / "recipe.yaml")
    recipe.output_dir, recipe.resume = str(half), "auto"
    assert find_checkpoint(recipe) is None


def test_a_checkpoint_by_its_name_in_the_folder(half):
    recipe = load_recipe(half / "recipe.yaml")
    recipe.output_dir, recipe.resume = str(half), "checkpoint-6"
    assert find_checkpoint(recipe) == half / "checkpoint-6"


def test_fewer_steps_than_the_checkpoint_has(half, monkeypatch):
    with pytest.raises(UserError, match="checkpoint-9 is past --max_steps 8: give 9 or more"):
        resume(monkeypatch, half, "--resume", "--max_steps", 8)


def test_a_run_that_was_moved_is_continued_where_it_is(half):
    recipe = load_recipe(half / "recipe.yaml")
    recipe.output_dir = "elsewhere"
    assert command(recipe, "--resume").endswith("--config elsewhere/recipe.yaml --output_dir elsewhere --resume")


def test_lines_with_line_separators_in_them(tmp_path):
    records = [{"step": 1, "completion": "a\u2028b\u2029c\x85d\ne"}, {"step": 2, "completion": ""}]
    write_json_lines(tmp_path / "x.jsonl", records)
    write_json_lines(tmp_path / "x.jsonl", records, append=True)
    assert read_json_lines(tmp_path / "x.jsonl") == records * 2


def test_going_back_loses_no_history_when_it_is_interrupted(half, monkeypatch):
    before = {path: path.read_bytes() for path in half.glob("*.jsonl")}

    def fail(source, target):
        raise OSError("interrupted")

    recipe = load_recipe(half / "recipe.yaml")
    recipe.output_dir = str(half)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        go_back_to(half / "checkpoint-6", recipe)
    assert before == {path: path.read_bytes() for path in half.glob("*.jsonl")}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda checkpoint: truncate(checkpoint / "optimizer.pt"), "optimizer.pt is damaged"),
        (lambda checkpoint: (checkpoint / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda checkpoint: (checkpoint / "complete.json").unlink(), "it was not finished"),
        (lambda checkpoint: truncate(checkpoint / "complete.json"), "its complete.json is damaged"),
        (lambda checkpoint: shutil.rmtree(checkpoint) or checkpoint.mkdir(), "it was not finished"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(half, monkeypatch, capsys, damage, words):
    damage(half / "checkpoint-9")
    recipe = load_recipe(half / "recipe.yaml")
    recipe.output_dir, recipe.resume = str(half), "newest"
    assert find_checkpoint(recipe) == half / "checkpoint-6"
    assert f"skipped     {half}/checkpoint-9: {words}" in capsys.readouterr().out
    recipe.resume = str(half / "checkpoint-9")
    with pytest.raises(UserError, match=f"cannot be continued from: {words}"):
        find_checkpoint(recipe)


def test_the_run_from_before_the_damaged_checkpoint_is_the_same(half, reference, monkeypatch, capsys):
    truncate(half / "checkpoint-9" / "adapter_model.safetensors")
    resume(monkeypatch, half, "--resume")
    assert f"removed     {half}/checkpoint-9, which is not whole" in capsys.readouterr().out
    assert_same_run(half, reference)
    assert [path.name for path in checkpoints(half)] == ["checkpoint-12", "checkpoint-9", "checkpoint-6"]
    assert not any(flaw(path) for path in checkpoints(half))


def test_a_named_checkpoint(half, reference, monkeypatch):
    resume(monkeypatch, half, "--resume", half / "checkpoint-6")
    assert_same_run(half, reference)


def test_nothing_to_resume(half, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is no checkpoint in .*, which holds checkpoint-9, checkpoint-6"):
        resume(monkeypatch, half, "--resume", half / "checkpoint-4")
    for path in checkpoints(half):
        (path / "complete.json").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* to continue from: .*--resume auto"):
        resume(monkeypatch, half, "--resume")
    assert len(checkpoints(half)) == 2  # nothing was removed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lora_rank", "8"], "lora_rank 16, not 8"),
        (["--seed", "7"], "seed 3407, not 7"),
        (["--dataset", "elsewhere"], "dataset 'tiny/questions', not 'elsewhere'"),
        (["--model", "elsewhere"], "model 'tiny', not 'elsewhere'"),
    ],
)
def test_another_run_is_refused(half, monkeypatch, arguments, words):
    before = (half / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=words) as error:
        resume(monkeypatch, half, "--resume", *arguments)
    assert "\n" not in str(error.value)
    assert (half / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_recipe_put_into_the_folder(half, monkeypatch, tmp_path):
    other = half / "checkpoint-9" / "complete.json"
    content = json.loads(other.read_text())
    content["recipe"]["model"] = "other"
    other.write_text(json.dumps(content))
    with pytest.raises(UserError, match="checkpoint-9 belongs to a run with model 'other', not 'tiny'"):
        resume(monkeypatch, half, "--resume")


def test_changed_settings_are_listed_and_used(half, monkeypatch, capsys):
    changes = ["--max_steps", 11, "--micro_batch_size", 2, "--num_generations", 3, "--eval_samples", 7]
    resume(monkeypatch, half, "--resume", *changes)
    said = capsys.readouterr().out
    assert "changed     max_steps: 12 before, 11 from here on" in said
    assert "changed     micro_batch_size: 4 before, 2 from here on" in said
    evaluations = json.loads((half / "eval.json").read_text())
    assert evaluations["before"]["n"] == evaluations["after"]["n"] == 7  # of the same questions
    steps = [sample["step"] for sample in jsonl(half / "samples.jsonl")]
    assert [steps.count(step) for step in range(1, 12)] == [8] * 9 + [6] * 2
    resume(monkeypatch, half, "--resume", "--max_steps", 11, "--eval_samples", 8)  # a finished run, measured anew
    assert json.loads((half / "eval.json").read_text())["after"]["n"] == 8


def test_after_a_change_of_length_both_evaluations_have_it(half, monkeypatch):
    before = json.loads((half / "eval.json").read_text())["before"]
    assert before["mean_length"] > 8
    resume(monkeypatch, half, "--resume", "--max_completion_length", 8)
    evaluations = json.loads((half / "eval.json").read_text())
    assert evaluations["before"]["mean_length"] == evaluations["after"]["mean_length"] == 8
    assert evaluations["before"]["truncated"] == 1


def test_other_questions_in_the_file_are_said_and_measured_anew(monkeypatch, tmp_path, capsys):
    rows = Path("tiny/questions/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file, out = tmp_path / "q.jsonl", tmp_path / "out"
    arguments = ["--dataset", file, "--save_steps", 2, "--eval_steps", 2, "--output_dir", out, "--max_steps"]
    file.write_text("".join(rows[:60]), encoding="utf-8")
    in_process(monkeypatch, *arguments, 2)
    rows = [json.loads(row) for row in rows[:60]]
    rows = [row | {"answer_only": row["answer_only"] + 1} for row in rows]  # the same questions with other labels
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    in_process(monkeypatch, *arguments, 4, "--resume")
    assert "changed     the questions to train on, or to develop on, are others than before" in capsys.readouterr().out
    assert [line["step"] for line in jsonl(out / "evaluations.jsonl")] == [2, 4]
    (answer,) = {
        row["answer_only"] for row in rows if row["question_zh-cn"] == jsonl(out / "answers.jsonl")[0]["question"]
    }
    assert jsonl(out / "answers.jsonl")[0]["expected"] == str(answer)


def test_changed_steps_between_checkpoints_are_kept_to(half, monkeypatch):
    resume(monkeypatch, half, "--resume", "--save_steps", 2)
    assert "checkpoint-10" in [path.name for path in checkpoints(half)]


def test_a_changed_learning_rate_is_logged_from_the_first_step(half, monkeypatch):
    resume(monkeypatch, half, "--resume", "--learning_rate", "1e-3", "--lr_scheduler", "constant")
    assert [line["learning_rate"] for line in jsonl(half / "metrics.jsonl")][9:] == [1e-3] * 3


def test_the_order_of_the_questions_goes_on_after_the_first_epoch():
    from datasets import Dataset

    questions = Dataset.from_dict({"prompt": list("abcde")})
    recipe = load_recipe("recipes/tiny.yaml")
    recipe.prompts_per_step, recipe.max_steps = 2, 6
    order = training_questions(questions, recipe)["prompt"][:]
    assert len(order) == 12 and sorted(order[:5]) == sorted(order[5:10]) == list("abcde")
    assert order[:5] != order[5:10]
    recipe.max_steps = 4
    assert training_questions(questions, recipe)["prompt"][:] == order[:8]


# --- nothing is lost, nothing comes twice ----------------------------------------------------------


def contents(folder):
    """Every file of a run, but for the log and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("libraries.log", ".lock"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_a_resumed_run_that_fails_before_its_first_step_is_done_changes_nothing(reference, tmp_path, monkeypatch):
    """From an older checkpoint, with other settings: the newer checkpoints, the adapter and the figures stay."""
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    before = contents(out)

    def fail(*args, **kwargs):
        raise RuntimeError("CUDA out of memory.")

    for owner, name in (train_grpo, "load_base_model"), (train_grpo, "measure"), (train_grpo.Trainer, "compute_loss"):
        monkeypatch.setattr(owner, name, fail)
        changed = ["--max_completion_length", 20, "--micro_batch_size", 2]
        with pytest.raises(UserError, match="out of GPU memory"):
            resume(monkeypatch, out, "--resume", out / "checkpoint-9", *changed)
        assert contents(out) == before, name
        monkeypatch.undo()
    resume(monkeypatch, out, "--resume", out / "checkpoint-9", "--max_steps", 10)
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == list(range(1, 11))
    assert [path.name for path in checkpoints(out)] == ["checkpoint-10", "checkpoint-9", "checkpoint-6"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_file_cut_at_any_byte_is_read_up_to_its_last_whole_line(reference, tmp_path, name):
    content = (reference / name).read_bytes()
    start = content.index("小".encode()) if name == "samples.jsonl" else 0
    for end in [*range(start, min(start + 1500, len(content))), len(content)]:
        (tmp_path / name).write_bytes(content[:end])
        assert len(read_json_lines(tmp_path / name)) == content[:end].count(b"\n")


def test_a_run_cut_inside_a_character_continues(half, reference, monkeypatch):
    content = (half / "samples.jsonl").read_bytes()
    at = content.rindex("小".encode()) + 1
    (half / "samples.jsonl").write_bytes(content[:at])
    resume(monkeypatch, half, "--resume", half / "checkpoint-6")
    assert_same_run(half, reference)


def test_other_prompts_a_step_go_on_with_the_questions_not_used_yet(half, monkeypatch):
    """Nine steps of two questions, then steps of three: the nineteenth is next, and in a further run the twenty-fifth."""
    resume(monkeypatch, half, "--resume", "--prompts_per_step", 3, "--num_generations", 4, "--max_steps", 11)
    resume(monkeypatch, half, "--resume", "--prompts_per_step", 1, "--num_generations", 4, "--max_steps", 14)
    questions = [sample["question"] for sample in jsonl(half / "samples.jsonl")][::4]
    recipe = load_recipe(half / "recipe.yaml")
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    train = load_questions(recipe.dataset, "train", tokenizer, recipe.max_prompt_length, recipe.system_prompt)
    train, _ = hold_out(train, recipe)
    order = train.shuffle(seed=recipe.seed)["prompt"][: 9 * 2 + 2 * 3 + 3 * 1]
    assert questions == [prompt[-1]["content"] for prompt in order]
    newest = json.loads((half / "checkpoint-14" / "complete.json").read_text())
    assert newest["questions"] == len(order)
    epochs = [line["epoch"] for line in jsonl(half / "metrics.jsonl")]
    used = [*range(2, 19, 2), 21, 24, 25, 26, 27]
    assert epochs == [count / len(train) for count in used]


def test_a_second_run_in_a_folder_is_stopped_and_a_killed_one_is_not_in_the_way(half, monkeypatch, tmp_path):
    hold = "import sys, time; from pathlib import Path; from support.resuming import hold\n"
    hold += "lock = hold(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold, half], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    before = contents(half)
    for arguments in ([], ["--resume"], ["--resume", "auto"], ["--resume", half / "checkpoint-6"]):
        with pytest.raises(UserError, match="another process is training in") as error:
            resume(monkeypatch, half, *arguments)
        assert "\n" not in str(error.value)
    assert contents(half) == before
    other.kill()
    other.wait()
    resume(monkeypatch, half, "--resume", "--max_steps", 10)
    assert len(jsonl(half / "metrics.jsonl")) == 10


def test_a_file_system_without_locks_holds_nobody_up(half, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    resume(monkeypatch, half, "--resume", "--max_steps", 10)
    assert len(jsonl(half / "metrics.jsonl")) == 10
