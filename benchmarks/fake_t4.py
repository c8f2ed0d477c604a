"""Runs a script on a newer card as on a Tesla T4 (compute capability 7.5): its dispatch and Triton's code, executed.

    python -m benchmarks.fake_t4 train_grpo.py --max_steps 3
    python -m benchmarks.fake_t4 -m benchmarks.training ours --child 1 --json figures.json

Who asks for the card, in Python, is told of a T4: torch, vLLM (which asks NVML), pynvml. torch's own attention, whose
choice is made in C++, does without FlashAttention and cuDNN. Triton lowers for sm_75 (no tensor cores, no asynchronous
copies) and assembles that PTX for the card that is there. Compiled C++ runs what it has for that card, at its speed.
Nothing is held to a T4's memory: that is --vram_gib 14.56. Processes that the script starts see the real card.

Triton's kernels go to as-t4 in its own cache. They are for the card that is there: another kind needs another cache.
"""

import importlib.abc
import importlib.machinery
import os
import runpy
import sys
from pathlib import Path

NAME, CAPABILITY = "Tesla T4", (7, 5)
T4 = {  # of torch's properties; all others are the real card's
    "name": NAME,
    "gcnArchName": NAME,
    "major": 7,
    "minor": 5,
    "multi_processor_count": 40,
    "warp_size": 32,
    "max_threads_per_multi_processor": 1024,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block": 48 * 1024,
    "shared_memory_per_block_optin": 64 * 1024,
    "shared_memory_per_multiprocessor": 64 * 1024,
    "L2_cache_size": 4 * 1024**2,
}


class Properties:
    """torch.cuda.get_device_properties() of the real card, but for what T4 says."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):  # only of what this class lacks
        return T4[name] if name in T4 else getattr(object.__getattribute__(self, "_real"), name)


def patch_torch(torch) -> None:
    global real_properties
    real_properties = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda device=None: Properties(real_properties(device))
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY  # which Triton's driver compiles for
    torch.cuda.get_device_name = lambda device=None: NAME
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def patch_triton_compiler(module) -> None:
    """Everything up to the PTX for sm_75, then ptxas for the card that is there."""
    make_cubin = module.CUDABackend.make_cubin

    def make_cubin_for_real_card(self, src, metadata, opt, capability):
        real = real_properties(None)
        return make_cubin(self, src, metadata, opt, real.major * 10 + real.minor)

    module.CUDABackend.make_cubin = make_cubin_for_real_card


def patch_vllm(module) -> None:
    """vLLM asks NVML, before CUDA starts."""
    from vllm.platforms.interface import DeviceCapability

    for platform in (module.NvmlCudaPlatform, module.NonNvmlCudaPlatform):
        platform.get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*CAPABILITY))
        platform.get_device_name = classmethod(lambda cls, device_id=0: NAME)


def patch_pynvml(module) -> None:
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: list(CAPABILITY)


PATCHES = {
    "pynvml": patch_pynvml,
    "torch": patch_torch,
    "triton.backends.nvidia.compiler": patch_triton_compiler,
    "vllm.platforms.cuda": patch_vllm,
    "vllm.third_party.pynvml": patch_pynvml,
}


class Finder(importlib.abc.MetaPathFinder):
    """Patches a module as soon as it has been imported, before anyone else sees it."""

    def find_spec(self, name, path=None, target=None):
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module
        return spec


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] == "-m" and len(sys.argv) < 3:
        sys.exit(__doc__)
    cache = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    os.environ["TRITON_CACHE_DIR"] = str(Path(cache, "as-t4"))
    sys.meta_path.insert(0, Finder())
    import torch  # noqa: F401  (patched with everything that it imports; starts no CUDA)

    if sys.argv[1] == "-m":
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = sys.argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).absolute().parent)  # as Python does for a script
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
