"""Where the seconds of a training run go: variants side by side on one card, each in a process of its own.

    python -m benchmarks.training ours article trl --model MODEL --dataset DATASET --max_completion_length 200 [--SETTING VALUE ...]

ours      train_grpo.py with recipes/t4.yaml
article   train_grpo.py with recipes/article.yaml; vLLM's model and unsloth's loss compiled, as they are by default
trl       ours, but the model loaded by transformers and PEFT, and transformers generates: TRL as it comes, QLoRA
trl_vllm  ours, but the model loaded by transformers and PEFT, and TRL's own colocated vLLM generates
inductor  ours, but torch.compile is on: vLLM compiles the model and its ranking of tokens with it, as it does by default
compiled  ours, but torch.compile is on: unsloth compiles its loss with it, as it does by default, and vLLM its ranking
triton    ours, but vLLM's attention is Triton's; flashinfer: FlashInfer's, as unsloth chooses where it finds nvcc and ninja
as_it_comes         ours, without all that the following leave out one by one
no_ahead, no_merge  ours, but vLLM waits for Python between two tokens; multiplies by each 4-bit weight by itself
no_tune             ours, but vLLM's kernels for the LoRA cut their work as vLLM has them do
no_once             ours, but unsloth loads the checkpoint again for its settings, a 4-bit one on the card
no_share, no_fuse   ours, but a prompt is computed anew for each of its answers; q, k and v one by one
no_trust  ours, but unsloth compares its pass with one for each answer by itself whenever a micro-batch is larger than all before
no_keep, no_rows    ours, but every layer computes its activations again; an answer gets its logits in four pieces

A variant may bring settings of its own: "ours --config recipes/24gb.yaml --max_completion_length 200". With --processes 2
each runs under torchrun, on two cards. --SETTING VALUE goes to every variant: same model, same prompts, same length,
same cap. Each variant starts twice, first with empty caches for compiled code (a step or two), then with those caches.
Prints the seconds from the start of the process to the first optimiser step, cold and warm; of the steps after the
second, the median seconds, how they divide, completions and tokens a second; peak memory; and the least that the card
could need for such a step:

  generation: each token of the longest completion reads the weights once, at the measured bandwidth;
  training: 4 floating-point operations a weight and token (forward, and backward through frozen weights), at the
  measured matrix rate, for a prompt once in its group and the completions, the output layer for completions only, and
  for groups with an advantage only, where the variant skips the others.
"""

import argparse
import contextlib
import importlib
import importlib.machinery
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

CONFIGS = {
    "ours": "recipes/t4.yaml",
    "article": "recipes/article.yaml",
    "trl": "recipes/t4.yaml",
    "trl_vllm": "recipes/t4.yaml",
    "inductor": "recipes/t4.yaml",
    "compiled": "recipes/t4.yaml",
    "triton": "recipes/t4.yaml",
    "flashinfer": "recipes/t4.yaml",
}
CHANGES = {  # what each of these variants leaves out: (module, name, what takes its place)
    "no_ahead": ("support.engine", "schedule_ahead", lambda: None),
    "no_merge": ("support.engine", "merge_products", lambda: None),
    "no_tune": ("support.engine", "tune_lora_kernels", lambda: None),
    "no_once": ("support.engine", "load_once", lambda: None),
    "no_share": ("support.trainer", "prompts_shared", contextlib.nullcontext),
    "no_trust": ("support.trainer", "trust_pass", lambda policy: None),
    "no_fuse": ("train_grpo", "fuse_qkv", lambda policy: None),
    "no_keep": ("train_grpo", "keep_activations", lambda policy, layers: None),
    "no_rows": ("train_grpo", "LOGIT_ROWS", None),
}
CONFIGS |= dict.fromkeys(["as_it_comes", *CHANGES], "recipes/t4.yaml")
COMPILE = {"TORCHDYNAMO_DISABLE": "0", "UNSLOTH_VLLM_NO_FLASHINFER": "0"}  # as the libraries come
ENVIRONMENT = {
    "article": COMPILE | {"UNSLOTH_COMPILE_DISABLE": "0"},
    "compiled": COMPILE | {"UNSLOTH_COMPILE_DISABLE": "0"},
    "inductor": COMPILE,
    "trl": COMPILE,
    "trl_vllm": COMPILE,
    "triton": {"VLLM_ATTENTION_BACKEND": "TRITON_ATTN"},
    "flashinfer": {"UNSLOTH_VLLM_NO_FLASHINFER": "0"},
}
CACHES = [
    "VLLM_CACHE_ROOT",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "UNSLOTH_COMPILE_LOCATION",
    "TVM_FFI_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
]


