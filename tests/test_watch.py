"""Warnings: each fires where it should, once, and not before."""

import sys
from types import SimpleNamespace

import pytest
import torch
from test_best import figures
from test_runs import in_process
from transformers import AutoTokenizer

from support.rules import OURS
from support.settings import Recipe
from support.watch import (
    Watch,
    cut_off,
    disagreement,
    lora_without_effect,
    no_gain,
    no_variance,
    other_language,
    reward_hacking,
    skipped,
)


def steps(rewards, same=0.2, norm=1.0):
    return [
        {"step": i, "reward": r, "frac_reward_zero_std": same, "grad_norm": norm}
        for i, r in enumerate(rewards, start=1)
    ]


def test_answers_that_are_cut_off():
    assert cut_off({"truncated": 0.2}, Recipe()) is None
    sentence = cut_off({"truncated": 0.44}, Recipe())
    assert sentence.startswith("44% of the answers") and "--max_completion_length 384" in sentence


def test_groups_without_variance():
    def said(metrics, texts=("<answer>1</answer>",)):
        rollout = {"completions": [[{"content": text}] for text in texts], "answers": ["1"] * len(texts)}
        return no_variance(SimpleNamespace(metrics=metrics, rollout=rollout, rules=OURS), Recipe())

    assert said(steps([1.0] * 19, same=0.9)) is None
    assert said(steps([0.0] * 4, same=1.0)) is None
    nothing = said(steps([0.0] * 5, same=1.0))  # as of a reward that does not read what it is given
    assert "in each of the 5 steps so far" in nothing and "whether the reward functions read" in nothing
    assert said([*steps([1.0], same=0.9), *steps([0.0] * 10, same=1.0)]) is None
    assert said(steps([1.0] * 25, same=0.5)) is None
    learned = said(steps([1.0, 2.0, *[3.9] * 20], same=0.6))
    assert "100% of the last step's answers are right: stop here, or give harder questions" in learned
    # half a billion parameters that have learned the form alone: the reward is as high as it ever was
    stuck = said(steps([2.0, *[2.7] * 20], same=0.8), ["<answer>1</answer>", *["<answer>2</answer>"] * 9])
    assert "10% of the last step's answers are right: give easier questions, --num_generations 12" in stuck


def test_a_reward_that_rises_while_right_answers_are_lost():
    # README's last row: strict accuracy rises from 0.2 to 2.5 %, but the number is right anywhere in 2.5 % instead of 9.8
    rising = steps([0.5 + i / 50 for i in range(60)])
    fell = [
        {"step": 0, **figures(0.10, 0.40)},
        {"step": 20, **figures(0.20, 0.40)},
        {"step": 40, **figures(0.25, 0.25)},
    ]
    sentence = reward_hacking(rising, fell, Recipe())
    assert "lenient accuracy on the development questions has fallen from 40.0% (step 0) to 25.0%" in sentence
    assert "--learning_rate 1e-05" in sentence
    assert reward_hacking(rising, fell[:2], Recipe()) is None
    assert reward_hacking(steps([2.0 - i / 50 for i in range(60)]), fell, Recipe()) is None  # it falls as well
    within = [{"step": 0, **figures(0.30)}, {"step": 20, **figures(0.25)}]  # the interval reaches to 35 %
    assert reward_hacking(rising, within, Recipe()) is None
    strict = reward_hacking(rising, [{"step": 20, **figures(0.5)}, {"step": 40, **figures(0.3)}], Recipe())
    assert "strict accuracy" in strict


def test_a_best_policy_that_is_worse_than_the_base_model():
    before, worse = {"step": 0, **figures(0.3)}, {"step": 20, **figures(0.2)}
    assert "answers 20.0% of the development questions right, and the base model 30.0%" in no_gain(
        [before, worse], Recipe()
    )
    assert no_gain([before, worse, {"step": 40, **figures(0.3)}], Recipe()) is None
    assert no_gain([], Recipe()) is None and no_gain([before], Recipe()) is None
    assert no_gain([worse], Recipe()) is None  # before was not measured


def test_steps_that_the_loss_scaler_leaves_out():
    assert skipped(steps([1.0] * 4, norm=float("inf")), Recipe()) is None
    assert "--dtype bfloat16" in skipped(steps([1.0] * 5, norm=float("nan")), Recipe())
    assert skipped([*steps([1.0] * 4, norm=float("inf")), *steps([1.0])], Recipe()) is None


def test_each_is_said_once(capsys):
    watch = Watch(Recipe(), report=None)
    for sentence in (None, "a", "b"):
        watch.warn("name", sentence)
    assert capsys.readouterr().out == "warning     a\n"


def test_a_run_says_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("support.watch.WINDOW", 3)
    settings = ["--max_steps", 4, "--max_completion_length", 4, "--temperature", 0.01, "--output_dir", tmp_path]
    in_process(monkeypatch, *settings)
    printed = capsys.readouterr().out
    assert printed.count("warning     100% of the answers before training are cut off at 4 tokens") == 1
    assert printed.count("warning     for 3 steps most groups of answers have earned the same") == 1
    assert printed.index("cut off at 4 tokens") < printed.index("step   1")


