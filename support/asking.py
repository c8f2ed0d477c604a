"""What infer.py does around the answers: shows them as they arrive, reads questions, continues a file."""

import contextlib
import json
import re
from pathlib import Path

from data import ANSWER_COLUMNS, QUESTION_COLUMNS, UserError, find_column, load_rows
from rewards import label_number


class Screen:
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
                print(("" if self.fresh else "\n") + heading, end="")
                self.fresh = True
            elif part := part.lstrip() if self.fresh else part:
                print(part, end="", flush=True)
                self.fresh = False
        if end and not self.fresh:
            print()


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
