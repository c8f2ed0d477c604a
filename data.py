"""gsm8k_chinese, or any set with its two columns, as prompts for GRPO.

`load_questions` takes a hub id (`id:configuration` where it has several), a local folder (train.jsonl, test.jsonl, …) or one
JSONL, JSON, CSV, TSV or Parquet file, and gives a `datasets.Dataset` with the columns `prompt` (system and user message) and
`answer` (str). `read_questions` takes a file of questions that need no answers, for infer.py. support/tables.py reads files.
"""

import functools
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, ReadInstruction, disable_progress_bars, load_dataset
from datasets.utils.logging import CRITICAL, set_verbosity

from rewards import label_number
from support.errors import UserError
from support.places import check_cache, check_hub_name, find_local, kind_of, split_files
from support.screen import say, say_once
from support.tables import FILE_TYPES, SPLIT_WORDS, Table, arrow_table, join, plain, read_table, shown

disable_progress_bars()  # a few thousand rows take a second
set_verbosity(CRITICAL)  # what cannot be read is said once, by this file

HUB_ID = "swulling/gsm8k_chinese"  # 7,473 train and 1,319 test questions, MIT licence
REVISION = "main"  # of HUB_ID, a branch; put a commit here to pin the questions for good

# Accepted names, the first that can serve. Chinese ones come before `question`, which is English in the hub set and in
# GSM8K_zh; bare numbers before `answer`, a worked solution in both, in MGSM and in GSM8K, which ends in `#### 72`.
QUESTION_COLUMNS = ["question_zh-cn", "question_zh", "question_cn", "question_chinese", "zh_question"]
QUESTION_COLUMNS += ["chinese_question", "问题", "题目", "question", "problem", "text"]  # text: a line of a .txt file
ANSWER_COLUMNS = ["answer_only", "answer_number", "final_answer", "答案", "answer", "ans", "label"]
ANSWER_COLUMNS += ["answer_zh-cn", "answer_zh"]
QUESTION_COLUMN, ANSWER_COLUMN = QUESTION_COLUMNS[0], ANSWER_COLUMNS[0]
NOT_UTF8 = "[\ud800-\udfff]"  # what stands for bytes that are no text, see tables.decode


# The form that rewards.py scores, newline by newline.
SYSTEM_PROMPT = """请按照如下格式回答：
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""


def to_prompt(question: str, system_prompt: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """The messages that the policy sees for `question`: the same in training, in evaluation and in infer.py."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]


def control_tokens(tokenizer) -> list[str]:
    """The tokens with which a conversation is written, and the tokenizer's other special ones.

    A tokenizer takes `<|im_end|>` for the end of a message wherever it stands: in a question it would end the question, and
    what follows would be a turn that nobody took. It cannot be escaped in a chat template, so such a question is refused.
    """
    frame = tokenizer.apply_chat_template(to_prompt("1"), add_generation_prompt=True, tokenize=False)
    added = tokenizer.added_tokens_decoder.values()
    return [t.content for t in added if (t.special or t.content in frame) and len(t.content.strip()) > 1]


def read_label(value) -> Decimal | None:
    """A label as a number, None if it is not one: what label_number reads, what follows `####`, and `1e3`.

    Also None where bytes are no text, as what they said may have been `万`, and from 10**300 on, which is no answer.
    """
    if isinstance(value, str):
        value = value.rpartition("####")[2]
        if re.fullmatch(r"\s*[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+\s*", value):  # as spreadsheets write large numbers
            value = float(value)
        elif re.search(NOT_UTF8, value):
            return None
    number = label_number(value)
    return number if number is not None and number.adjusted() < 300 else None


def number_label(value) -> str:
    """A label as it is kept: a number, in digits. Raises ValueError, with what is wrong, where it is none."""
    number = read_label(value)
    if number is None:
        raise ValueError("which is not one number")
    return f"{number:f}"


def kept_labels(labels: list, check_label: Callable[[object], str]) -> tuple[list[str | None], str]:
    """`labels` as `check_label` keeps them, None for those that it refuses, and why it refused the first."""
    kept, reason = [], ""
    for label in labels:
        try:
            kept.append(check_label(label))
        except ValueError as error:
            kept.append(None)
            reason = reason or str(error)
    return kept, reason


