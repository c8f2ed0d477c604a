"""The log-probabilities that vLLM sampled with are compared with the trainer's, token by token, whatever order these are in."""

import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_runs import in_process, jsonl

from support.trainer import Trainer


@pytest.fixture
def vllm(monkeypatch):
    """As with vLLM, generation also returns the log-probability of each token: the model's own, and `off` for the longest answer."""

    def with_logps(off=0.0):
        generate = Trainer.__mro__[1]._generate_single_turn

        def generate_single_turn(self, prompts, *rest):
            prompt_ids, completion_ids, _, *others = generate(self, prompts, *rest)
            logged = []
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
                with torch.no_grad():
                    logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
                chances = (logits / self.temperature).log_softmax(dim=-1)
                logged.append(chances.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist())
            longest = max(range(len(logged)), key=lambda i: (len(logged[i]), i))
            logged[longest][random.randrange(len(logged[longest]))] += off
            return prompt_ids, completion_ids, logged, *others

        monkeypatch.setattr(Trainer.__mro__[1], "_generate_single_turn", generate_single_turn)

    return with_logps


NAME = "sampling/sampling_logp_difference/"


def test_the_same_policy_has_the_same_log_probabilities(vllm, monkeypatch, tmp_path):
    vllm()
    in_process(monkeypatch, "--max_steps", 3, "--eval_samples", 2, "--dev_samples", 0, "--output_dir", tmp_path)
    for line in jsonl(tmp_path / "metrics.jsonl"):
        assert line[f"{NAME}mean"] <= line[f"{NAME}max"] < 1e-4


def test_one_token_that_differs_is_seen(vllm, monkeypatch, tmp_path):
    vllm(off=0.5)
    # a KL term, so that no answer is left out
    settings = ["--max_steps", 1, "--beta", 0.01, "--eval_samples", 2, "--dev_samples", 0, "--output_dir", tmp_path]
    in_process(monkeypatch, *settings)
    (line,) = jsonl(tmp_path / "metrics.jsonl")
    assert line[f"{NAME}max"] == pytest.approx(0.5, abs=1e-4)
    assert 0 < line[f"{NAME}mean"] < 0.05


def test_the_entropy_is_estimated_from_the_sampled_tokens(vllm, monkeypatch, tmp_path):
    vllm()
    # 256 answers of 23 tokens; with a KL term all of them count in TRL's entropy, which is exact
    settings = ["--max_steps", 1, "--prompts_per_step", 32, "--num_generations", 8, "--micro_batch_size", 64]
    settings += ["--beta", 0.01, "--eval_samples", 2, "--dev_samples", 0, "--output_dir", tmp_path]
    in_process(monkeypatch, *settings)
    (line,) = jsonl(tmp_path / "metrics.jsonl")
    assert line["sampling/entropy"] == pytest.approx(line["entropy"], rel=0.15)


def test_without_vllm_there_is_nothing_to_compare(monkeypatch, tmp_path):
    in_process(monkeypatch, "--max_steps", 1, "--eval_samples", 2, "--dev_samples", 0, "--output_dir", tmp_path)
    assert not any(name.startswith(NAME) for name in jsonl(tmp_path / "metrics.jsonl")[0])


def test_unsloths_mask_is_wider_and_has_no_padding_token():
    """unsloth shifts the prompts' padding behind the answers, and masks the padding token with which an answer may end."""
    trainer = Trainer.__new__(Trainer)
    trainer.processing_class, trainer._metrics = SimpleNamespace(pad_token_id=0), {"train": defaultdict(list)}
    completion_ids = torch.tensor([[5, 6, 0], [7, 8, 9]])  # the first ends with it
    inputs = {"completion_ids": completion_ids, "completion_mask": torch.ones_like(completion_ids)}
    inputs["sampled_logps"] = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -4.0, -5.0]])
    computed = torch.tensor([[-1.5, -2.0, 0.0, 0.0], [0.0, -3.0, -4.0, -5.0]])
    trainer._computed = [(computed, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]))]
    trainer._log_difference(inputs)
    assert trainer._metrics["train"] == {f"{NAME}mean": [pytest.approx(0.1)], f"{NAME}max": [0.5]}
