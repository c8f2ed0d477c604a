"""vLLM in the training process: what unsloth starts it with, what is done where it does not start, an adapter's name in it."""

import hashlib
import math
import tempfile
from pathlib import Path

import torch

from support.decoding import merge_products, schedule_ahead, tune_lora_kernels
from support.errors import StartAgain
from support.preflight import GPU
from support.screen import say
from support.settings import Recipe
from support.turing import AT_ONCE


def engine_arguments(recipe: Recipe, max_num_seqs: int, share: float) -> dict:
    """What FastLanguageModel.from_pretrained needs to start vLLM for `max_num_seqs` completions at once, with `share` of the card."""
    import vllm.model_executor.models.registry as registry

    # vLLM looks at the model's class in a process of its own, which imports torch and vllm once more: half a minute
    registry._run_in_subprocess = lambda look: look()
    schedule_ahead()
    merge_products()
    tune_lora_kernels()
    load_once()
    if torch.cuda.get_device_capability() < (8, 0):
        max_num_seqs = min(max_num_seqs, AT_ONCE)
    # vLLM captures CUDA graphs for every 8 answers up to 248, then for every 16 up to 512; more than the last have none
    step = 8 if max_num_seqs <= 248 else 16
    sequences = min(math.ceil(max_num_seqs / step) * step, 512)
    if sequences == 256:  # unsloth's own default, for which it picks fewer by free memory
        sequences = 272
    return {
        "fast_inference": True,
        "gpu_memory_utilization": share,
        "max_lora_rank": next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= recipe.lora_rank),
        "max_num_seqs": sequences,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},  # no compiler, but CUDA graphs
        "enforce_eager": recipe.enforce_eager,  # not even these
    }


def load_once() -> None:
    """Keeps unsloth from loading the checkpoint again behind vLLM, a 4-bit one on the card, only to copy settings from it.

    It makes the model that is trained of vLLM's weights; without a name it takes the settings from the model's config.
    Written for unsloth_zoo 2026.10; where that has changed, it loads twice, or fails as it would by itself.
    """
    try:
        from unsloth_zoo import empty_model

        create = empty_model.create_empty_causal_lm
    except (ImportError, AttributeError):
        return say("loading     this unsloth_zoo may load the model a second time for its settings")

    def from_config(config, *args, **options):
        name, config.model_name = getattr(config, "model_name", None), None
        try:
            return create(config, *args, **options)
        finally:
            config.model_name = name

    empty_model.create_empty_causal_lm = from_config


def start_again(recipe: Recipe, error: Exception) -> StartAgain:
    """The way out where vLLM did not start: the same again without CUDA graphs and, where it had none, without vLLM."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if recipe.enforce_eager:
        how, arguments = "without vLLM, which is slow", ["--use_vllm", "false"]
    else:
        how, arguments = "without CUDA graphs", ["--enforce_eager", "true"]
    return StartAgain(f"vLLM could not start ({reason})", how, arguments)


def generation(recipe: Recipe, model) -> dict:
    """What generates the answers of `model`: the library and, of vLLM, its attention, CUDA graphs and tokens in its cache."""
    if not hasattr(model, "vllm_engine"):
        return {"engine": "unsloth" if GPU else "transformers"}
    llm = model.vllm_engine
    cache = llm.llm_engine.vllm_config.cache_config
    attention = llm.collective_rpc(lambda worker: worker.model_runner.attn_groups[0][0].backend.get_name())[0]
    return {
        "engine": "vLLM",
        "attention": attention,
        "cuda_graphs": not recipe.enforce_eager,
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def own_lora_folder(model):
    """`model`, which hands its LoRA to vLLM through a folder of its own.

    unsloth writes the LoRA's config into the working directory, under one name for all runs there, and reads it back.
    """
    folder, load_lora = tempfile.TemporaryDirectory(prefix="grpo-lora-"), model.load_lora

    def load(_, **options):
        return load_lora(folder.name, **options)

    model.load_lora = load
    return model


def adapter_name(adapter: Path) -> tuple[str, int]:
    """A name and an id for the LoRA in the folder `adapter`, made of its files: another content is another name.

    vLLM keeps weights under the id, and the keys and values of prompts under the name. Under one name for all, a second
    adapter would answer from the first one's cache; under one for each folder, what was trained anew from the old one's.
    """
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("adapter_*")):  # the weights and their config
        digest.update(path.read_bytes())
    name = digest.hexdigest()
    return name, 2**30 + int(name[:7], 16)  # vLLM holds ids in 31 bits, and unsloth counts its own from 1


def lora_request(adapter: Path):
    """What vLLM takes to answer with the LoRA in the folder `adapter`."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(*adapter_name(adapter), str(adapter))
