"""Answers and what they are worth: generation, accuracy with its interval, pass@k, the majority, a paired test.

train_grpo.py measures with `measure` before its first step and after its last, and infer.py with what it is made of: same
prompt, same parser, same figures.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy.stats import binomtest
from transformers import TextStreamer

from rewards import is_strict_format
from support.engine import lora_request
from support.rules import OURS, Rules

# --- answers -----------------------------------------------------------------------------------------


class Completion(NamedTuple):
    text: str
    ids: list[int]  # its tokens, the end-of-turn token included
    truncated: bool  # ran into max_tokens without ending

    @property
    def length(self) -> int:
        return len(self.ids)


def _echo(tokenizer, on_text: Callable[[str], None]):
    """transformers' streamer, which hands the text on instead of printing it."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    return streamer


def generate(
    model,
    tokenizer,
    prompts: list,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    adapter: Path | None = None,
    on_text: Callable[[str], None] | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """One completion for each of `prompts` (lists of messages); temperature 0 decodes greedily.

    `adapter`: the folder of the LoRA to answer with, None for the base model. A model that unsloth loaded with vLLM
    answers all prompts in one batch and reads the LoRA from the folder. Any other model answers `batch_size` at a time; a PEFT
    model has the LoRA in it already, and switches it off for the base model. `on_text` gets the text of a single prompt
    piece by piece, as it is generated.
    """
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False) if prompts else []
    if hasattr(model, "vllm_engine"):
        from vllm import SamplingParams

        sampling = [  # a seed each: equal prompts shall differ
            SamplingParams(
                temperature=temperature, top_p=top_p, seed=seed + i if temperature else None, max_tokens=max_tokens
            )
            for i in range(len(texts))
        ]
        lora = lora_request(adapter) if adapter else None
        if on_text:
            outputs = [_stream_vllm(model.vllm_engine.llm_engine, texts[0], sampling[0], lora, on_text)]
        else:
            outputs = model.vllm_engine.generate(texts, sampling, lora_request=lora, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [Completion(a.text, list(a.token_ids), a.finish_reason == "length") for a in answers]

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False, "temperature": None, "top_p": None}
    )
    was_training = model.training
    model.eval()
    completions = []
    base = model.disable_adapter() if hasattr(model, "peft_config") and not adapter else contextlib.nullcontext()
    with base, torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
            if temperature:  # not in training, whose random state this would reset
                torch.manual_seed(seed + start)
            # Explicit, because a checkpoint's own generation_config may ask for top-p or a repetition penalty.
            sequences = model.generate(
                **batch.to(model.device),
                **sampling,
                top_k=None,
                repetition_penalty=1.0,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                streamer=_echo(tokenizer, on_text) if on_text else None,
            )
            for ids in sequences[:, batch["input_ids"].shape[1] :].tolist():
                ended = tokenizer.eos_token_id in ids
                length = ids.index(tokenizer.eos_token_id) + 1 if ended else len(ids)
                text = tokenizer.decode(ids[:length], skip_special_tokens=True)
                completions.append(Completion(text, ids[:length], not ended))
    model.train(was_training)
    return completions


def _stream_vllm(engine, text: str, sampling, lora, on_text: Callable[[str], None]):
    engine.add_request("ask", text, sampling, lora_request=lora)
    shown = 0
    try:
        while engine.has_unfinished_requests():
            for output in engine.step():
                on_text(output.outputs[0].text[shown:])
                shown = len(output.outputs[0].text)
    except BaseException:  # Ctrl-C: the engine is asked again
        engine.abort_request(["ask"])
        raise
    return output


# --- accuracy ----------------------------------------------------------------------------------------


def measure(
    model, tokenizer, questions, max_tokens: int, adapter: Path | None = None, rules: Rules = OURS
) -> tuple[dict[str, float], list[str]]:
    """The figures of `evaluate` for `questions` (with `prompt` and `answer`), each answered greedily in at most `max_tokens`; and the answers.

    `adapter`: the folder of the LoRA to measure, None for the base model; see `generate`. Of several processes each
    answers its share, and all get the same.
    """
    with PartialState().split_between_processes(questions["prompt"][:]) as prompts:
        completions = gather_object(generate(model, tokenizer, prompts, max_tokens, adapter=adapter))
    return evaluate(completions, questions["answer"][:], rules=rules), [completion.text for completion in completions]


