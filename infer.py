"""Ask the policy, talk to it, work through a file with it, measure it.

    python infer.py "小明有3个苹果，又买了5个，一共有几个？"
    python infer.py --adapter outputs/adapter                      talk to the trained policy; Ctrl-D ends
    python infer.py --adapter outputs/adapter --compare "…"        base model and adapter side by side
    python infer.py --adapter outputs/adapter --samples 8 "…"      eight answers and what most of them say
    python infer.py --adapter outputs/adapter --input questions.jsonl --output answers.jsonl
    python infer.py --adapter outputs/adapter --eval test --limit 200 --json after.json
    python infer.py --adapter outputs/adapter --merge outputs/merged

With --adapter, the base model, the system prompt, the dataset and the lengths come from the recipe.yaml that training
wrote beside the adapter. vLLM through unsloth generates on a GPU, transformers elsewhere. train_grpo.py measures with
`generate` and `evaluate` below, before its first step and after its last, so its figures and these are the same.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch  # and neither transformers nor peft up here: unsloth, which train_grpo.py imports on a GPU, must come first
from tqdm import tqdm

from data import UserError, load_questions, run_script, to_prompt, train_and_test_splits
from rewards import REWARD_FUNCS, is_correct, is_strict_format, label_number, last_number
from support.adapters import add_adapter, check_adapter, export, recipe_of
from support.asking import Screen, parse_arguments, read_questions, resume_output, show, to_record
from support.figures import is_majority_right, mcnemar, pass_at_k, wilson
from support.preflight import check_chat_template

# --- generation --------------------------------------------------------------------------------------


class Completion(NamedTuple):
    text: str
    length: int  # tokens, the end-of-turn token included
    truncated: bool  # ran into max_tokens without ending


def _echo(tokenizer, on_text: Callable[[str], None]):
    """transformers' streamer, which hands the text on instead of printing it."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    return streamer


