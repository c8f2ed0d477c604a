"""What is checked before the start: each fault is provoked, and the estimate of memory is right."""

import dataclasses
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_runs import in_process, one_line
from transformers import GPT2Config

import infer
from support import preflight
from support.errors import UserError
from support.memory import check_memory, estimate_memory, is_out_of_memory, layers_kept, memory_advice
from support.preflight import check_disk, check_disk_for_model, check_machine, larger_recipe, model_error
from support.settings import Recipe, load_recipe

# Qwen2.5-7B's config.json
QWEN_7B = SimpleNamespace(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
    tie_word_embeddings=False,
)


@pytest.fixture
def t4(monkeypatch):
    """The preflight on a machine that says of itself what a T4 does."""
    monkeypatch.setattr(preflight, "GPU", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(preflight, "check_installed", lambda package: None)
    return monkeypatch


def test_a_t4_passes(t4):
    check_machine(Recipe())
    check_memory(estimate_memory(QWEN_7B, Recipe(), 14.7), Recipe(), free=14.7, card=14.7)
    assert preflight.compute_dtype(Recipe()) == torch.float16


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(preflight, "GPU", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "nvidia_driver", lambda: None)
    with pytest.raises(UserError, match="no CUDA GPU was found") as error:
        check_machine(Recipe())
    assert "recipes/tiny.yaml" in one_line(error)
    check_machine(load_recipe("recipes/tiny.yaml"))


def test_a_driver_that_is_too_old(monkeypatch):
    monkeypatch.setattr(preflight, "GPU", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight, "nvidia_driver", lambda: "470.82.01")
    with pytest.raises(UserError, match=r"driver 470.82.01 does not run CUDA \S+, .*update the driver") as error:
        check_machine(Recipe())
    one_line(error)


@pytest.mark.parametrize("capability", [(6, 0), (7, 0)])
def test_a_card_that_is_too_old(t4, capability):
    t4.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(UserError, match="has compute capability .* need 7.5"):
        check_machine(Recipe())


def test_bfloat16_on_a_t4(t4):
    with pytest.raises(UserError, match="has no bfloat16: give --dtype float16"):
        preflight.compute_dtype(Recipe(dtype="bfloat16"))


@pytest.mark.parametrize("package, changes", [("vllm", {"load_in_4bit": False}), ("bitsandbytes", {"use_vllm": False})])
def test_a_missing_package(t4, package, changes):
    t4.undo()  # find_spec again, and neither is in requirements-cpu.txt
    t4.setattr(preflight, "GPU", True)
    t4.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    t4.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=f"{package} is not installed, .*pip install -c constraints.txt {package}"):
        check_machine(Recipe(**changes))


def test_unsloth_missing_beside_a_gpu(t4):
    t4.setattr(preflight, "GPU", False)
    with pytest.raises(UserError, match="unsloth is not installed.*requirements.txt"):
        check_machine(Recipe())


@pytest.mark.parametrize(
    "micro_batch_size, free, card, words",
    [
        (48, 14.7, 14.7, r"about \d+\.\d GiB of GPU memory are needed, and there are 14.7: try --micro_batch_size 24"),
        (6, 9.0, 14.7, r"9.0 of 14.7 are free: end what holds the rest .* or try --micro_batch_size 3"),
        (6, 5.0, 5.0, "no room for a KV cache .* raise --gpu_memory_utilization"),
    ],
)
def test_too_little_gpu_memory(micro_batch_size, free, card, words):
    recipe = Recipe(micro_batch_size=micro_batch_size, max_completion_length=512)
    with pytest.raises(UserError, match=words) as error:
        check_memory(estimate_memory(QWEN_7B, recipe, card), recipe, free, card)
    one_line(error)


def test_too_little_disk(monkeypatch, tmp_path):
    recipe = Recipe(output_dir=str(tmp_path / "not" / "there" / "yet"))
    check_disk(0.15, recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(2**40, 2**40, 2**29))
    with pytest.raises(UserError, match=f"1.1 GiB of disk are needed .* 0.5 are free in {tmp_path}.*--lora_rank 8"):
        check_disk(0.15, recipe)
    for step in (1, 2, 3):
        (Path(recipe.output_dir) / f"checkpoint-{step}").mkdir(parents=True)
    check_disk(0.15, recipe)  # a resumed run has most of them already
    with pytest.raises(UserError, match="0.8 GiB of disk are needed .* --output_dir.$"):  # and cannot change its rank
        check_disk(0.3, recipe)


