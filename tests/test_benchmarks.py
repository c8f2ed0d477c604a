"""The benchmarks run on the tiny policy without a GPU, and their arithmetic is right. Their figures are for a GPU."""

import json
import math
import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.learning import picture, read_run
from benchmarks.profile import table
from benchmarks.t4 import compare, kernels_table, spill_bytes, write_adapter


def run(*argv: str) -> str:
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def runs(tmp_path):
    """Two recipes, one of them with two seeds and one that is not done yet, as folders of files."""

    def write(name, strict, after):
        folder = tmp_path / name
        folder.mkdir()
        figures = {"lenient": 0.5, "n": 40}
        steps = [{"step": i + 1, "reward": float(i), "seconds": 30.0} for i in range(len(strict))]
        way = [{"step": i + 1, "strict": s, **figures} for i, s in enumerate(strict)]
        test = {"before": {"strict": 0.25, **figures}}
        if after:
            test |= {"after": {"strict": after, **figures}, "best_step": 2}
        (folder / "recipe.yaml").write_text("prompts_per_step: 4\nnum_generations: 3\nof_an_older_version: 1\n")
        (folder / "eval.json").write_text(json.dumps(test))
        for file, lines in {"metrics": steps, "evaluations": way}.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("quick-1", [0.3, 0.6, 0.55], 0.58)
    write("quick-2", [0.4, 0.45, 0.7], 0.62)
    write("slow", [0.2, 0.3], None)
    return tmp_path


def test_learning_sets_runs_side_by_side(runs):
    printed = run("benchmarks.learning", str(runs))
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows[0] == ["quick", "1", "12", "3", "25.0% → 58.0% (2)", "50.0% → 50.0%", "58.0%", "1.5", "1.0"]
    assert rows[1][-1] == "1.5" and "mean 60.0% (58.0% to 62.0%)" in rows[2][4]
    assert rows[3][4:] == ["25.0% → …", "50.0% → …", "…", "1.0", "never"]
    assert (runs / "learning.png").stat().st_size > 10_000


def test_rewards_side_by_side_are_those_that_all_runs_have(runs):
    """A recipe with one more reward would seem to learn more."""
    for folder, more in zip(sorted(runs.iterdir()), [{}, {"rewards/chinese_reward": 0.5}, {}], strict=True):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rewards = {"rewards/int": 1.0, "rewards/int/std": 0.1, **more}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line | rewards) + "\n" for line in lines))
    sides = {folder.name: [read_run(folder)] for folder in sorted(runs.iterdir())}
    accuracy, reward = picture(sides).axes
    assert [set(line.get_ydata()) for line in reward.lines] == [{1.0}] * 3
    assert reward.get_title().startswith("Mean reward of a step, of the 1 functions that all runs have")


def test_training_divides_a_step_into_its_parts(tmp_path):
    settings = "--model tiny --dataset tiny/questions --use_vllm false --load_in_4bit false --optim adamw_torch"
    settings += " --max_completion_length 32 --prompts_per_step 1 --micro_batch_size 6"
    figures = tmp_path / "figures.json"
    variants = "trl", "ours --config recipes/tiny.yaml --num_generations 6"
    printed = run(
        "benchmarks.training", *variants, "--no-cold", "--steps", "2", "--json", str(figures), *settings.split()
    )
    assert "compl./s" in printed and "over floor" in printed
    trl, measured = json.loads(figures.read_text())
    assert trl["name"] == "trl" and [step["completions"] for step in trl["steps"]] == [6, 6]
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


def test_operations_are_those_of_the_tokens_and_of_the_layers_that_compute_again():
    settings = ["--config", "recipes/tiny.yaml", "--num_generations", "8", "--max_completion_length", "60"]
    printed = run("benchmarks.operations", *settings, "--kept", "1", "--prompt_length", "60")
    *_, each, once, kept = [float(line.split()[-3]) for line in printed.splitlines() if "TFLOP" in line]
    # 64 answers and 64 prompts of 60 tokens, or 8; the output layer, a fifteenth of the products, is of answers alone
    assert 0.56 < once / each < 0.62
    assert 1 - 1 / 3 / 4 < kept / once < 0.95  # a third of one of four layers, less the output layer's part


AS_H100 = """
import types
import torch
import torch.cuda as cuda

card = types.SimpleNamespace(major=9, minor=0, name="NVIDIA H100", multi_processor_count=132, total_memory=80 * 2**30)
cuda._lazy_init, cuda.device_count, cuda._get_device_index = (lambda: None), (lambda: 1), (lambda *_, **__: 0)
cuda._get_device_properties = lambda index: card  # C++, under everything that is patched
"""


def test_a_script_finds_a_t4_and_triton_lowers_for_it_and_assembles_for_the_card(tmp_path):
    (tmp_path / "pynvml.py").write_text("nvmlDeviceGetCudaComputeCapability = lambda handle: [9, 0]\n")
    (tmp_path / "script.py").write_text(
        AS_H100
        + """
import json, os, pynvml, sys, triton
import triton.language as tl

@triton.jit
def double(x):
    tl.store(x, 2 * tl.load(x))

source = triton.compiler.ASTSource(double, {"x": "*fp32"}, {})
target = triton.backends.compiler.GPUTarget("cuda", 10 * cuda.get_device_capability()[0] + 5, 32)
asm = triton.compile(source, target=target).asm
properties = cuda.get_device_properties(0)
found = {
    "argv": sys.argv[1:],
    "main": __name__,
    "capability": cuda.get_device_capability(),
    "name": cuda.get_device_name(),
    "properties": [properties.major, properties.multi_processor_count, properties.total_memory // 2**30],
    "nvml": pynvml.nvmlDeviceGetCudaComputeCapability(None),
    "ptx": ".target sm_75" in asm["ptx"],
    "cubin": asm["cubin"][48],  # the ELF header's flags: the architecture
    "cache": os.environ["TRITON_CACHE_DIR"],
    "flash": torch.backends.cuda.flash_sdp_enabled(),
}
print(json.dumps(found))
"""
    )
    command = [sys.executable, "-m", "benchmarks.fake_t4", tmp_path / "script.py", "--steps", "3"]
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {  # and the screen is the script's own
        "argv": ["--steps", "3"],
        "main": "__main__",
        "capability": [7, 5],
        "name": "Tesla T4",
        "properties": [7, 40, 80],
        "nvml": [7, 5],
        "ptx": True,
        "cubin": 90,
        "cache": str(tmp_path / "cache/as-t4"),
        "flash": False,
    }
    assert list((tmp_path / "cache/as-t4").glob("*/double.cubin"))