def measure(variant: str, settings: list[str], started: float, all_answers: bool, json_file: Path) -> None:
    """One variant, in this process: writes what it measured to `json_file`."""
    variant, *own = shlex.split(variant)
    from support import screen
    from support.memory import GIB, limit_memory, parameter_counts
    from support.preflight import GPU, check_machine, compute_dtype

    plain = variant.startswith("trl")
    if plain:  # train_grpo.py then finds TRL as it comes
        unsloth = types.ModuleType("unsloth")
        unsloth.FastLanguageModel, unsloth.__spec__ = None, importlib.machinery.ModuleSpec("unsloth", None)
        sys.modules["unsloth"] = unsloth
    import train_grpo  # imports unsloth, which must come before transformers

    # isort: split
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from support.trainer import GRPOTrainer  # TRL's

    config = [] if "--config" in own else ["--config", CONFIGS[variant]]
    recipe = train_grpo.parse_recipe([*config, *settings, *own])
    leave_out(variant, recipe)
    if variant == "trl":
        recipe.use_vllm = False
    marks, steps, parts = {"imported": time.time() - started}, [], {}

    def timed(name, function):
        def wrapper(*args, **kwargs):
            if GPU:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if GPU:
                torch.cuda.synchronize()
            parts[name] = parts.get(name, 0) + time.perf_counter() - start
            return result

        return wrapper

    def load(recipe, max_num_seqs):
        check_machine(recipe)
        limit_memory(recipe)
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model, dtype=compute_dtype(recipe), device_map={"": 0} if GPU else None
        )
        return model, AutoTokenizer.from_pretrained(recipe.model)

    load_base_model, training_arguments = load if plain else train_grpo.load_base_model, train_grpo.training_arguments

    def load_and_mark(*args):
        loaded = load_base_model(*args)
        marks["loaded"] = time.time() - started
        return loaded

    def arguments(recipe):
        config = training_arguments(recipe)
        if variant == "trl_vllm":
            share = (recipe.vram_gib or torch.cuda.mem_get_info()[1] / GIB) / (torch.cuda.mem_get_info()[1] / GIB)
            config.vllm_gpu_memory_utilization = recipe.gpu_memory_utilization * share
        return config

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            marks.setdefault("training", time.time() - started)
            parts.clear()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if GPU:
                torch.cuda.synchronize()
            marks.setdefault("first step", time.time() - started)
            steps.append({"step": time.perf_counter() - self.start, **parts})

    trainer = GRPOTrainer if plain else train_grpo.Trainer

    class Timed(on_all_answers(trainer) if all_answers else trainer):
        def __init__(self, model, **kwargs):
            if plain:
                lora = train_grpo.lora_arguments(recipe)
                kwargs["peft_config"] = train_grpo.LoraConfig(**lora, task_type="CAUSAL_LM")
            super().__init__(model=model, **kwargs)
            self.add_callback(Clock())
            for name, method in {
                "generate and score": "_generate_and_score_completions",
                "generation": "_generate_single_turn",
                "scoring": "_calculate_rewards",
            }.items():
                setattr(self, method, timed(name, getattr(self, method)))
            # How the new LoRA gets into the engine: unsloth hands it over with each call, TRL merges it into its copy.
            if hasattr(self, "vllm_generation"):  # TRL 1
                self.vllm_generation.sync_weights = timed("sync", self.vllm_generation.sync_weights)
            elif hasattr(self, "_move_model_to_vllm"):
                self._move_model_to_vllm = timed("sync", self._move_model_to_vllm)
            if hasattr(self.model, "load_lora"):
                self.model.load_lora = timed("sync", self.model.load_lora)

    train_grpo.load_base_model, train_grpo.training_arguments, train_grpo.Trainer = load_and_mark, arguments, Timed
    if GPU and variant in ("inductor", "article"):
        from_pretrained = train_grpo.FastLanguageModel.from_pretrained

        def with_inductor(*args, compilation_config=None, **kwargs):
            return from_pretrained(*args, **kwargs)

        train_grpo.FastLanguageModel.from_pretrained = with_inductor
    if plain:  # the estimate is for unsloth's and vLLM's shared weights, and TRL adds the LoRA itself
        train_grpo.preflight = lambda *args: 0
        train_grpo.load_policy = lambda recipe, kept: load_and_mark(recipe, recipe.completions_each)
    train_grpo.run(recipe)
    if screen.RANK != "0":
        return

    metrics = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    for step, logged in zip(steps, metrics, strict=True):
        step["completions"] = recipe.prompts_per_step * recipe.num_generations
        step["tokens"] = logged["completions/mean_length"] * step["completions"]
        step["longest"] = logged["completions/max_length"]
        everything = plain or all_answers or recipe.beta
        step["trained"] = 1 if everything else 1 - logged["frac_reward_zero_std"]
    steps[0]["all tokens"] = metrics[0]["num_tokens"]
    for step, before, logged in zip(steps[1:], metrics, metrics[1:], strict=False):
        step["all tokens"] = logged["num_tokens"] - before["num_tokens"]
    free, total = (size / GIB for size in torch.cuda.mem_get_info()) if GPU else (0, 0)
    _, linear, embeddings = parameter_counts(AutoConfig.from_pretrained(recipe.model), recipe.lora_rank)
    tied = AutoConfig.from_pretrained(recipe.model).tie_word_embeddings
    result = {
        "variant": variant,
        "settings": settings,
        "marks": marks,
        "steps": steps,
        "gib": metrics[-1]["gib"],
        "allocated": torch.cuda.max_memory_allocated() / GIB if GPU else 0,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"] if GPU else 0,  # allocations for which it freed first
        "card_gib": metrics[-1]["gib"] + (total - free - torch.cuda.memory_reserved() / GIB if GPU else 0),
        "linear": linear,
        "group": recipe.num_generations,
        "output_layer": embeddings if tied else embeddings // 2,
        "bytes": torch.finfo(compute_dtype(recipe)).bits / 8,  # of a weight; NF4's 4.127 bits only in the linear layers
        "linear_bytes": 4.127 / 8 if recipe.load_in_4bit else torch.finfo(compute_dtype(recipe)).bits / 8,
        "dtype": str(compute_dtype(recipe)).removeprefix("torch."),
    }
    json_file.write_text(json.dumps(result))


