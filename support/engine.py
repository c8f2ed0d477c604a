"""vLLM in the training process: what unsloth starts it with, and the name that an adapter has in it."""

import hashlib
import math
import tempfile
from pathlib import Path

from support.settings import Recipe


def engine_arguments(recipe: Recipe, max_num_seqs: int, share: float) -> dict:
    """What FastLanguageModel.from_pretrained needs to start vLLM for `max_num_seqs` completions at once, with `share` of the card."""
    import vllm.envs
    import vllm.model_executor.models.registry as registry

    # vLLM looks at the model's class in a process of its own, which imports torch and vllm once more: half a minute
    registry._run_in_subprocess = lambda look: look()
    # unsloth sets this variable to 1 where it finds nvcc, and FlashInfer then compiles itself for a minute at the
    # first start, for top-p and top-k sampling that training does not use.
    vllm.envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"] = lambda: False
    sequences = math.ceil(max_num_seqs / 8) * 8  # as CUDA graphs come
    if sequences == 256:  # unsloth's own default, for which it picks fewer by free memory
        sequences = 264
    return {
        "fast_inference": True,
        "gpu_memory_utilization": share,
        "max_lora_rank": next(rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= recipe.lora_rank),
        "max_num_seqs": sequences,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},  # no compiler, but CUDA graphs
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