def test_too_little_disk_for_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "HF_HUB_CACHE", str(tmp_path / "not there"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(2**40, 2**40, 2**32))
    with pytest.raises(UserError, match=f"5.4 GiB of disk are needed .* 4.0 are free in {tmp_path}: .*HF_HOME"):
        check_disk_for_model(5.4, Recipe())
    check_disk_for_model(3.9, Recipe())
    check_disk_for_model(5.4, Recipe(model="tiny"))


def test_a_resumed_run_is_not_told_to_change_its_rank():
    assert "--lora_rank" in memory_advice(Recipe())
    assert "--lora_rank" not in memory_advice(Recipe(resume="newest"))
    assert "--lora_rank" not in memory_advice(Recipe(), resumed=True)


def test_where_there_is_no_pip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f": uv pip install --python {sys.executable} -c constraints.txt wandb"):
        preflight.check_installed("wandb")


def test_a_gated_model():
    error = OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://…")
    assert str(model_error("meta/x", error)) == (
        "cannot load the model meta/x: You are trying to access a gated repo. Accept its licence on its page, then run "
        "`hf auth login`."
    )


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, "cannot load the model .*header"),  # a download that was cut off
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat template: give an instruct model"),
        (lambda folder: GPT2Config().save_pretrained(folder), "is a gpt2, which has other layers .*--model"),
    ],
)
def test_a_model_that_cannot_be_used(monkeypatch, tmp_path, damage, words):
    model = tmp_path / "model"
    shutil.copytree("tiny", model)
    damage(model)
    with pytest.raises(UserError, match=words) as error:
        in_process(monkeypatch, "--model", model, "--output_dir", tmp_path / "out")
    one_line(error)


def test_asking_a_model_without_a_chat_template(monkeypatch, tmp_path):
    shutil.copytree("tiny", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(tmp_path / "model"), "1+1"])
    with pytest.raises(UserError, match="has no chat template"):
        infer.main()


