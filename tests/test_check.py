"""--check says what holds, and what does not: each part is broken on purpose, and check.json can be shown to anybody."""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_runs import assert_user_error, in_process, run

import train_grpo
from support import check, pins
from support.check_file import output_dir_of, without_names
from support.errors import UserError
from support.settings import Recipe

FAST = ["--prompts_per_step", "2", "--num_generations", "4", "--micro_batch_size", "4"]


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    out = tmp_path_factory.mktemp("somebody's") / "out"
    return out, run("train_grpo.py", "--check", *FAST, "--output_dir", out)  # the tiny recipe: there is no GPU


def found(out: Path) -> dict:
    return json.loads((out / "check.json").read_text(encoding="utf-8"))


def test_without_a_gpu_the_tiny_recipe_is_checked_and_passes(passed):
    out, result = passed
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("no GPU ") and lines[-1] == "check passed"
    labels = [line.split()[0] for line in lines[1:-1] if not line.startswith(("columns", " "))]
    expected = "packages machine numbers step run log machine questions generation agreement step time rewards written"
    assert labels == expected.split()
    assert re.search(r"^time +80 steps and the evaluations at that rate: \d+ (s|min)$", result.stdout, re.MULTILINE)


def test_what_it_found_is_in_check_json(passed):
    holds = found(passed[0])
    assert holds["passed"] and holds["failure"] is None
    assert holds["generation"]["engine"] == "transformers"
    agreement = holds["agreement"]
    assert agreement["mean"] <= agreement["bound_mean"] < agreement["without_lora"]
    assert 0 < holds["step"]["hours"] < 1 and holds["step"]["grad_norm"] > 0
    assert holds["settings"]["prompts_per_step"] == 2 and holds["versions"]["torch"]


def test_check_json_has_no_paths_and_no_names(passed):
    out, _ = passed
    text = (out / "check.json").read_text()
    for private in (str(Path.cwd()), str(out), str(Path.home()), platform.node()):
        assert private not in text


def test_a_check_leaves_the_folder_free_for_a_run(passed, monkeypatch):
    out, _ = passed
    assert {path.name for path in out.iterdir()} <= {"check.json", "libraries.log", ".lock"}
    in_process(monkeypatch, "--max_steps", 1, "--output_dir", out)
    assert (out / "adapter").is_dir()


def checked(monkeypatch, out, *arguments):
    """--check of the tiny recipe in this process, to its error."""
    with pytest.raises(UserError) as error:
        in_process(monkeypatch, "--check", "--output_dir", out, *arguments)
    failure = found(out)["failure"]
    said = str(error.value).replace("tiny/questions", "DATASET")
    assert not found(out)["passed"] and said == f"check failed ({failure['part']}): {failure['sentence']}"
    return failure["part"], failure["sentence"]


def test_a_lora_that_does_not_reach_what_generates(monkeypatch, tmp_path):
    answers = check.answers

    def without_lora(model, *rest):
        with model.disable_adapter():
            return answers(model, *rest)

    monkeypatch.setattr(check, "answers", without_lora)
    part, sentence = checked(monkeypatch, tmp_path)
    assert part == "agreement" and "what is trained is not what answers. Try another --dtype" in sentence
    assert found(tmp_path)["agreement"]["mean"] == pytest.approx(found(tmp_path)["agreement"]["without_lora"], rel=1e-3)


def test_a_poisoned_lora(monkeypatch, tmp_path):
    answers = check.answers

    def poisoned(model, *rest):
        with torch.no_grad():
            weights = next(w for name, w in model.named_parameters() if ".lora_B." in name)
            weights += 0.5
            try:
                return answers(model, *rest)
            finally:
                weights -= 0.5

    monkeypatch.setattr(check, "answers", poisoned)
    assert checked(monkeypatch, tmp_path)[0] == "agreement"


def test_chances_that_are_no_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "trainer_log_probabilities", lambda trainer, ids, keep: torch.full((keep,), torch.nan))
    assert checked(monkeypatch, tmp_path)[0] == "agreement"


