"""How fast infer.py answers held-out questions: vLLM through unsloth against transformers' batched generate.

    python -m benchmarks.generation --model MODEL --dataset DATASET --limit 400

Both answer the same prompts greedily, in one process, on one card, in the same dtype, after a warm-up of 8 prompts: vLLM all
of them in one call, transformers in batches of each given size. Prints seconds, tokens per second and the ratio, median
and range of the repeats, and how many of the answers are the same.
"""

import argparse
import statistics
import time

import torch

from train_grpo import GPU, compute_dtype, load_base_model, load_recipe  # first: it imports unsloth

from data import load_questions, train_and_test_splits  # isort: skip
from infer import evaluate, generate  # isort: skip
from transformers import AutoModelForCausalLM  # isort: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dataset", default="tiny/questions")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 400])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    recipe = load_recipe()
    recipe.model, recipe.load_in_4bit, recipe.use_vllm = args.model, False, GPU
    recipe.max_completion_length, recipe.gpu_memory_utilization = args.max_new_tokens, 0.4
    model, tokenizer = load_base_model(recipe, max_num_seqs=256)
    questions = load_questions(
        args.dataset, train_and_test_splits(args.dataset)[1], tokenizer, recipe.max_prompt_length
    )
    questions = questions.select(range(min(args.limit, len(questions))))
    prompts, labels = questions["prompt"][:], questions["answer"][:]

    def measure(policy, batch_size: int):
        generate(policy, tokenizer, prompts[:8], args.max_new_tokens)
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            completions = generate(policy, tokenizer, prompts, args.max_new_tokens, batch_size=batch_size)
            seconds.append(time.perf_counter() - start)
        return seconds, completions

    results = {}
    if GPU:
        results["vLLM, all at once"] = measure(model, len(prompts))
        dtype = compute_dtype(recipe)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to("cuda")
    for batch_size in args.batch_sizes:
        results[f"transformers, {batch_size}"] = measure(model, batch_size)

    print(f"{len(prompts)} questions, greedy, at most {args.max_new_tokens} tokens, torch {torch.__version__}")
    reference = next(iter(results.values()))
    for name, (seconds, completions) in results.items():
        tokens = sum(completion.length for completion in completions)
        median = statistics.median(seconds)
        same = sum(a.text == b.text for a, b in zip(completions, reference[1], strict=True))
        print(
            f"{name:24}{median:8.2f} s ({min(seconds):.2f} to {max(seconds):.2f}){tokens / median:10.0f} tokens/s"
            f"{median / statistics.median(reference[0]):8.1f} ×  {same} answers the same, strict {evaluate(completions, labels)['strict']:.1%}"
        )


if __name__ == "__main__":
    main()
