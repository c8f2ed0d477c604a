"""Files of questions as tables: JSONL, JSON, CSV, TSV, Parquet and text, in whatever encoding and shape people have them.

Not through `datasets`: its readers fix a column's type by the first block, check the encoding only when a row is used, and
name no row. Here a value stays as the file has it, and every fault is a UserError with the number of its row.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet

from rewards import label_number
from support.errors import UserError
from support.screen import say_once

TABLE_TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # in capitals too
FILE_TYPES = (*TABLE_TYPES, ".txt")  # a folder's text files are about its set, and no questions
NOT_TEXT = {  # the first bytes of what is no text, and what to do with it
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd: unpack it",
    b"BZh9": "is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "is compressed with xz: unpack it",
    **dict.fromkeys((b"\x80\x04", b"\x80\x05"), "is a pickle: save it as Parquet or JSONL"),
    b"\xd0\xcf\x11\xe0": "is an old Excel or Word file: save the sheet as CSV",
    b"%PDF": "is a PDF: save the questions as CSV or JSONL",
    **dict.fromkeys(
        (b"<!DOCTYPE", b"<!doctype", b"<html"), "is a web page, not the file itself: download the raw file"
    ),
    b"PK\x03\x04": "is a zip archive or an Excel file: unpack it, or save the sheet as CSV",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
    b"ARROW1": "is an Arrow file: save it as Parquet or JSONL",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
}
# The words in the name of a file, a folder or a split that say what it is for, as in datasets, and Chinese ones.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "训练", "訓練"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "测试", "測試"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "验证", "驗證"), "validation"),
}


@dataclass
class Table:
    """Rows by column. Columns go by `plain` names; `names` has them as written, `where` each row's file, number and line."""

    columns: dict[str, list]
    names: dict[str, str]
    where: list[tuple[str, int, int]]

    def __len__(self) -> int:
        return len(self.where)

    def place(self, row: int, word: str = "row") -> str:
        """What to call a row in a message: `row 2 (line 3) of questions.csv`."""
        source, number, line = self.where[row]
        return f"{row_and_line(number, line, word)} of {source}"

    def pick(self, rows: Iterable[int]) -> "Table":
        """These rows only."""
        rows = list(rows)
        columns = {name: [column[row] for row in rows] for name, column in self.columns.items()}
        return Table(columns, self.names, [self.where[row] for row in rows])

    def describe(self, bad: dict[int, object], column: str, fault: str, word: str = "row") -> str:
        """Which rows are bad and what they have in `column`: the one, or how many there are and the first three."""
        name, first = self.names[column], list(bad.items())[:3]
        if len(bad) == 1:
            ((row, value),) = first
            return f"{self.place(row, word)} has {shown(quote(value))} in {name}, {fault}"
        files = list(dict.fromkeys(source for source, _, _ in self.where))
        rows = ", ".join(
            f"{row_and_line(*self.where[row][1:], word) if len(files) == 1 else self.place(row, word)} has {shown(quote(value))}"
            for row, value in first
        )
        more = ", …" if len(bad) > 3 else ""
        source = files[0] if len(files) == 1 else f"{len(files)} files"
        return f"{len(bad)} of {len(self)} {word}s of {source} are bad: {rows}{more} in {name}, {fault}"

    def rename(self, column: str, other: str) -> None:
        self.columns[other], self.names[other] = self.columns.pop(column), self.names.pop(column)

    def by_mark(self) -> dict[str, list[int]]:
        """The rows of each split, where a column `split` marks every row as one, and not all as the same."""
        marks = [SPLIT_WORDS.get(plain(str(mark))) for mark in self.columns.get("split", [])]
        if "train" not in marks or None in marks or len(set(marks)) == 1:
            return {}
        return {mark: [row for row, other in enumerate(marks) if other == mark] for mark in Counter(marks)}


def join(tables: list[Table]) -> Table:
    """The rows of one table after those of the other; a column that one of them lacks is None there."""
    names = {key: name for table in reversed(tables) for key, name in table.names.items()}
    columns = {
        key: [value for table in tables for value in table.columns.get(key, [None] * len(table))] for key in names
    }
    return Table(columns, names, [where for table in tables for where in table.where])


def plain(name: str) -> str:
    """A column's name as names are compared: `Question ZH-CN` is `question_zh_cn`."""
    return re.sub(r"[\s_-]+", "_", name.strip("\ufeff").strip().casefold())