def leave_out(variant: str, recipe) -> None:
    """Takes back what `variant` does without: of CHANGES one, all of them, or none."""
    for name in CHANGES if variant == "as_it_comes" else [variant] if variant in CHANGES else []:
        module, attribute, other = CHANGES[name]
        importlib.import_module(module)
        setattr(sys.modules[module], attribute, other or recipe.max_completion_length / 4)


def on_all_answers(trainer: type) -> type:
    """`trainer`, but every answer has an advantage: those of random weights earn nothing, and would be skipped."""

    class Trainer(trainer):
        def _prepare_inputs(self, generation_batch):
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            if self._buffered_inputs is not before:
                for batch in self._buffered_inputs:
                    batch["advantages"] = batch["advantages"] * 0 + 1e-6  # hardly a gradient, but one
                    batch["skip"] = False
            return inputs

    return Trainer


def card_rates(dtype: str) -> tuple[float, float]:
    """Bytes a second that a large copy reads and writes, and operations a second of a large matrix product."""
    code = f"""
import torch, time
device = "cuda" if torch.cuda.is_available() else "cpu"
n, m = (8192, 2**30) if device == "cuda" else (1024, 2**26)
a = torch.randn(n, n, device=device, dtype=torch.{dtype}); b = torch.empty(m, dtype=torch.uint8, device=device); c = b.clone()
def seconds(work):
    times = []
    for _ in range(10):
        start = time.perf_counter(); work()
        if device == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[5]
print(2 * m / seconds(lambda: c.copy_(b)), 2 * n**3 / seconds(lambda: a @ a))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    bandwidth, rate = map(float, output.split())
    return bandwidth, rate


def floor_seconds(result: dict, step: dict, bandwidth: float, rate: float) -> tuple[float, float]:
    """The least seconds of generation and of training for `step`."""
    weights = result["linear"] * result["linear_bytes"] + result["output_layer"] * result["bytes"]
    read = step["tokens"] + (step["all tokens"] - step["tokens"]) / result["group"]
    operations = 4 * step["trained"] * (result["linear"] * read + result["output_layer"] * step["tokens"])
    return step["longest"] * weights / bandwidth, operations / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cold", action=argparse.BooleanOptionalAction, default=True, help="also start with no caches")
    parser.add_argument(
        "--all_answers",
        action="store_true",
        help="train on answers without advantage too: for a model with random weights, which earns nothing",
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--processes", type=int, default=1, help="each with a card of its own")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    for variant in args.variants:
        if variant.split()[0] not in CONFIGS:
            parser.error(f"there is no variant {variant}: choose from {', '.join(CONFIGS)}.")
    if args.child:
        return measure(args.variants[0], settings, args.child, args.all_answers, args.json)

    results, failed, rates = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(args.variants):
            caches = {name: str(Path(folder, f"caches-{number}", name)) for name in CACHES} if args.cold else {}
            result = {}
            for start in ("cold", "warm") if args.cold else ("warm",):
                path = Path(folder, f"{number}-{start}.json")
                steps = ["--max_steps", str(args.steps if start == "warm" else 1)]
                steps += ["--output_dir", str(Path(folder, f"{number}-{start}"))]
                quick = ["--eval_samples", "8", "--save_steps", "1000000", "--sample_steps", "1000000"]
                quick += ["--dev_samples", "0"]
                several = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.processes)]
                command = [sys.executable, *(several if args.processes > 1 else [])]
                command += ["-m", "benchmarks.training", variant, *quick, *settings, *steps]
                command += ["--all_answers"] if args.all_answers else []
                command += ["--json", str(path), "--child", str(time.time())]
                print(f"--- {variant}, {start}", flush=True)
                own = ENVIRONMENT.get(variant.split()[0], {})
                if subprocess.run(command, env=os.environ | caches | own).returncode:
                    failed.append(variant)
                    break
                measured = json.loads(path.read_text())
                result |= measured | {f"{start} marks": measured["marks"]}
            else:
                result["name"] = variant
                results.append(result)
            if args.json:
                args.json.write_text(json.dumps(results))

    heads = [
        "cold",
        "warm",
        "loaded",
        "step",
        "generation",
        "sync",
        "scoring",
        "other",
        "training",
        "compl./s",
        "tokens/s",
    ]
    width = max(len(variant) for variant in args.variants) + 1
    print(
        f"\n{'seconds':{width}}" + "".join(f"{head:>11}" for head in [*heads, "GiB", "card GiB", "floor", "over floor"])
    )
    for result in results:
        if result["dtype"] not in rates:
            rates[result["dtype"]] = card_rates(result["dtype"])
        steady = result["steps"][2:] or result["steps"][-1:]

        def median(name, steady=steady):
            return statistics.median(step.get(name, 0) for step in steady)

        rounds, sync, generation = median("generate and score"), median("sync"), median("generation")
        floor = sum(floor_seconds(result, steady[-1], *rates[result["dtype"]]))
        row = [
            result.get("cold marks", {}).get("first step", float("nan")),
            result["warm marks"]["first step"],
            result["warm marks"]["loaded"],
            median("step"),
            generation - sync,
            sync,
            median("scoring"),
            rounds - generation - median("scoring"),
            median("step") - rounds,
            median("completions") / median("step"),
            median("tokens") / median("step"),
            result["gib"],
            result["card_gib"],
            floor,
            median("step") / floor,
        ]
        print(f"{result['name']:{width}}" + "".join(f"{value:11.2f}" for value in row))
        spread = [step["step"] for step in steady]
        print(f"{'':{width}}  steps {min(spread):.2f} to {max(spread):.2f} s")
    for dtype, (bandwidth, rate) in rates.items():
        print(f"measured: {bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.1f} TFLOP/s in {dtype}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
