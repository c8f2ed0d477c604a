"""Several processes, as torchrun starts them: on a CPU, with gloo and the tiny policy. They train one policy, and end together."""

import dataclasses
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from test_preflight import QWEN_7B as QWEN

from support import preflight, screen
from support.errors import UserError
from support.memory import NCCL_GIB, estimate_memory
from support.resuming import allow_mending, read_json_lines
from support.settings import parse_recipe

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "--config",
    "recipes/tiny.yaml",
    "--prompts_per_step",
    "8",
    "--num_generations",
    "4",
    "--micro_batch_size",
    "4",
]
SETTINGS += ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "4", "--eval_samples", "5", "--dev_samples", "5"]
SETTINGS += ["--max_completion_length", "24"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(processes: int, out: Path, *settings: str, launcher=None, script="tests/ranks.py", **environment: str):
    """A run of so many processes, in a folder beside `out` their LoRAs (tests/ranks.py)."""
    probe = out.with_name(out.name + "-probe")
    probe.mkdir(exist_ok=True)
    environment = os.environ | {"PROBE": str(probe), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    launcher = launcher or [*TORCHRUN, "--master_port", free_port(), "--nproc_per_node", str(processes)]
    command = [
        *(launcher if processes > 1 else [sys.executable]),
        script,
        *SETTINGS,
        "--output_dir",
        str(out),
        *settings,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*args, **kwargs) -> tuple[int, str]:
    process = start(*args, **kwargs)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def again(out: Path) -> str:
    """The command that goes on with the run in `out`, but for how."""
    launcher = f"{sys.executable} -m torch.distributed.run --nproc_per_node 2 tests/ranks.py"
    return f"{launcher} --config {out}/recipe.yaml --output_dir {out}"


def loras(out: Path, step: int) -> list[dict[str, torch.Tensor]]:
    """The LoRA of each process after `step`."""
    return [torch.load(path) for path in sorted(out.with_name(out.name + "-probe").glob(f"*-{step}.pt"))]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def difference(a: dict, b: dict) -> float:
    """Of what has been learned, as B holds it, which begins as 0."""
    a, b = (torch.cat([lora[name].flatten() for name in sorted(lora) if "lora_B" in name]) for lora in (a, b))
    return ((a - b).norm() / a.norm()).item()


def samples(out: Path) -> list[tuple]:
    return [(line["step"], line["question"], line["completion"]) for line in read_json_lines(out / "samples.jsonl")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Four steps of two processes, and what they said."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    status, said = run(2, out, PICTURE="1")
    assert status == 0, said
    return out, said


def test_one_screen_and_one_set_of_files(unbroken):
    out, said = unbroken
    assert re.findall(r"^step +(\d)  reward", said, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "8 prompts × 4 answers = 32 completions, 16 on each of 2 processes, in micro-batches of 4" in said
    assert [line["step"] for line in read_json_lines(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["step"] for line in read_json_lines(out / "evaluations.jsonl")] == [0, 4]
    test = json.loads((out / "eval.json").read_text())
    assert test["before"]["n"] == test["after"]["n"] == 5  # of which one process had three, and one two
    assert {path.name for path in (out / "adapter").iterdir()} > {"adapter_model.safetensors", "tokenizer.json"}
    assert (out / "reward_curve.png").exists()


def test_every_answer_of_every_process_is_written_once(unbroken):
    out, _ = unbroken
    lines = samples(out)
    asked = Counter((step, question) for step, question, _ in lines)
    assert len(lines) == 4 * 32 and set(asked.values()) == {4} and len(asked) == 4 * 8


def test_each_process_draws_answers_of_its_own(unbroken):
    states = [torch.load(unbroken[0] / f"checkpoint-2/rng_state_{rank}.pth", weights_only=False) for rank in (0, 1)]
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


def test_the_processes_train_one_policy(unbroken):
    out, _ = unbroken
    for step in range(1, 5):
        first, second = loras(out, step)
        assert equal(first, second)
    assert not equal(loras(out, 1)[0], loras(out, 4)[0])


def test_two_processes_learn_what_one_does(tmp_path):
    """The same answers and advantages, most of them 0: the same policy, but for the order of adding; as many skipped by each."""
    outs = [tmp_path / "one", tmp_path / "two"]
    for n, out in enumerate(outs, 1):
        status, said = run(n, out, "--max_steps", "2", FIXED="1")
        assert status == 0, said
    one, *two = loras(outs[0], 2) + loras(outs[1], 2)
    assert equal(*two)
    assert difference(one, two[0]) < 1e-3
    norms = [[line["grad_norm"] for line in read_json_lines(out / "metrics.jsonl")] for out in outs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    skipped = [(tmp_path / "two-probe" / f"skipped-{rank}").read_text() for rank in (0, 1)]
    # of rank 0 three of four micro-batches are worth nothing, of rank 1 one; so both leave out one, the first
    assert skipped == ["x..." * 2] * 2


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """As `unbroken`, but one process was killed in the third step; and for how long the run went on."""
    out = tmp_path_factory.mktemp("died") / "out"
    began = time.monotonic()
    status, said = run(2, out, DIES="1:3")
    return out, said, status, time.monotonic() - began


def test_a_process_that_dies_ends_the_run(died):
    out, said, status, seconds = died
    assert status != 0 and seconds < 60
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert sentences[0].startswith("error: process 0 of 2 stopped (")
    assert sentences[0].endswith(f"the newest checkpoint is {out}/checkpoint-2. Go on with: {again(out)} --resume")


def test_the_first_process_may_be_the_one_that_dies(tmp_path):
    _, said = run(2, tmp_path / "out", DIES="0:3")
    assert len(re.findall(r"^error: process 1 of 2 stopped .* --resume$", said, re.MULTILINE)) == 1


def test_resumed_it_is_as_if_nothing_had_happened(died, unbroken):
    out, whole = died[0], unbroken[0]
    status, said = run(2, out, "--resume")
    assert status == 0 and f"resuming    after step 2, from {out}/checkpoint-2" in said
    assert samples(out) == samples(whole)
    for rank in (0, 1):
        assert equal(loras(out, 4)[rank], loras(whole, 4)[rank])


def test_another_number_of_processes_goes_on(unbroken, tmp_path):
    out, _ = unbroken
    status, said = run(1, out, "--resume", "--max_steps", "5", "--eval_steps", "5")
    assert status == 0, said
    assert "changed     processes: 2 before, 1 from here on; answers are sampled in another order" in said
    assert Counter(line["step"] for line in read_json_lines(out / "samples.jsonl"))[5] == 32


def test_rewards_that_fail_can_be_mended(tmp_path):
    out, file = tmp_path / "out", tmp_path / "own.py"
    broken = "def length(completions, trainer_state, **kwargs):\n    {}return [len(c[0]['content']) / 100 for c in completions]\n"
    broken += "REWARD_FUNCS = [length]\n"
    file.write_text(broken.format("assert trainer_state.global_step < 2; "))
    settings = ["--rewards", str(file)]
    status, said = run(2, out, *settings)
    assert status != 0
    (sentence,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert sentence.endswith(f"Mend it, then: {again(out)} --rewards {file} --resume"), said
    assert json.loads((out / "checkpoint-2" / "complete.json").read_text())["mend"]


def test_two_processes_may_allow_mending_at_the_same_time(monkeypatch, tmp_path):
    """The second writes and renames while the first has written and not yet renamed."""
    path, rank, rename = tmp_path / "complete.json", SimpleNamespace(process_index=0), os.replace
    path.write_text('{"files": {}}')
    monkeypatch.setattr("support.resuming.PartialState", lambda: rank)

    def meanwhile(partial, target):
        if rank.process_index == 0:
            rank.process_index = 1
            allow_mending(tmp_path)
        rename(partial, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    allow_mending(tmp_path)
    assert json.loads(path.read_text()) == {"files": {}, "mend": True} and list(tmp_path.iterdir()) == [path]


def test_a_policy_that_diverges_ends_in_one_sentence(tmp_path):
    """Both find it after the same step: neither waits for the other."""
    settings = ["--learning_rate", "1e30", "--warmup_ratio", "0", "--dev_samples", "0"]
    status, said = run(2, tmp_path / "out", *settings)
    (sentence,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert status != 0 and re.search("not finite.*start again with --learning_rate 5e\\+29", sentence), said


def test_the_check_runs_in_all(tmp_path):
    status, said = run(2, tmp_path / "out", "--check", script="train_grpo.py")
    assert status == 0 and said.splitlines()[-1] == "check passed", said
    assert json.loads((tmp_path / "out" / "check.json").read_text())["passed"]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_signal_leaves_a_checkpoint(tmp_path, launcher):
    out = tmp_path / "out"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate += ["--main_process_port", free_port()]
    process = start(2, out, "--max_steps", "50", launcher=accelerate if launcher == "accelerate" else None)
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step   1 "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    assert "SIGTERM: finishing this step, then saving a checkpoint" in said, said
    step = re.search(r"^stopped after step (\d+); the checkpoint is in ", said, re.MULTILINE)[1]
    assert (out / f"checkpoint-{step}" / "complete.json").exists()
    assert re.search(r"^continue with: .* --resume$", said, re.MULTILINE)


def test_two_hosts(tmp_path):
    """Two agents, as on two hosts that share the folder."""
    out, port = tmp_path / "out", free_port()
    agent = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    processes = [start(2, out, "--max_steps", "2", launcher=[*agent, "--node_rank", str(rank)]) for rank in (0, 1)]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "step   2 " in said[0] and "step   2 " not in said[1]
    assert equal(*loras(out, 2))


def test_what_is_wrong_is_said_once(tmp_path):
    status, said = run(2, tmp_path / "out", "--model", "nowhere/at-all", script="train_grpo.py")
    assert status != 0
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and sentences[0].startswith("error: cannot load the model nowhere/at-all: "), said


@pytest.mark.parametrize(
    "settings, processes, sentence",
    [
        ([3, 4, 2], 2, "3 prompts a step cannot be shared out evenly among 2 processes: give --prompts_per_step 2."),
        ([3, 4, 2], 8, "3 prompts a step cannot be shared out evenly among 8 processes: give --prompts_per_step 8."),
        (
            [8, 4, 32],
            2,
            "8 prompts × 4 answers ÷ 2 processes = 16 completions do not divide into micro-batches of 32: "
            "give --micro_batch_size 16.",
        ),
        ([8, 4, 16], 2, None),
    ],
)
def test_a_step_is_shared_out_evenly(monkeypatch, settings, processes, sentence):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    names = ["--prompts_per_step", "--num_generations", "--micro_batch_size"]
    argv = [text for name, value in zip(names, settings, strict=True) for text in (name, str(value))]
    if sentence:
        with pytest.raises(UserError) as error:
            parse_recipe(argv)
        assert str(error.value) == sentence
    else:
        recipe = parse_recipe(argv)
        assert (recipe.completions, recipe.completions_each) == (32, 16)
        # a card holds its own answers
        recipe = dataclasses.replace(recipe, use_vllm=False)
        several = estimate_memory(QWEN, recipe, 24)
        monkeypatch.setenv("WORLD_SIZE", "1")
        alone = estimate_memory(QWEN, recipe, 24)
        assert several["KV cache"] * 2 == alone["KV cache"]
        # and NCCL's buffers, and those that the gradients are averaged in
        assert several["CUDA and buffers"] - alone["CUDA and buffers"] == pytest.approx(NCCL_GIB)
        assert several["LoRA and optimiser"] > alone["LoRA and optimiser"]


def test_verl_can_score_with_our_rewards(monkeypatch, tmp_path):
    """The code in docs/scaling.md, on the tiny questions."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)[1]
    code = code.replace("HUB_ID, load_questions", "load_questions\n    HUB_ID = 'tiny/questions'")
    code = code.replace('"Qwen/Qwen2.5-7B-Instruct"', '"tiny"')
    (tmp_path / "to_verl.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for folder in ("tiny", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    subprocess.run([sys.executable, "to_verl.py"], cwd=tmp_path, env=environment, check=True)
    rows = pandas.read_parquet(tmp_path / "train.parquet")
    assert {"data_source", "prompt", "ability", "reward_model", "extra_info"} == set(rows.columns)
    row = rows.iloc[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"] and row["reward_model"][
        "style"
    ] == "rule"
    scored = runpy.run_path(str(tmp_path / "to_verl.py"))
    label = row["reward_model"]["ground_truth"]
    answer = f"<reasoning>\n算\n</reasoning>\n<answer>\n{label}\n</answer>\n"
    assert scored["compute_score"]("tiny/questions", answer, label) == 4.0
    assert scored["compute_score"]("tiny/questions", "不知道", label, extra_info={}) == 0.0


@pytest.mark.parametrize(
    "place, seen, own",
    [
        ("0", None, "0"),
        ("3", None, "3"),
        ("1", "4,6", "6"),
        ("0", "4,6", "4"),
        ("2", "4,6", "-1"),  # none
        ("0", "4", "4"),  # as torchrun --virtual-local-rank does, and this function itself
        ("1", "4", "4"),
        (None, "4,6", "4,6"),
    ],
)
def test_each_process_sees_its_own_card(monkeypatch, place, seen, own):
    for name, value in {"LOCAL_RANK": place, "CUDA_VISIBLE_DEVICES": seen}.items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    for _ in range(2):  # again in a child process
        preflight.take_own_card()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == own
    assert os.environ.get("LOCAL_RANK") == (None if place is None else "0")


def test_the_first_that_ends_says_so(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", int(port := free_port()), is_master=True)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    assert [screen.first_to_end() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started them all again
    assert screen.first_to_end()
    del store
