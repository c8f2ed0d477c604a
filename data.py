"""gsm8k_chinese, or any set with its two columns, as prompts for GRPO.

`load_questions` takes a hub id, a local folder (train.jsonl, test.jsonl, …) or one JSONL, JSON, CSV or Parquet file,
and gives a `datasets.Dataset` with the columns `prompt` (system and user message) and `answer` (str). `read_questions`
takes a file of questions that need no answers, for infer.py.
"""

import glob
from pathlib import Path

from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.utils.logging import CRITICAL, set_verbosity

from rewards import label_number
from support.errors import UserError
from support.screen import say

disable_progress_bars()  # a few thousand rows take a second
set_verbosity(CRITICAL)  # what cannot be read is said once, by this file

HUB_ID = "swulling/gsm8k_chinese"  # 7,473 train and 1,319 test questions, MIT licence
REVISION = "main"  # of HUB_ID, a branch; put a commit here to pin the questions for good

# Accepted names, the first that is there: the hub set's, then MGSM's, then what people call their own. The hub set's
# `question` is English and its `answer` the English worked solution, so these come after.
QUESTION_COLUMNS = ["question_zh-cn", "question", "problem", "问题", "text"]  # text: a line of a .txt file
ANSWER_COLUMNS = ["answer_only", "answer_number", "answer", "label", "答案"]
QUESTION_COLUMN, ANSWER_COLUMN = QUESTION_COLUMNS[0], ANSWER_COLUMNS[0]

# The form that rewards.py scores, newline by newline.
SYSTEM_PROMPT = """请按照如下格式回答：
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def to_prompt(question: str, system_prompt: str = SYSTEM_PROMPT) -> list[dict[str, str]]:
    """The messages that the policy sees for `question`: the same in training, in evaluation and in infer.py."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]


def train_and_test_splits(dataset: str) -> tuple[str, str]:
    """The names of the two splits. A single file has but one: its last tenth is held out."""
    return ("train[:90%]", "train[90%:]") if Path(dataset).is_file() else ("train", "test")


def load_questions(
    dataset: str, split: str, tokenizer, max_prompt_length: int, system_prompt: str = SYSTEM_PROMPT
) -> Dataset:
    """The questions of `split` as a Dataset with `prompt` (list of messages) and `answer` (str).

    `dataset` is a hub id, a folder or a file; `split` is a split's name or a slice of one (`train[:90%]`).
    Questions whose prompt has more than `max_prompt_length` tokens are dropped, and their number is printed: newer
    TRL does not cut prompts, and vLLM refuses them. Raises UserError with one sentence where a question cannot be used.
    """
    rows = load_rows(dataset, split)
    question_column = find_column(rows, QUESTION_COLUMNS, dataset)
    answer_column = find_column(rows, ANSWER_COLUMNS, dataset)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row[question_column], str) or not row[question_column].strip():
            raise UserError(
                f"row {number} of {dataset} ({split}) has no question in {question_column}: remove the row."
            )
        if label_number(row[answer_column]) is None:
            raise UserError(
                f"row {number} of {dataset} ({split}) has {row[answer_column]!r} in {answer_column}, "
                "which is not one number: correct the row or remove it."
            )
    questions = rows.map(
        lambda row: {
            "prompt": to_prompt(row[question_column], system_prompt),
            "answer": f"{label_number(row[answer_column]):f}",
        },
        remove_columns=rows.column_names,
    )
    fitting = questions.filter(
        lambda row: (
            len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))
            <= max_prompt_length
        )
    )
    if len(fitting) == 0:
        raise UserError(
            f"every question of {dataset} ({split}) has more than {max_prompt_length} tokens, the recipe's max_prompt_length: raise it."
        )
    if len(fitting) < len(questions):
        say(
            f"{split}: dropped {len(questions) - len(fitting)} of {len(questions)} questions, longer than {max_prompt_length} tokens"
        )
    return fitting


def read_questions(file: str) -> tuple[list[str], list]:
    """The questions of a JSONL, JSON, CSV, Parquet or text file, and their answers, None where it has no such column."""
    if not Path(file).is_file():
        raise UserError(f"there is no file {file}.")
    rows = load_rows(file, "train")
    questions = rows[find_column(rows, QUESTION_COLUMNS, file)][:]
    labels = next((rows[name][:] for name in ANSWER_COLUMNS if name in rows.column_names), [None] * len(questions))
    if file.endswith(".txt"):
        questions = [question.strip("\ufeff") for question in questions if question.strip("\ufeff \t")]
        labels = [None] * len(questions)
    for number, (question, label) in enumerate(zip(questions, labels, strict=True), start=1):
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"question {number} of {file} is empty or not text: correct or remove it.")
        if label is not None and label_number(label) is None:
            raise UserError(
                f"question {number} of {file} has the answer {label!r}, which is not one number: correct it."
            )
    if not questions:
        raise UserError(f"there is no question in {file}.")
    return questions, labels


def find_column(rows: Dataset, names: list[str], dataset: str) -> str:
    """The first of `names` that is a column of `rows`. Raises UserError where none is."""
    for name in names:
        if name in rows.column_names:
            return name
    raise UserError(
        f"{dataset} has no column {' or '.join(names)}: it has {', '.join(rows.column_names)}. "
        f"Rename the one that is meant to {names[0]}."
    )


def load_rows(dataset: str, split: str) -> Dataset:
    """The rows of a hub id, folder or file as they are. Raises UserError where they cannot be loaded."""
    path = Path(dataset)
    try:
        if path.is_file():
            if path.suffix not in FILE_TYPES:
                raise UserError(f"cannot read {dataset}: its name ends in none of {', '.join(FILE_TYPES)}.")
            if path.stat().st_size == 0:
                raise UserError(f"{dataset} is empty.")
            return load_dataset(FILE_TYPES[path.suffix], data_files=glob.escape(str(path)), split=split)
        if path.is_dir():
            return load_dataset(str(path), split=split)
        if path.is_absolute() or path.suffix in FILE_TYPES or dataset.startswith("."):
            raise UserError(f"there is no file or folder {dataset}.")
        return load_dataset(dataset, split=split, revision=REVISION if dataset == HUB_ID else None)
    except UserError:
        raise
    except Exception as error:  # load_dataset raises a dozen types, of four libraries
        reason = " ".join(f"{error.__cause__ or error or type(error).__name__}".split())
        if "corresponds to no data" in reason or "BatchSize must be" in reason:  # what datasets says of empty splits
            held_out = ": give a file of five questions or more, as its last tenth is held out" if "%" in split else ""
            raise UserError(f"{dataset} has no questions in its split {split}{held_out}.") from error
        if path.exists():
            raise UserError(f"cannot load the split {split} of {dataset}: {reason}") from error
        raise UserError(
            f"cannot load {dataset} from the Hugging Face hub: {reason} "
            "Check the name and the network, or give a local folder or file with --dataset."
        ) from error
