"""Ask the policy a question, or measure it on held-out ones.

    python infer.py "小明有3个苹果，又买了5个，一共有几个？"
    python infer.py --adapter outputs/adapter "…"                  the policy that train_grpo.py trained
    python infer.py --adapter outputs/adapter --eval test          how many held-out questions it gets right
    python infer.py --adapter outputs/adapter --eval test --limit 50 --json after.json

With --adapter, the base model, the dataset and the lengths come from the recipe.yaml that training wrote beside the
adapter. vLLM through unsloth generates on a GPU, transformers elsewhere. train_grpo.py measures with `generate` and
`evaluate` below, before its first step and after its last, so that its figures and these are the same figures.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import binomtest

from data import UserError, fail, load_questions, run_script, to_prompt, train_and_test_splits
from rewards import is_correct, is_strict_format, label_number, last_number


class Completion(NamedTuple):
    text: str
    length: int  # tokens, the end-of-turn token included
    truncated: bool  # ran into max_tokens without ending


def generate(
    model, tokenizer, prompts: list, max_tokens: int, temperature: float = 0.0, adapter=None
) -> list[Completion]:
    """One completion for each of `prompts` (lists of messages); temperature 0 decodes greedily.

    A model that unsloth loaded with vLLM answers all prompts in one batch, through the LoRA in the folder `adapter`.
    Any other model answers 64 at a time with its own weights (for a PEFT model, the adapter in it).
    """
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    if hasattr(model, "vllm_engine"):
        from vllm import SamplingParams

        outputs = model.fast_generate(
            texts,
            SamplingParams(temperature=temperature, max_tokens=max_tokens),
            lora_request=model.load_lora(str(adapter)) if adapter else None,
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return [Completion(a.text, len(a.token_ids), a.finish_reason == "length") for a in answers]

    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None}
    )
    was_training = model.training
    model.eval()
    completions = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            # Explicit, because a checkpoint's own generation_config may ask for top-p or a repetition penalty.
            sequences = model.generate(
                **batch.to(model.device),
                **sampling,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        for ids in sequences[:, batch["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in ids
            length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
            completions.append(Completion(tokenizer.decode(ids[:length], skip_special_tokens=True), length, not ended))
    model.train(was_training)
    return completions


def evaluate(completions: list[Completion], labels: list) -> dict[str, float]:
    """How good `completions` are, as shares from 0 to 1 of their number `n`.

    strict: the number inside <answer> is right, with its 95 % Wilson score interval (Wilson 1927) in strict_low and
    strict_high. lenient: the last number anywhere is right. format: the whole completion is the form asked for.
    truncated: it was cut off at the length limit. mean_length: tokens.
    """
    n = len(completions)
    strict = sum(is_correct(c.text, label) for c, label in zip(completions, labels, strict=True))
    found = [(last_number(c.text), label_number(label)) for c, label in zip(completions, labels, strict=True)]
    lenient = sum(last is not None and last == label for last, label in found)
    interval = binomtest(strict, n).proportion_ci(0.95, method="wilson")
    return {
        "n": n,
        "strict": strict / n,
        "strict_low": float(interval.low),
        "strict_high": float(interval.high),
        "lenient": lenient / n,
        "format": sum(is_strict_format(c.text) for c in completions) / n,
        "truncated": sum(c.truncated for c in completions) / n,
        "mean_length": sum(c.length for c in completions) / n,
    }


def evaluation_table(evaluations: dict[str, dict]) -> str:
    """Evaluations by name, as the lines that the scripts print."""
    lines = [
        f"{'':8}{'strict':>7}  {'95 % interval':16}{'lenient':>8}{'format':>8}{'truncated':>11}{'mean tokens':>13}"
    ]
    for name, e in evaluations.items():
        interval = f"{e['strict_low']:.1%} to {e['strict_high']:.1%}"
        lines.append(
            f"{name:8}{e['strict']:7.1%}  {interval:16}{e['lenient']:8.1%}{e['format']:8.1%}"
            f"{e['truncated']:11.1%}{e['mean_length']:13.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("question", nargs="?", help="the question to answer")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA that train_grpo.py saved; default: none")
    parser.add_argument("--model", help="the base model; default: the adapter's, else train_grpo.py's")
    parser.add_argument(
        "--dataset", help="hub id, folder or file of --eval; default: the adapter's, else train_grpo.py's"
    )
    parser.add_argument("--eval", metavar="SPLIT", help="measure on this split, for example test, decoding greedily")
    parser.add_argument("--limit", type=int, metavar="N", help="measure on the first N questions only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of --eval to FILE")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="default: the adapter's, else train_grpo.py's")
    parser.add_argument("--temperature", type=float, default=0.0, help="for a question; default: %(default)s, greedy")
    args = parser.parse_args()
    if (args.question is None) == (args.eval is None):
        raise UserError(
            'give either a question, python infer.py "…", or --eval with a split, python infer.py --eval test.'
        )
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty.")
    for name, least in {"limit": 1, "max_new_tokens": 1, "temperature": 0}.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            raise UserError(f"--{name} {getattr(args, name)} is too small: give {least} or more.")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"there is no folder {args.json.parent} to write {args.json.name} into.")
    if args.adapter and not (args.adapter / "adapter_config.json").is_file():
        raise UserError(f"there is no adapter in {args.adapter}: give the folder that holds adapter_config.json.")

    # On a GPU this imports unsloth, which wants to be first: so not at the top, where train_grpo.py imports this file.
    from train_grpo import load_base_model, load_recipe

    recipe = load_recipe(args.adapter.parent / "recipe.yaml") if args.adapter else load_recipe()
    recipe.model = args.model or recipe.model
    recipe.dataset = args.dataset or recipe.dataset
    recipe.max_completion_length = args.max_new_tokens or recipe.max_completion_length
    model, tokenizer = load_base_model(recipe)
    if args.adapter and not hasattr(model, "vllm_engine"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)

    def answer(prompts: list, temperature: float) -> list[Completion]:
        return generate(model, tokenizer, prompts, recipe.max_completion_length, temperature, args.adapter)

    if args.question is not None:
        (completion,) = answer([to_prompt(args.question)], args.temperature)
        print(completion.text)
        return

    train_split, test_split = train_and_test_splits(recipe.dataset)
    split = {"train": train_split, "test": test_split}.get(args.eval, args.eval)
    questions = load_questions(recipe.dataset, split, tokenizer, recipe.max_prompt_length)
    if args.limit:
        questions = questions.select(range(min(args.limit, len(questions))))
    result = evaluate(answer(questions["prompt"][:], 0.0), questions["answer"][:])
    print(f"{result['n']} questions of {recipe.dataset} ({args.eval}), greedy")
    print(evaluation_table({"adapter" if args.adapter else "base": result}))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
