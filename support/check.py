"""--check: what a run needs, tried part by part on this machine. `check` in train_grpo.py is the order of the parts."""

import contextlib
import ctypes
import dataclasses
import math
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import psutil
import torch

from support.check_file import write_check
from support.engine import generation
from support.errors import UserError
from support.memory import CUDA_GIB, GIB, is_out_of_memory, memory_advice
from support.pins import INSTALL, differences, differing
from support.places import find_local, kind_of
from support.preflight import GPU, compute_dtype, nvidia_driver
from support.rules import Rules
from support.screen import doing, say
from support.settings import Recipe
from support.step_report import duration, installed_versions, recording, short

TOKENS = 32  # of an answer whose log-probabilities are compared
PRIVATE = ("model", "dataset", "output_dir", "rewards")  # settings that may be paths of this machine


class Check:
    """What holds, said part by part and written to check.json at the end, however it ends.

    As a context manager it raises UserError for whatever does not hold, with the part and what to set.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.out, self.clock = recipe, Path(recipe.output_dir), time.perf_counter()
        settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("system_prompt", "resume")}
        self.names = {settings[name]: name.upper() for name in PRIVATE if kind_of(find_local(settings[name]))}
        self.names[recipe.output_dir] = "OUTPUT_DIR"  # also where it is not there yet
        self.found = {"passed": False, "failure": None, "settings": settings, "versions": installed_versions()}
        self.part = "packages"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.found["seconds"] = round(time.perf_counter() - self.clock, 1)
        if isinstance(error, Exception):
            sentence = str(error) if isinstance(error, UserError) else self.explained(error)
            self.found["failure"] = {"part": self.part, "sentence": sentence}
        elif not error:
            self.found["passed"] = True
        with contextlib.suppress(OSError):  # of a folder that cannot be written: the run's own sentence says so
            write_check(self.out, self.found, self.names)
            say(f"written     {self.out / 'check.json'}, for a report: no paths, no names")
        if isinstance(error, Exception):
            cause = error.__cause__ if isinstance(error, UserError) else error
            raise UserError(f"check failed ({self.part}): {sentence}") from cause

    def explained(self, error: Exception) -> str:
        """An error that no part expects, in a sentence with what to set."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(" .:")
        if is_out_of_memory(error):
            return f"out of GPU memory: {memory_advice(self.recipe, error=error)}"
        if different := differences():
            return f"{reason}. {different}: {INSTALL}"
        return f"{reason}. Run it again with --verbose, and report it with check.json."

    def begin(self, part: str, what: str) -> None:
        """The part that begins now: what goes wrong from here on is its."""
        self.part = part
        doing(part, what)

    def holds(self, text: str, **figures) -> None:
        """What has been found of the present part, in words and for check.json."""
        say(f"{self.part:12}{text}")
        self.found[self.part] = figures

    # --- the machine ---

    def packages(self) -> None:
        self.begin("packages", "against constraints.txt")
        words = differences() or "as pinned in constraints.txt"
        self.holds(f"Python {platform.python_version()}; {words}", differing=differing())

    def machine(self) -> None:
        """Host memory, disk, and on a GPU the card and what Triton compiles its kernels' launchers with."""
        self.begin("machine", "memory, disk, compiler")
        folder = self.out.absolute()
        while not folder.exists():
            folder = folder.parent
        memory, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
        figures = {
            "host_gib": [round(memory.available / GIB, 1), round(memory.total / GIB, 1)],  # free, all
            "disk_gib": [round(disk.free / GIB, 1), round(disk.total / GIB, 1)],
            "cores": os.cpu_count(),
        }
        words = "{} of {} GiB of host memory and {} of {} GiB of disk free, {} cores".format(
            *figures["host_gib"], *figures["disk_gib"], figures["cores"]
        )
        if GPU:
            free, total = (round(size / GIB, 1) for size in torch.cuda.mem_get_info())
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            figures |= {"card": torch.cuda.get_device_name(), "capability": capability, "driver": nvidia_driver()}
            figures |= {"gpu_gib": [free, total], "compiler": compiler()}
            words += f", {figures['compiler']}, Python.h, libcuda.so.1"
        self.holds(words, **figures)

    def triton_kernel(self) -> None:
        self.begin("triton", "a kernel")
        a, b = torch.randn(2, 1000, device="cuda")
        if not torch.equal(triton_sum(a, b), a + b):
            raise UserError("a Triton kernel adds wrongly on this card: update the driver.")
        self.holds("a kernel compiles, and adds right")

    def four_bit_product(self, config) -> None:
        """bitsandbytes' product with packed weights, at the sizes of a decode step of 1, 48 and 96 answers."""
        self.begin("4-bit", "bitsandbytes' products")
        dtype, wide, narrow = compute_dtype(self.recipe), config.intermediate_size, config.hidden_size
        bound = 8 * torch.finfo(dtype).eps  # both round each product to the dtype once, and add in another order
        errors = {rows: four_bit_error(rows, narrow, wide, dtype) for rows in (1, 48, 96)}
        figures = {"rows": list(errors), "errors": [round(error, 6) for error in errors.values()], "bound": bound}
        self.found[self.part] = figures
        if bad := [rows for rows, error in errors.items() if not error <= bound]:
            raise UserError(
                f"bitsandbytes' 4-bit product of {bad[0]} rows is off by {errors[bad[0]]:.2g} of its largest value on this card "
                f"(bound {bound:.2g}): train a model in 16 bit, --config recipes/small.yaml."
            )
        worst = max(errors.values())
        self.holds(f"the fused product is the unpacked one's at 1, 48 and 96 rows, within {worst:.1g}", **figures)

    # --- the engine, and a step ---

    def engine(self, model, seconds: float) -> None:
        """What `model` generates with, after it has been loaded in so many `seconds`."""
        self.part = "generation"
        figures = generation(self.recipe, model)
        words = figures["engine"]
        if words == "vLLM":
            graphs = "CUDA graphs" if figures["cuda_graphs"] else "no CUDA graphs"
            words += f", {figures['attention']}, {graphs}, a cache of {figures['cache_tokens']:,} tokens"
        self.holds(f"{words}; loaded in {seconds:.0f} s", **figures, loading_seconds=round(seconds, 1))

    def log_probabilities(self, trainer, prompts: list) -> None:
        """Greedy tokens with a LoRA that changes much: what generated them and the trainer must give them the same chances.

        Both round in the compute dtype, layer by layer. With a real 1.5B model on an H100 that came to 1.3 of the dtype's eps on
        average and 17 at most, in float16 and in bfloat16. The bounds are 20 and 400 eps; and on average at most half of what
        the LoRA itself changes, or one that does not arrive would pass.
        """
        self.begin("agreement", f"{len(prompts)} × {TOKENS} tokens")
        model, dtype = trainer.model, compute_dtype(self.recipe)
        matrices = [weights for name, weights in model.named_parameters() if ".lora_B." in name]
        torch.manual_seed(0)
        with torch.no_grad():
            for weights in matrices:
                weights.normal_(std=0.03)
        pairs = answers(model, trainer.processing_class, prompts, TOKENS)
        temperature, trainer.temperature = trainer.temperature, 1.0  # as greedy tokens are logged
        try:
            with torch.no_grad():
                trained = [trainer_log_probabilities(trainer, ids, len(logged)) for ids, logged in pairs]
                with model.disable_adapter():
                    base = [trainer_log_probabilities(trainer, ids, len(logged)) for ids, logged in pairs]
                for weights in matrices:
                    weights.zero_()
        finally:
            trainer.temperature = temperature
        ours = torch.cat(trained)
        logged = torch.tensor([x for _, logged in pairs for x in logged])
        off, effect = (logged - ours).abs(), (torch.cat(base) - ours).abs().mean().item()
        eps = max(torch.finfo(dtype).eps, 1e-4)  # in float32 the order of adding counts, too
        bound, largest = min(20 * eps, effect / 2), 400 * eps
        figures = {"tokens": len(off), "mean": off.mean().item(), "largest": off.max().item()}
        figures |= {"bound_mean": bound, "bound_largest": largest, "without_lora": effect}
        self.found[self.part] = figures
        words = (
            f"{figures['mean']:.4f} on average and {figures['largest']:.4f} at most between the log-probabilities of "
            f"{len(off)} tokens in generation and in training (bounds {bound:.4f}, {largest:.2f}; without the LoRA {effect:.2f})"
        )
        if not (figures["mean"] <= bound and figures["largest"] <= largest):  # also of what is no number
            way_out = "--use_vllm false, and report it with check.json" if self.recipe.use_vllm else "another --dtype"
            raise UserError(f"there are {words}: what is trained is not what answers. Try {way_out}.")
        self.holds(words, **figures)

    def step(self, trainer) -> None:
        """One step, all answers trained on, and how long the run takes at that rate."""
        recipe = self.recipe
        completions = recipe.completions
        self.begin("step", f"{completions} answers")
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"the loss of the step is {logs['loss']}: give another --dtype, or report it with check.json."
            )
        gib = torch.cuda.max_memory_reserved() / GIB + CUDA_GIB if GPU else 0.0
        # two evaluations on the test questions, those on the way; to answer counts half as much as to answer and train
        answered = 2 * recipe.eval_samples + (recipe.max_steps // recipe.eval_steps + 1) * recipe.dev_samples
        steps = recipe.max_steps + answered / completions / 2
        figures = {"seconds": round(seconds, 1), "gib": round(gib, 1), "hours": round(steps * seconds / 3600, 2)}
        figures |= {"tokens": logs["completions/mean_length"], "loss": logs["loss"], "grad_norm": logs["grad_norm"]}
        self.holds(
            f"{completions} answers of {figures['tokens']:.0f} tokens generated and trained on in {seconds:.1f} s"
            + (f", at most {gib:.1f} GiB" if GPU else ""),
            **figures,
        )
        self.part = "time"
        say(f"{self.part:12}{recipe.max_steps} steps and the evaluations at that rate: {duration(steps * seconds)}")

    def rewards(self, rules: Rules, rollout: dict) -> None:
        """What each function of `rules` gave the answers of the step. Not in check.json: their names are the user's."""
        self.part = "rewards"
        earned = {name: {value for value in rollout[name] if value is not None} for name in rules.names}
        ends = {
            name: " to ".join(f"{x:g}" for x in sorted({min(values), max(values)})) if values else "none"
            for name, values in earned.items()
        }
        say(f"{self.part:12}{', '.join(f'{short(name)} {text}' for name, text in ends.items())}")
        if all(len(values) < 2 for values in earned.values()):
            say("            the same for all answers: if some are better, look whether they are read as they should")


def trial(rules: Rules, rollout: dict):
    """The reward of --check's step: the second of two answers beats the first, so that every group has a variance.

    The functions of `rules` are called, as TRL calls them; what they give is left in `rollout`, but not trained on.
    """

    def trial_reward(completions, **given) -> list[float]:
        for func in rules.funcs:
            recording(func, rollout, rules)(completions=completions, **given)
        return [float(i % 2) for i in range(len(completions))]

    return trial_reward


def compiler() -> str:
    """The C compiler that Triton will use. Raises UserError where it, or what it needs, is not there."""
    name = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)  # as Triton looks
    if not name or not shutil.which(name):
        raise UserError("there is no C compiler, with which Triton builds its kernels' launchers: apt install gcc.")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        version = ".".join(platform.python_version_tuple()[:2])
        raise UserError(
            f"Python.h is not there, which Triton's launchers need: apt install python{version}-dev, or take uv's Python."
        )
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UserError(f"the driver's library cannot be loaded ({error}): install the NVIDIA driver.") from error
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0] if said else name


