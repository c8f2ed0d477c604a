"""How fast infer.py answers held-out questions: vLLM through unsloth against transformers' batched generate.

    python -m benchmarks.generation --model MODEL --dataset DATASET --limit 400

Both answer the same prompts greedily, on one card, in the same dtype, one after the other, each in a process of its own (unsloth
changes transformers where it is imported), after one uncounted batch: vLLM all of them in one call, transformers in
batches of each given size. Prints seconds, tokens per second and the ratio, median and range of the repeats, and how
many of the answers are the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(args) -> None:
    """One backend, in this process: writes seconds and answers to args.json."""
    import torch

    if args.backend == "vLLM":
        from train_grpo import load_base_model

        # isort: split
        from support.settings import load_recipe

        recipe = load_recipe()
        recipe.model, recipe.load_in_4bit = args.model, False
        recipe.max_completion_length, recipe.gpu_memory_utilization = args.max_new_tokens, 0.4
        model, tokenizer = load_base_model(recipe, max_num_seqs=256)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if args.cuda else torch.float32)
        model, tokenizer = model.to("cuda" if args.cuda else "cpu"), AutoTokenizer.from_pretrained(args.model)
    from data import load_questions, train_and_test_splits
    from support.evaluation import evaluate, generate

    questions = load_questions(args.dataset, train_and_test_splits(args.dataset)[1], tokenizer, 256)
    questions = questions.select(range(min(args.limit, len(questions))))
    prompts, labels = questions["prompt"][:], questions["answer"][:]
    results = {}
    for batch_size in [len(prompts)] if args.backend == "vLLM" else args.batch_sizes:
        generate(model, tokenizer, prompts[:batch_size], args.max_new_tokens)
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            completions = generate(model, tokenizer, prompts, args.max_new_tokens, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
        results[f"{args.backend}, batches of {batch_size}"] = {
            "seconds": seconds,
            "tokens": sum(completion.length for completion in completions),
            "texts": [completion.text for completion in completions],
            "strict": evaluate(completions, labels)["strict"],
        }
    args.json.write_text(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="tiny/questions")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[400, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backend", choices=["vLLM", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    args.cuda = torch.cuda.is_available()
    if args.backend:
        return measure(args)

    card = torch.cuda.get_device_name() if args.cuda else "CPU"
    print(f"{args.limit} questions, greedy, at most {args.max_new_tokens} tokens; {card}, torch {torch.__version__}")
    reference = None
    for backend in ("vLLM", "transformers") if args.cuda else ("transformers",):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            options = [*sys.argv[1:], "--backend", backend, "--json", path]
            subprocess.run([sys.executable, "-m", "benchmarks.generation", *options], check=True)
            results = json.loads(path.read_text())
        for name, result in results.items():
            reference = reference or result
            seconds, median = result["seconds"], statistics.median(result["seconds"])
            same = sum(a == b for a, b in zip(result["texts"], reference["texts"], strict=True))
            print(
                f"{name:30}{median:8.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
                f"{result['tokens'] / median:10.0f} tokens/s{median / statistics.median(reference['seconds']):8.1f} ×  "
                f"{same} answers the same, strict {result['strict']:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
