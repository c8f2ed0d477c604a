"""What files hold: every encoding, shape and type of a good one, and for a damaged one a sentence with its row."""

import bz2
import gzip
import json
import lzma
import os
import pickle

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import load_questions, read_label, read_questions, train_and_test_splits
from support.errors import UserError

A, B = "小红有3支笔，又买了4支，共几支？", "1加1等于几？"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny")


@pytest.fixture
def load(tmp_path, tokenizer):
    """What training makes of a file with this name and these bytes: (question, label) by (question, label)."""

    def load(name, content, split="train"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        rows = load_questions(str(path), split, tokenizer, 512)
        return [(row["prompt"][-1]["content"], row["answer"]) for row in rows]

    return load


def parquet(columns, **arrays):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns | arrays), sink)
    return sink.getvalue().to_pybytes()


JSONL = f'{{"question": "{A}", "answer": 7}}\n{{"question": "{B}", "answer": 2}}\n'
ARRAY = json.dumps([{"question": A, "answer": 7}, {"question": B, "answer": 2}], ensure_ascii=False, indent=2)
CSV = f"question,answer\n{A},7\n{B},2\n"
ROWS = [(A, "7"), (B, "2")]
BIG5 = "小明有3個蘋果，媽媽又買了4個，現在一共有多少個？"

