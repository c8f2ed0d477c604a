"""Where the milliseconds of a token and of a micro-batch go on the card, by kind of kernel, and for how long it has nothing to do.

    python -m benchmarks.profile [--variant as_it_comes] --model MODEL --dataset DATASET --max_completion_length 200 [--SETTING VALUE ...]

Runs train_grpo.py with recipes/t4.yaml and these settings for four steps, on all answers, as a model with random weights
needs; --variant leaves out what that variant of benchmarks/training.py does. The fourth step's answers are generated
twice: as they are, for the seconds, and their first 40 tokens under PyTorch's profiler, which slows Python down but not
the kernels; those of the third step, too, without the profiler, for the seconds of a token without the prompts. The
second micro-batch of each step gives the seconds of one, that of the fourth the kernels. The floor: for a token the
weights read once at the measured bandwidth; for a micro-batch four operations a weight and token, a prompt once for its
group, at the measured rate (benchmarks/training.py).
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter

TOKENS = 40  # under the profiler
KINDS = {  # of kernels, by their names; the first that fits
    "4-bit products, unpacked on the way": r"gemm_4bit",
    "4-bit weights unpacked": r"dequant",
    "LoRA of vLLM": r"_lora_(shrink|expand)",
    "attention": r"flash|fmha|attention|attn",
    "products": r"gemm|nvjet|cutlass|splitk|cublas",
    "to another dtype, copies": r"copy|memcpy|cat",
    "norms, positions, SwiGLU": r"norm|rope|rotary|act_and_mul|swiglu|_fg_|silu|reshape_and_cache",
    "softmax, sampling": r"softmax|logsumexp|argmax|sort|multinomial|distribution",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "others")


def table(spans: list[tuple[str, float, float]]) -> tuple[dict[str, float], float, int]:
    """Microseconds of each kind, those in which any kernel ran, and how many kernels; `spans`: (name, start, end) of each."""
    kinds, busy, until = Counter(), 0.0, float("-inf")
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        kinds[kind_of(name)] += end - start
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return dict(kinds.most_common()), busy, len(spans)


def profiled(work) -> list[tuple[str, float, float]]:
    """The kernels of `work()`."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        work()
        torch.cuda.synchronize()
    on_card = (event for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return [(event.name, event.time_range.start, event.time_range.end) for event in on_card]


def show(what: str, seconds: list[float], spans: list, each: int, floor: float) -> None:
    """Prints the table of `spans`, in milliseconds for each of `each`; `seconds`: of one of `what`, as measured without the profiler."""
    kinds, busy, kernels = table(spans)
    low, high = min(seconds) * 1000, max(seconds) * 1000
    print(f"\n{what}: {statistics.median(seconds) * 1000:.2f} ms ({low:.2f} to {high:.2f}), floor {floor * 1000:.2f}")
    for kind, microseconds in kinds.items():
        print(f"    {kind:40}{microseconds / each / 1000:9.2f} ms")
    print(f"    {'the card is busy':40}{busy / each / 1000:9.2f} ms, {kernels / each:,.0f} kernels", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="ours")
    args, settings = parser.parse_known_args()
    import train_grpo

    # isort: split
    import torch
    from transformers import AutoConfig

    from benchmarks.training import card_rates, leave_out, on_all_answers
    from support.memory import parameter_counts
    from support.preflight import compute_dtype
    from support.trainer import Trainer

    quick = ["--max_steps", "4", "--eval_samples", "1", "--dev_samples", "0", "--save_steps", "1000000"]
    folder = tempfile.TemporaryDirectory()
    recipe = train_grpo.parse_recipe([*quick, *settings, "--output_dir", folder.name])
    leave_out(args.variant, recipe)
    tokens, after, passes, spans, read = [], [], [], {}, {}

    def timed(work):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        return result, time.perf_counter() - start

    class Profiled(on_all_answers(Trainer)):
        def _generate_single_turn(self, *args, **kwargs):
            def generate():
                return super(Profiled, self)._generate_single_turn(*args, **kwargs)

            length, self.max_completion_length = self.max_completion_length, TOKENS
            # the third step: vLLM, which keeps the prompts' keys and values, gets another LoRA with each call
            short = timed(generate)[1] if self.state.global_step == 2 else 0
            if self.state.global_step == 3:
                spans["token"] = profiled(generate)
            self.max_completion_length = length
            result, seconds = timed(generate)
            tokens.append(seconds / max(map(len, result[1])))
            if short:
                after.append((seconds - short) / (max(map(len, result[1])) - TOKENS))
            return result

        def training_step(self, *args, **kwargs):
            if self._step % self.args.steps_per_generation != 1:
                return super().training_step(*args, **kwargs)
            masks = (self._buffered_inputs[1][f"{part}_mask"].sum().item() for part in ("prompt", "completion"))
            prompts, read["answers"] = masks
            read["all"] = prompts // self.num_generations + read["answers"]
            if self.state.global_step == 3:
                spans["pass"] = profiled(lambda: super(Profiled, self).training_step(*args, **kwargs))
            result, seconds = timed(lambda: super(Profiled, self).training_step(*args, **kwargs))
            passes.append(seconds)
            return result

    train_grpo.Trainer = Profiled
    train_grpo.run(recipe)

    config = AutoConfig.from_pretrained(recipe.model)
    _, linear, embeddings = parameter_counts(config, recipe.lora_rank)
    output_layer = embeddings if config.tie_word_embeddings else embeddings // 2
    bandwidth, rate = card_rates(str(compute_dtype(recipe)).removeprefix("torch."))
    weights = linear * (4.127 / 8 if recipe.load_in_4bit else 2) + output_layer * 2
    answers = recipe.prompts_per_step * recipe.num_generations
    show(f"a token of {answers} answers", tokens[1:], spans["token"], TOKENS, weights / bandwidth)
    print(f"    after the first {TOKENS}, whose time has the prompts in it: {after[0] * 1000:.2f} ms a token")
    operations = 4 * (linear * read["all"] + output_layer * read["answers"])
    rows = f"a micro-batch of {recipe.micro_batch_size} answers, {read['all']} tokens"
    show(rows, passes[1:], spans["pass"], 1, operations / rate)


if __name__ == "__main__":
    sys.exit(main())