def test_a_step_whose_loss_is_no_number(monkeypatch, tmp_path):
    monkeypatch.setattr("train_grpo.Trainer.compute_loss", lambda self, model, inputs, *_, **__: nan_loss(model))
    part, sentence = checked(monkeypatch, tmp_path)
    assert part == "step" and sentence.startswith("the loss of the step is nan: give another --dtype")


def nan_loss(model):
    return torch.nan * sum(weights.sum() for weights in model.parameters() if weights.requires_grad)


def test_what_a_user_can_get_wrong_is_the_part_s_own_sentence(monkeypatch, tmp_path):
    part, sentence = checked(monkeypatch, tmp_path, "--max_prompt_length", 1)
    assert part == "questions" and "raise it" in sentence


def test_an_optimiser_whose_package_is_missing_is_said(monkeypatch, tmp_path):
    _, sentence = checked(monkeypatch, tmp_path, "--optim", "galore_adamw")
    assert sentence.startswith("--optim galore_adamw: ") and "galore" in sentence and "--verbose" not in sentence


def test_an_error_that_no_part_expects_says_what_to_do(monkeypatch, tmp_path):
    def broken(recipe, kept):
        raise RuntimeError(f"no kernel\nimage in {Path.cwd()}/kernels.so")

    monkeypatch.setattr("train_grpo.load_policy", broken)
    monkeypatch.setattr(check, "differences", lambda: "")
    with pytest.raises(UserError, match="RuntimeError: no kernel image in .*--verbose, and report it with check.json"):
        in_process(monkeypatch, "--check", "--output_dir", tmp_path)
    assert found(tmp_path)["failure"]["sentence"].startswith("RuntimeError: no kernel image in PATH. ")
    monkeypatch.setattr(check, "differences", lambda: "torchao is 0.10.0, 0.17.0 is pinned")
    with pytest.raises(UserError, match="torchao is 0.10.0, 0.17.0 is pinned: pip install -r requirements.txt$"):
        in_process(monkeypatch, "--check", "--output_dir", tmp_path)