FINE = [
    # encodings
    ("q.jsonl", JSONL, ROWS, "UTF-8"),
    ("q.jsonl", JSONL.encode("utf-8-sig"), ROWS, "with a byte order mark"),
    ("q.jsonl", JSONL.encode("gbk"), ROWS, "GBK"),
    ("q.jsonl", JSONL.encode("gb18030"), ROWS, "GB18030"),
    ("q.jsonl", JSONL.encode("utf-16"), ROWS, "UTF-16"),
    ("q.jsonl", JSONL.encode("utf-16-be"), ROWS, "UTF-16 without a mark"),
    ("q.jsonl", JSONL.encode("utf-32"), ROWS, "UTF-32"),
    ("q.jsonl", JSONL.encode("ascii", "backslashreplace"), ROWS, "escapes"),
    ("q.jsonl", "\ufeff" + JSONL.replace("\n", "\n\ufeff", 1), ROWS, "two files put together, each with a mark"),
    ("q.json", ARRAY.encode("utf-8-sig"), ROWS, "an array with a mark"),
    ("q.json", ARRAY.encode("utf-16"), ROWS, "an array in UTF-16"),
    ("q.json", ARRAY.encode("gbk"), ROWS, "an array in GBK"),
    ("q.csv", CSV.encode("utf-8-sig"), ROWS, "as Excel writes it"),
    ("q.csv", CSV.encode("gbk"), ROWS, "as a Chinese Excel writes it"),
    ("q.csv", CSV.encode("utf-16"), ROWS, "CSV in UTF-16"),
    ("q.csv", CSV.replace(",", "\t").encode("utf-16"), ROWS, "what Excel calls Unicode text"),
    (
        "q.jsonl",
        JSONL.encode().replace(b'"answer": 7', b'"answer": 7, "note": "caf\xe9 \xff"'),
        ROWS,
        "a wrong byte that nobody reads",
    ),
    ("q.jsonl", JSONL.encode("gbk") + JSONL.encode(), ROWS * 2, "GBK and UTF-8 put together"),
    ("q.csv", f"question,answer\n{BIG5},7\n".encode("gbk"), [(BIG5, "7")], "traditional Chinese in GBK"),
    # line ends
    ("q.jsonl", JSONL.replace("\n", "\r\n"), ROWS, "Windows"),
    ("q.jsonl", JSONL.replace("\n", "\r"), ROWS, "an old Mac"),
    ("q.jsonl", "\n" + JSONL.replace("\n", "\n \n") + "\n\n", ROWS, "empty lines"),
    ("q.jsonl", JSONL.rstrip("\n"), ROWS, "no end of the last line"),
    (
        "q.jsonl",
        f'{{"question": "{A}\u2028", "answer": 7}}',
        [(A + "\u2028", "7")],
        "what str.splitlines would split at",
    ),
    ("q.jsonl", '{"question": "1加\t1", "answer": 7}', [("1加\t1", "7")], "a tab within a text"),
    ("q.csv", CSV.replace("\n", "\r"), ROWS, "CSV of an old Mac"),
    ("q.csv", f'question,answer\n"{A}\n第二行",7\n', [(A + "\n第二行", "7")], "a question on two lines"),
    # shapes
    ("Q.JSONL", JSONL, ROWS, "a name in capitals"),
    ("Q.CSV", CSV, ROWS, "a name in capitals, CSV"),
    ("q.json", JSONL, ROWS, "JSONL called JSON"),
    ("q.jsonl", ARRAY, ROWS, "JSON called JSONL"),
    ("q.json", json.dumps({"question": A, "answer": 7}), ROWS[:1], "one row alone"),
    ("q.json", json.dumps({"question": A, "answer": 7}, indent=2), ROWS[:1], "one row alone, on four lines"),
    ("q.json", json.dumps({"data": json.loads(ARRAY)}), ROWS, "rows within an object"),
    ("q.json", json.dumps({"version": "1.0", "data": json.loads(ARRAY)}), ROWS, "and other things beside"),
    ("q.json", json.dumps({"question": [A, B], "answer": [7, 2]}), ROWS, "lists by column"),
    ("q.json", pandas.DataFrame(json.loads(ARRAY)).to_json(), ROWS, "pandas' to_json"),
    ("q.json", pandas.DataFrame(json.loads(ARRAY)).to_json(orient="index"), ROWS, "pandas' to_json, by row"),
    ("q.json", pandas.DataFrame(json.loads(ARRAY)).to_json(orient="table"), ROWS, "pandas' to_json, with a schema"),
    ("q.json", json.dumps({"data": {"question": [A, B], "answer": [7, 2]}}), ROWS, "lists by column within an object"),
    ("q.json", json.dumps({"question": [A, B], "answer": [7, 2], "version": 1}), ROWS, "a number beside the lists"),
    (
        "q.json",
        json.dumps({"question": {"0": A, "1": B}, "answer": {"1": 2, "0": 7}}),
        ROWS,
        "by number, in another order",
    ),
    ("q.json", json.dumps({"train": json.loads(ARRAY), "test": [{"question": A, "answer": 1}]}), ROWS, "by split"),
    ("q.csv", CSV.replace(",", ";"), ROWS, "semicolons"),
    ("q.csv", CSV.replace(",", "|"), ROWS, "bars"),
    ("q.csv", "sep=;\n" + CSV.replace(",", ";"), ROWS, "Excel's own first line"),
    ("q.csv", CSV.replace(",", "\t"), ROWS, "tabs"),
    ("q.tsv", CSV.replace(",", "\t"), ROWS, "TSV"),
    ("q.tsv", f'question\tanswer\n"{A}\t7\n{B}\t2\n', [('"' + A, "7"), ROWS[1]], "a quote without an end, in TSV"),
    ("q.tsv", f"{A}\t7\n{B}\t2\n", ROWS, "MGSM's own files have no header"),
    ("q.csv", CSV.encode().replace(b"7\n", b"####\xcd\xf2####7\n"), ROWS, "a wrong byte before ####"),
    ("q.csv", f"zh_question,ans\n{A},7\n{B},2\n", ROWS, "other names"),
    ("q.csv", f"question, answer\n{A}, 7\n", ROWS[:1], "a space after the comma"),
    ("q.csv", CSV.replace("\n", ",\n"), ROWS, "commas at the ends of lines"),
    ("q.csv", CSV + ",\n,\n", ROWS, "empty rows at the end"),
    (
        "q.csv",
        'question,answer\n"小明说""好""",7\n小明说"好",2\n',
        [('小明说"好"', "7"), ('小明说"好"', "2")],
        "quotes",
    ),
    ("q.csv", f"question,question,answer\n{A},{B},7\n", ROWS[:1], "a name that comes twice"),
    ("q.csv", f" Question ,ANSWER\n{A},7\n", ROWS[:1], "names in capitals, with spaces"),
    ("q.jsonl", '{"note": 1, ' + JSONL[1:], ROWS, "rows with other keys than the first"),
    ("q.jsonl", JSONL.replace('"answer": 7', '"answer": 7, "x": ' + "[" * 50 + "]" * 50), ROWS, "deep, unread"),
    # types of labels
    ("q.csv", CSV.replace("7\n", "7.5\n"), [(A, "7.5"), (B, "2")], "an integer and a decimal"),
    ("q.csv", CSV.replace("7\n", '"1,080"\n'), [(A, "1080"), (B, "2")], "a comma in a number"),
    ("q.csv", CSV.replace("7\n", "007\n"), ROWS, "zeros in front"),
    ("q.csv", CSV.replace("7\n", "1.5E+03\n"), [(A, "1500.0"), (B, "2")], "as spreadsheets write large numbers"),
    ("q.csv", CSV.replace("7\n", "12345678901234567890\n"), [(A, "12345678901234567890"), (B, "2")], "beyond 64 bits"),
    ("q.jsonl", JSONL.replace("7", '"7"', 1), ROWS, "a text and a number"),
    ("q.jsonl", JSONL.replace(": 7", ": 7.5"), [(A, "7.5"), (B, "2")], "a decimal and an integer"),
    ("q.jsonl", JSONL.replace(": 7", ': "3+4=7\\n#### 7"'), ROWS, "GSM8K's own answers"),
    ("q.jsonl", JSONL.replace(": 7", ': "她有 1 支。 #### 1,007 "'), [(A, "1007"), (B, "2")], "GSM8K's, with a comma"),
    (
        "q.parquet",
        parquet({"question": [A, B], "answer": pyarrow.array([0.1, 72.0], "float32")}),
        [(A, "0.1"), (B, "72.0")],
        "float32",
    ),
    (
        "q.parquet",
        parquet({"question": [A, B], "answer": pyarrow.array([0.1, 2.0]).cast("float32").cast("float16")}),
        [(A, "0.1"), (B, "2.0")],
        "float16",
    ),
    (
        "q.parquet",
        parquet({"question": pyarrow.array([A, B]).dictionary_encode(), "answer": pyarrow.array([7, 2], "uint8")}),
        ROWS,
        "categories, uint8",
    ),
    (
        "q.parquet",
        parquet({"question": pyarrow.array([A, B], "large_string"), "answer": pandas.array(["7", "2"])}),
        ROWS,
        "large strings",
    ),
    (
        "q.parquet",
        parquet({"question": [A, B], "answer": pyarrow.array([7, 2]).cast(pyarrow.decimal128(21, 2))}),
        [(A, "7.00"), (B, "2.00")],
        "decimals",
    ),
    (
        "q.parquet",
        parquet(
            {
                "question": [A, B],
                "answer": [7, 2],
                "when": pyarrow.array([2**62, 1], pyarrow.timestamp("us")),
                "x": [[1], []],
            }
        ),
        ROWS,
        "dates that Python has not, lists",
    ),
]


