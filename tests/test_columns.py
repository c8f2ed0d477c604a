"""--question_column and --answer_column: a set whose columns have other names, and what is said of a wrong one."""

import json
import sys
from dataclasses import asdict

import pytest
from datasets import Dataset, DatasetDict
from test_runs import in_process, one_line
from transformers import AutoTokenizer

import infer
from data import Columns, columns_named, load_from_hub, load_questions, read_questions, train_and_test_splits
from support.errors import UserError
from support.resuming import check_same_run
from support.settings import Recipe

# `question` and `answer` are there, but they are something else
ROWS = [{"文 本": f"1加{i}等于几？", "结果": 1 + i, "question": f"one and {i}", "answer": 0} for i in range(20)]
OWN = columns_named("文 本", "结果")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny")


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def first(dataset, tokenizer, columns, split="train"):
    row = load_questions(dataset, split, tokenizer, 256, columns=columns)[0]
    return row["prompt"][-1]["content"], row["answer"]


def test_the_named_columns_are_taken(tokenizer, tmp_path):
    file = write(tmp_path / "q.jsonl")
    assert first(file, tokenizer, OWN) == ("1加0等于几？", "1")
    assert first(file, tokenizer, columns_named("", "结果")) == ("one and 0", "1")
    assert first(file, tokenizer, columns_named("文_本", "")) == (
        "1加0等于几？",
        "0",
    )  # names are compared as everywhere
    assert first(file, tokenizer, columns_named("", "")) == first(file, tokenizer, Columns()) == ("one and 0", "0")


def test_in_every_kind_of_set(tokenizer, tmp_path, monkeypatch):
    rows = [{"文 本": row["文 本"], "结果": row["结果"]} for row in ROWS]
    (tmp_path / "folder").mkdir()
    for name in ("train", "test"):
        write(tmp_path / "folder" / f"{name}.jsonl", rows)
    lines = ["文 本;结果", *(f"{row['文 本']};{row['结果']}" for row in rows)]
    (tmp_path / "q.csv").write_text("\n".join(lines), encoding="utf-8")
    asked = []

    def load_dataset(name, configuration=None, revision=None):
        asked.append((name, configuration))
        return DatasetDict({split: Dataset.from_list(rows) for split in ("train", "test")})

    monkeypatch.setattr("data.load_dataset", load_dataset)
    load_from_hub.cache_clear()
    for dataset in (str(tmp_path / "folder"), str(tmp_path / "q.csv"), "somebody/set:zh"):
        split, _ = train_and_test_splits(dataset, OWN)
        assert first(dataset, tokenizer, OWN, split) == ("1加0等于几？", "1")
    assert set(asked) == {("somebody/set", "zh")}
    load_from_hub.cache_clear()


def test_a_wrong_name_lists_those_that_there_are(tokenizer, tmp_path):
    file = write(tmp_path / "q.jsonl")
    for columns, name in ((columns_named("题", ""), "题"), (columns_named("文 本", "得数"), "得数")):
        with pytest.raises(UserError, match=f"has no column {name}: it has 文 本, 结果, question, answer") as error:
            first(file, tokenizer, columns)
        one_line(error)


def test_another_file_may_have_the_usual_names(tmp_path):
    columns = columns_named("文 本", "结果", others=True)
    own, usual = write(tmp_path / "own.jsonl"), write(tmp_path / "usual.jsonl", [{"question": "2加2", "answer": 4}])
    assert read_questions(own, columns) == ([row["文 本"] for row in ROWS], [row["结果"] for row in ROWS])
    assert read_questions(usual, columns) == (["2加2"], [4])


def test_a_run_and_infer_with_them(monkeypatch, tmp_path, capsys):
    """infer.py finds them in the recipe beside the adapter; another file may have the usual names."""
    file, out = write(tmp_path / "q.jsonl"), tmp_path / "out"
    columns = ["--question_column", "文 本", "--answer_column", "结果"]
    in_process(monkeypatch, "--dataset", file, *columns, "--max_steps", 1, "--output_dir", out)
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert all(sample["question"].startswith("1加") for sample in samples)
    usual = write(tmp_path / "usual.jsonl", [{"question": "2加2等于几？", "answer": 4}])
    for evaluated, n in (("test", 2), (usual, 1), (file, 20)):
        arguments = ["--adapter", out / "adapter", "--eval", evaluated, "--max_new_tokens", 4, "--json", out / "e.json"]
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
        infer.main()
        assert json.loads((out / "e.json").read_text())["n"] == n
        said = "".join(capsys.readouterr())
        assert ("was trained on most of these" in said) == (evaluated is file)


def test_a_run_keeps_its_columns(tmp_path):
    recipe = Recipe(question_column="文 本")
    with pytest.raises(UserError, match="belongs to a run with question_column '', not '文 本'"):
        check_same_run(recipe, tmp_path, asdict(Recipe()))