def triton_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b, of one dimension, by a kernel that Triton compiles for this card."""
    import triton
    import triton.language as tl

    @triton.jit
    def add(a, b, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(a + at, at < n) + tl.load(b + at, at < n), at < n)

    out = torch.empty_like(a)
    add[(triton.cdiv(a.numel(), 128),)](a, b, out, a.numel(), BLOCK=128)
    return out


def four_bit_error(rows: int, narrow: int, wide: int, dtype: torch.dtype) -> float:
    """The largest difference between bitsandbytes' product with NF4 weights of `wide` × `narrow` and the product with the same
    weights unpacked, over the largest value of that. As vLLM calls it in generation."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(rows)
    weights = torch.randn(wide, narrow, device="cuda", dtype=dtype) / narrow**0.5
    packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    x = torch.randn(rows, narrow, device="cuda", dtype=dtype)
    with torch.inference_mode():
        expected = x.float() @ dequantize_4bit(packed, state).float().t()
        return ((matmul_4bit(x, packed.t(), state) - expected).abs().max() / expected.abs().max()).item()


def answers(model, tokenizer, prompts: list, tokens: int) -> list[tuple[list[int], list[float]]]:
    """Greedy answers of at most so many `tokens` with the LoRA that is in `model`: the ids of prompt and answer, and the
    log-probability of each token of the answer, as what generates gives it in training."""
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    if hasattr(model, "vllm_engine"):
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0)
        lora = model.load_lora("check", load_tensors=True)
        found = []
        for output in model.vllm_engine.generate(texts, sampling, lora_request=lora, use_tqdm=False):
            answer = output.outputs[0]
            logged = [chances[token].logprob for token, chances in zip(answer.token_ids, answer.logprobs, strict=True)]
            found.append(([*output.prompt_token_ids, *answer.token_ids], logged))
        return found
    was_training, found = model.training, []
    model.eval()
    for text in texts:
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = output.sequences[0, prompt["input_ids"].shape[1] :]
        chances = torch.stack(output.logits, dim=1)[0].float().log_softmax(dim=-1)
        logged = chances.gather(1, ids[:, None])[:, 0].tolist()
        found.append((output.sequences[0].tolist(), logged))
    model.train(was_training)
    return found


def trainer_log_probabilities(trainer, ids: list[int], keep: int) -> torch.Tensor:
    """The log-probabilities of the last `keep` of `ids`, on the CPU, as `trainer` computes them for the loss."""
    ids = torch.tensor([ids], device=trainer.model.device)
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), keep)[0]
    return found[0, -keep:].float().cpu()