@pytest.mark.parametrize("name, content, rows, why", FINE, ids=[f"{name} {why}" for name, _, _, why in FINE])
def test_good_files(load, name, content, rows, why):
    assert load(name, content) == rows


BAD = [
    # encodings
    ("q.jsonl", JSONL.encode().replace(b"\xe7", b"\xff", 1), "row 1 .*not in UTF-8", "a wrong byte in a question"),
    ("q.jsonl", (JSONL * 3).encode()[:-30], "row 6 is not JSON, perhaps half-written", "cut within a character"),
    ("q.jsonl", JSONL.encode().replace("几".encode(), b"\xe5\x87", 1), "row 1 .*not in UTF-8", "two bytes of three"),
    (
        "q.csv",
        CSV.encode().replace("几".encode(), b"\xe5\x87", 1),
        r"row 1 \(line 2\) .*not in UTF-8",
        "the same in CSV",
    ),
    ("q.csv", f"question,answer\n{BIG5},7\n".encode("big5"), "not in UTF-8", "Big5"),
    ("q.csv", "question,answer\n太郎は３本のペンを持っています,3\n".encode("shift_jis"), "not in UTF-8", "Shift-JIS"),
    ("q.csv", "question,answer\nZoé a 3 cafés à 2 €,6\n".encode("cp1252"), "not in UTF-8", "Western"),
    (
        "q.jsonl",
        (JSONL * 5).encode("gbk").replace("支".encode("gbk"), b"\xff", 1),
        "row 1 .*not in UTF-8",
        "a wrong byte in GBK",
    ),
    ("q.jsonl", JSONL.encode("gbk")[:-22], "row 2 is not JSON, perhaps half-written", "GBK, cut"),
    ("q.jsonl", (JSONL * 5).encode() + JSONL.encode("gbk"), "2 of 12 rows .* row 11 has", "GBK after UTF-8"),
    ("q.jsonl", JSONL.replace(B, "\u3000\u200b？"), "row 2 .*no question", "nothing to read"),
    ("q.json", '[{"question": "1", "answer": 2},]', "not JSON: .*line 1", "a comma at the end"),
    ("q.jsonl", JSONL.encode("utf-16")[:-1], "UTF-16, but damaged", "half of UTF-16"),
    ("q.jsonl", '{"question": "1加1\\ud83d", "answer": 7}', "row 1 .*not in UTF-8", "half an emoji"),
    ("q.jsonl", gzip.compress(JSONL.encode()), "gzip: unpack", "compressed"),
    ("q.jsonl", bz2.compress(JSONL.encode()), "bzip2: unpack", "bzip2"),
    ("q.jsonl", lzma.compress(JSONL.encode()), "xz: unpack", "xz"),
    ("q.json", pickle.dumps(json.loads(ARRAY), 5), "pickle: save", "a pickle"),
    ("q.csv", b"\xd0\xcf\x11\xe0rest", "old Excel", "an old Excel file"),
    ("q.csv", b"%PDF-1.7 ", "is a PDF", "PDF"),
    ("q.jsonl", "<!DOCTYPE html><html>", "is a web page", "what a browser saved"),
    ("q.csv", b"PK\x03\x04rest", "Excel file", "Excel called CSV"),
    ("q.jsonl", parquet({"question": [A]}), "Parquet", "Parquet called JSONL"),
    ("q.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull", "Git LFS"),
    ("q.jsonl", bytes(range(256)) * 8, "cannot load", "binary"),
    ("q.jsonl", JSONL.encode() + b"\0" * 4096, "row 3 is not JSON", "zeros after a crash"),
    # JSON
    ("q.jsonl", JSONL + '{"question": "小', "row 3 is not JSON, perhaps half-written", "half a line"),
    ("q.jsonl", "\n" + JSONL + "\nx\n", r"row 3 \(line 5\) is not JSON", "text after empty lines"),
    ("q.jsonl", "{'question': '1加1', 'answer': 2}\n" + JSONL, "row 1 is not JSON", "single quotes"),
    ("q.jsonl", JSONL.replace("}\n", "},\n"), "row 1 is not JSON", "commas between"),
    ("q.json", ARRAY[:-10], "not JSON: .*line", "half an array"),
    ("q.json", '{"question": [', "not JSON", "half an object"),
    ("q.jsonl", "[" * 100_000, "not JSON|too deep", "brackets"),
    ("q.jsonl", JSONL + '{"a": ' * 100_000, "row 3 is not JSON", "brackets, in the last row"),
    ("q.jsonl", '{"question": "1加1", "answer": ' + "9" * 5000 + "}", "row 1 is not JSON", "a number of 5,000 digits"),
    ("q.jsonl", JSONL + "[1, 2]\n", "row 3 is .1, 2., where an object", "a list as a row"),
    ("q.json", '["1加1", "2加2"]', "row 1 is '1加1', where an object", "texts"),
    ("q.json", "null", "row 1 is None", "null"),
    ("q.json", "{}", "no column .* it has none", "no key"),
    ("q.json", "[]", "no questions in its split", "no row"),
    ("q.json", '{"data": []}', "no questions in its split", "no row within"),
    ("q.json", '{"question": ["1"], "answer": [1, 2]}', "columns have 1, 2 values", "columns of other lengths"),
    ("q.json", '{"easy": [], "hard": []}', "no column .* it has easy, hard", "two lists"),
    # CSV
    ("q.csv", f'question,answer\n{B},2\n"{A},7\n{B},2\n', r"row 2 \(line 3\) is not CSV", "a quote without an end"),
    ("q.csv", f'question,answer\n"{A}" 问,7\n', r"row 1 \(line 2\) is not CSV", "text after a quote"),
    ("q.csv", 'question,"answer', "header is not CSV", "a quote in the header"),
    ("q.csv", "question,answer\n小红有3支,又买了4支,7\n", r"row 1 \(line 2\) has 3 cells, and the header 2", "a comma"),
    ("q.csv", f"question,answer\n{B},2\n{A}\n", r"row 2 \(line 3\) .* None in answer", "a row without a label"),
    ("q.csv", "question,answer\n", "no questions in its split", "only a header"),
    ("q.csv", " \n\n", "no questions in its split", "blank"),
    ("q.csv", f"{A},{B}\n{A},{B}\n", "no column", "two questions and no header"),
    ("q.csv", f"题干,2024\n{A},7\n", "no column .* it has 题干, 2024", "a number in the header"),
    # Parquet
    ("q.parquet", JSONL, "cannot load .*q.parquet", "no Parquet"),
    ("q.parquet", b"", "q.parquet has no questions in its split", "nothing"),
    ("q.parquet", parquet({"question": [A], "answer": [7]})[:-20], "cannot load .*q.parquet", "half a Parquet file"),
    ("q.parquet", parquet({"question": [A.encode()], "answer": [7]}), "row 1 .*not text", "bytes"),
    ("q.parquet", parquet({"question": [A, None], "answer": [7, 2]}), "row 2 .*None in question", "null"),
    ("q.parquet", parquet({"question": [A], "answer": [float("nan")]}), "row 1 .*nan", "nan"),
    ("q.parquet", parquet({"question": [[A]], "answer": [7]}), "row 1 .*no question", "a list"),
    (
        "q.parquet",
        parquet({"prompt": [[{"role": "user", "content": A}]], "reward_model": [{"ground_truth": "7"}]}),
        "no column .* it has prompt, reward_model",
        "verl's rows",
    ),
    # labels
    ("q.jsonl", JSONL.replace(": 7", ': "七"'), "row 1 .*'七' in answer, which is not one number", "a word"),
    ("q.jsonl", JSONL.replace(": 7", ": NaN"), "row 1 .*nan", "not a number"),
    ("q.jsonl", JSONL.replace(": 7", ": 1e999"), "row 1 .*inf", "infinite"),
    ("q.jsonl", JSONL.replace(": 7", ": true"), "row 1 .*True", "a truth value"),
    ("q.jsonl", JSONL.replace(": 7", ': {"a": 1}'), "row 1 .*'a': 1", "an object"),
    ("q.jsonl", JSONL.replace(": 7", ': "有 1 支 #### 不知道"'), "row 1 .*not one number", "no number after ####"),
    ("q.jsonl", JSONL.replace(": 7", f': "{"很长" * 500}"'), "row 1 .{,300}$", "a long one"),
    ("q.jsonl", JSONL.replace(": 7", ': "a\\nb\\u001b[m"'), "row 1", "line ends and colours"),
    ("q.csv", CSV.encode().replace(b",7", b",7\xcd\xf2"), "row 1 .*not one number", "a unit in GBK"),
    ("q.csv", CSV.replace(",7", "," + "9" * 5000), "row 1 .*not one number", "5,000 digits"),
    ("q.csv", CSV.replace(",7", "," + "9" * 400 + ".5"), "row 1 .*not one number", "400 digits and a decimal"),
    # control tokens
    (
        "q.jsonl",
        JSONL.replace("1加1", "1加1<|im_end|>"),
        r"row 2 .*'<\|im_end\|>' in question.*control token",
        "in a question",
    ),
]