class Columns(NamedTuple):
    """The names that the column of questions and that of labels may have, the first that can serve.

    `check_label` makes a label, as it is kept, of what is in its column; ValueError, with what is wrong, where it is none.
    """

    questions: list[str] = QUESTION_COLUMNS
    labels: list[str] = ANSWER_COLUMNS
    check_label: Callable[[object], str] = number_label

    @property
    def known(self) -> set[str]:
        return set(map(plain, self.questions))

    def is_label(self, value) -> bool:
        return kept_labels([value], self.check_label)[0] != [None]


USUAL = Columns()


def columns_named(question: str, answer: str, check_label: Callable = number_label, others: bool = False) -> Columns:
    """The columns of these names only, or, with `others`, rather than of the usual ones; an empty name: the usual ones."""
    names = ((question, QUESTION_COLUMNS), (answer, ANSWER_COLUMNS))
    found = ([name, *(usual if others else [])] if name else usual for name, usual in names)
    return Columns(*found, check_label)


# --- questions ---------------------------------------------------------------------------------------


def load_questions(
    dataset: str,
    split: str,
    tokenizer,
    max_prompt_length: int,
    system_prompt: str = SYSTEM_PROMPT,
    columns: Columns = USUAL,
) -> Dataset:
    """The questions of `split` as a Dataset with `prompt` (list of messages) and `answer` (str).

    `dataset` is a hub id, a folder or a file; `split` is a split's name or a slice of one (`train[:90%]`).
    Questions whose prompt has more than `max_prompt_length` tokens are dropped, and their number is printed: newer
    TRL does not cut prompts, and vLLM refuses them. Raises UserError with one sentence where a question cannot be used.
    """
    table, question_column, answer_column = load_rows(dataset, split, columns)
    say_columns(table, [question_column, answer_column], dataset)
    check_questions(table, question_column)
    questions, labels = table.columns[question_column], table.columns[answer_column]
    answers, reason = kept_labels(labels, columns.check_label)
    bad = {row: labels[row] for row, answer in enumerate(answers) if answer is None}
    if bad:
        own = ", or give --rewards FILE.py, whose labels need not be numbers" if "number" in reason else ""
        raise UserError(f"{table.describe(bad, answer_column, reason)}: correct or remove such rows{own}.")
    tokens = control_tokens(tokenizer)
    bad = {row: token for row, question in enumerate(questions) for token in tokens if token in question}
    if bad:
        fault = "which the model would take for a control token"
        raise UserError(f"{table.describe(bad, question_column, fault)}: remove it from the question.")
    prompts = [to_prompt(question, system_prompt) for question in questions]
    lengths = list(map(len, tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)))
    fitting = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    if not fitting:
        raise UserError(
            f"every question of {dataset} ({split}) has more than {max_prompt_length} tokens, the recipe's max_prompt_length: raise it "
            f"to {max(lengths)}, which the longest has with the system prompt."
        )
    if len(fitting) < len(prompts):
        say(
            f"{split}: dropped {len(prompts) - len(fitting)} of {len(prompts)} questions, longer than {max_prompt_length} tokens"
        )
    return Dataset.from_dict({"prompt": [prompts[row] for row in fitting], "answer": [answers[row] for row in fitting]})


def without_repeats(train: Dataset, test: Dataset) -> Dataset:
    """`train` with each question once, and without those of `test`, which would be held out no longer."""
    rows, seen = [], {prompt[-1]["content"] for prompt in test["prompt"]}
    for row, prompt in enumerate(train["prompt"]):
        if prompt[-1]["content"] not in seen:
            rows.append(row)
            seen.add(prompt[-1]["content"])
    if not rows:
        raise UserError("every question to train on is held out, too: give other questions.")
    if repeated := len(train) - len(rows):
        say(
            f"repeated    {repeated} of {len(train)} questions to train on are left out: they stand there twice, or are held out"
        )
    return train.select(rows)


def read_questions(file: str, columns: Columns = USUAL) -> tuple[list[str], list]:
    """The questions of a file and their answers, None where there is none.

    A label that `columns.check_label` refuses counts as none. Answers are numbers with number_label, and else text.
    """
    if (kind := kind_of(file)) != "file":
        raise UserError(f"{file} is {kind}, and no file." if kind else f"there is no file {shown(file, 200)}.")
    table = read_table(Path(file), columns.known)
    if not len(table):
        raise UserError(f"{file} has no questions.")
    question_column = find_column(table, columns.questions, file, is_question)
    check_questions(table, question_column, word="question")
    questions, answers = table.columns[question_column], [None] * len(table)
    used = [question_column]
    if any(plain(name) in table.columns for name in columns.labels):
        answer_column = find_column(table, columns.labels, file, columns.is_label)
        used.append(answer_column)
        labels = table.columns[answer_column]
        answers, reason = kept_labels(labels, columns.check_label)
        bad = {row: labels[row] for row, answer in enumerate(answers) if answer is None and labels[row] is not None}
        if bad:  # asking needs no labels
            say(f"labels      {table.describe(bad, answer_column, reason)}: taken as unknown")
    say_columns(table, used, file)
    if columns.check_label is number_label:
        numbers = [None if answer is None else Decimal(answer) for answer in answers]
        answers = [n if n is None else int(n) if n == n.to_integral_value() else exact(n) for n in numbers]
    return questions, answers