def test_the_spill_of_a_kernel_is_what_a_t4s_assembler_says():
    def kernel(registers: int) -> str:  # 64 numbers that are all needed after the last is read
        body = [f"ld.volatile.global.f32 %f{i}, [%rd1+{4 * i}];" for i in range(64)]
        body += [f"st.volatile.global.f32 [%rd1+{4 * i}], %f{i};" for i in range(64)]
        head = (
            f".version 8.0\n.target sm_75\n.address_size 64\n.visible .entry k(.param .u64 p)\n.maxnreg {registers}\n"
        )
        return (
            head
            + "{\n.reg .f32 %f<64>;\n.reg .b64 %rd<2>;\nld.param.u64 %rd1, [p];\n"
            + "\n".join(body)
            + "\nret;\n}\n"
        )

    assert spill_bytes(kernel(128)) == 0
    assert spill_bytes(kernel(32)) > (64 - 32) * 4


def test_answers_are_compared_up_to_the_first_token_that_differs():
    def answer(text, tokens, logprobs):
        return {"text": text, "tokens": tokens, "logprobs": logprobs}

    answers = [answer("3 + 4", [3, 10, 4], [-0.5, -1.0, -2.0]), answer("3 + 4 = 7", [3, 10, 4, 7], [-1.0] * 4)]
    others = [
        answer("3 + 4", [3, 10, 4], [-0.5, -1.25, -2.0]),
        answer("3 + 5 = 7", [3, 10, 5, 7], [-1.5, -1.0, -9.0, -9.0]),
    ]
    alike = compare(answers, others)
    assert alike == {"equal": 1, "tokens": 5, "mean": pytest.approx(0.75 / 5), "largest": 0.5}
    assert compare(answers, answers) == {"equal": 2, "tokens": 7, "mean": 0, "largest": 0}
    nothing = compare([answer("3", [3], [0.0])], [answer("4", [4], [0.0])])
    assert nothing["equal"] == nothing["tokens"] == 0 and math.isnan(nothing["mean"])


def test_a_table_has_the_worst_error_and_spill_of_a_group_and_the_time_of_a_layer():
    case = {
        "op": "shrink",
        "linear": "o",
        "rank": 16,
        "rows": 48,
        "blocks": "ours",
        "error": 1e-6,
        "spill": 8,
        "us": 9.0,
    }
    results = [{**case, "op": op, "rows": rows} for op in ("shrink", "expand") for rows in (48, 2048)]
    results += [{**case, "linear": "down", "error": 2e-6, "us": 21.0}, {**case, "rank": 8, "spill": 3224}]
    table = kernels_table(results).splitlines()
    assert table[2].count("|") == table[3].count("|") == table[4].count("|") == 6
    assert table[4] == "| shrink, 1 to 64 rows | ours | 2.0e-06 | 8 to 3,224 | 30 (48 rows) |"  # rank 8 is not timed
    assert table[5] == "| shrink, 512 to 2048 rows | ours | 1.0e-06 | 8 to 8 | 9 (2048 rows) |"
    assert len(table) == 8


def test_the_random_lora_fits_the_model_and_is_not_zero(tmp_path):
    write_adapter(AutoConfig.from_pretrained("tiny"), 4, tmp_path)
    with (
        safe_open("tiny/model.safetensors", "np") as model,
        safe_open(tmp_path / "adapter_model.safetensors", "np") as lora,
    ):
        linears = [key for key in model.keys() if key.endswith("_proj.weight")]
        assert len(list(lora.keys())) == 2 * len(linears) > 0
        for key in linears:
            name, (out, width) = f"base_model.model.{key.removesuffix('.weight')}", model.get_slice(key).get_shape()
            a, b = (lora.get_tensor(f"{name}.lora_{factor}.weight") for factor in "AB")
            assert a.shape == (4, width) and b.shape == (out, 4)
            assert a.any() and b.any()


def test_kernels_are_counted_by_kind_and_the_card_once():
    spans = [
        ("void gemm_4bit_sm80_m16n8k16<__half, 64, 64, 64>", 0.0, 5.0),
        ("nvjet_hsh_128x48_64x9_4x1_v_bz_splitK_TNT", 4.0, 6.0),  # overlaps with the one before
        ("_lora_expand_kernel", 8.0, 9.0),
        ("_nf4_dequant_kernel", 9.0, 10.0),
        ("void kDequantizeBlockwise<__half, 512, 64, 8, 2>", 10.0, 12.0),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 12.0, 12.5),
        ("something new", 12.5, 13.0),
    ]
    kinds, busy, kernels = table(spans)
    assert kinds == {
        "4-bit products, unpacked on the way": 5.0,
        "4-bit weights unpacked": 3.0,
        "products": 2.0,
        "LoRA of vLLM": 1.0,
        "attention": 0.5,
        "others": 0.5,
    }
    assert (busy, kernels) == (11.0, 7)
    assert table([]) == ({}, 0.0, 0)