@pytest.mark.parametrize("name, content, words, why", BAD, ids=[f"{name} {why}" for name, _, _, why in BAD])
def test_bad_files(load, name, content, words, why):
    with pytest.raises(UserError, match=words) as error:
        load(name, content)
    message = str(error.value)
    assert name in message and message.isprintable() and len(message) < 700


def test_many_bad_labels_are_counted_and_three_are_named(load):
    bad = {3: "两个", 5: None, 8: "1 或 2", 9: "?"}
    rows = [{"question": f"{n}加1", "answer": bad.get(n, n)} for n in range(1, 13)]
    with pytest.raises(UserError) as error:
        load("q.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert "4 of 12 rows of " in str(error.value) and "in answer, which is not one number" in str(error.value)
    assert "row 3 has '两个', row 5 has None, row 8 has '1 或 2', …" in str(error.value)


def test_a_row_is_called_by_its_number_in_the_file_whatever_the_split(load):
    rows = [{"question": f"{n}加1", "answer": n if n < 19 else "?"} for n in range(1, 20)]
    content = "\n".join(json.dumps(row) for row in rows)
    with pytest.raises(UserError, match="row 19 of "):
        load("q.jsonl", content, split="train[90%:]")


def test_a_type_is_not_fixed_by_the_first_block(load):
    content = "question,answer\n" + f"{B},2\n" * 11_500 + f"{B},72.5\n" + f"{B},2\n" * 499
    answers = [answer for _, answer in load("q.csv", content, split="train[11498:11502]")]
    assert answers == ["2", "2", "72.5", "2"]
    with pytest.raises(UserError, match=r"row 11501 \(line 11502\) .*'没有'"):
        load("q.csv", content.replace("72.5", "没有"), split="train[11498:11502]")


def test_what_is_no_file(tmp_path, tokenizer):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "circle.jsonl").symlink_to("circle.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    for name, words in [
        ("folder.jsonl", "folder.jsonl has no file that ends in|is folder"),
        ("circle.jsonl", "no file"),
        ("link.jsonl", "no file"),
        ("pipe.jsonl", "is a pipe or a device"),
        ("x" * 300 + ".jsonl", "no file"),
        ("zero\0.jsonl", "no file"),
    ]:
        with pytest.raises(UserError, match=words):
            load_questions(str(tmp_path / name), "train", tokenizer, 512)
        with pytest.raises(UserError, match=words):
            train_and_test_splits(str(tmp_path / name))
        with pytest.raises(UserError, match=words):
            read_questions(str(tmp_path / name))