def evaluate(completions: list[Completion], labels: list, samples: int = 1, rules: Rules = OURS) -> dict[str, float]:
    """How good `completions` are: `samples` of them for each of the labels, one question's after another's.

    Shares from 0 to 1, with 95 % Wilson intervals in …_low and …_high over the n questions. strict: the number inside
    <answer> is right. lenient: the last number anywhere is right. format: the whole completion is the form asked for.
    truncated: it was cut off at the length limit. mean_length: tokens. With several samples a question, these are means
    over all of them (pass@1), the intervals are too wide rather than too narrow, and there are also pass@k for k = 1, 2,
    4, … and maj@k: what most of the samples say is right.

    With rules of the user's (support/rules.py), strict: their is_correct holds, or, where they have none, the text
    inside <answer>, stripped, is the label. lenient: that, or the label stands in the last line, tags left out, and not
    as a part of a word or a number. format: our form still. maj@k: votes are the texts inside <answer>, or, without
    one, the last lines.
    """
    n = len(labels)
    repeated = [label for label in labels for _ in range(samples)]
    strict = [rules.is_correct(c.text, label) for c, label in zip(completions, repeated, strict=True)]
    counts = {
        "strict": sum(strict),
        "lenient": sum(rules.is_lenient(c.text, label) for c, label in zip(completions, repeated, strict=True)),
        "format": sum(is_strict_format(c.text) for c in completions),
        "truncated": sum(c.truncated for c in completions),
    }
    result = {"n": n}
    for name, count in counts.items():
        low, high = wilson(count / samples, n)
        result |= {name: count / len(completions), f"{name}_low": low, f"{name}_high": high}
    result["mean_length"] = sum(c.length for c in completions) / len(completions)
    if samples > 1:
        groups = [slice(i * samples, (i + 1) * samples) for i in range(n)]
        ks = [k for k in (2**i for i in range(samples.bit_length())) if k < samples] + [samples]
        for k in ks:
            result[f"pass@{k}"] = sum(pass_at_k(samples, sum(strict[group]), k) for group in groups) / n
        right = sum(
            is_majority_right([c.text for c in completions[group]], label, rules)
            for group, label in zip(groups, labels, strict=True)
        )
        low, high = wilson(right, n)
        result |= {f"maj@{samples}": right / n, f"maj@{samples}_low": low, f"maj@{samples}_high": high}
    return result


def evaluation_table(evaluations: dict[str, dict]) -> str:
    """Evaluations by name, as the lines that the scripts print."""
    lines = [
        f"{'':8}{'strict':>7}  {'95 % interval':16}{'lenient':>8}{'format':>8}{'truncated':>11}{'mean tokens':>13}"
    ]
    for name, e in evaluations.items():
        interval = f"{e['strict_low']:.1%} to {e['strict_high']:.1%}"
        lines.append(
            f"{name:8}{e['strict']:7.1%}  {interval:16}{e['lenient']:8.1%}{e['format']:8.1%}"
            f"{e['truncated']:11.1%}{e['mean_length']:13.1f}"
        )
    for name, e in evaluations.items():
        several = [f"{key} {e[key]:.1%}" for key in e if re.fullmatch(r"(pass|maj)@\d+", key)]
        if several:
            lines.append(f"{name:8}{'  '.join(several)}")
    return "\n".join(lines)


def best_evaluation(evaluations: list[dict]) -> dict | None:
    """The line of evaluations.jsonl of the best policy: the latest within one standard error of the highest strict accuracy.

    The highest of several noisy accuracies owes something to luck, and with a falling learning rate a later policy is
    rarely worse. The one-standard-error rule of Breiman et al. 1984, Classification and Regression Trees, section 3.4.3; the
    error is that of a share, sqrt(p (1 − p) / n). Step 0 is no policy of ours.
    """
    trained = [line for line in evaluations if line["step"]]
    if not trained:
        return None
    highest = max(trained, key=lambda line: line["strict"])
    error = math.sqrt(highest["strict"] * (1 - highest["strict"]) / highest["n"])
    return max((line for line in trained if line["strict"] >= highest["strict"] - error), key=lambda line: line["step"])


# --- statistics --------------------------------------------------------------------------------------


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of successes/n (Wilson 1927). Here, because scipy's takes whole successes only."""
    z, share = NormalDist().inv_cdf(0.975), successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(center - half, 0.0) if successes else 0.0, min(center + half, 1.0) if successes < n else 1.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, from n ≥ k samples of which `right` are: 1 − C(n−right, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1.
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(texts: list[str], rules: Rules = OURS) -> str | None:
    """The answer that most of `texts` give, as first written; of equally frequent ones the first. None without any."""
    text = majority_text(texts, rules)
    return None if text is None else rules.answer_of(text).strip()


def majority_text(texts: list[str], rules: Rules) -> str | None:
    """The first of `texts` that gives the answer of most."""
    answers = {i: answer for i, text in enumerate(texts) if (answer := rules.answer_of(text) or "").strip()}
    votes = {i: rules.vote(answer) for i, answer in answers.items()}
    if not votes:
        return None
    winner = Counter(votes.values()).most_common(1)[0][0]
    return next(texts[i] for i, vote in votes.items() if vote == winner)


def is_majority_right(texts: list[str], label, rules: Rules = OURS) -> bool:
    """Whether the answer that most of `texts` give is `label`; of a single text, the same as is_correct."""
    text = texts[0] if len(texts) == 1 else majority_text(texts, rules)
    return text is not None and rules.is_correct(text, label)


def mcnemar(before: list[bool], after: list[bool]) -> dict[str, float]:
    """How two policies differ on the same questions, with the p-value of McNemar's exact test (McNemar 1947).

    gained: right only after; lost: right only before. If neither policy were better, gained would be binomial with
    probability 1/2 among the gained and lost together.
    """
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    return {
        "gained": gained,
        "lost": lost,
        "p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }
