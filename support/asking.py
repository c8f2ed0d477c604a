"""What infer.py does around the answers: its command line, showing and writing answers, continuing a file of them."""

import argparse
import contextlib
import difflib
import inspect
import json
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from support import screen
from support.errors import UserError, fail
from support.evaluation import Completion, is_majority_right, majority
from support.resuming import checkpoints
from support.rules import Rules
from support.screen import say
from support.tables import FILE_TYPES


def parse_arguments(description: str) -> argparse.Namespace:
    """infer.py's command line. Raises UserError for what does not go together or cannot be."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    parser.print_help = screen.shown(parser.print_help)
    add = parser.add_argument
    add("question", nargs="?", help="the question; without one, questions are read from the terminal or a pipe")
    add("--adapter", type=Path, metavar="DIR", help="a LoRA that train_grpo.py saved; default: none")
    add("--model", help="the base model; default: the adapter's, else train_grpo.py's")
    add("--compare", action="store_true", help="the base model beside the adapter, same prompt, same seed")
    add("--samples", type=int, default=1, metavar="N", help="answers to each question, their tally and the majority")
    add("--temperature", type=float, help="default: 0, greedy; with --samples, the one of the training")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this total probability")
    add("--max_new_tokens", type=int, metavar="N", help="default: the adapter's, else train_grpo.py's")
    add("--seed", type=int, default=0, help="of sampling; default: %(default)s")
    add("--show-prompt", action="store_true", help="print the exact prompt first")
    add("--rewards", action="store_true", help="the rewards of every answer")
    add("--expected", metavar="LABEL", help="the right answer to the question, for --rewards")
    add("--input", metavar="FILE", help="questions: JSONL, JSON, CSV, Parquet, or text with one a line")
    add("--output", type=Path, metavar="FILE.jsonl", help="where their answers go; a second run continues a killed one")
    add("--eval", metavar="SPLIT_OR_FILE", help="measure on this split of the dataset (test), or on a file")
    add("--dataset", help="hub id, folder or file of --eval; default: the adapter's, else train_grpo.py's")
    add("--limit", type=int, metavar="N", help="the first N questions of --eval or --input only")
    add("--json", type=Path, metavar="FILE", help="write the figures of --eval to FILE")
    add("--merge", type=Path, metavar="DIR", help="write the base model with the adapter merged into it, 16-bit")
    add("--gguf", type=Path, metavar="DIR", help="write the same as GGUF, with unsloth's converter")
    add("--use_vllm", choices=["true", "false"], help="default: the adapter's, else train_grpo.py's")
    add("--enforce_eager", choices=["true", "false"], help="vLLM without CUDA graphs; the same default")
    add("--verbose", action="store_true", help="show what the libraries say")
    args, unknown = parser.parse_known_args()
    if flag := next((part for part in unknown if part.startswith("-")), None):
        nearest = difflib.get_close_matches(flag.split("=")[0], parser._option_string_actions, n=1, cutoff=0.0)[0]
        minus = "" if flag.startswith("--") else " A question that begins with a minus goes after --."
        raise UserError(f"unknown argument {flag}; the nearest is {nearest}. --help lists them all.{minus}")
    if unknown:
        raise UserError(
            f"{args.question} and {unknown[0]} cannot both be the question: put a question of several words into quotes"
            + (", and give no file with --rewards: they are those of the training." if args.rewards else ".")
        )

    jobs = [name for name in ("question", "input", "eval", "merge", "gguf") if getattr(args, name) is not None]
    if len(jobs) > 1:
        raise UserError(f"{' and '.join(jobs)} cannot go together: give one of them.")
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty.")
    for name in ("input", "eval"):
        if getattr(args, name) == "":
            raise UserError(f"--{name} is empty: give it a value.")
    for name, least in {"limit": 1, "max_new_tokens": 1, "samples": 1}.items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            raise UserError(f"--{name} {getattr(args, name)} is too small: give {least} or more.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} must lie from 0 to {2**32 - 1}.")
    if args.temperature is not None and not (args.temperature == 0 or 0.01 <= args.temperature <= 10):
        raise UserError(f"--temperature {args.temperature} must be 0, which is greedy, or lie from 0.01 to 10.")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p {args.top_p} must lie above 0 and not above 1.")
    if args.samples > 1 and args.temperature == 0:
        raise UserError("--temperature 0 gives the same answer every time: leave it out, or --samples.")
    if bool(args.input) != bool(args.output):
        raise UserError("--input FILE and --output FILE.jsonl go together: give both.")
    if (args.compare or args.merge or args.gguf) and not args.adapter:
        raise UserError("--compare, --merge and --gguf need an --adapter.")
    if args.json and args.json.is_file() and not holds_figures(args.json):
        raise UserError(
            f"--json {args.json} holds something else than figures, which would be lost: give another file."
        )
    if args.json and not args.eval:
        raise UserError("--json takes the figures of --eval: give both.")
    if args.eval and Path(args.eval).suffix.lower() in FILE_TYPES and not Path(args.eval).is_file():
        raise UserError(f"there is no file {args.eval}.")
    if args.model and (Path(args.model) / "adapter_config.json").is_file():
        raise UserError(f"--model {args.model} is an adapter: give it as --adapter {args.model}.")
    if args.compare and args.input:
        raise UserError("--compare works with a question or --eval: run --input twice, with and without --adapter.")
    for path in (args.json, args.output):
        if path and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} into.")
        if path and (
            path.exists() and not path.is_file() or not os.access(path if path.exists() else path.parent, os.W_OK)
        ):
            raise UserError(f"cannot write to {path}: give a file in a folder that you may write to.")
    if args.adapter and not (args.adapter / "adapter_config.json").is_file():
        inside = [args.adapter / "adapter", *checkpoints(args.adapter)]  # where it is a run's folder
        folders = [path for path in inside if (path / "adapter_config.json").is_file()][:1]
        folders = folders or [path.parent for path in sorted(Path("outputs").glob("**/adapter/adapter_config.json"))]
        found = " or ".join(map(str, folders))
        give = f"give {found}" if found else "give the folder that holds adapter_config.json"
        raise UserError(f"there is no adapter in {args.adapter}: {give}.")
    return args


def holds_figures(file: Path) -> bool:
    """Whether `file` is empty, or an earlier --json."""
    with contextlib.suppress(OSError, ValueError):
        text = file.read_text(encoding="utf-8")
        return not text or bool({"strict", "mcnemar"} & set(json.loads(text)))
    return False


class StreamedAnswer:
    """Prints a completion while it arrives, with a heading in the place of each opening tag."""

    def __init__(self):
        self.waiting, self.fresh = "", True  # fresh: nothing stands on this line yet

    def write(self, text: str, end: bool = False) -> None:
        self.waiting += text
        # white space, and what may become a tag, wait for what follows
        cut = len(self.waiting) if end else re.search(r"\s*(<[/a-z]*)?$", self.waiting).start()
        ready, self.waiting = self.waiting[:cut], self.waiting[cut:]
        for part in re.split(r"\s*(</?(?:reasoning|answer)>)\s*", ready):
            if re.fullmatch(r"</?(reasoning|answer)>", part):
                heading = "" if part.startswith("</") else f"— {part.strip('<>')}\n"
                say(("" if self.fresh else "\n") + heading, end="")
                self.fresh = True
            elif part := part.lstrip() if self.fresh else part:
                say(part, end="")
                self.fresh = False
        if end and not self.fresh:
            say("")


def resume_output(output: Path, questions: list[str], settings: dict) -> int:
    """How many questions of an earlier, perhaps killed, run stand in `output`; a half-written last line is cut off."""
    if not output.exists():
        return 0
    try:
        content = output.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {output}: {error.strerror}. Give another --output.") from error
    whole, rest = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        last = []  # a line that only lacks its end is answered anew, but it must be one of ours
        with contextlib.suppress(ValueError):
            last = [json.loads(rest)]
        if not rest.startswith(b'{"index": '[: len(rest)]):
            raise ValueError
        if not all(r["question"] == questions[r["index"]] and r["index"] == i for i, r in enumerate(records + last)):
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{output} holds something else than answers to these {len(questions)} questions: give another --output."
        ) from error
    other = [name for name, value in settings.items() if records and records[0].get(name) != value]
    if other:
        raise UserError(
            f"{output} was begun with another {', '.join(other)} ({records[0].get(other[0])}): give another --output."
        )
    if len(whole) < len(content):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return len(records)


def rewards_of(prompt: list, completion: Completion, label, rules: Rules) -> dict[str, float | None]:
    """The rewards of one completion, by function name; None for those that take `answer`, where no answer is known."""
    given = {"prompts": [prompt], "answer": [label], **as_given([completion])}
    needs_label = {func for func in rules.funcs if "answer" in inspect.signature(func).parameters}
    return {func.__name__: None if label is None and func in needs_label else func(**given)[0] for func in rules.funcs}


def as_given(completions: list[Completion]) -> dict[str, list]:
    """Completions as TRL hands them to a reward function: messages, and tokens."""
    return {
        "completions": [[{"role": "assistant", "content": completion.text}] for completion in completions],
        "completion_ids": [completion.ids for completion in completions],
    }


def to_record(index: int, prompt: list, label, completions: list, with_rewards: bool, rules: Rules) -> dict:
    """What the answers to one question, the last message of `prompt`, are written as, in --output."""
    texts = [c.text for c in completions]
    record = {"index": index, "question": prompt[-1]["content"], "answer": majority(texts, rules)}
    if label is not None:
        record |= {"expected": label, "correct": is_majority_right(texts, label, rules)}
    record["completions"] = texts
    if with_rewards:
        record["rewards"] = [rewards_of(prompt, completion, label, rules) for completion in completions]
    return record


def show(answers: dict[str, list], args: argparse.Namespace, prompt: list, rules: Rules) -> None:
    """Prints the completions of each policy to `prompt`, but for a single one, which has been shown as it arrived."""
    if args.compare:
        table = Table(*(Column(name, overflow="fold") for name in answers), show_lines=True)  # Chinese has no blanks
        for row in zip(*answers.values(), strict=True):
            table.add_row(*(completion.text for completion in row))
        Console(file=screen.output(), markup=False, highlight=False, emoji=False).print(table)
    elif args.samples > 1:
        for number, completion in enumerate(*answers.values(), start=1):
            say(f"[{number}]")
            StreamedAnswer().write(completion.text, end=True)
    for name, completions in answers.items():
        texts = [completion.text for completion in completions]
        if args.rewards:
            for number, completion in enumerate(completions, start=1):
                rewards = rewards_of(prompt, completion, args.expected, rules).items()
                parts = ", ".join(
                    f"{key.removesuffix('_reward_func')} {'unknown' if value is None else value}"
                    for key, value in rewards
                )
                say(f"{name} {number}: {parts}")
        if args.samples > 1:
            votes = Counter(rules.vote(majority([text], rules) or "no answer") for text in texts)
            tally = [(f"{vote:f}" if isinstance(vote, Decimal) else vote, count) for vote, count in votes.most_common()]
            say(f"{name}: {', '.join(f'{text} × {count}' for text, count in tally)}; majority {majority(texts, rules)}")
    say("")
