"""The real scripts, run on the tiny model: what they write, what they say, and that the policy learns."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import infer
from data import to_prompt
from rewards import REWARD_FUNCS, is_correct
from support.errors import UserError
from support.evaluation import generate
from support.settings import Recipe, load_recipe
from support.step_report import installed_versions
from train_grpo import main

TINY = ["train_grpo.py", "--config", "recipes/tiny.yaml"]
SHORT = ["--prompts_per_step", "2", "--num_generations", "4", "--micro_batch_size", "4", "--eval_samples", "10"]
SHORT += ["--max_completion_length", "24"]  # of 64: a run of fewer tokens, with answers that are cut off
QUESTIONS = Path("tiny/questions/test.jsonl")
EVALUATION = {"n", "strict", "strict_low", "strict_high", "lenient", "format", "truncated", "mean_length"}


def run(*arguments, **options):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=900, **options
    )


def assert_user_error(result, *words):
    """One line on stderr that begins with `error:`, status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), last


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def in_process(monkeypatch, *arguments, draw=lambda *_: None):
    """The short run in this process, without its picture, which takes a second a checkpoint."""
    monkeypatch.setattr("support.step_report.draw_reward_curve", draw)
    monkeypatch.setattr(sys, "argv", [*TINY, *SHORT, *map(str, arguments)])
    main()


def jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_variance_is_counted_by_question_whatever_advantages_are_divided_by(monkeypatch, tmp_path):
    in_process(monkeypatch, "--scale_rewards", "batch", "--max_steps", 4, "--dev_samples", 0, "--output_dir", tmp_path)
    samples = jsonl(tmp_path / "samples.jsonl")
    earned = [sum(sample[func.__name__] for func in REWARD_FUNCS) for sample in samples]
    groups = [earned[i : i + 4] for i in range(0, len(earned), 4)]
    same = [max(group) - min(group) < 1e-5 for group in groups]
    shares = [line["frac_reward_zero_std"] for line in jsonl(tmp_path / "metrics.jsonl")]
    assert shares == [sum(same[i : i + 2]) / 2 for i in range(0, len(same), 2)] and sum(shares) > 0


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("two words") / "short"
    out.mkdir()
    result = run(*TINY, *SHORT, "--max_steps", 3, "--save_steps", 2, "--sample_steps", 2, "--output_dir", out)
    assert result.returncode == 0, result.stderr
    return out, result.stdout + result.stderr


def test_the_picture_is_drawn_once_where_a_step_has_a_sample_and_a_checkpoint(tmp_path, monkeypatch):
    drawn, arguments = [], ["--max_steps", 4, "--save_steps", 2, "--sample_steps", 1, "--dev_samples", 0]
    draw = lambda out, _: drawn.append(len(jsonl(out / "metrics.jsonl")))  # noqa: E731
    in_process(monkeypatch, *arguments, "--output_dir", tmp_path / "run", draw=draw)
    assert drawn == [1, 2, 3, 4, 4]  # the last one has the evaluation


