"""vLLM in the process: what it is started with, below compute capability 8.0 and above, and what is done where it does not start."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import train_grpo
from support import decoding, engine, screen, turing
from support.errors import StartAgain, UserError
from support.settings import Recipe
from support.step_report import Report, duration, on_mounted_folder

# --- below compute capability 8.0 ---


@pytest.fixture
def card(monkeypatch):
    """A card of the compute capability that is asked for; the environment is put back afterwards."""

    def of(capability, name="Tesla T4"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)

    for name in ("VLLM_ATTENTION_BACKEND", "VLLM_TUNED_CONFIG_FOLDER"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return of


@pytest.mark.parametrize("shell", [None, "FLASHINFER", "XFORMERS", "FLASH_ATTN", "TRITON_ATTN"])
def test_a_t4_gets_triton_whatever_the_shell_says(card, capsys, monkeypatch, shell):
    card((7, 5))
    if shell:
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", shell)
    turing.after_unsloth()
    assert os.environ["VLLM_ATTENTION_BACKEND"] == "TRITON_ATTN"
    said = capsys.readouterr().out
    if shell in (None, "TRITON_ATTN"):
        assert not said
    else:
        assert said.splitlines() == [
            f"attention   VLLM_ATTENTION_BACKEND={shell} does not work below compute capability 8.0: TRITON_ATTN it is"
        ]


@pytest.mark.parametrize("shell", [None, "TRITON_ATTN"])
def test_a_newer_card_is_left_as_it_is(card, monkeypatch, shell):
    card((8, 6))
    if shell:
        monkeypatch.setenv("VLLM_ATTENTION_BACKEND", shell)
    turing.after_unsloth()
    assert os.environ.get("VLLM_ATTENTION_BACKEND") == shell


def vllms_choice(config: dict, loras: int, slices: int, rows: int, k: int, n: int) -> dict:
    """What vllm.lora.ops.triton_ops.utils.get_lora_op_configs (0.11.2) reads from a file."""

    def nearest(table, number):
        return table.get(str(number)) or table[min(table, key=lambda x: abs(int(x) - number))]

    return nearest(nearest(nearest(nearest(config, loras)[str(slices)], rows), k), n)


@pytest.fixture
def reader(monkeypatch):
    """Stands in for the module of vLLM that reads the files."""
    names = ["vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.lora.ops.triton_ops.utils"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules[names[-1]]
    module.load_lora_op_config = None
    return module


def test_a_vllm_that_reads_no_blocks_is_left_alone(card, reader, capsys):
    card((7, 5))
    del reader.load_lora_op_config
    decoding.tune_lora_kernels()
    assert "VLLM_TUNED_CONFIG_FOLDER" not in os.environ
    assert capsys.readouterr().out.startswith("generation  this vLLM does not read how to cut its LoRA kernels' work")


def test_vllm_finds_the_blocks_of_its_lora_kernels(card, reader):
    card((7, 5), name="NVIDIA GeForce RTX 2080-Ti")
    decoding.tune_lora_kernels()
    folder = Path(os.environ["VLLM_TUNED_CONFIG_FOLDER"])
    files = {path.name: json.loads(path.read_text()) for path in folder.iterdir()}
    kinds = ("SHRINK", "EXPAND_TRUE", "EXPAND_FALSE")
    assert set(files) == {f"NVIDIA_GeForce_RTX_2080_Ti_{kind}.json" for kind in kinds}
    shrink, expand = (files[f"NVIDIA_GeForce_RTX_2080_Ti_{kind}.json"] for kind in kinds[:2])
    for loras, slices, rows, width, rank in itertools.product(
        (1, 2, 4), (1, 2, 3), (1, 48, 128, 256, 512, 720, 2048, 10**5), (896, 18944), (8, 16, 32)
    ):
        blocks = vllms_choice(shrink, loras, slices, rows, width, rank)
        assert (blocks["block_k"], blocks["split_k"]) == ((64, 32) if rows <= 512 else (32, 8))
        assert vllms_choice(expand, loras, slices, rows, rank, width)["block_m"] == 32
        assert blocks.keys() == {"block_m", "block_n", "block_k", "split_k", "group_size_m"} | SHARED
    assert vllms_choice(expand, 1, 1, 1, 8, 896).keys() == {"block_m", "block_n", "block_k"} | SHARED


SHARED = {"num_warps", "num_ctas", "num_stages", "max_nreg"}


@pytest.fixture
def empty_model(monkeypatch):
    """Stands in for unsloth_zoo.empty_model; `create_empty_causal_lm` returns the name that it would load, and its other arguments."""
    package = ModuleType("unsloth_zoo")
    package.empty_model = module = ModuleType("unsloth_zoo.empty_model")
    module.create_empty_causal_lm = lambda config, *args: (config.model_name, *args)
    monkeypatch.setitem(sys.modules, "unsloth_zoo", package)
    monkeypatch.setitem(sys.modules, "unsloth_zoo.empty_model", module)
    return module


def test_unsloth_takes_its_settings_from_the_config(empty_model):
    engine.load_once()
    config = SimpleNamespace(model_name="Qwen/Qwen2.5-7B-Instruct")
    assert empty_model.create_empty_causal_lm(config, torch.float16) == (None, torch.float16)
    assert config.model_name == "Qwen/Qwen2.5-7B-Instruct"
    bare = SimpleNamespace()
    assert empty_model.create_empty_causal_lm(bare) == (None,)


def test_the_config_keeps_its_name_when_that_fails(empty_model):
    def fail(config):
        raise ValueError(config.model_name)

    empty_model.create_empty_causal_lm = fail
    engine.load_once()
    config = SimpleNamespace(model_name="a model")
    with pytest.raises(ValueError, match="None"):
        empty_model.create_empty_causal_lm(config)
    assert config.model_name == "a model"


def test_another_unsloth_may_load_twice_and_says_so(empty_model, capsys):
    del empty_model.create_empty_causal_lm
    engine.load_once()
    assert capsys.readouterr().out == "loading     this unsloth_zoo may load the model a second time for its settings\n"


@pytest.fixture
def vllm(monkeypatch):
    """Stands in for the module of vLLM that `engine_arguments` touches. The changes have tests of their own: here is who was called."""
    called = []
    for change in ("schedule_ahead", "merge_products", "tune_lora_kernels", "load_once"):
        monkeypatch.setattr(engine, change, lambda change=change: called.append(change))
    names = "vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.registry"
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for parent, child in itertools.pairwise(names):
        monkeypatch.setattr(sys.modules[parent], child.rsplit(".")[-1], sys.modules[child], raising=False)
    return called


CAPTURED = {1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)}  # batches for which vLLM 0.11.2 captures CUDA graphs


@pytest.mark.parametrize(
    "capability, asked, at_once",
    [
        ((7, 5), 48, 48),
        ((7, 5), 96, 64),
        ((8, 6), 100, 104),
        ((9, 0), 256, 272),
        ((9, 0), 264, 272),
        ((9, 0), 600, 512),
    ],
)
def test_a_t4_answers_at_most_64_at_once_and_all_batches_have_cuda_graphs(card, vllm, capability, asked, at_once):
    card(capability)
    assert engine.engine_arguments(Recipe(), asked, 0.6)["max_num_seqs"] == at_once
    assert at_once in CAPTURED and at_once != 256  # 256 is what unsloth changes by itself
    assert vllm == ["schedule_ahead", "merge_products", "tune_lora_kernels", "load_once"]


# --- where vLLM does not start ---


@pytest.fixture
def broken(monkeypatch):
    """load_base_model on a machine whose vLLM raises what is asked for."""

    def load(error, **settings):
        def from_pretrained(*_, **__):
            raise error

        monkeypatch.setattr(train_grpo, "GPU", True)
        monkeypatch.setattr(train_grpo, "check_machine", lambda recipe: None)
        monkeypatch.setattr(train_grpo, "limit_memory", lambda recipe: 0.6)
        monkeypatch.setattr(train_grpo, "engine_arguments", lambda *_: {})
        fake = SimpleNamespace(from_pretrained=from_pretrained)
        monkeypatch.setattr(train_grpo, "FastLanguageModel", fake, raising=False)
        train_grpo.load_base_model(Recipe(model="tiny", dtype="float16", load_in_4bit=False, **settings), 8)

    monkeypatch.setattr("train_grpo.compute_dtype", lambda recipe: torch.float16)
    return load


def test_first_without_cuda_graphs_then_without_vllm(broken):
    error = RuntimeError("Engine core\ninitialization failed")
    with pytest.raises(StartAgain) as first:
        broken(error)
    assert first.value.arguments == ["--enforce_eager", "true"]
    assert first.value.sentence == (
        "vLLM could not start (Engine core initialization failed): starting again without CUDA graphs."
    )
    assert str(first.value).endswith(": give --enforce_eager true.")
    with pytest.raises(StartAgain, match="give --use_vllm false") as second:
        broken(error, enforce_eager=True)
    assert second.value.sentence.endswith("starting again without vLLM, which is slow.")
    with pytest.raises(RuntimeError, match="Engine core"):
        broken(error, use_vllm=False)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "No available memory for the cache blocks.",
        "cache is needed, which is larger than the available KV cache memory (0.1 GiB)",
        "Free memory on device (3/80 GiB) on startup is less than desired GPU memory utilization (0.6)",
    ],
)
def test_memory_has_its_own_advice(broken, words):
    with pytest.raises(RuntimeError, match="memory"):
        broken(RuntimeError(words))


def test_a_model_that_is_not_there_is_no_fault_of_vllm(broken):
    with pytest.raises(UserError, match="^cannot load the model tiny: no file"):
        broken(OSError("no file"))


def test_the_script_runs_again_in_the_place_of_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
from support import screen
screen.start()
from support.errors import StartAgain, run_script
def main():
    print("a library")
    screen.say(f"{os.getpid()} {sys.argv[1:]}")
    for flag in ("--enforce_eager", "--use_vllm"):
        if flag not in sys.argv:
            raise StartAgain(f"no {flag}", "another way", [flag, "true"])
run_script(main)
""")
    environment = os.environ | {"PYTHONPATH": "."}
    command = [sys.executable, "-B", str(script), "a b"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0
    process = result.stdout.split()[0]
    assert result.stdout.splitlines() == [
        f"{process} ['a b']",
        f"{process} ['a b', '--enforce_eager', 'true']",
        f"{process} ['a b', '--enforce_eager', 'true', '--use_vllm', 'true']",
    ]
    errors = [line for line in result.stderr.splitlines() if not line.startswith("importing")]
    assert errors == [f"no {flag}: starting again another way." for flag in ("--enforce_eager", "--use_vllm")]
    logs = [line.split()[-1] for line in result.stderr.splitlines() if line.startswith("importing")]
    assert len(logs) == 3 and not any(Path(log).parent.exists() for log in logs)


def test_what_generates_is_told(monkeypatch):
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(
            attn_groups=[[SimpleNamespace(backend=SimpleNamespace(get_name=lambda: "TRITON_ATTN"))]]
        )
    )
    cache = SimpleNamespace(num_gpu_blocks=100, block_size=16)
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache)),
        collective_rpc=lambda call: [call(worker)],
    )
    assert engine.generation(Recipe(enforce_eager=True), SimpleNamespace(vllm_engine=llm)) == {
        "engine": "vLLM",
        "attention": "TRITON_ATTN",
        "cuda_graphs": False,
        "cache_tokens": 1600,
    }
    assert engine.generation(Recipe(), SimpleNamespace()) == {"engine": "transformers"}
    monkeypatch.setattr(engine, "GPU", True)
    assert engine.generation(Recipe(use_vllm=False), SimpleNamespace()) == {"engine": "unsloth"}


