"""Ask the policy, talk to it, work through a file with it, measure it.

    python infer.py "小明有3个苹果，又买了5个，一共有几个？"
    python infer.py --adapter outputs/adapter                      talk to the trained policy; Ctrl-D ends
    python infer.py --adapter outputs/adapter --compare "…"        base model and adapter side by side
    python infer.py --adapter outputs/adapter --samples 8 "…"      eight answers and what most of them say
    python infer.py --adapter outputs/adapter --input questions.jsonl --output answers.jsonl
    python infer.py --adapter outputs/adapter --eval test --limit 200 --json after.json
    python infer.py --adapter outputs/adapter --merge outputs/merged

With --adapter, the base model, the system prompt, the dataset and the lengths come from the recipe.yaml that training
wrote beside the adapter. vLLM through unsloth generates on a GPU, transformers elsewhere. train_grpo.py measures with the same
functions (support/evaluation.py), before its first step and after its last, so its figures and these are the same.
"""

from support import screen  # before what prints, as unsloth does when it is imported

if __name__ == "__main__":
    screen.start()

from train_grpo import GPU, load_base_model  # before transformers and peft, as it imports unsloth

# isort: split
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data import columns_named, control_tokens, load_questions, read_questions, to_prompt, train_and_test_splits
from support.adapters import add_adapter, check_adapter, recipe_of
from support.asking import StreamedAnswer, as_given, parse_arguments, resume_output, show, to_record
from support.engine import adapter_name
from support.errors import UserError, run_script
from support.evaluation import Completion, evaluate, evaluation_table, generate, is_majority_right, mcnemar
from support.rules import Rules, load_rules
from support.screen import doing, note, say
from support.settings import load_recipe
from support.step_report import reward_text