def test_gbk_is_said(load, capsys):
    load("q.jsonl", JSONL.encode("gbk"))
    assert "is not UTF-8, and is read as GB18030" in capsys.readouterr().out


@pytest.mark.parametrize(
    "label, number",
    [
        ("#### 7", 7),
        ("1 支\n#### -5", -5),
        ("7", 7),
        (numpy.float32(0.1), 0.1),
        ("1e3", 1000),
        ("1e999", None),
        ("####", None),
    ],
)
def test_labels(label, number):
    found = read_label(label)
    assert found is number is None or float(found) == pytest.approx(number)


WORDS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"question"',
    b'"answer"',
    b":",
    b",",
    b"\n",
    b'"',
    b"\xff",
    b"\0",
    b"7",
    "小".encode(),
    b"\t",
]
BYTES = st.binary(max_size=200) | st.lists(st.sampled_from([*WORDS, *b"question,answer\n".splitlines(True)])).map(
    b"".join
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BYTES, st.sampled_from(["q.jsonl", "q.json", "q.csv", "q.tsv", "q.parquet", "q.txt"]), st.booleans())
@example(b'"question"', "q.json", False)
@example(b"\xff\xfe", "q.csv", True)
def test_no_bytes_of_any_file_raise_anything_else(load, tmp_path, content, name, damaged):
    """Any bytes; and good files with these bytes in the middle."""
    if damaged:
        good = {
            "q.parquet": parquet({"question": [A, B], "answer": [7, 2]}),
            "q.csv": CSV.encode(),
            "q.json": ARRAY.encode(),
        }
        whole = good.get(name, JSONL.encode())
        content = whole[: len(whole) // 2] + content + whole[len(whole) // 2 :]
    for read in (lambda: load(name, content), lambda: read_questions(str(tmp_path / name))):
        try:
            read()
        except UserError as error:
            assert str(error).isprintable()