# --- the hours ---


@pytest.mark.parametrize(
    "steps, mounted, lines",
    [
        ([200, 70, 80], False, ["time        96 min left, for 77 of 80 steps"]),
        ([9, 210, 210], True, ["time        4.5 hours left, for 77 of 80 steps"]),
        (
            [9, 210, 210],
            False,
            ["time        4.5 hours left, for 77 of 80 steps", "            a Colab runtime may"],
        ),
        ([1, 2, 2], False, ["time        3 min left, for 77 of 80 steps"]),
    ],
)
def test_the_hours_are_said_after_the_third_step(monkeypatch, capsys, steps, mounted, lines):
    monkeypatch.setattr("support.step_report.on_mounted_folder", lambda folder: mounted)
    report = Report.__new__(Report)
    report.recipe, report.seconds, report.development = Recipe(max_steps=80), steps, []
    report.say_hours(3)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))


def test_durations():
    assert [duration(s) for s in (2.4, 99, 100, 5990, 6000, 9000)] == [
        "2 s",
        "99 s",
        "2 min",
        "100 min",
        "1.7 hours",
        "2.5 hours",
    ]


def test_a_mounted_folder(tmp_path, monkeypatch):
    drive = tmp_path / "drive"
    (drive / "grpo").mkdir(parents=True)
    real = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == drive or (Path(path) == Path("/") and real("/")))
    assert on_mounted_folder(drive / "grpo" / "not there yet") and on_mounted_folder(drive)
    assert not on_mounted_folder(tmp_path)


def test_the_screen_is_given_back(capfd):
    screen.stop()  # nothing was redirected: nothing happens
    print("still here")
    assert capfd.readouterr().out == "still here\n"