def test_everything_that_the_design_lists_is_written(short_run):
    out, _ = short_run
    written = {path.name for path in out.iterdir()}
    assert {"adapter", "recipe.yaml", "metrics.jsonl", "samples.jsonl", "reward_curve.png", "eval.json"} <= written
    assert {"checkpoint-2", "checkpoint-3"} <= written
    assert "README.md" not in written  # TRL's, which would name no model
    assert (out / "reward_curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_said(short_run):
    _, text = short_run
    assert "2 prompts × 4 answers = 8 completions, in micro-batches of 4" in text
    assert "3 steps = 24 completions" in text
    assert "questions   1872 to train on, 128 to develop on, 10 held out" in text
    for step in (1, 2, 3):
        assert f"step   {step}  reward " in text
    assert text.count("question: ") == 2 and "expected: " in text  # a sample, at step 2, and before and after
    assert "before " in text and "after " in text


def test_the_screen_is_the_recipes_own(short_run):
    """A line a step, nothing of the libraries, no bars, no empty lines; and the log's place before the first step."""
    out, text = short_run
    lines = text.splitlines()
    assert "\r" not in text and all(line.strip() for line in lines)
    first = next(i for i, line in enumerate(lines) if line.startswith("step   1  "))
    assert first <= 15
    assert f"log         {out}/libraries.log has what the libraries say; --verbose shows it here" in lines[:first]
    assert (out / "libraries.log").exists() and "tokenizer" not in text
    known = "importing machine numbers step run log reading questions loading answering strict before accuracy training after last warning The expected"
    ours = [line for line in lines if not line.startswith("    ") or line.startswith("         strict")]
    assert {line.split()[0] for line in ours} <= {*known.split(), "10"}


def test_metrics(short_run):
    out, _ = short_run
    metrics = jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        parts = [line[f"rewards/{func.__name__}"] for func in REWARD_FUNCS]
        assert line["reward"] == pytest.approx(sum(parts), abs=1e-5)
        assert {
            "frac_reward_zero_std",
            "completions/mean_length",
            "completions/clipped_ratio",
            "seconds",
            "gib",
        } <= set(line)


def test_samples_are_all_completions_with_their_rewards(short_run):
    out, _ = short_run
    samples = jsonl(out / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1] * 8 + [2] * 8 + [3] * 8
    for sample in samples:
        for func in REWARD_FUNCS:
            (reward,) = func(prompts=[], completions=[sample["completion"]], answer=[sample["answer"]])
            assert sample[func.__name__] == reward
    for line in jsonl(out / "metrics.jsonl"):
        of_step = [s["correctness_reward_func"] for s in samples if s["step"] == line["step"]]
        assert line["rewards/correctness_reward_func"] == pytest.approx(sum(of_step) / 8)


def test_the_recipe_that_is_written_is_the_one_that_was_used(short_run):
    out, _ = short_run
    recipe = load_recipe(out / "recipe.yaml")
    assert set(yaml.safe_load((out / "recipe.yaml").read_text())) == set(vars(Recipe()))
    assert (recipe.max_steps, recipe.prompts_per_step, recipe.output_dir, recipe.model) == (3, 2, str(out), "tiny")


def test_every_held_out_answer_before_and_after(short_run):
    out, text = short_run
    lines, evaluations = jsonl(out / "answers.jsonl"), json.loads((out / "eval.json").read_text())
    for name in ("before", "after"):
        assert sum(line[f"{name}_correct"] for line in lines) / 10 == evaluations[name]["strict"]
        assert all(line[f"{name}_correct"] == is_correct(line[name], line["expected"]) for line in lines)
    assert [line["question"] for line in lines] == [row["question_zh-cn"] for row in jsonl(QUESTIONS)[:10]]
    shown = f"    question: {lines[0]['question']}\nbefore, wrong:\n{lines[0]['before']}".replace("\n", "\n    ")
    assert shown.rstrip() in text


def test_eval_json(short_run):
    out, _ = short_run
    evaluations = json.loads((out / "eval.json").read_text())
    keys = "before after best_step generation gpu measured_with revisions seconds versions"
    assert set(evaluations) == set(keys.split())
    assert evaluations["generation"] == {"engine": "transformers"}
    assert set(evaluations["before"]) == set(evaluations["after"]) > EVALUATION
    assert evaluations["before"]["n"] == 10
    assert evaluations["versions"]["trl"] == "0.24.0"


def test_the_versions_are_of_the_packages_imported(monkeypatch, tmp_path):
    (tmp_path / "trl-9.9.dist-info").mkdir()  # a second copy of TRL, as on a machine that brings packages of its own
    (tmp_path / "trl-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 9.9\n")
    monkeypatch.setattr("sys.path", [*sys.path, str(tmp_path)])
    assert installed_versions()["trl"] == "0.24.0"
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_versions()["trl"] == "9.9"


def test_the_adapter_loads_in_plain_peft_and_changes_the_policy(short_run):
    out, _ = short_run
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, out / "adapter")
        after = model(ids).logits
    assert all(weights.abs().max() > 0 for name, weights in model.named_parameters() if "lora_B" in name)
    assert not torch.allclose(before, after)


def test_infer_answers_through_the_adapter(short_run, monkeypatch, capsys):
    out, _ = short_run
    question = "小明有8个苹果，送给小红3个，又得到2个，现在有多少个苹果？"
    monkeypatch.setattr(sys, "argv", ["infer.py", "--adapter", str(out / "adapter"), question])
    infer.main()
    assert "— answer" in capsys.readouterr().out


def test_infer_measures_through_the_adapter(short_run, tmp_path):
    out, _ = short_run
    result = run(
        "infer.py", "--adapter", out / "adapter", "--eval", "test", "--limit", 10, "--json", tmp_path / "e.json"
    )
    assert result.returncode == 0, result.stderr
    # the same questions, prompt, parser and adapter as in the training script: the same figures
    assert json.loads((tmp_path / "e.json").read_text()) == json.loads((out / "eval.json").read_text())["after"]