def test_libraries_that_cannot_be_imported(tmp_path):
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text(f"raise ImportError('no name X in {tmp_path}/trl.')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments, status in ((["--check"], 2), ([], 1)):
        code = [sys.executable, "train_grpo.py", *arguments, "--output_dir", str(tmp_path / "out")]
        result = subprocess.run(code, env=environment, capture_output=True, text=True, timeout=100)
        assert result.returncode == status
        assert f"error: ImportError: no name X in {tmp_path}/trl." in result.stderr
    assert found(tmp_path / "out")["failure"] == {"part": "importing", "sentence": "ImportError: no name X in PATH."}


def test_a_setting_that_does_not_exist_is_said_before_anything_is_tried(tmp_path):
    result = run("train_grpo.py", "--check", "--max_stepz", 3, "--output_dir", tmp_path / "out")
    assert_user_error(result, "unknown setting --max_stepz")
    assert not (tmp_path / "out").exists()


def test_a_recipe_may_be_given_in_one_word(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", "--check", "--config=recipes/tiny.yaml", "--max_steps", "0"])
    with pytest.raises(UserError, match="--max_steps 0 is too small"):
        train_grpo.main()


# --- packages ---


def test_packages_that_differ_are_named(tmp_path):
    version = importlib.metadata.version("torch")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        f"# a comment\n\ntorch=={version}\nnumpy==0.1 ; python_version < '4'\nHuggingFace.Hub==0.2  # why\n"
        "trl==0.0 ; python_version < '3'\nnot-there-at-all==1.0\nsetuptools==1\n"
    )
    has = importlib.metadata.version
    assert pins.differing(constraints) == {
        "numpy": (has("numpy"), "0.1"),
        "HuggingFace.Hub": (has("huggingface_hub"), "0.2"),
    }


def test_words_for_packages_that_differ(monkeypatch):
    monkeypatch.setattr(pins, "differing", lambda: {"torchao": ("0.10.0", "0.17.0"), "peft": ("1", "2")})
    assert pins.differences() == "torchao is 0.10.0, 0.17.0 is pinned; peft is 1, 2 is pinned"
    monkeypatch.setattr(
        pins, "differing", lambda: dict.fromkeys(["aiohttp", "rich", "huggingface-hub", "vllm"], ("1", "2"))
    )
    assert re.findall(r"(\S+) is 1", pins.differences()) == ["vllm", "huggingface-hub", "rich", "aiohttp"]
    monkeypatch.setattr(pins, "differing", lambda: {f"p{i}": ("1", "2") for i in range(20)})
    assert pins.differences().endswith("p7 is 1, 2 is pinned and 12 more")


def test_the_installed_packages_are_as_pinned():
    assert pins.differing() == {}


# --- the machine ---


def test_a_compiler_is_needed(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no C compiler, .*apt install gcc"):
        check.compiler()


def test_python_h_and_the_driver_are_needed(monkeypatch, tmp_path):
    gcc = tmp_path / "gcc"
    gcc.write_text("#!/bin/sh\necho gcc 11.4.0\n")
    gcc.chmod(0o755)
    monkeypatch.setenv("CC", str(gcc))
    monkeypatch.setattr(check.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"Python.h is not there, .*apt install python3\.\d+-dev"):
        check.compiler()
    (tmp_path / "Python.h").touch()

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(check.ctypes, "CDLL", missing)
    with pytest.raises(UserError, match=r"libcuda.so.1: cannot open .*install the NVIDIA driver"):
        check.compiler()
    monkeypatch.setattr(check.ctypes, "CDLL", lambda name: None)
    assert check.compiler() == "gcc 11.4.0"


def test_a_4_bit_product_that_is_wrong(monkeypatch, tmp_path):
    errors = {1: 1e-4, 48: 0.02, 96: 1e-4}
    monkeypatch.setattr(check, "four_bit_error", lambda rows, *_: errors[rows])
    monkeypatch.setattr(check, "compute_dtype", lambda recipe: torch.float16)
    with pytest.raises(UserError, match=r"product of 48 rows is off by 0.02 .* --config recipes/small.yaml"):
        with check.Check(Recipe(output_dir=str(tmp_path))) as checking:
            checking.four_bit_product(Shape)
    assert found(tmp_path)["failure"]["part"] == "4-bit"
    errors[48] = 1e-4
    with check.Check(Recipe(output_dir=str(tmp_path))) as checking:
        checking.four_bit_product(Shape)
    assert found(tmp_path)["passed"] and found(tmp_path)["4-bit"]["rows"] == [1, 48, 96]


class Shape:
    hidden_size, intermediate_size = 64, 128


# --- what may be shown ---


@pytest.mark.parametrize(
    "text, shown",
    [
        ("cannot read /content/drive/My/x.json: gone", "cannot read PATH: gone"),
        ("in '/root/a b'", "in 'PATH b'"),
        ("~/models and ../secret/data and ./x", "PATH and PATH and PATH"),
        ("recipes/small.yaml, 4/5 of 10, and/or, https://github.com/a/b", None),
        ("the model Smith/Own at 3.5 GiB", "the model MODEL at 3.5 GiB"),
        ("Smith/Own-2 is another", None),
        (f"host {platform.node()}.", "host NAME."),
    ],
)
def test_paths_and_names_are_taken_out(text, shown):
    assert without_names({"a": [text]}, {"Smith/Own": "MODEL"}) == {"a": [shown or text]}


def test_the_user_s_name_is_taken_out(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "xiaoming")
    assert without_names("by xiaoming, on 3 cores", {}) == "by NAME, on 3 cores"


def test_the_output_folder_is_found_without_the_recipe_s_parser(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("output_dir: there\n")
    assert output_dir_of(["--check", "--max_steps", "3"]) == Path("outputs")
    assert output_dir_of(["--check", "--config", str(recipe)]) == Path("there")
    assert output_dir_of(["--config", str(recipe), "--output_dir", "here"]) == Path("here")