@pytest.mark.parametrize("warned", [True, False])
def test_hacking_is_looked_for_after_each_evaluation(monkeypatch, warned, capsys):
    class report:
        metrics = steps([0.5 + i / 50 for i in range(60)])
        development = [{"step": 20, **figures(0.5)}, {"step": 40, **figures(0.3 if warned else 0.6)}]

    Watch(Recipe(), report).on_save(None, None, None)
    assert ("warning     the reward rises" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("found, warned", [(None, False), (0.08, False), (0.6, True)])
def test_what_is_trained_is_not_what_answers(found, warned, capsys):
    metrics = steps([1.0, 1.0])
    if found is not None:
        metrics[-1]["sampling/sampling_logp_difference/mean"] = found
    assert (disagreement(metrics, Recipe()) is not None) == warned
    watch = Watch(Recipe(), SimpleNamespace(metrics=metrics, rollout=answers("二", ["二"])))
    for _ in range(2):
        watch.on_log(None, None, None, logs={"reward": 1.0})
    assert capsys.readouterr().out.count("what is trained is not what answers") == warned


def answers(question, completions):
    prompt = [{"role": "system", "content": "Answer in this form"}, {"role": "user", "content": question}]
    return {"prompts": [prompt] * len(completions), "completions": [[{"content": text}] for text in completions]}


@pytest.mark.parametrize(
    "question, completions, warned",
    [
        ("她卖了多少杯？", ["一共32杯", "She sold 27 cups", "共20杯", "She sold them"], False),  # half of them
        ("她卖了多少杯？", ["She sold 32 cups", "She sold 27 cups", "共20杯"], True),
        ("How many cups?", ["She sold 32 cups", "She sold 27 cups"], False),
        ("3 + 4", ["It is seven"], True),
    ],
)
def test_answers_in_another_language(question, completions, warned, capsys):
    rollout = answers(question, completions)
    sentence = other_language(rollout, Recipe(learning_rate=2e-4))
    assert (sentence is not None) == warned
    if warned:
        assert sentence.endswith(
            "give --rewards examples/in_chinese.py, which pays for Chinese, or --learning_rate 0.0001"
        )
        assert "in_chinese" not in other_language(rollout, Recipe(rewards="mine.py"))  # who has rewards has reasons
    watch = Watch(Recipe(), SimpleNamespace(metrics=steps([1.0, 1.0]), rollout=rollout))
    for _ in range(2):
        watch.on_log(None, None, None, logs={"reward": 1.0})
    assert capsys.readouterr().out.count("are in English, and their questions are not") == warned


class Engine:
    """Stands in for vLLM: it answers with one log-probability for each token, and adds the LoRA's to it."""

    def __init__(self, effect, longest=99):
        self.effect, self.longest, self.asked = effect, longest, []

    def generate(self, prompts, sampling, lora_request, use_tqdm):
        tokens = prompts[0]["prompt_token_ids"]
        self.asked.append(tokens)
        assert len(tokens) + sampling["max_tokens"] <= self.longest
        effect = self.effect if lora_request else 0.0
        logged = [None, *({token: SimpleNamespace(logprob=-token + effect)} for token in tokens[1:])]
        return [SimpleNamespace(prompt_token_ids=tokens, prompt_logprobs=logged)]


@pytest.mark.parametrize("effect", [0.0, 1e-6])
def test_a_lora_that_does_not_arrive_in_vllm(monkeypatch, effect):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kwargs: kwargs))
    model = SimpleNamespace(vllm_engine=Engine(effect), load_lora=lambda name, load_tensors: "lora")
    assert (lora_without_effect(model, [1, 2, 3, 4]) is None) == bool(effect)


def test_the_lora_is_looked_for_in_as_many_tokens_as_vllm_takes(monkeypatch):
    """An answer has other tokens when it is read again: one of a policy that writes nonsense has had many more."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **kwargs: kwargs))
    tokenizer, recipe = AutoTokenizer.from_pretrained("tiny"), Recipe(max_prompt_length=20, max_completion_length=12)
    rollout = {"prompts": [[{"role": "user", "content": "1+1"}]], "completions": [[{"content": "2 " * 100}]]}
    policy = torch.nn.Module()
    policy.q_proj = torch.nn.Module()
    policy.q_proj.lora_B = torch.nn.Linear(2, 2)
    policy.vllm_engine, policy.load_lora = Engine(0.1, longest=32), lambda name, load_tensors: "lora"
    Watch(recipe, SimpleNamespace(rollout=rollout)).on_step_end(
        None, None, None, model=policy, processing_class=tokenizer
    )
    assert [len(tokens) for tokens in policy.vllm_engine.asked] == [31, 31]