def test_sampling_is_the_recipes_not_the_checkpoints(monkeypatch, tmp_path):
    """A checkpoint that asks for top-p 0.01 would give every question one answer, again and again."""
    shutil.copytree("tiny", tmp_path / "model")
    settings = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "top_p": 0.01, "repetition_penalty": 1.1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    in_process(monkeypatch, "--max_steps", 1, "--model", tmp_path / "model", "--output_dir", out)
    samples = jsonl(out / "samples.jsonl")
    for question in {sample["question"] for sample in samples}:
        assert len({sample["completion"] for sample in samples if sample["question"] == question}) > 1


def test_a_run_is_not_overwritten(short_run, monkeypatch):
    out, _ = short_run
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="already holds a run.*--resume.*--output_dir") as error:
        in_process(monkeypatch, "--output_dir", out)
    other = str(error.value).rpartition("start another: ")[2]  # with one --output_dir, the other one
    assert other.count("--output_dir") == 1 and shlex.split(other)[-1] == f"{out}-2"
    assert (out / "metrics.jsonl").read_text() == before


def test_ctrl_c_saves_a_checkpoint_and_the_printed_command_continues(tmp_path):
    out = tmp_path / "stopped"
    command = [*TINY, *SHORT, "--max_steps", "40", "--output_dir", str(out)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if "step   2  reward" in line:
            process.send_signal(signal.SIGINT)
            break
    said.append(process.stdout.read())
    assert process.wait(timeout=300) == 128 + signal.SIGINT, said
    said = "".join(said)
    done = jsonl(out / "metrics.jsonl")[-1]["step"]
    assert done < 40 and (out / f"checkpoint-{done}").is_dir()
    assert f"stopped after step {done}; the checkpoint is in {out}/checkpoint-{done}" in said
    (hint,) = [line for line in said.splitlines() if line.startswith("continue with: ")]
    python, *command = shlex.split(hint.removeprefix("continue with: "))
    assert python == sys.executable
    resumed = run(*command, "--max_steps", done + 2)
    assert resumed.returncode == 0, resumed.stderr
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == list(range(1, done + 3))


def test_generation_does_not_depend_on_the_batch():
    """Left padding must not change a greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    model = AutoModelForCausalLM.from_pretrained("tiny", dtype=torch.float32)
    questions = [line["question_zh-cn"] for line in jsonl(Path("tiny/questions/test.jsonl"))[:6]]
    prompts = [to_prompt(question) for question in questions]
    together = generate(model, tokenizer, prompts, 64)
    assert together == [generate(model, tokenizer, [prompt], 64)[0] for prompt in prompts]
    assert not any(completion.truncated for completion in together)
    assert all(completion.truncated and completion.length == 5 for completion in generate(model, tokenizer, prompts, 5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_the_defaults_say_what_to_run(monkeypatch):
    assert_user_error(run("train_grpo.py"), "no CUDA GPU", "--config recipes/tiny.yaml")
    monkeypatch.setattr(sys, "argv", ["infer.py", "1+1"])
    with pytest.raises(UserError, match="no CUDA GPU"):
        infer.main()


def test_bad_input_ends_in_one_line(tmp_path):
    assert_user_error(run(*TINY, "--max_stepz", 5), "--max_steps")
    assert_user_error(run("infer.py", "--adapter", tmp_path, "1+1"), "no adapter")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--output_dir", "TMP/out", "--dataset", "TMP/bad.jsonl"], "row 1 .* not one number"),
        (["--output_dir", "TMP/out", "--model", "TMP/nowhere"], "cannot load the model"),
        (["--output_dir", "TMP/out", "--resume"], "no checkpoint"),
        (["--output_dir", "TMP/bad.jsonl"], "is a file"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, arguments, words):
    (tmp_path / "bad.jsonl").write_text('{"question_zh-cn": "1加1", "answer_only": "两个"}\n' * 20)
    with pytest.raises(UserError, match=words) as error:
        in_process(monkeypatch, *(argument.replace("TMP", str(tmp_path)) for argument in arguments))
    one_line(error)


@pytest.mark.slow
def test_the_policy_learns(tmp_path):
    """The README's first command: 25 points of strict accuracy at least, and intervals that do not overlap."""
    result = run(*TINY, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    evaluations = json.loads((tmp_path / "out" / "eval.json").read_text())
    before, after = evaluations["before"], evaluations["after"]
    assert before["n"] == 300 and 0.25 < before["strict"] < 0.42
    assert after["strict"] >= before["strict"] + 0.25
    assert after["strict_low"] > before["strict_high"]