def main() -> None:
    args = parse_arguments(__doc__)
    # Files are read before the model is loaded, which takes a minute or more on a GPU.
    recipe, base = recipe_of(args.adapter) if args.adapter else (load_recipe(), None)
    rules = load_rules(recipe.rewards)
    if rules.file:
        note(f"note: rewards and right answers are those of {rules.file}")
    if args.expected is not None:
        try:
            args.expected = rules.check_label(args.expected)
        except ValueError as error:
            raise UserError(f"--expected is {args.expected}, {error}.") from None
    columns = columns_named(recipe.question_column, recipe.answer_column, rules.check_label, others=True)
    questions, labels = read_questions(args.input, columns) if args.input else ([], [])
    if base and args.model and args.model != base:
        note(f"note: the adapter was trained on {base}, and is used on {args.model}")
    recipe.model = args.model or recipe.model
    if args.model and not GPU:  # the recipe's are for a GPU
        recipe.load_in_4bit = recipe.use_vllm = False
    for name in ("use_vllm", "enforce_eager"):
        if getattr(args, name):
            setattr(recipe, name, getattr(args, name) == "true")
    if args.dataset == recipe.dataset and args.adapter:
        args.dataset = None  # as if it were not given
    recipe.dataset = args.dataset or recipe.dataset
    recipe.max_completion_length = args.max_new_tokens or recipe.max_completion_length
    temperature = (
        args.temperature if args.temperature is not None else (recipe.temperature if args.samples > 1 else 0.0)
    )
    settings = {
        "model": recipe.model,
        "adapter": str(args.adapter.resolve()).encode(errors="replace").decode() if args.adapter else None,
        "samples": args.samples,
        "temperature": temperature,
        "top_p": args.top_p,
        "max_new_tokens": recipe.max_completion_length,
        "seed": args.seed,
        "scored": args.rewards,
        "prompt_sha256": hashlib.sha256(recipe.system_prompt.encode()).hexdigest()[:12],
    }
    if rules.file:
        settings["rewards_sha256"] = rules.digest[:12]
    if args.adapter:
        check_adapter(args.adapter, recipe.model)
        settings["adapter_sha256"] = adapter_name(args.adapter)[0][:12]  # trained anew, it is another one
    done = resume_output(args.output, questions, settings) if args.input else 0
    questions = questions[: args.limit]
    if args.input and done >= len(questions):
        say(f"All {len(questions)} questions are answered in {args.output} already.")
        return
    if args.merge or args.gguf:
        if GPU and args.model:
            raise UserError("on a GPU the adapter is merged into the model that it names: leave out --model.")
        return export(args.adapter, recipe, args.merge or args.gguf, gguf=bool(args.gguf))

    doing("loading", recipe.model)
    model, tokenizer = load_base_model(recipe, max_num_seqs=128)
    if args.adapter and not hasattr(model, "vllm_engine"):
        model = add_adapter(model, args.adapter)
    policies = {"base": None} if args.compare or not args.adapter else {}
    if args.adapter:
        policies["adapter"] = args.adapter
    context = recipe.max_prompt_length + recipe.max_completion_length
    context = min(context, model.config.max_position_embeddings)

    forbidden = control_tokens(tokenizer)

    def check_prompt(prompt: list, name: str) -> None:
        if token := next((token for token in forbidden if token in prompt[-1]["content"]), None):
            raise UserError(f"{name} holds {token}, which the model would take for a control token: leave it out.")
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
        check_prompt(prompt, "the question")
        if args.show_prompt:
            say(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))
        answers = {}
        for name, adapter in policies.items():
            if args.compare or args.samples > 1:
                answers[name] = answer([prompt], adapter)
            else:
                streamed = StreamedAnswer()
                answers[name] = answer([prompt], adapter, on_text=streamed.write)
                streamed.write("", end=True)
        show(answers, args, prompt, rules)

    if args.eval:
        return measure(args, recipe, rules, tokenizer, policies, check_prompt, answer)
    if args.input:
        prompts = [to_prompt(question, recipe.system_prompt) for question in questions]
        for number, prompt in enumerate(prompts, start=1):
            check_prompt(prompt, f"question {number} of {args.input}")
        batch = max((512 if GPU else 64) // args.samples, 1)
        doing("answering", f"{len(prompts)} questions", total=len(prompts))
        for start in range(done, len(prompts), batch):
            completions = answer(prompts[start : start + batch], args.adapter, first=start)
            records = [
                to_record(
                    start + i,
                    prompt,
                    labels[start + i],
                    completions[i * args.samples : (i + 1) * args.samples],
                    args.rewards,
                    rules,
                )
                for i, prompt in enumerate(prompts[start : start + batch])
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
            screen.advance(start + len(records))
    elif args.question is not None:
        ask(args.question)
    elif sys.stdin is None:
        raise UserError("there is no question, and no standard input to read one from.")
    elif sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history in input()

        say("Ask in Chinese. Ctrl-D ends.")
        with contextlib.suppress(EOFError):
            while True:
                if question := screen.shown(input)("> ").strip():
                    try:
                        ask(question)
                    except UserError as error:  # too long: the talk goes on
                        note(f"error: {error}")
                    except KeyboardInterrupt:  # stops this answer only
                        say("")
        say("")
    else:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        for line in sys.stdin:
            if line.strip():
                say(line.strip().encode(errors="replace").decode())
                ask(line.strip())


def measure(args, recipe, rules: Rules, tokenizer, policies: dict, check_prompt: Callable, answer: Callable) -> None:
    """--eval: prints the figures of each policy, and writes them to --json."""
    is_file = Path(args.eval).is_file()
    dataset = args.eval if is_file else recipe.dataset
    other = is_file or args.dataset is not None  # not the recipe's: its columns may have the usual names
    columns = columns_named(recipe.question_column, recipe.answer_column, rules.check_label, others=other)
    train_split, test_split = train_and_test_splits(dataset, columns)
    if is_file:  # all of it, or, where a column marks some rows as held out, these
        split = "train" if "%" in test_split else test_split
    elif train_split == "test[:90%]" and (other or not args.adapter):  # test is all there is
        split = args.eval
    else:
        split = {"train": train_split, "test": test_split}.get(args.eval, args.eval)
    questions = load_questions(
        dataset, split, tokenizer, recipe.max_prompt_length, recipe.system_prompt, columns=columns
    )
    questions = questions.select(range(min(args.limit or len(questions), len(questions))))
    labels = questions["answer"][:]
    for number, prompt in enumerate(questions["prompt"], start=1):
        check_prompt(prompt, f"question {number}")
    doing("answering", f"{len(labels)} questions")
    results, right = {}, {}
    for name, adapter in policies.items():
        completions = answer(questions["prompt"][:], adapter)
        results[name] = evaluate(completions, labels, args.samples, rules)
        texts = [completion.text for completion in completions]
        right[name] = [
            is_majority_right(texts[i * args.samples : (i + 1) * args.samples], label, rules)
            for i, label in enumerate(labels)
        ]
        if args.rewards:
            given = {"prompts": questions["prompt"][:], "answer": labels}
            given = {key: [value for value in values for _ in range(args.samples)] for key, values in given.items()}
            given |= as_given(completions)
            results[name]["rewards"] = {f.__name__: mean_reward(f(**given)) for f in rules.funcs}
    how = f"{args.samples} samples each" if args.samples > 1 else "one answer each"
    say(f"{len(labels)} questions of {dataset if is_file else f'{dataset} ({args.eval})'}, {how}")
    whole = is_file and split == "train" and args.adapter  # a file without a column that says what is held out
    if whole and Path(recipe.dataset).is_file() and Path(recipe.dataset).samefile(args.eval):
        note("note: the adapter was trained on most of these; --eval test has those that were held out")
    say(evaluation_table(results))
    for name, result in results.items():
        if args.rewards:
            say(
                f"{name:8}"
                + "  ".join(f"{key} {reward_text(value, '.3f')}" for key, value in result["rewards"].items())
            )
    if args.compare:
        test = mcnemar(right["base"], right["adapter"])
        say(
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


def mean_reward(rewards: list) -> float | None:
    """Over the completions that a function gives a reward, as TRL's; None without any."""
    known = [reward for reward in rewards if reward is not None]
    return sum(known) / len(known) if known else None


def export(adapter: Path, recipe, out: Path, gguf: bool) -> None:
    """Writes the base model with the adapter merged into it to the folder `out`: 16-bit, or as GGUF by unsloth."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: give a new folder.")
    if gguf and not GPU:
        raise UserError(
            "GGUF is written by unsloth's converter, which needs unsloth and a CUDA GPU: "
            "use --merge DIR, then llama.cpp's convert_hf_to_gguf.py DIR."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").touch()  # that the folder takes files is known before the model is loaded
        (out / "config.json").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}.") from error
    doing("loading", f"{recipe.model}, to merge the adapter into it")
    if GPU:
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(str(adapter), load_in_4bit=recipe.load_in_4bit)
        try:
            if gguf:
                model.save_pretrained_gguf(str(out), tokenizer, quantization_method="q8_0")
            else:
                model.save_pretrained_merged(str(out), tokenizer, save_method="merged_16bit")
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(f"unsloth could not write {out}: {' '.join(str(error).split())}") from error
    else:
        model, tokenizer = load_base_model(recipe, max_num_seqs=1)
        model = add_adapter(model, adapter).merge_and_unload().to(torch.bfloat16)
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except Exception as error:  # safetensors has types of its own
            raise UserError(f"cannot write the model to {out}: {error}".split("\n")[0]) from error
    say(f"The merged model is in {out}.")


if __name__ == "__main__":
    run_script(main)
