"""--rewards FILE.py: the user's functions, labels and prompt in place of ours; and every way such a file can fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_runs import EVALUATION, in_process, jsonl, one_line

import infer
import train_grpo
from data import SYSTEM_PROMPT, Columns, load_questions, read_questions
from rewards import is_correct
from support import asking
from support.errors import UserError
from support.evaluation import Completion, evaluate, majority
from support.picture import draw_reward_curve
from support.resuming import flaw
from support.rules import OURS, RewardsError, load_rules
from support.settings import load_recipe, parse_recipe

CHOICE = ["--rewards", "examples/multiple_choice.py", "--dataset", "examples/multiple_choice.jsonl"]
CHOICE += ["--max_prompt_length", "320"]  # the tiny tokenizer has few of its characters
GOOD = "def good(completions, **kwargs):\n    return [float(len(c[-1]['content']) % 3) for c in completions]\n"
TAIL = "REWARD_FUNCS = [good]\n"


def answer(text):
    return f"<reasoning>\n…\n</reasoning>\n<answer>\n{text}\n</answer>"


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def asked(monkeypatch, capsys, *arguments):
    """What infer.py prints."""
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
    capsys.readouterr()
    infer.main()
    return capsys.readouterr().out


# --- what a file says ----------------------------------------------------------------------------------


def test_without_a_file_the_rules_are_ours():
    assert load_rules("") is OURS and OURS.digest is None
    assert OURS.is_correct is is_correct and sum(OURS.maxima.values()) == 4.0


def test_a_file_of_one_function(write):
    """The text inside <answer> is right where it is the label, and any text is a label."""
    rules = load_rules(write(GOOD + TAIL))
    assert rules.names == ["good"] and rules.maxima == {} and rules.system_prompt is None
    assert rules.is_correct(answer(" 北京 "), "北京") and not rules.is_correct("北京", "北京")
    assert rules.check_label(" B ") == "B" and rules.check_label(3) == "3"
    for empty in ("", "  ", None, float("nan")):
        with pytest.raises(ValueError, match="which is no label: it is empty"):
            rules.check_label(empty)
    with pytest.raises(ValueError, match="not in UTF-8"):
        rules.check_label("a\udcff")
    assert rules.funcs[0](prompts=[], completions=messages("ab", "abc"), answer=["", ""]) == [2.0, 0.0]


def test_all_that_a_file_may_have():
    rules = load_rules("examples/multiple_choice.py")
    assert rules.maxima == {"correct_reward": 2.0, "letter_reward": 0.5, "tags_reward": 0.5}
    assert rules.is_correct(answer("(b)"), "B") and not rules.is_correct(answer("A B"), "B")
    assert rules.check_label("c.") == "C"
    best = [func(prompts=[], completions=messages(answer("B")), answer=["B"])[0] for func in rules.funcs]
    assert best == list(rules.maxima.values())


def test_a_file_that_takes_our_is_correct_has_numbers_for_labels():
    rules = load_rules("examples/length_bonus.py")
    assert rules.is_correct is is_correct and rules.vote is OURS.vote and rules.is_lenient is OURS.is_lenient
    assert rules.check_label("#### 1,080") == "1080"
    with pytest.raises(ValueError, match="^which is not one number$"):
        rules.check_label("B")
    assert len(rules.funcs) == 6 and sum(rules.maxima.values()) == 4.0 + rules.maxima["length_bonus"]


def test_chinese_is_paid_for_beside_our_five_where_the_question_is_not_in_english():
    rules = load_rules("examples/in_chinese.py")
    texts = [
        f"<reasoning>\n{why}\n</reasoning>\n<answer>\n72\n</answer>"
        for why in ("一共72杯", "72 cups in all", "70+2=72")
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    for question, expected in [("一共多少杯？", [4.5, 4.0, 4.5]), ("How many cups in all?", [4.5, 4.5, 4.5])]:
        prompts = [[{"role": "user", "content": question}]] * 3
        earned = [func(prompts=prompts, completions=completions, answer=["72"] * 3) for func in rules.funcs]
        assert [sum(each) for each in zip(*earned, strict=True)] == expected
    assert sum(rules.maxima.values()) == 4.5 and rules.is_correct is is_correct


def test_the_prompt_of_the_recipe_or_a_flag_wins_over_the_files_which_wins_over_ours(write, tmp_path, monkeypatch):
    mine = write(GOOD + TAIL + "SYSTEM_PROMPT = '答案：'")
    assert parse_recipe(["--rewards", mine]).system_prompt == "答案："
    assert parse_recipe(["--rewards", write(GOOD + TAIL, "other.py")]).system_prompt == SYSTEM_PROMPT
    assert parse_recipe(["--rewards", mine, f"--system_prompt={SYSTEM_PROMPT}"]).system_prompt == SYSTEM_PROMPT
    assert parse_recipe(["--rewards", mine, "--system-prompt", "问："]).system_prompt == "问："
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rewards: mine.py\nsystem_prompt: 问：\n", encoding="utf-8")
    assert parse_recipe([f"--config={recipe}"]).system_prompt == "问："
    recipe.write_text("rewards: mine.py\n", encoding="utf-8")
    assert parse_recipe(["--config", "recipes/t4.yaml", "--rewards", mine]).system_prompt == "答案："
    assert load_recipe(recipe).system_prompt == "答案：" and load_recipe(recipe).rewards == mine  # beside the recipe
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.py").write_text(GOOD + TAIL)
    monkeypatch.chdir(other)  # a flag means what lies here, and a recipe what lies beside it
    assert parse_recipe(["--config", str(recipe), "--rewards", "mine.py"]).rewards == "mine.py"
    assert load_recipe(recipe).rewards == mine


def test_figures_of_answers_that_are_no_numbers(write):
    rules = load_rules(write(GOOD + TAIL))
    texts = [answer("B"), "选 B", "the answer is (B)", answer("C"), "ABC", "<answer>\nB", answer("B。")]
    result = evaluate([Completion(text, range(10), False) for text in texts], ["B"] * 7, rules=rules)
    assert set(result) >= EVALUATION
    assert (result["strict"], result["lenient"], result["format"]) == (1 / 7, 5 / 7, 3 / 7)


def test_what_is_correct_is_lenient_too(write):
    rules = load_rules(write(GOOD + TAIL + "def is_correct(text, label):\n    return '乙' in text and label == 'B'"))
    assert rules.is_lenient("乙", "B") and not rules.is_lenient("甲", "B")


def test_the_majority_of_answers_that_are_no_numbers(write):
    rules = load_rules(write(GOOD + TAIL))
    assert majority([answer("A"), answer("B "), answer("B")], rules) == "B"
    assert majority(["so\n\\boxed{x}", "\\boxed{y}", "\\boxed{y}"], rules) == "\\boxed{y}"
    assert majority(["", " \n"], rules) is None
    texts = [answer(x) for x in "BBACCB"]
    result = evaluate([Completion(text, range(1), False) for text in texts], ["B", "C"], samples=3, rules=rules)
    assert result["maj@3"] == 1.0 and result["pass@1"] == pytest.approx(4 / 6)


# --- labels ------------------------------------------------------------------------------------------


def test_a_label_that_is_refused_names_the_row(monkeypatch, tmp_path):
    lines = [json.dumps({"question": f"第{i}题", "answer": "E" if i == 7 else "A"}) for i in range(20)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match="row 8 .*bad.jsonl.* has 'E' in answer, .*none of A, B, C and D: correct"
    ) as error:
        in_process(monkeypatch, *CHOICE, "--dataset", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "out")
    one_line(error)


def test_the_column_of_labels_is_the_one_that_check_label_takes(tmp_path):
    """`answer_only` comes before `answer` in the list of names, but holds none of the letters."""
    (tmp_path / "q.jsonl").write_text('{"question": "一", "answer_only": 1, "answer": "b"}\n' * 4)
    rules = load_rules("examples/multiple_choice.py")
    tokenizer = train_grpo.AutoTokenizer.from_pretrained("tiny")
    found = load_questions(
        str(tmp_path / "q.jsonl"), "train", tokenizer, 512, columns=Columns(check_label=rules.check_label)
    )
    assert found["answer"][:] == ["B"] * 4
    assert read_questions(str(tmp_path / "q.jsonl"), Columns(check_label=rules.check_label))[1] == ["B"] * 4
    assert read_questions(str(tmp_path / "q.jsonl"))[1] == [1] * 4


def test_a_label_that_is_refused_in_a_file_to_ask_is_unknown(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text('{"question": "一", "answer": "A"}\n{"question": "二", "answer": "E"}\n')
    columns = Columns(check_label=load_rules("examples/multiple_choice.py").check_label)
    labels = read_questions(str(tmp_path / "q.jsonl"), columns)[1]
    assert labels == ["A", None] and "none of A, B, C and D: taken as unknown" in capsys.readouterr().out


# --- files that cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("x = 1\ndef good(:\n", "mine.py, line 2: this is not Python: invalid syntax"),
        ("x = '\0'", "this is not Python"),
        ("x = 1\ny = 1 / 0\n", "mine.py, line 2: ZeroDivisionError: division by zero. Installed packages"),
        ("\nimport nothing_like_it\n", "line 2: ModuleNotFoundError: No module named 'nothing_like_it'. Installed"),
        ("def f():\n    raise ValueError('no')\nf()", "mine.py, line 2: ValueError: no"),
        ("import sys\nsys.exit(3)", "mine.py, line 2: SystemExit: 3"),
        (GOOD, "mine.py has no list REWARD_FUNCS of reward functions. TRL calls .*prompts, completions, answer"),
        (GOOD + "REWARD_FUNCS = good", "has no list REWARD_FUNCS"),
        (GOOD + "REWARD_FUNCS = []", "has no list REWARD_FUNCS"),
        (GOOD + "REWARD_FUNCS = [good, 'a/model']", "REWARD_FUNCS holds 'a/model', which is no function. TRL calls"),
        (GOOD + "REWARD_FUNCS = [good, good]", "REWARD_FUNCS has 2 functions good: .* give it another"),
        (GOOD + "good.__name__ = 'answer'\n" + TAIL, "REWARD_FUNCS has a function answer: .* give it another"),
        (GOOD + TAIL + "MAX_REWARDS = [1, 2]", "MAX_REWARDS is 2 values for 1 REWARD_FUNCS"),
        (GOOD + TAIL + "MAX_REWARDS = 1", "MAX_REWARDS is 1 for 1 REWARD_FUNCS"),
        (GOOD + TAIL + "MAX_REWARDS = ['a']", "MAX_REWARDS holds 'a'"),
        (GOOD + TAIL + "SYSTEM_PROMPT = 3", "SYSTEM_PROMPT is 3: give a text"),
        (GOOD + TAIL + "is_correct = 3", "is_correct is 3: give a function"),
    ],
)
def test_a_file_that_cannot_be_used(write, text, words):
    with pytest.raises(RewardsError, match=words) as error:
        load_rules(write(text))
    one_line(error)


def test_a_file_that_cannot_be_read(write, tmp_path, monkeypatch):
    for name, reason in (("none.py", "No such file"), ("", "Is a directory")):
        with pytest.raises(RewardsError, match=f"cannot read the rewards {tmp_path}.*{reason}") as error:
            in_process(monkeypatch, "--rewards", tmp_path / name, "--output_dir", tmp_path / "out")
        one_line(error)
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff\xfe'\n")
    with pytest.raises(RewardsError, match="bytes.py.*: this is not Python: .*utf-8"):
        load_rules(str(tmp_path / "bytes.py"))


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise KeyError('x')", "mine.py, line 2, in bad: KeyError: 'x'. TRL calls a reward function as"),
        ("return [1.0]", "mine.py, line 1: bad gave 1 values for 2 completions. TRL"),
        ("return [1.0, 'two']", "mine.py, line 1: bad gave 'two', which is no finite number. TRL"),
        ("return [1.0, float('nan')]", "bad gave nan, which is no finite number"),
        ("return [1.0, [2.0]]", "bad gave .2.0., which is no finite number"),
        ("pass", "mine.py, line 1: bad gave None, and no list. TRL"),
        ("return 1.0", "mine.py, line 1: bad gave 1.0, and no list. TRL"),
        ("return (1 / 0 for c in completions)", "mine.py, line 2, in bad: ZeroDivisionError"),
    ],
)
def test_a_function_that_fails(write, body, words):
    rules = load_rules(write(f"def bad(completions, **kwargs):\n    {body}\nREWARD_FUNCS = [bad]"))
    with pytest.raises(RewardsError, match=words) as error:
        rules.funcs[0](prompts=[], completions=messages("a", "b"), answer=["", ""])
    one_line(error)


def test_a_function_with_other_arguments(write):
    rules = load_rules(write("\ndef bad(texts):\n    return [1.0]\nREWARD_FUNCS = [bad]"))
    with pytest.raises(RewardsError, match="mine.py, line 2, in bad: TypeError: .*unexpected keyword.*TRL calls"):
        rules.funcs[0](prompts=[], completions=messages("a"), answer=[""])


def test_numbers_of_numpy_and_torch_are_numbers(write):
    text = "import numpy, torch\ndef good(completions, **kwargs):\n    return {}\n" + TAIL
    for given in (
        "numpy.array([1, 2])",
        "torch.tensor([1.0, 2.0])",
        "[torch.tensor(1.0), numpy.float32(2)]",
        "(True, 2)",
    ):
        rules = load_rules(write(text.format(given)))
        assert rules.funcs[0](prompts=[], completions=messages("a", "b"), answer=["", ""]) == [1.0, 2.0]


def test_a_completion_that_no_function_gives_a_number(write):
    two = "def one(completions, **_):\n    return [1.0, None]\ndef two(completions, **_):\n    return [None, None]\n"
    rules = load_rules(write(two + "REWARD_FUNCS = [one, two]"))
    with pytest.raises(RewardsError, match="one and two gave None for completion 2 of a step") as error:
        rules.check_rewarded({"one": [1.0, None], "two": [None, None]})
    one_line(error)
    rules.check_rewarded({"one": [1.0, None], "two": [None, 2.0]})


@pytest.mark.parametrize(
    "text, call, words",
    [
        (
            "def is_correct(text, label):\n    return text[9]",
            "is_correct",
            "line 5, in is_correct: IndexError.*True or False",
        ),
        (
            "def check_label(label):\n    return label.x",
            "check_label",
            "line 5, in check_label: AttributeError.*ValueError",
        ),
        (
            "def check_label(label):\n    return 3",
            "check_label",
            "check_label gave 3 for 'B'. A check_label.label. gives the",
        ),
    ],
)
def test_a_rule_that_fails(write, text, call, words):
    rules = load_rules(write(GOOD + TAIL + text))
    with pytest.raises(RewardsError, match=words) as error:
        rules.is_correct("B", "B") if call == "is_correct" else rules.check_label("B")
    one_line(error)


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def choice_run(tmp_path_factory):
    """examples/multiple_choice.py for two steps, from a copy that is deleted afterwards, in a folder that is moved."""
    root = tmp_path_factory.mktemp("choice")
    shutil.copy("examples/multiple_choice.py", root / "mine.py")
    said = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in ("train_grpo", "support.step_report", "support.rules"):
            monkeypatch.setattr(f"{module}.say", said.append)
        arguments = [*CHOICE, "--rewards", root / "mine.py", "--max_steps", 2, "--save_steps", 1, "--sample_steps", 2]
        in_process(monkeypatch, *arguments, "--output_dir", root / "made")
    (root / "mine.py").rename(root / "gone.py")
    (root / "made").rename(root / "moved")
    return root / "moved", "\n".join(said)


def test_multiple_choice_is_trained(choice_run):
    out, said = choice_run
    assert "mine.py: correct_reward (at best 2), letter_reward (at best 0.5), tags_reward (at best 0.5)" in said
    assert "questions   33 to train on, 3 to develop on, 4 held out" in said
    assert " = correct_reward 0." in said and "; rewards: correct_reward 0, letter_reward " in said
    for line in jsonl(out / "metrics.jsonl"):
        parts = [line[f"rewards/{name}"] for name in ("correct_reward", "letter_reward", "tags_reward")]
        assert line["reward"] == pytest.approx(sum(parts), abs=1e-5)
    sample = jsonl(out / "samples.jsonl")[0]
    assert list(sample) == [
        "step",
        "question",
        "completion",
        "answer",
        "correct_reward",
        "letter_reward",
        "tags_reward",
    ]
    assert sample["answer"] in "ABCD"
    assert set(json.loads((out / "eval.json").read_text())["after"]) > EVALUATION


def test_the_file_is_copied_beside_the_adapter(choice_run):
    out, _ = choice_run
    assert (out / "own_rewards.py").read_bytes() == Path("examples/multiple_choice.py").read_bytes()
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.rewards == str(out / "own_rewards.py")
    assert recipe.system_prompt.startswith("下面是一道选择题")


def test_the_picture(choice_run):
    out, _ = choice_run
    draw_reward_curve(out, load_rules(str(out / "own_rewards.py")).maxima)
    assert (out / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    draw_reward_curve(out, {})


def test_infer_measures_with_the_copy(choice_run, monkeypatch, capsys, tmp_path):
    out, _ = choice_run
    arguments = ["--adapter", out / "adapter", "--eval", "test", "--json", tmp_path / "e.json"]
    said = asked(monkeypatch, capsys, *arguments, "--rewards")
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (
        set(figures.pop("rewards")) == {"correct_reward", "letter_reward", "tags_reward"} and "letter_reward " in said
    )
    assert figures == json.loads((out / "eval.json").read_text())["after"]


def test_infer_asks_with_the_copy(choice_run, monkeypatch, capsys, tmp_path):
    out, _ = choice_run
    ask = ["--adapter", out / "adapter", "--rewards", "--max_new_tokens", 8, "--samples", 2]
    said = asked(monkeypatch, capsys, *ask, "--expected", "b", "1加1")
    assert said.count(": correct_reward 0.0, letter_reward ") == 2 and "majority" in said
    assert "correct_reward unknown, letter_reward 0" in asked(monkeypatch, capsys, *ask, "1加1")
    with pytest.raises(UserError, match="--expected is 7, which is no label: it is none of A, B, C and D.") as error:
        asked(monkeypatch, capsys, *ask, "--expected", "7", "1加1")
    one_line(error)
    (tmp_path / "q.jsonl").write_text('{"question": "一", "answer": "a"}\n')
    asked(monkeypatch, capsys, *ask, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "o.jsonl")
    (record,) = jsonl(tmp_path / "o.jsonl")
    assert record["expected"] == "A" and record["correct"] is False
    assert record["rewards"][0]["correct_reward"] == 0.0 and record["rewards_sha256"]


def test_an_adapter_whose_file_is_not_there(choice_run, monkeypatch, capsys, tmp_path):
    out, _ = choice_run
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    shutil.copy(out / "recipe.yaml", tmp_path)
    with pytest.raises(UserError, match="cannot read the rewards own_rewards.py: No such file"):
        asked(monkeypatch, capsys, "--adapter", tmp_path / "adapter", "1加1")


def test_resumed_with_another_content_it_is_another_run(choice_run, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(choice_run[0], out)
    again = [*CHOICE, "--output_dir", out, "--max_steps", 3, "--resume"]
    other = tmp_path / "other.py"
    other.write_bytes(Path("examples/multiple_choice.py").read_bytes() + b"\n")
    before = (out / "metrics.jsonl").read_bytes()
    words = "checkpoint-2 belongs to a run with the rewards of .*/own_rewards.py, and not with "
    with pytest.raises(UserError, match=words + "what .*other.py holds now: continue it with --rewards") as error:
        in_process(monkeypatch, *again, "--rewards", other)
    one_line(error)
    with pytest.raises(UserError, match=words + "ours: continue it with --rewards .*own_rewards.py, or start another"):
        in_process(monkeypatch, "--output_dir", out, "--resume")
    assert (out / "metrics.jsonl").read_bytes() == before
    in_process(monkeypatch, *again)  # the same content under another name
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--config", str(out / "recipe.yaml"), "--output_dir", str(out)])
    sys.argv += ["--resume", "--max_steps", "4"]  # as the printed command is: with the copy
    train_grpo.main()
    assert len(jsonl(out / "metrics.jsonl")) == 4 and load_recipe(out / "recipe.yaml").rewards.startswith(str(out))


def test_answers_that_all_earn_the_same_teach_nothing(write, monkeypatch, tmp_path):
    """The mean of eight 3.7 is not 3.7 in float32: TRL divides the difference by 1e-4."""
    mine = write("def same(completions, **kwargs):\n    return [3.7] * len(completions)\nREWARD_FUNCS = [same]")
    arguments = ["--num_generations", 8, "--micro_batch_size", 8, "--max_steps", 2, "--dev_samples", 0]
    in_process(monkeypatch, "--rewards", mine, *arguments, "--output_dir", tmp_path / "out")
    lines = jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [line["frac_reward_zero_std"] for line in lines] == [1, 1]
    assert [line["grad_norm"] for line in lines] == [0, 0]


FAILS = GOOD + "def fails(completions, answer, **kwargs):\n    if kwargs['trainer_state'].global_step == 2:\n"
FAILS += "        return [1 / 0 for label in answer]\n    return [0.0 if c else None for c in completions]\n"
FAILS += "REWARD_FUNCS = [good, fails]\nfrom rewards import is_correct\n"


def test_a_function_that_fails_on_the_way_leaves_a_checkpoint_and_may_be_mended(write, monkeypatch, tmp_path, capsys):
    out, mine = tmp_path / "out", write(FAILS)
    run = ["--rewards", mine, "--output_dir", out, "--save_steps", 2, "--max_steps", 3]
    words = (
        r"mine.py, line 5, in fails: ZeroDivisionError: division by zero. TRL calls .* The checkpoint of step 2 is in "
    )
    with pytest.raises(UserError, match=words + ".* Mend it, then: .*--rewards .*mine.py --resume$") as error:
        in_process(monkeypatch, *run)
    one_line(error)
    assert not flaw(out / "checkpoint-2") and error.value.__cause__ is None  # no lines of the log under it
    write(FAILS.replace("1 / 0", "0"))
    in_process(monkeypatch, *run, "--resume")
    assert f"changed     {mine}, which failed after step 2" in capsys.readouterr().out
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == [1, 2, 3]
    assert b"1 / 0" not in (out / "own_rewards.py").read_bytes()


def test_a_function_that_fails_in_the_first_step_of_a_resumed_run_may_be_mended(write, monkeypatch, tmp_path):
    out, mine = tmp_path / "out", write(FAILS)
    run = ["--rewards", mine, "--output_dir", out, "--save_steps", 2, "--dev_samples", 0, "--max_steps"]
    in_process(monkeypatch, *run, 2)
    with pytest.raises(UserError, match="ZeroDivisionError: .* Mend it, then: .* --max_steps 3 --resume$") as error:
        in_process(monkeypatch, *run, 3, "--resume")
    one_line(error)
    write(FAILS.replace("1 / 0", "0"))
    in_process(monkeypatch, *run, 3, "--resume")
    assert [line["step"] for line in jsonl(out / "metrics.jsonl")] == [1, 2, 3]


def test_an_evaluation_that_fails_after_training_is_made_again(write, monkeypatch, tmp_path):
    out = tmp_path / "out"
    calls = "calls = []\ndef is_correct(text, label):\n    calls.append(1)\n    return bool(1 / {})\n"
    mine = write(GOOD + TAIL + calls.format("(len(calls) <= 30)"))  # 10 questions, for two accuracies and answers.jsonl
    run = ["--output_dir", out, "--max_steps", 1, "--dev_samples", 0, "--rewards", mine]
    with pytest.raises(UserError, match="in is_correct: ZeroDivisionError.*The checkpoint of step 1 is in .*Mend it"):
        in_process(monkeypatch, *run)
    write(GOOD + TAIL + calls.format("1"))
    in_process(monkeypatch, *run, "--resume")
    evaluations = json.loads((out / "eval.json").read_text())
    assert evaluations["before"]["strict"] == evaluations["after"]["strict"] == 1.0  # by the mended rule, both


def test_a_function_that_fails_in_the_first_step(write, monkeypatch, tmp_path):
    mine = write("def bad(completions, **kwargs):\n    return [None] * len(completions)\nREWARD_FUNCS = [bad]")
    with pytest.raises(RewardsError, match="bad gave None for completion 1 of a step") as error:
        in_process(monkeypatch, "--rewards", mine, "--output_dir", tmp_path / "out", "--max_steps", 1)
    one_line(error)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_function_that_leaves_out_completions(write, monkeypatch, tmp_path):
    """None is no reward and counts for nothing; of a step without any there is none to print."""
    half = "def half(completions, **kwargs):\n    return [None] * len(completions)\n"
    mine = write(GOOD + half + "REWARD_FUNCS = [good, half]")
    out = tmp_path / "out"
    in_process(monkeypatch, "--rewards", mine, "--output_dir", out, "--max_steps", 1)
    (line,) = jsonl(out / "metrics.jsonl")
    assert line["rewards/half"] is None and line["reward"] == line["rewards/good"]
    draw_reward_curve(out, {})


def test_check_tries_the_functions(write, monkeypatch, tmp_path, capsys):
    in_process(monkeypatch, "--check", *CHOICE, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert "rewards     examples/multiple_choice.py: correct_reward" in said and said.endswith("check passed\n")
    assert (
        "rewards     correct_reward 0, letter_reward 0, tags_reward 0\n            the same for all answers: if" in said
    )
    in_process(monkeypatch, "--check", "--rewards", write(GOOD + TAIL), "--output_dir", tmp_path / "out1")
    assert "rewards     good 0 to 2\n" in capsys.readouterr().out
    mine = write(FAILS.replace("== 2", "== 0"))
    with pytest.raises(UserError, match=r"check failed \(step\): .*mine.py, line 5, in fails: ZeroDivisionError"):
        in_process(monkeypatch, "--check", "--rewards", mine, "--output_dir", tmp_path / "out2")
    assert str(tmp_path) not in (tmp_path / "out2" / "check.json").read_text()


def test_the_length_bonus_is_hacked_and_the_run_says_so(monkeypatch, tmp_path, capsys):
    """Within a few steps answers earn more and are right less often."""
    steps = ["--max_steps", 16, "--prompts_per_step", 4, "--num_generations", 8, "--micro_batch_size", 32]
    arguments = ["--rewards", "examples/length_bonus.py", "--max_completion_length", 64, *steps, "--eval_steps", 8]
    arguments += ["--dev_samples", 100, "--learning_rate", 4e-3, "--output_dir", tmp_path]
    in_process(monkeypatch, *arguments)
    lines = jsonl(tmp_path / "metrics.jsonl")
    first, last = lines[:5], lines[-5:]
    for key in ("rewards/length_bonus", "reward"):
        assert sum(line[key] for line in last) > 1.1 * sum(line[key] for line in first), key
    said = capsys.readouterr().out
    assert "warning     the reward rises" in said and "the rewards pay for something else than right answers" in said
    accuracies = [line["strict"] for line in jsonl(tmp_path / "evaluations.jsonl")]
    assert accuracies[-1] < 0.6 * accuracies[0]


def test_rewards_of_one_answer_without_a_label(write):
    text = GOOD + "def right(completions, answer, **kwargs):\n    return [float(len(a)) for a in answer]\n"
    rules = load_rules(write(text + "REWARD_FUNCS = [good, right]"))
    completion = Completion("ab", [1, 2], False)
    assert asking.rewards_of([], completion, None, rules) == {"good": 2.0, "right": None}
    assert asking.rewards_of([], completion, "B", rules) == {"good": 2.0, "right": 1.0}


def test_rewards_of_tokens(write):
    text = GOOD + "def short(completion_ids, **kwargs):\n    return [-len(ids) for ids in completion_ids]\n"
    rules = load_rules(write(text + "REWARD_FUNCS = [good, short]"))
    assert asking.rewards_of([], Completion("ab", [1, 2, 3], False), None, rules)["short"] == -3.0
