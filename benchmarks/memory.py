"""The preflight's estimate of GPU memory against what a run takes, over a grid of settings.

    python -m benchmarks.memory --model MODEL --dataset DATASET --grid num_generations=6,12 max_completion_length=128,256 lora_rank=16,32 [--SETTING VALUE ...]

Every combination of the grid runs two steps of train_grpo.py (the second has the optimiser's state from its beginning). Settings that only the model's loading
depends on (lora_rank, vram_gib, gpu_memory_utilization, load_in_4bit) get a process for each of their combinations; the others
are run one after the other with the same model in memory, with vLLM set up for the longest. Combinations that make no sense (micro-batches that do
not divide the completions) are left out. The estimate is for prompts and answers of full length, and so is what is measured: every question is the
longest of those that max_prompt_length admits, and a model with random weights never ends its answers. The held-out questions are not answered,
which takes no more memory than a step.

reserved: the most that PyTorch held, plus what the process holds outside of it (the CUDA context). allocated: the most
that was in use at once, of what PyTorch held.
"""

import argparse
import contextlib
import gc
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOADING = ["lora_rank", "vram_gib", "gpu_memory_utilization", "load_in_4bit"]


def measure(settings: list[str], points: list[dict[str, str]], json_file: Path) -> None:
    """All `points` (settings by name) with one model in memory: appends a line for each to `json_file`."""
    import train_grpo  # imports unsloth, which must come before transformers

    # isort: split
    import torch
    from transformers import AutoConfig

    import support.preflight
    from benchmarks.training import on_all_answers
    from data import load_questions, train_and_test_splits
    from support.errors import UserError
    from support.memory import GIB, estimate_memory, is_out_of_memory, layers_kept
    from support.preflight import GPU
    from support.trainer import Trainer
    from support.training_pass import keep_activations

    def parse(point):
        return train_grpo.parse_recipe(
            [*settings, *(part for name, value in point.items() for part in (f"--{name}", value))]
        )

    recipes = []
    for point in points:
        with contextlib.suppress(UserError):
            recipes.append((point, parse(point)))
    longest = max((recipe for _, recipe in recipes), key=lambda r: r.max_prompt_length + r.max_completion_length)
    most = max(recipe.prompts_per_step * recipe.num_generations for _, recipe in recipes)
    base, tokenizer = train_grpo.load_base_model(longest, most)
    model = train_grpo.attach_lora(base, longest)
    split, _ = train_and_test_splits(longest.dataset)
    questions = load_questions(longest.dataset, split, tokenizer, longest.max_prompt_length, longest.system_prompt)

    chats = (
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in questions["prompt"]
    )
    lengths = [len(chat) for chat in chats]

    def longest_question(dataset, split, tokenizer, max_prompt_length, *_, **__):
        tokens, row = max((tokens, row) for row, tokens in enumerate(lengths) if tokens <= max_prompt_length)
        print(f"{split}: every prompt has {tokens} tokens", flush=True)
        return questions.select([row])

    train_grpo.load_questions = longest_question
    train_grpo.without_repeats = lambda train, test: train
    train_grpo.load_base_model = lambda *args: (base, tokenizer)

    def keep(base, recipe, kept):  # in the place of attach_lora
        for layer in model.base_model.model.model.layers:
            if "gradient_checkpointing" in vars(type(layer)):  # it kept its activations at the last point
                layer.__class__ = type(layer).__bases__[0]
        if GPU:
            keep_activations(model, kept)
        return model

    train_grpo.attach_lora = keep
    figures = dict.fromkeys("strict strict_low strict_high lenient format truncated mean_length".split(), 0.0)
    train_grpo.measure = lambda model, tokenizer, questions, *_: ({"n": 1, **figures}, [""] * len(questions))
    train_grpo.Trainer = on_all_answers(Trainer)
    support.preflight.check_memory = lambda *args: None  # what is estimated too large shall be tried
    config = AutoConfig.from_pretrained(longest.model)
    for point, recipe in recipes:
        total = torch.cuda.mem_get_info()[1] / GIB if GPU else 0.0
        card = min(recipe.vram_gib or total, total)
        kept = layers_kept(config, recipe, card, card)
        parts = estimate_memory(config, recipe, card, kept)
        gc.collect()  # the last trainer, which refers to itself
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        line = point | {"kept": kept, "parts": parts, "estimate": sum(parts.values())}
        try:
            with tempfile.TemporaryDirectory() as folder:
                recipe.output_dir = folder
                train_grpo.run(recipe)
        except (RuntimeError, UserError) as error:  # after its first step a run makes a UserError of it
            if not is_out_of_memory(error.__cause__ or error):
                raise
            line["error"] = "out of memory"
        if GPU:
            free, total = torch.cuda.mem_get_info()
            outside = (total - free - torch.cuda.memory_reserved()) / GIB
            line |= {
                "reserved": torch.cuda.max_memory_reserved() / GIB + outside,
                "allocated": torch.cuda.max_memory_allocated() / GIB + outside,
                "outside": outside,
            }
        else:
            line |= {"reserved": float("nan"), "allocated": float("nan"), "outside": float("nan")}
        with json_file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", nargs="+", required=True, metavar="SETTING=VALUE,VALUE", help="what to vary")
    parser.add_argument("--json", type=Path, help="append a line for each combination here")
    parser.add_argument("--points", help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    if args.points:
        return measure(settings, json.loads(args.points), args.json)
    grid = {name: values.split(",") for name, _, values in (axis.partition("=") for axis in args.grid)}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def loading(point):
        return [point.get(name, "") for name in LOADING]

    quick = ["--max_steps", "2", "--eval_samples", "1", "--save_steps", "1000000", "--sample_steps", "1000000"]
    with tempfile.TemporaryDirectory() as folder:
        path = args.json or Path(folder, "lines.jsonl")
        before = len(path.read_text().splitlines()) if path.exists() else 0
        for _, group in itertools.groupby(sorted(points, key=loading), key=loading):
            command = [sys.executable, "-m", "benchmarks.memory", "--grid", "-", *settings, *quick]
            result = subprocess.run([*command, "--points", json.dumps(list(group)), "--json", str(path)])
            if result.returncode:
                print(f"a process ended with status {result.returncode}; what it had measured is below", flush=True)
        lines = [json.loads(line) for line in path.read_text().splitlines()[before:]] if path.exists() else []
    heads = [*grid, "estimate", "reserved", "allocated", "estimate/reserved"]
    print("".join(f"{head:>{max(len(head), 9) + 2}}" for head in heads))
    for line in lines:
        row = [line[name] for name in grid] + [f"{line[name]:.2f}" for name in ("estimate", "reserved", "allocated")]
        row.append(f"{line['estimate'] / line['reserved'] - 1:+.1%}" if "error" not in line else line["error"])
        print("".join(f"{value:>{max(len(head), 9) + 2}}" for head, value in zip(heads, row, strict=True)))


if __name__ == "__main__":
    main()