def shown(text: str, limit: int = 60) -> str:
    """`text` for a message: one line, not long, and nothing in it that a terminal cannot print."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote(value) -> str:
    """`value` as Python writes it; NumPy would put its own name around it."""
    return repr(value.item() if isinstance(value, numpy.generic) else value)


def row_and_line(row: int, line: int, word: str = "row") -> str:
    """`row 2 (line 3)`, both counted from 1; the line only where it is known (not 0) and another number."""
    return f"{word} {row}" + (f" (line {line})" if line not in (row, 0) else "")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """`names` by their plain ones; where two are the same, the later one gets a number."""
    found = {}
    for name in names:
        found[plain(name) if plain(name) not in found else f"{plain(name)}.{len(found)}"] = name
    return found


def read_table(path: Path, questions: set[str]) -> Table:
    """The rows of a file. `questions`: plain names of columns of questions, by which a header or a row is known as one.

    Raises UserError with one sentence for every file that it cannot read, whatever is in it.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise UserError(
            f"cannot read {path}: its name ends in none of {', '.join(FILE_TYPES)}. Spreadsheets can be saved as CSV."
        )
    try:
        content = path.read_bytes()
        if not content.strip():
            return Table({}, {}, [])
        if path.suffix.lower() == ".parquet":
            return arrow_table(pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read(), str(path))
        for magic, advice in NOT_TEXT.items():
            if content.startswith(magic):
                raise UserError(f"cannot load {path}: it {advice}.")
        text = decode(content, path)
        if path.suffix.lower() == ".txt":
            rows = [(number, {"text": line.strip()}) for number, line in lines_of(text)]
        elif path.suffix.lower() in (".csv", ".tsv"):
            rows = csv_rows(text, path, questions)
        else:
            rows = json_rows(text, path, questions)
        names = plain_names(dict.fromkeys(name for _, row in rows for name in row))
        columns = {key: [row.get(name) for _, row in rows] for key, name in names.items()}
        return Table(columns, names, [(str(path), row, line) for row, (line, _) in enumerate(rows, start=1)])
    except UserError:
        raise
    except Exception as error:  # pyarrow and the operating system have a dozen types
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load {path}: {shown(reason, 200).rstrip('.')}.") from error


def decode(content: bytes, path: Path) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or GB18030 (GBK, GB2312).

    A byte that is no text stays in it as a lone surrogate: it does no harm in a column that nobody reads, and whoever meets
    it in a question can name the row.
    """
    encoding = json.detect_encoding(content)  # by a byte order mark, or by the zeros that ASCII has in UTF-16
    if not encoding.startswith("utf-8"):
        try:
            return content.decode(encoding).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"cannot load {path}: it is {encoding.upper()}, but damaged: save it as UTF-8.") from error
    text = content.decode("utf-8-sig", "surrogateescape")
    broken = sum("\udc80" <= character <= "\udcff" for character in text)
    whole = sum(character > "\x7f" for character in text) - broken
    if broken > whole:  # a wrong byte in a file of UTF-8 does not make it GB18030, which takes nearly any bytes
        chinese = "\n".join(map(decode_chinese, content.split(b"\n")))
        characters = "".join(character for character in chinese if character > "\x7f")
        # Simplified Chinese is all in GB2312, traditional more than half; what Big5 or Shift-JIS look like is not
        if len(characters.encode("gb2312", "ignore")) > len(characters):
            say_once(f"encoding    {path} is not UTF-8, and is read as GB18030 (GBK)", about=str(path))
            return chinese
    return text


def decode_chinese(line: bytes) -> str:
    """A line of GB18030, or of UTF-8 where two files were put together: Chinese in UTF-8 is hardly ever GB18030 by chance."""
    try:
        if max(text := line.decode(), default="") > "\u07ff":
            return text
    except UnicodeDecodeError:
        pass
    return line.decode("gb18030", "surrogateescape")


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines of `text` that are not blank, with their numbers in an editor. U+2028 and its like end no line here."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        line = line.strip("\ufeff")
        if line.strip():
            yield number, line


# --- JSON --------------------------------------------------------------------------------------------


def json_rows(text: str, path: Path, questions: set[str]) -> list[tuple[int, dict]]:
    """The rows of JSONL or JSON, whichever it is and whatever the name says, each with its line (0: not known)."""
    try:
        rows = [(0, row) for row in rows_in(parse_json(text), path, questions)]
    except ValueError as error:
        lines, rows = list(lines_of(text)), []
        for number, line in lines:
            try:
                rows.append((number, parse_json(line)))
            except ValueError:
                if not rows and (line.strip() == "{" or line.lstrip().startswith("[")):  # one document
                    raise UserError(f"cannot load {path}: it is not JSON: {error}.") from None
                half = ", perhaps half-written" if number == lines[-1][0] else ""
                raise UserError(
                    f"cannot load {path}: {row_and_line(len(rows) + 1, number)} is not JSON{half} ({shown(line)}): "
                    "correct it or remove it."
                ) from None
    for row, (number, value) in enumerate(rows, start=1):
        if not isinstance(value, dict):
            raise UserError(
                f"cannot load {path}: {row_and_line(row, number)} is {shown(repr(value))}, where an object like "
                '{"question": "…"} is expected: correct it or remove it.'
            )
    return rows


def parse_json(text: str):
    """The value of `text`; a text in it may hold tabs. Raises ValueError, and nothing else."""
    try:
        return json.loads(text.strip("\ufeff"), strict=False)
    except RecursionError:
        raise ValueError("brackets within brackets, too deep") from None


def rows_in(value, path: Path, questions: set[str]) -> list:
    """The rows in a JSON document: a list of them, one alone, lists by column (pandas' too), or lists by split or name."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    inner = list(value.values())
    parts = {name: part for name, part in value.items() if isinstance(part, list | dict)}
    if not questions.isdisjoint(map(plain, value)):
        if questions.isdisjoint(map(plain, parts)):
            return [value]
        numbers = dict.fromkeys(number for part in parts.values() if isinstance(part, dict) for number in part)
        columns = [[part.get(n) for n in numbers] if isinstance(part, dict) else part for part in parts.values()]
        if len(set(map(len, columns))) > 1:
            lengths = ", ".join(str(len(column)) for column in columns)
            raise UserError(f"cannot load {path}: its columns have {lengths} values, and not as many each.")
        return [dict(zip(parts, row, strict=True)) for row in zip(*columns, strict=True)]
    if len(inner) == 1 and parts:
        return rows_in(inner[0], path, questions)
    if inner and all(isinstance(part, dict) for part in inner):
        return inner
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    if lists and all(plain(name) in SPLIT_WORDS for name in lists):
        rows = [(name, row) for name, part in lists.items() for row in part]
        return [{**row, "split": name} if isinstance(row, dict) else row for name, row in rows]
    return [value]


# --- CSV ---------------------------------------------------------------------------------------------


def csv_rows(text: str, path: Path, questions: set[str]) -> list[tuple[int, dict]]:
    """The rows of a file with commas, semicolons or tabs, each with the line on which it begins."""
    if re.match(r"sep=.\r?\n", text):  # Excel's; what it says can be seen
        text = text[text.index("\n") :]
    first = next(lines_of(text), (0, ""))[1]

    def likely(delimiter: str) -> tuple:
        known = any(plain(name.strip('" ')) in questions for name in first.split(delimiter))
        return known, delimiter == "\t" and path.suffix.lower() == ".tsv", first.count(delimiter)

    delimiter = max(",;\t|", key=likely)
    try:
        records = csv_records(text, path, delimiter=delimiter, strict=True)
    except UserError:
        if delimiter != "\t":
            raise
        records = csv_records(text, path, delimiter=delimiter, quoting=csv.QUOTE_NONE)  # a quote may be just a quote
    if not records:
        return []
    header = [name.strip("\ufeff").strip() for name in records[0][1]]
    # MGSM's own files have no header: a question and its number from the first line on
    first_row = len(header) == 2 and re.search("[0-9?？。]", header[0]) and label_number(header[1]) is not None
    if first_row and questions.isdisjoint(map(plain, header)):
        say_once("columns     no header: the first is the question, the second the answer", about=str(path))
        header = ["question", "answer"]
    else:
        records = records[1:]
    seen = Counter()
    for position, name in enumerate(header):  # a name that comes again gets a number, as in pandas
        header[position] = f"{name}.{seen[name]}" if seen[name] else name
        seen[name] += 1
    rows = []
    for line, cells in records:
        if any(cell.strip() for cell in cells[len(header) :]):
            raise UserError(
                f"cannot load {path}: {row_and_line(len(rows) + 1, line)} has {len(cells)} cells, and the header "
                f"{len(header)}: put a text that holds {'a tab' if delimiter == chr(9) else delimiter} into double quotes."
            )
        rows.append((line, {name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=False)}))
    return rows


