"""data.py: what it makes of good sets, and one sentence for each bad one."""

import json

import pandas
import pytest
from transformers import AutoTokenizer

from data import SYSTEM_PROMPT, load_questions, train_and_test_splits
from support.errors import UserError

GOOD = {"question_zh-cn": "1加1等于几？", "answer_only": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tiny")


@pytest.fixture
def write(tmp_path):
    def write(rows, name="questions.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def load(dataset, tokenizer, split="train", max_prompt_length=512):
    return load_questions(dataset, split, tokenizer, max_prompt_length)


def test_prompt_and_answer(tokenizer, write):
    questions = load(write([GOOD]), tokenizer)
    assert questions.column_names == ["prompt", "answer"]
    assert questions[0] == {
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "1加1等于几？"}],
        "answer": "2",
    }


def test_a_folder_has_its_two_splits(tokenizer):
    assert train_and_test_splits("tiny/questions") == ("train", "test")
    assert len(load("tiny/questions", tokenizer, "train")) == 2000
    assert len(load("tiny/questions", tokenizer, "test")) == 300


def test_the_shipped_splits_are_disjoint(tokenizer):
    train, test = (load("tiny/questions", tokenizer, split) for split in ("train", "test"))
    asked = [{prompt[-1]["content"] for prompt in split["prompt"]} for split in (train, test)]
    assert [len(questions) for questions in asked] == [2000, 300]
    assert not asked[0] & asked[1]


def test_the_last_tenth_of_a_file_is_held_out(tokenizer, write):
    path = write([GOOD | {"answer_only": n} for n in range(20)])
    train, test = (load(path, tokenizer, split)["answer"][:] for split in train_and_test_splits(path))
    assert train == [str(n) for n in range(18)] and test == ["18", "19"]


def test_csv_and_parquet(tokenizer, tmp_path):
    frame = pandas.DataFrame([GOOD, GOOD | {"answer_only": 3}])
    frame.to_csv(tmp_path / "questions.csv", index=False)
    frame.to_parquet(tmp_path / "questions.parquet")
    for name in ("questions.csv", "questions.parquet"):
        assert load(str(tmp_path / name), tokenizer)["answer"][:] == ["2", "3"]


@pytest.mark.parametrize(
    "label, answer", [("1,080", "1080"), (1080.5, "1080.5"), (-5, "-5"), (1e16, "10000000000000000")]
)
def test_labels_of_any_type_become_strings(tokenizer, write, label, answer):
    assert load(write([GOOD | {"answer_only": label}]), tokenizer)[0]["answer"] == answer


def test_long_prompts_are_dropped_and_counted(tokenizer, write, capsys):
    path = write([GOOD, GOOD | {"question_zh-cn": "1" * 300}])
    assert len(load(path, tokenizer, max_prompt_length=200)) == 1
    assert "dropped 1 of 2 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row",
    [
        {"question": "1加1", "answer": "2", "answer_number": 2},  # MGSM
        {"problem": "1加1", "label": 2},
        {"问题": "1加1", "答案": "2"},
        {
            "question": "one and one",
            "question_zh-cn": "1加1",
            "answer": "1 + 1 = 2 #### 2",
            "answer_only": 2,
        },  # the hub set
    ],
)
def test_accepted_columns(tokenizer, write, row):
    question = load(write([row]), tokenizer)[0]
    assert question["prompt"][-1]["content"] == "1加1" and question["answer"] == "2"


def test_the_system_prompt_is_the_one_asked_for(tokenizer, write):
    (question,) = load_questions(write([GOOD]), "train", tokenizer, 256, "答：")
    assert question["prompt"][0] == {"role": "system", "content": "答："}


BAD = [
    ([{"题": "1加1", "answer_only": 2}], ["question_zh-cn", "题, answer_only", "Rename"], "no question column"),
    ([{"question_zh-cn": "1加1"}], ["answer_only", "Rename"], "no answer column"),
    ([{"a": 1}], ["no column question_zh-cn or", "it has a."], "neither column"),
    ([GOOD, GOOD | {"answer_only": "两个"}], ["row 2", "'两个'", "not one number"], "a label that is no number"),
    ([GOOD | {"answer_only": "1 或 2"}], ["row 1", "not one number"], "a label with two numbers"),
    ([GOOD, GOOD | {"answer_only": None}], ["row 2", "None"], "no label"),
    ([GOOD | {"answer_only": True}], ["row 1", "True"], "a truth value"),
    ([GOOD | {"answer_only": [2]}], ["row 1", "[2]"], "a list"),
    ([GOOD | {"question_zh-cn": "  "}], ["row 1", "no question"], "a blank question"),
    ([GOOD | {"question_zh-cn": "1" * 900}], ["512 tokens", "max_prompt_length: raise it"], "only long questions"),
]


@pytest.mark.parametrize("rows, words, why", BAD, ids=[why for _, _, why in BAD])
def test_bad_rows(tokenizer, write, rows, words, why):
    with pytest.raises(UserError) as error:
        load(write(rows), tokenizer)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_bad_files(tokenizer, write, tmp_path):
    (tmp_path / "broken.jsonl").write_text("not json\n")
    (tmp_path / "empty.csv").write_text("question_zh-cn,answer_only\n")
    pandas.DataFrame({name: [] for name in GOOD}).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "text.txt").write_text("1加1")
    (tmp_path / "text.doc").write_text("1加1")
    (tmp_path / "folder").mkdir()
    write([GOOD], "folder/train.jsonl")
    for dataset, split, words in [
        (str(tmp_path / "missing.jsonl"), "train", ["there is no file or folder", "missing.jsonl"]),
        (str(tmp_path / "broken.jsonl"), "train", ["cannot load", "broken.jsonl"]),
        (str(tmp_path / "empty.csv"), "train", ["empty.csv has no questions in its split train."]),
        (str(tmp_path / "empty.parquet"), "train[:90%]", ["has no questions", "five questions or more"]),
        (write([GOOD] * 4, "four.jsonl"), "train[90%:]", ["has no questions", "last tenth is held out"]),
        (str(tmp_path / "text.txt"), "train", ["no column answer_only"]),
        (str(tmp_path / "text.doc"), "train", ["cannot read", ".jsonl"]),
        (str(tmp_path / "folder"), "test", ["cannot load the split test"]),
    ]:
        with pytest.raises(UserError) as error:
            load(dataset, tokenizer, split)
        assert all(word in str(error.value) for word in words), error.value
        assert "\n" not in str(error.value)


def test_a_hub_set_that_cannot_be_reached(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot load nobody/nothing from the Hugging Face hub.*--dataset"):
        load("nobody/nothing", tokenizer)