def generate(
    model,
    tokenizer,
    prompts: list,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapter: Path | None = None,
    on_text: Callable[[str], None] | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """One completion for each of `prompts` (lists of messages); temperature 0 decodes greedily.

    `adapter`: the folder of the LoRA to answer with, None for the base model. A model that unsloth loaded with vLLM
    answers all prompts in one batch and reads the LoRA from the folder. Any other model answers `batch_size` at a time; a PEFT
    model has the LoRA in it already, and switches it off for the base model. `on_text` gets the text of a single prompt
    piece by piece, as it is generated.
    """
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    if hasattr(model, "vllm_engine"):
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        sampling = [  # a seed each: equal prompts shall differ
            SamplingParams(
                temperature=temperature, top_p=top_p, seed=seed + i if temperature else None, max_tokens=max_tokens
            )
            for i in range(len(texts))
        ]
        # An id for each folder: vLLM keeps what it read under an id, and unsloth counts its own from 1.
        lora = LoRARequest("adapter", 2**30 + zlib.crc32(str(adapter).encode()) // 4, str(adapter)) if adapter else None
        if on_text:
            outputs = [_stream_vllm(model.vllm_engine.llm_engine, texts[0], sampling[0], lora, on_text)]
        else:
            outputs = model.vllm_engine.generate(texts, sampling, lora_request=lora, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [Completion(a.text, len(a.token_ids), a.finish_reason == "length") for a in answers]

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False, "temperature": None, "top_p": None}
    )
    was_training = model.training
    model.eval()
    completions = []
    base = model.disable_adapter() if hasattr(model, "peft_config") and not adapter else contextlib.nullcontext()
    with base, torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
            if temperature:  # not in training, whose random state this would reset
                torch.manual_seed(seed + start)
            # Explicit, because a checkpoint's own generation_config may ask for top-p or a repetition penalty.
            sequences = model.generate(
                **batch.to(model.device),
                **sampling,
                top_k=None,
                repetition_penalty=1.0,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                streamer=_echo(tokenizer, on_text) if on_text else None,
            )
            for ids in sequences[:, batch["input_ids"].shape[1] :].tolist():
                ended = tokenizer.eos_token_id in ids
                length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                completions.append(Completion(text, length, not ended))
    model.train(was_training)
    return completions


def _stream_vllm(engine, text: str, sampling, lora, on_text: Callable[[str], None]):
    engine.add_request("ask", text, sampling, lora_request=lora)
    shown = 0
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                on_text(output.outputs[0].text[shown:])
                shown = len(output.outputs[0].text)
    except BaseException:  # Ctrl-C: the engine is asked again
        engine.abort_request(["ask"])
        raise
    return output


# --- figures -----------------------------------------------------------------------------------------


def evaluate(completions: list[Completion], labels: list, samples: int = 1) -> dict[str, float]:
    """How good `completions` are: `samples` of them for each of the labels, one question's after another's.

    Shares from 0 to 1, with 95 % Wilson intervals in …_low and …_high over the n questions. strict: the number inside
    <answer> is right. lenient: the last number anywhere is right. format: the whole completion is the form asked for.
    truncated: it was cut off at the length limit. mean_length: tokens. With several samples a question, these are means
    over all of them (pass@1), the intervals are too wide rather than too narrow, and there are also pass@k for k = 1, 2,
    4, … and maj@k: what most of the samples say is right.
    """
    n = len(labels)
    repeated = [label for label in labels for _ in range(samples)]
    strict = [is_correct(c.text, label) for c, label in zip(completions, repeated, strict=True)]
    last = [last_number(c.text) for c in completions]
    counts = {
        "strict": sum(strict),
        "lenient": sum(x is not None and x == label_number(label) for x, label in zip(last, repeated, strict=True)),
        "format": sum(is_strict_format(c.text) for c in completions),
        "truncated": sum(c.truncated for c in completions),
    }
    result = {"n": n}
    for name, count in counts.items():
        low, high = wilson(count / samples, n)
        result |= {name: count / len(completions), f"{name}_low": low, f"{name}_high": high}
    result["mean_length"] = sum(c.length for c in completions) / len(completions)
    if samples > 1:
        groups = [slice(i * samples, (i + 1) * samples) for i in range(n)]
        ks = [k for k in (2**i for i in range(samples.bit_length())) if k < samples] + [samples]
        for k in ks:
            result[f"pass@{k}"] = sum(pass_at_k(samples, sum(strict[group]), k) for group in groups) / n
        right = sum(
            is_majority_right([c.text for c in completions[group]], label)
            for group, label in zip(groups, labels, strict=True)
        )
        low, high = wilson(right, n)
        result |= {f"maj@{samples}": right / n, f"maj@{samples}_low": low, f"maj@{samples}_high": high}
    return result


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
    for name, e in evaluations.items():
        several = [f"{key} {e[key]:.1%}" for key in e if re.fullmatch(r"(pass|maj)@\d+", key)]
        if several:
            lines.append(f"{name:8}{'  '.join(several)}")
    return "\n".join(lines)


# --- the command -------------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments(__doc__)
    # Files are read before the model is loaded, which takes a minute or more on a GPU.
    questions, labels = read_questions(args.input) if args.input else ([], [])
    questions, labels = questions[: args.limit], labels[: args.limit]
    # On a GPU this imports unsloth, which wants to be first: so not at the top, where train_grpo.py imports this file.
    from train_grpo import GPU, load_base_model, load_recipe

    recipe, base = recipe_of(args.adapter) if args.adapter else (load_recipe(), None)
    if base and args.model and args.model != base:
        print(f"note: the adapter was trained on {base}, and is used on {args.model}", file=sys.stderr)
    recipe.model = args.model or recipe.model
    if args.model and not GPU:  # the recipe's are for a GPU
        recipe.load_in_4bit = recipe.use_vllm = False
    recipe.dataset = args.dataset or recipe.dataset
    recipe.max_completion_length = args.max_new_tokens or recipe.max_completion_length
    temperature = (
        args.temperature if args.temperature is not None else (recipe.temperature if args.samples > 1 else 0.0)
    )
    settings = {
        "model": recipe.model,
        "adapter": str(args.adapter.resolve()) if args.adapter else None,
        "samples": args.samples,
        "temperature": temperature,
        "top_p": args.top_p,
        "max_new_tokens": recipe.max_completion_length,
        "seed": args.seed,
        "scored": args.rewards,
        "prompt_sha256": hashlib.sha256(recipe.system_prompt.encode()).hexdigest()[:12],
    }
    if args.adapter:
        check_adapter(args.adapter, recipe.model)
        weights = (args.adapter / "adapter_model.safetensors").read_bytes()  # trained anew, it is another one
        settings["adapter_sha256"] = hashlib.sha256(weights).hexdigest()[:12]
    done = resume_output(args.output, questions, settings) if args.input else 0
    if args.input and done == len(questions):
        print(f"All {done} questions are answered in {args.output} already.")
        return
    if args.merge or args.gguf:
        if GPU and args.model:
            raise UserError("on a GPU the adapter is merged into the model that it names: leave out --model.")
        return export(args.adapter, recipe, args.merge or args.gguf, gguf=bool(args.gguf))

    model, tokenizer = load_base_model(recipe, max_num_seqs=128)
    check_chat_template(tokenizer, recipe.model)
    if args.adapter and not hasattr(model, "vllm_engine"):
        model = add_adapter(model, args.adapter)
    policies = {"base": None} if args.compare or not args.adapter else {}
    if args.adapter:
        policies["adapter"] = args.adapter
    context = recipe.max_prompt_length + recipe.max_completion_length
    context = min(context, model.config.max_position_embeddings)

    def check_length(prompt: list, name: str) -> None:
        length = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        if length + recipe.max_completion_length > context:
            raise UserError(
                f"the prompt of {name} has {length} tokens, and {context} hold the prompt and {recipe.max_completion_length} "
                "new tokens: shorten it, or give fewer --max_new_tokens."
            )

    def answer(prompts: list, adapter, first: int = 0, on_text=None) -> list[Completion]:
        repeated = [prompt for prompt in prompts for _ in range(args.samples)]
        seed = args.seed + first * args.samples
        length = recipe.max_completion_length
        return generate(model, tokenizer, repeated, length, temperature, args.top_p, seed, adapter, on_text)

    def ask(question: str) -> None:
        try:
            question.encode()
        except UnicodeEncodeError as error:  # bytes that are not UTF-8 arrive as lone surrogates
            raise UserError("the question is not in UTF-8: set the terminal to it, or convert the file.") from error
        prompt = to_prompt(question, recipe.system_prompt)
        check_length(prompt, "the question")
        if args.show_prompt:
            print(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        answers = {}
        for name, adapter in policies.items():
            if args.compare or args.samples > 1:
                answers[name] = answer([prompt], adapter)
            else:
                screen = Screen()
                answers[name] = answer([prompt], adapter, on_text=screen.write)
                screen.write("", end=True)
        show(answers, args)

    if args.eval:
        return measure(args, recipe, tokenizer, policies, answer)
    if args.input:
        prompts = [to_prompt(question, recipe.system_prompt) for question in questions]
        for number, prompt in enumerate(prompts, start=1):
            check_length(prompt, f"question {number} of {args.input}")
        batch = max((512 if GPU else 64) // args.samples, 1)
        with tqdm(total=len(prompts), initial=done, unit="") as bar:
            for start in range(done, len(prompts), batch):
                completions = answer(prompts[start : start + batch], args.adapter, first=start)
                records = [
                    to_record(
                        start + i,
                        question,
                        labels[start + i],
                        completions[i * args.samples : (i + 1) * args.samples],
                        args.rewards,
                    )
                    for i, question in enumerate(questions[start : start + batch])
                ]
                try:
                    with args.output.open("a", encoding="utf-8") as file:
                        for record in records:
                            file.write(json.dumps(record | settings, ensure_ascii=False) + "\n")
                        file.flush()
                        os.fsync(file.fileno())
                except OSError as error:
                    raise UserError(
                        f"cannot write to {args.output}: {error.strerror}. What it holds stays; the same command goes on from there."
                    ) from error
                bar.update(len(records))
    elif args.question is not None:
        ask(args.question)
    elif sys.stdin is None:
        raise UserError("there is no question, and no standard input to read one from.")
    elif sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history in input()

        print("Ask in Chinese. Ctrl-D ends.")
        with contextlib.suppress(EOFError):
            while True:
                if question := input("> ").strip():
                    try:
                        ask(question)
                    except UserError as error:  # too long: the talk goes on
                        print(f"error: {error}", file=sys.stderr)
                    except KeyboardInterrupt:  # stops this answer only
                        print()
        print()
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        for line in sys.stdin:
            if line.strip():
                print(line.strip().encode(errors="replace").decode())
                ask(line.strip())


def measure(args, recipe, tokenizer, policies: dict, answer: Callable) -> None:
    """--eval: prints the figures of each policy, and writes them to --json."""
    if Path(args.eval).is_file():
        dataset, split = args.eval, "train"
    else:
        dataset = recipe.dataset
        train_split, test_split = train_and_test_splits(dataset)
        split = {"train": train_split, "test": test_split}.get(args.eval, args.eval)
    questions = load_questions(dataset, split, tokenizer, recipe.max_prompt_length, recipe.system_prompt)
    questions = questions.select(range(min(args.limit or len(questions), len(questions))))
    labels = questions["answer"][:]
    results, right = {}, {}
    for name, adapter in policies.items():
        completions = answer(questions["prompt"][:], adapter)
        results[name] = evaluate(completions, labels, args.samples)
        texts = [completion.text for completion in completions]
        right[name] = [
            is_majority_right(texts[i * args.samples : (i + 1) * args.samples], label) for i, label in enumerate(labels)
        ]
        if args.rewards:
            repeated = [label for label in labels for _ in range(args.samples)]
            results[name]["rewards"] = {
                f.__name__: sum(f(completions=texts, answer=repeated)) / len(texts) for f in REWARD_FUNCS
            }
    how = f"{args.samples} samples each" if args.samples > 1 else "one answer each"
    print(f"{len(labels)} questions of {dataset} ({args.eval}), {how}")
    print(evaluation_table(results))
    for name, result in results.items():
        if args.rewards:
            print(f"{name:8}" + "  ".join(f"{key} {value:.3f}" for key, value in result["rewards"].items()))
    if args.compare:
        test = mcnemar(right["base"], right["adapter"])
        print(
            f"only the adapter is right: {test['gained']} questions, only the base: {test['lost']}; "
            f"McNemar's exact test p = {test['p']:.2g}"
        )
        results |= {"mcnemar": test}
    if args.json:
        figures = results if args.compare else next(iter(results.values()))
        try:
            args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {args.json}: {error.strerror}.") from error


if __name__ == "__main__":
    run_script(main)