def exact(number: Decimal) -> float | str:
    """`number` as JSON can hold it without rounding: a float, or else its digits."""
    return float(number) if Decimal(str(float(number))) == number else str(number)


def is_question(value) -> bool:
    return isinstance(value, str) and any(map(str.isalnum, value))


def check_questions(table: Table, column: str, word: str = "row") -> None:
    """Raises UserError where there is no question, or one with bytes that are no text (surrogates, see tables.decode)."""
    questions = table.columns[column]
    bad = {row: question for row, question in enumerate(questions) if not is_question(question)}
    if bad:
        raise UserError(
            f"{table.describe(bad, column, 'which is empty or not text, so no question', word)}: correct or remove such rows."
        )
    bad = {row: question for row, question in enumerate(questions) if re.search(NOT_UTF8, question)}
    if bad:
        raise UserError(
            f"{table.describe(bad, column, 'which is not in UTF-8', word)}: save the file in UTF-8 and correct it."
        )


# --- columns -----------------------------------------------------------------------------------------


def find_column(table: Table, names: list[str], dataset: str, can_serve: Callable[[object], bool]) -> str:
    """The first of `names` whose values can serve in half of the rows, else the one with most that can. Raises UserError where none is a column."""
    there = [plain(name) for name in names if plain(name) in table.columns]
    if not there:
        has = ", ".join(shown(name, 30) for name in list(table.names.values())[:12]) or "none"
        flag = "--question_column" if names[-1] in QUESTION_COLUMNS else "--answer_column"
        named = f"Train with {flag} NAME, or rename the one that is meant to {names[0]}"
        advice = named if len(names) > 1 else "Name one of these"
        raise UserError(f"{dataset} has no column {' or '.join(names)}: it has {has}. {advice}.")
    serving = {column: sum(map(can_serve, table.columns[column])) for column in there}
    return next((column for column in there if serving[column] * 2 >= len(table)), max(there, key=serving.get))


def say_columns(table: Table, used: list[str], dataset: str) -> None:
    """One line on which columns were taken, where there are more."""
    if len(table.names) > len(used):
        taken = " and ".join(table.names[column] for column in used)
        every = ", ".join(shown(name, 30) for name in list(table.names.values())[:12])
        say_once(f"columns     {taken}, of {every}{', …' if len(table.names) > 12 else ''}", about=dataset)


# --- splits ------------------------------------------------------------------------------------------


def train_and_test_splits(dataset: str, columns: Columns = USUAL) -> tuple[str, str]:
    """The names of the two splits; `validation` stands in for `test`. Of a set with one split the last tenth is held out."""
    names = list(splits_of(dataset, columns))
    kinds = {SPLIT_WORDS.get(plain(name), name): name for name in reversed(names)}
    held_out = kinds.get("test") or kinds.get("validation")
    if held_out and len(names) > 1:
        train = kinds.get("train") or next(n for n in (kinds.get("validation"), *names) if n and n != held_out)
        if "train" not in kinds:
            say_once(f"split       there is no train: trained on {train}, held out is {held_out}", about=dataset)
        return train, held_out
    only = kinds.get("train", names[0])
    if kind_of(find_local(dataset)) != "file":
        say_once(f"split       {', '.join(names)} is all there is: the last tenth of {only} is held out", about=dataset)
    return f"{only}[:90%]", f"{only}[90%:]"