def csv_records(text: str, path: Path, **options) -> list[tuple[int, list[str]]]:
    """The records that are not blank, the header among them, each with its first line. A quote without an end is an error."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, **options)
    records, line = [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        place = row_and_line(len(records), line) if records else "the header"
        raise UserError(
            f"cannot load {path}: {place} is not CSV ({error}): a double quote in a text is written twice, within a "
            "text in double quotes."
        ) from error
    return records


# --- Parquet, and what datasets has loaded -----------------------------------------------------------


def arrow_table(table: pyarrow.Table, source: str) -> Table:
    """An Arrow table as ours. Its rows are those of `source`."""
    names = plain_names(table.column_names)
    columns = {key: arrow_values(column) for key, column in zip(names, table.columns, strict=True)}
    return Table(columns, names, [(source, row, 0) for row in range(1, table.num_rows + 1)])


def arrow_values(column: pyarrow.ChunkedArray) -> list:
    """The values of a column. Those of 32 and 16 bits stay so, or 0.1 would become 0.10000000149011612."""
    try:
        values = column.to_pylist()
    except Exception:  # Arrow does not check UTF-8, and has dates and times that Python has not
        values = []
        for scalar in column:
            try:
                values.append(scalar.as_py())
            except UnicodeDecodeError:
                values.append(bytes(scalar.as_buffer()).decode("utf-8", "surrogateescape"))
            except Exception:
                values.append(None)
    narrow = {pyarrow.float32(): numpy.float32, pyarrow.float16(): numpy.float16}.get(column.type)
    if narrow:
        return [None if value is None else narrow(value) for value in values]
    return [f"{value:f}" if isinstance(value, Decimal) else value for value in values]
