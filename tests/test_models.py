"""Models of other kinds than Qwen2: a random tiny one of each shape, with a chat template that behaves like theirs."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_runs import in_process, one_line
from tokenizers import AddedToken, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationMixin,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

import infer
import train_grpo
from benchmarks.t4 import write_adapter
from data import QUESTION_COLUMN, SYSTEM_PROMPT, control_tokens, to_prompt
from support.errors import UserError
from support.memory import estimate_memory, linear_shapes, parameter_counts
from support.preflight import check_kind, check_memory, prepare_tokenizer
from support.rules import OURS
from support.settings import Recipe, load_recipe

SHAPE = {"vocab_size": 1296, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}

QWEN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
QWEN += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
QWEN3 = (
    QWEN + "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
LLAMA = "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content + '<|eot|>' }}"
LLAMA += "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}"
TURNS = "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
GEMMA += "{% for m in messages %}" + TURNS + "{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}"
# an old Mistral's, but one that drops the system message without a word
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
MISTRAL += "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}{% if false %}"

# config, chat template, tokens of its own (the first is the BOS, the last ends a turn), eos_token, a prompt
Q = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
FOLDED = "<bos><start>user\n{system}\n\n{question}<end>\n<start>model\n"
KINDS = {
    "qwen2": (Qwen2Config(**SHAPE), QWEN, [], "<|im_end|>", Q),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=32), QWEN3, [], "<|im_end|>", Q + "<think>\n\n</think>\n\n"),
    "llama": (
        LlamaConfig(**SHAPE),
        LLAMA,
        ["<bos>", "<|start|>", "<|end|>", "<|eot|>"],
        "<|eot|>",
        "<bos><|start|>system<|end|>\n\n{system}<|eot|><|start|>user<|end|>\n\n{question}<|eot|>"
        "<|start|>assistant<|end|>\n\n",
    ),
    "gemma2": (Gemma2Config(**SHAPE, head_dim=32), GEMMA, ["<bos>", "<start>", "<end>"], "<eos>", FOLDED),
    "gemma3": (Gemma3TextConfig(**SHAPE, head_dim=32), GEMMA, ["<bos>", "<start>", "<end>"], "<eos>", FOLDED),
    "mistral": (
        MistralConfig(**SHAPE),
        MISTRAL,
        ["<bos>", "[INST]", "[/INST]", "</s>"],
        "</s>",
        "<bos>[INST] {system}\n\n{question} [/INST]",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a model of the kind asked for."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind) / kind
        config, template, tokens, eos, _ = KINDS[kind]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained("tiny")
        tokenizer.add_tokens([AddedToken(token, special=True) for token in dict.fromkeys([*tokens, eos])])
        tokenizer.eos_token, tokenizer.chat_template = eos, template + "{% endif %}"
        if tokens:  # as theirs, it puts a BOS before every text, and the template has one already
            tokenizer.bos_token, tokenizer.pad_token = "<bos>", None
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
            )
        tokenizer.save_pretrained(folder)
        return folder

    return make


def prompt_of(kind, question):
    return KINDS[kind][-1].format(system=SYSTEM_PROMPT, question=question)


def prepared(folder):
    return prepare_tokenizer(AutoTokenizer.from_pretrained(folder), str(folder))


# --- what is trained, measured and asked ---


def telling(rewards):
    """The rewards, of which one tells the answers of a random model apart, or nothing would be learned from them."""

    @functools.wraps(rewards[-1])
    def reward(completions, **_):
        return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]

    return [*rewards[:-1], reward]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_every_prompt_is_the_same(checkpoint, kind, monkeypatch, tmp_path, capsys):
    """In training, before and after it, and in infer.py: the ids of every prompt are those of the one text above."""
    seen, generate = [], GenerationMixin.generate

    def spy(self, *args, **kwargs):
        rows = zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True)
        seen.append({tuple(ids[mask].tolist()) for ids, mask in rows})
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    monkeypatch.setattr(train_grpo, "load_rules", lambda file: replace(OURS, funcs=telling(OURS.funcs)))
    folder, out = checkpoint(kind), tmp_path / "out"
    in_process(monkeypatch, "--model", folder, "--max_steps", 1, "--output_dir", out, "--max_completion_length", 8)
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(weights[name].any() for name in weights)  # B began as zero

    tokenizer = prepared(folder)
    eval_json = json.loads((out / "eval.json").read_text())
    assert eval_json["revisions"] == {"model": None, "dataset": None}  # both are here
    arguments = ["--adapter", out / "adapter", "--eval", "test", "--limit", 10, "--json", out / "e.json"]
    monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, arguments)])
    infer.main()
    assert json.loads((out / "e.json").read_text()) == eval_json["after"]
    monkeypatch.setattr(sys, "argv", ["infer.py", "--adapter", str(out / "adapter"), "--show-prompt", "1加1等于几？"])
    capsys.readouterr()
    infer.main()
    assert capsys.readouterr().out.startswith(prompt_of(kind, "1加1等于几？") + "\n")

    samples = [json.loads(line)["question"] for line in (out / "samples.jsonl").read_text().splitlines()]
    files = (Path("tiny/questions") / f"{split}.jsonl" for split in ("train", "test"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    texts = {prompt_of(kind, question) for question in [*(row[QUESTION_COLUMN] for row in rows), "1加1等于几？"]}
    found = {tokenizer.decode(ids): ids for batch in seen for ids in batch}
    assert {prompt_of(kind, question) for question in samples} < found.keys() <= texts
    for text, ids in found.items():
        assert ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    # whoever takes the saved tokenizer writes the same, with the same end
    saved = AutoTokenizer.from_pretrained(out / "adapter")
    frame = {"add_generation_prompt": True, "tokenize": False}
    assert saved.apply_chat_template(to_prompt("1加1"), **frame) == prompt_of(kind, "1加1")
    assert saved.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_tokenizer(checkpoint, kind):
    _, _, tokens, _, _ = KINDS[kind]
    tokenizer = prepared(checkpoint(kind))
    assert tokenizer.eos_token == (tokens[-1] if tokens else "<|im_end|>")  # of Gemma not <eos>, which ends a text
    assert tokenizer.pad_token is not None
    assert set(control_tokens(tokenizer)) >= {*tokens, tokenizer.eos_token}
    text = prompt_of(kind, "1加1")
    ids = tokenizer.apply_chat_template(to_prompt("1加1"), add_generation_prompt=True)
    assert ids == tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    template = tokenizer.chat_template
    assert prepare_tokenizer(tokenizer, kind).chat_template == template  # once is enough


def test_a_conversation_goes_on_behind_the_system_prompt(checkpoint):
    tokenizer = prepared(checkpoint("gemma2"))
    more = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "2加2"}]
    text = tokenizer.apply_chat_template([*to_prompt("1加1"), *more], tokenize=False)
    turns = [f"user\n{SYSTEM_PROMPT}\n\n1加1", "model\n2", "user\n2加2"]
    assert text == "<bos>" + "".join(f"<start>{turn}<end>\n" for turn in turns)
    text = tokenizer.apply_chat_template(to_prompt("1加1", ""), tokenize=False)
    assert text == "<bos><start>user\n1加1<end>\n"


@pytest.mark.parametrize(
    "template, sentence",
    [
        ("{{ raise_exception('no such thing') }}", "cannot write a question: no such thing"),
        ("{% for %}", "cannot write a question: "),
        ({"rag": "{{ messages }}"}, "cannot write a question: "),
    ],
)
def test_a_template_that_cannot_be_used(template, sentence):
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"the chat template of x {sentence}") as error:
        prepare_tokenizer(tokenizer, "x")
    one_line(error)


def test_of_several_templates_the_default_one_is_taken():
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    template = tokenizer.chat_template
    tokenizer.chat_template = {"tool_use": "{{ tools }}", "default": template}
    assert prepare_tokenizer(tokenizer, "x").chat_template == template


def test_vllm_encodes_with_the_same(checkpoint, monkeypatch):
    """vLLM has a tokenizer of its own, which unsloth leaves as it is."""
    folder = checkpoint("gemma2")
    own, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.vllm_engine = SimpleNamespace(get_tokenizer=lambda: own)
    monkeypatch.setattr(train_grpo.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    recipe = replace(load_recipe("recipes/tiny.yaml"), model=str(folder))
    _, tokenizer = train_grpo.load_base_model(recipe, 8)
    text = prompt_of("gemma2", "1加1")
    assert own is not tokenizer and isinstance(own, PreTrainedTokenizerBase)
    assert own.encode(text) == tokenizer.encode(text) and own.encode(text).count(own.bos_token_id) == 1
    assert own.eos_token == tokenizer.eos_token == "<end>"


# --- arithmetic ---


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts_are_what_peft_makes(checkpoint, kind):
    recipe = replace(load_recipe("recipes/tiny.yaml"), model=str(checkpoint(kind)), lora_rank=4)
    policy, _ = train_grpo.load_policy(recipe, 0)
    weights = dict(policy.named_parameters())
    lora = sum(weights[name].numel() for name in weights if ".lora_" in name)
    linear = sum(weights[name].numel() for name in weights if name.endswith("_proj.base_layer.weight"))
    embeddings = sum(weights[name].numel() for name in weights if "embed_tokens" in name or "lm_head" in name)
    assert parameter_counts(policy.config, 4) == (lora, linear, embeddings)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_random_adapter_has_its_shapes(checkpoint, kind, tmp_path):
    config = AutoConfig.from_pretrained(checkpoint(kind))
    write_adapter(config, 4, tmp_path)
    recipe = replace(load_recipe("recipes/tiny.yaml"), model=str(checkpoint(kind)), lora_rank=4)
    policy, _ = train_grpo.load_policy(recipe, 0)
    trained = {name: w.shape for name, w in policy.named_parameters() if ".lora_" in name}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.replace(".default", ""): shape for name, shape in trained.items()} == {
        name: w.shape for name, w in weights.items()
    }


QWEN3_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)


def test_the_estimate_takes_the_head_dim():
    """Qwen3-4B has 4.02 billion parameters, 0.39 of them in its embeddings, and 144 KiB of keys and values a token."""
    shapes = linear_shapes(QWEN3_4B)
    assert (shapes["q_proj"], shapes["k_proj"], shapes["o_proj"]) == ((2560, 4096), (2560, 1024), (4096, 2560))
    lora, linear, embeddings = parameter_counts(QWEN3_4B, 16)
    assert (round(linear / 1e9, 2), round(embeddings / 1e9, 2), round(lora / 1e6)) == (3.63, 0.39, 33)
    recipe = Recipe(use_vllm=False)
    tokens = recipe.prompts_per_step * recipe.num_generations * 512
    assert estimate_memory(QWEN3_4B, recipe, 14.7)["KV cache"] * 2**30 == tokens * 144 * 1024


def test_qwen3_4b_fits_a_t4():
    recipe = load_recipe("recipes/qwen3-4b.yaml")
    parts = estimate_memory(QWEN3_4B, recipe, 14.7)
    check_memory(parts, recipe, free=14.7, card=14.7)
    answers = recipe.prompts_per_step * recipe.num_generations
    tokens = recipe.max_prompt_length + recipe.max_completion_length
    assert sum(parts.values()) == pytest.approx(12.0, abs=0.1)  # as the recipe says
    assert parts["KV cache"] * 2**30 > answers * tokens * 144 * 1024  # all answers of a step at once


# --- what cannot be trained ---


@pytest.mark.parametrize(
    "config, fault",
    [
        (MixtralConfig(), "is a mixtral, a mixture of experts"),
        (Qwen3MoeConfig(), "is a qwen3_moe, a mixture of experts"),
        (Qwen2VLConfig(), "is a qwen2_vl, which takes more than text"),
        (T5Config(), "is a t5, which has other layers than the LoRA goes on"),
    ],
)
def test_another_kind_is_one_sentence(config, fault):
    with pytest.raises(UserError, match=f"^x {fault}: give a dense --model") as error:
        check_kind("x", config)
    one_line(error)


def test_layers_of_other_names_are_one_sentence(monkeypatch, checkpoint, tmp_path):
    config = Phi3Config(**SHAPE, pad_token_id=0)
    check_kind("x", config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "phi3")
    AutoTokenizer.from_pretrained("tiny").save_pretrained(tmp_path / "phi3")
    with pytest.raises(UserError, match="phi3 has other linear layers than q_proj, .*: give another --model"):
        in_process(monkeypatch, "--model", tmp_path / "phi3", "--output_dir", tmp_path / "out")