def load_rows(dataset: str, split: str, columns: Columns) -> tuple[Table, str, str]:
    """The rows of a split, or of a slice or a sum of splits as `datasets` writes them, and the columns of questions and labels.

    The columns are those that serve in whole splits, so they are the same in every slice. Raises UserError where there is nothing.
    """
    splits = splits_of(dataset, columns)
    names = [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]
    if not splits.keys() >= set(names):
        raise UserError(f"cannot load the split {split} of {dataset}: it has {', '.join(splits)}.")
    tables = {name: splits[name]() for name in names}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(table) for name, table in tables.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{split} is no split: write it as train, test[:100] or train[90%:].") from error
    table = join([tables[part.splitname].pick(range(part.from_, part.to)) for part in parts])
    if not len(table):
        own = split.endswith(("[:90%]", "[90%:]"))
        held_out = ": give a file of five questions or more, as its last tenth is held out" if own else ""
        raise UserError(f"{dataset} has no questions in its split {split}{held_out}.")
    whole = join(list(tables.values()))
    question_column = find_column(whole, columns.questions, dataset, is_question)
    return table, question_column, find_column(whole, columns.labels, dataset, columns.is_label)


def splits_of(dataset: str, columns: Columns) -> dict[str, Callable[[], Table]]:
    """The splits of a hub id, folder or file, each with what reads it. One that is all there is may be cut by its column `split`."""
    found = find_local(dataset)
    path, kind = Path(found), kind_of(found)
    if kind == "folder":
        try:
            readers = {split: partial(read_files, files, columns) for split, files in split_files(path).items()}
        except OSError as error:
            raise UserError(f"cannot read {error.filename or dataset}: {error.strerror}.") from error
    elif kind == "file":
        readers = {"train": partial(read_files, [path], columns)}
    elif kind or path.is_absolute() or path.suffix.lower() in FILE_TYPES or dataset.startswith(".") or "://" in dataset:
        raise UserError(
            f"{dataset} is {kind}: give a file or a folder."
            if kind
            else f"there is no file or folder {shown(dataset, 200)}."
        )
    else:
        sets = load_from_hub(dataset)
        readers = {
            split: partial(arrow_table, rows.with_format("arrow")[:], f"{dataset} ({split})")
            for split, rows in sets.items()
        }
    if len(readers) > 1:
        return readers
    ((name, read),) = readers.items()
    table = read()
    marked = table.by_mark()
    if not marked:
        return {name: lambda: table}
    counts = ", ".join(f"{len(rows)} {mark}" for mark, rows in marked.items())
    say_once(f"split       by the column {table.names['split']}: {counts}", about=dataset)
    return {mark: partial(table.pick, rows) for mark, rows in marked.items()}


def read_files(files: list[Path], columns: Columns) -> Table:
    """The rows of the files of a split, but for files that hold none and JSON about the set, which has no column of questions."""
    tables = {file: read_table(file, columns.known) for file in files}
    has = {file: not columns.known.isdisjoint(table.columns) for file, table in tables.items()}
    for file, table in list(tables.items()) if any(has.values()) else []:
        if not has[file] and (file.suffix.lower() == ".json" or not len(table)):
            say_once(f"passed over {file}: it has no column of questions", about=str(file))
            del tables[file]
    tables = list(tables.values())
    for names, can_serve in ((columns.questions, is_question), (columns.labels, columns.is_label)):
        known = [set(map(plain, names)) & table.columns.keys() for table in tables]
        if all(known) and not set.intersection(*known):  # each file has a name of its own for them
            for table in tables:
                table.rename(find_column(table, names, "", can_serve), plain(names[0]))
    return join(tables)


@functools.cache  # a run asks for the names of the splits, for one and for the other
def load_from_hub(dataset: str) -> DatasetDict:
    """All splits of a set on the hub. Raises UserError where it cannot be loaded."""
    name, _, configuration = dataset.partition(":")
    check_hub_name(name)
    check_cache()
    try:
        return load_dataset(name, configuration or None, revision=REVISION if name == HUB_ID else None)
    except Exception as error:  # load_dataset raises a dozen types, of four libraries
        reason = " ".join(f"{error.__cause__ or error or type(error).__name__}".split())
        if "Config name is missing" in reason:
            raise UserError(f"{name} holds several sets: give one, like {name}:NAME. {reason}") from error
        raise UserError(
            f"cannot load {dataset} from the Hugging Face hub: {reason} "
            "Check the name and the network, or give a local folder or file with --dataset."
        ) from error


def revision_of(dataset: str) -> str | None:
    """The commit that a set on the hub was loaded from, None of a local one: `datasets` names the folder of its cache so."""
    found = find_local(dataset)
    if kind_of(found):
        return None
    folders = {
        Path(file["filename"]).parent.name for rows in load_from_hub(found).values() for file in rows.cache_files
    }
    commits = {name for name in folders if re.fullmatch("[0-9a-f]{40}", name)}
    return commits.pop() if len(commits) == 1 else None