def test_out_of_memory_is_known_by_its_words():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"))
    assert is_out_of_memory(RuntimeError("No available memory for the cache blocks"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(OSError("out of memory"))


@pytest.mark.parametrize(
    "arguments, package",
    [
        (["--report_to", "wandb"], "wandb"),
        (["--report_to", "trackio"], "trackio"),
        (["--optim", "adamw_8bit"], "bitsandbytes"),
        (["--optim", "paged_adamw_32bit"], "bitsandbytes"),
    ],
)
def test_a_package_that_only_this_recipe_needs(monkeypatch, tmp_path, arguments, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        UserError, match=f"{package} is not installed.*: pip install -c constraints.txt {package}"
    ) as error:
        in_process(monkeypatch, *arguments, "--output_dir", tmp_path / "out")
    one_line(error)
    assert not (tmp_path / "out").exists()


def test_memory_of_the_7b_model():
    parts = estimate_memory(QWEN_7B, Recipe(), card_gib=14.74)
    lora_slots = 32 * 2.52e6 * 2 / 2**30  # rank 32, 16 bits
    assert parts["weights"] + lora_slots == pytest.approx(5.36, abs=0.1)  # GiB, as vLLM loaded it with them
    assert parts["weights"] + parts["KV cache"] + 0.7 == pytest.approx(0.5 * 14.74)
    assert estimate_memory(QWEN_7B, Recipe(load_in_4bit=False), 80)["weights"] == pytest.approx(14.2, abs=0.1)


@pytest.mark.parametrize(
    "card, utilization, rank, length, micro_batch_size, measured",  # GiB: docs/results.md
    [
        (24, 0.4, 16, 128, 6, 11.50),
        (24, 0.4, 16, 128, 12, 12.21),
        (24, 0.4, 16, 512, 6, 12.27),
        (24, 0.4, 16, 512, 12, 13.95),
        (24, 0.4, 32, 128, 6, 11.99),
        (24, 0.4, 32, 512, 12, 14.06),
        (12, 0.6, 16, 1024, 6, 10.95),
        (14.7, 0.6, 16, 768, 6, 12.01),
        (14.7, 0.6, 16, 1280, 6, 13.04),
        (16, 0.6, 16, 1536, 6, 14.33),
        (24, 0.6, 16, 2304, 6, 20.58),
        (12, 0.6, 16, 1472, 6, 11.79),
        (14.7, 0.6, 16, 2048, 6, 14.66),
        (14.7, 0.6, 16, 2112, 6, 14.68),
        (16, 0.6, 16, 2368, 6, 15.95),
        (24, 0.6, 16, 3968, 6, 23.94),
    ],
)
def test_memory_is_what_was_measured(card, utilization, rank, length, micro_batch_size, measured):
    """Prompts not shared."""
    recipe = Recipe(
        gpu_memory_utilization=utilization,
        lora_rank=rank,
        max_prompt_length=241,
        max_completion_length=length,
        micro_batch_size=micro_batch_size,
    )
    estimate = sum(estimate_memory(QWEN_7B, recipe, card, shared=False).values())
    assert estimate == pytest.approx(measured, rel=0.025)


@pytest.mark.parametrize(
    "name, card, settings, kept, measured",  # the 7B model's shape, prompts and answers as long as here: docs/results.md
    [
        ("t4", 14.7, {"micro_batch_size": 6, "max_prompt_length": 241, "max_completion_length": 128}, 20, 13.50),
        ("t4", 14.7, {"micro_batch_size": 6, "max_prompt_length": 241, "max_completion_length": 256}, 10, 13.75),
        ("t4", 14.7, {}, 6, 13.55),
        ("24gb", 23.6, {"micro_batch_size": 8}, 7, 21.64),
        ("24gb", 23.6, {}, 2, 21.39),
        ("24gb", 23.6, {"micro_batch_size": 8, "load_in_4bit": True, "gpu_memory_utilization": 0.55}, 23, 20.85),
        ("80gb", 79.2, {"gradient_checkpointing": False}, 28, 41.85),
        (
            "80gb",
            79.2,
            {
                "gradient_checkpointing": False,
                "micro_batch_size": 8,
                "gpu_memory_utilization": 0.3,
                "max_prompt_length": 241,
                "max_completion_length": 256,
            },
            28,
            34.89,
        ),
    ],
)
def test_memory_of_layers_that_keep_their_activations(name, card, settings, kept, measured):
    asked = {"max_prompt_length": 95, "max_completion_length": 200} | settings
    if name == "t4":
        asked["gpu_memory_utilization"] = 0.6
    recipe = dataclasses.replace(load_recipe(f"recipes/{name}.yaml"), **asked)
    assert sum(estimate_memory(QWEN_7B, recipe, card, kept).values()) == pytest.approx(measured, rel=0.035)


def test_layers_keep_their_activations_as_far_as_memory_allows():
    recipe = load_recipe("recipes/t4.yaml")
    kept = layers_kept(QWEN_7B, recipe, 14.56, 14.56)
    assert 0 < kept < 28
    estimates = [sum(estimate_memory(QWEN_7B, recipe, 14.56, layers).values()) for layers in (kept, kept + 1)]
    assert estimates[0] <= 0.95 * 14.56 < estimates[1]
    assert layers_kept(QWEN_7B, recipe, 14.56, 14.56, shared=False) < kept
    assert layers_kept(QWEN_7B, recipe, 80, 80) == 28
    assert layers_kept(QWEN_7B, dataclasses.replace(recipe, gradient_checkpointing=False), 12, 12) == 28


@pytest.mark.parametrize(
    "card, settings, better",
    [
        (14.6, {}, None),
        (15.8, {}, None),
        (22.2, {}, "24gb"),
        (44.5, {}, "48gb"),
        (79.2, {}, "80gb"),
        (79.2, {"model": "tiny"}, None),
        (79.2, {"load_in_4bit": False}, None),
    ],
)
def test_a_larger_card_has_a_recipe_of_its_own(card, settings, better):
    assert larger_recipe(Recipe(**settings), card) == better
    assert better is None or Path("recipes", f"{better}.yaml").exists()


def test_memory_of_the_kv_cache_without_vllm():
    recipe = Recipe(
        use_vllm=False, prompts_per_step=1, num_generations=2, max_prompt_length=256, max_completion_length=256
    )
    # 2 answers × 512 tokens × 56 KiB: keys and values of 28 layers, 4 heads of 128, 2 bytes
    assert estimate_memory(QWEN_7B, recipe, 16)["KV cache"] * 2**30 == 2 * 512 * 56 * 1024


def test_memory_grows_with_what_the_advice_lowers():
    def total(**changes):
        return sum(estimate_memory(QWEN_7B, dataclasses.replace(Recipe(), **changes), 14.74).values())

    assert total(micro_batch_size=6) < total()
    assert total(max_completion_length=192) < total()
    assert total(lora_rank=8) < total()
    assert total(gradient_checkpointing=False) > total() + 10
    advice = memory_advice(Recipe())
    assert all(flag in advice for flag in ("--micro_batch_size 6", "--max_completion_length 192", "--lora_rank 8"))
    lowest = Recipe(micro_batch_size=1, max_completion_length=64, lora_rank=8)
    assert memory_advice(lowest) == "take a smaller --model."
    assert "--gradient_checkpointing true" in memory_advice(Recipe(gradient_checkpointing=False))


def test_where_vllm_finds_no_room_its_share_is_what_to_raise():
    error = RuntimeError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.")
    assert memory_advice(Recipe(gpu_memory_utilization=0.4), error=error).endswith("try --gpu_memory_utilization 0.5.")
