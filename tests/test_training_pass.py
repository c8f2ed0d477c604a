"""unsloth's pass, shorter: a prompt once for its group, whole groups in a micro-batch, q, k and v with a bias in the fused product."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from support import training_pass

HEADS, KV_HEADS, WIDTH = 4, 2, 8
GROUPS = [(5, [3, 1, 4]), (2, [6, 0, 2])]  # a prompt, and its answers; one has no token but the padding


@pytest.fixture
def xformers(monkeypatch):
    """Stands in for xFormers: blocks of attention in which the last query sees all keys, the one before it one less, and so on."""

    class Bias:
        @classmethod
        def from_seqlens(cls, queries, keys, device=None):
            bias = cls()
            bias.blocks = list(zip(queries, keys, strict=True))
            return bias

    def memory_efficient_attention(q, k, v, attn_bias, scale):
        outputs, at, of = [], 0, 0
        for queries, keys in attn_bias.blocks:
            block = (q[0, at : at + queries], k[0, of : of + keys], v[0, of : of + keys])
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            block = [x.transpose(0, 1) for x in block]
            outputs.append(torch.nn.functional.scaled_dot_product_attention(*block, attn_mask=seen, scale=scale))
            at, of = at + queries, of + keys
        assert (at, of) == (q.shape[1], k.shape[1])
        return torch.cat(outputs, dim=1).transpose(0, 1)[None]

    names = "xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"
    modules = {name: ModuleType(name) for name in names}
    modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalCausalFromBottomRightMask = Bias
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def row_of(groups):
    """Places in a row of prompts and answers: for each answer those of its prompt, then its own."""
    start, sequences = 0, []
    for prompt, answers in groups:
        of_prompt = list(range(start, start + prompt))
        start += prompt
        for answer in answers:
            sequences.append((of_prompt, list(range(start, start + answer))))
            start += answer
    return sequences, start


def test_an_answer_sees_its_prompt_and_itself(xformers):
    """As if each answer stood alone behind its prompt, with causal attention, gradients included."""
    torch.manual_seed(0)
    sequences, tokens = row_of(GROUPS)
    q = torch.randn(1, tokens, HEADS, WIDTH, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, tokens, KV_HEADS, WIDTH, dtype=torch.float64, requires_grad=True) for _ in "kv")
    layout = SimpleNamespace(signature=("multi", 128, tuple((prompt, tuple(answers)) for prompt, answers in GROUPS)))
    found = training_pass.shared_prompt_attention(q, k, v, layout, scale=0.3)

    expected = torch.zeros_like(found)
    for prompt, answer in sequences:
        places = prompt + answer
        alone = [x[0, places].transpose(0, 1) for x in (q, k, v)]
        alone[1:] = [x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in alone[1:]]
        attention = torch.nn.functional.scaled_dot_product_attention(*alone, is_causal=True, scale=0.3)
        expected[0, places] = attention.transpose(0, 1)  # of the prompt the same each time
    torch.testing.assert_close(found, expected)

    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), (q, k, v), retain_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_layout_is_made_once(xformers, monkeypatch):
    layout = SimpleNamespace(signature=("multi", 128, ((2, (3,)),)))
    q, k = torch.randn(1, 5, HEADS, WIDTH), torch.randn(1, 5, KV_HEADS, WIDTH)
    first = training_pass.shared_prompt_attention(q, k, k, layout)
    monkeypatch.delattr(training_pass, "blocks")
    torch.testing.assert_close(training_pass.shared_prompt_attention(q, k, k, layout), first)


@pytest.fixture
def unsloth(monkeypatch):
    parts = "attention_dispatch", "prefix_grouper"
    names = "unsloth", "unsloth.utils", "unsloth.kernels", *(f"unsloth.utils.{part}" for part in parts)
    modules = {name: ModuleType(name) for name in names}
    for part in parts:
        setattr(modules["unsloth.utils"], part, modules[f"unsloth.utils.{part}"])
    dispatch, grouper = (modules[f"unsloth.utils.{part}"] for part in parts)
    dispatch._flex_shared_prefix_attention = "FlexAttention"
    grouper._VERIFY_ON, grouper._TOKR_THRESHOLD = True, 1.3
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(dispatch=dispatch, grouper=grouper, kernels=modules["unsloth.kernels"])


def test_unsloth_is_given_the_attention(unsloth, xformers):
    assert training_pass.share_prompts()
    assert unsloth.dispatch._flex_shared_prefix_attention is training_pass.shared_prompt_attention


def test_without_xformers_unsloth_keeps_its_own(unsloth, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xformers", None)
    assert not training_pass.share_prompts()
    assert unsloth.dispatch._flex_shared_prefix_attention == "FlexAttention"
    assert capsys.readouterr().out.startswith("training    without xFormers, or with another unsloth")


def test_another_unsloth_is_left_alone(unsloth, xformers, capsys):
    del unsloth.dispatch._flex_shared_prefix_attention
    assert not training_pass.share_prompts()
    assert "another unsloth" in capsys.readouterr().out


def test_an_unsloth_that_compares_in_another_way_is_left_alone(unsloth, xformers, capsys):
    del unsloth.grouper._VERIFY_ON
    assert not training_pass.share_prompts()
    assert unsloth.dispatch._flex_shared_prefix_attention == "FlexAttention"
    assert "another unsloth" in capsys.readouterr().out


def test_unsloth_compares_its_pass_with_no_other(unsloth, xformers):
    """As it asks: whether to compare, from which saving on to share, and how large a row without shared prompts is known to be right."""
    policy = torch.nn.Module()
    training_pass.trust_pass(policy)
    assert not unsloth.grouper._VERIFY_ON and unsloth.grouper._TOKR_THRESHOLD == 1
    verified = [policy._unsloth_seq_packing_grad_verified_T, policy._unsloth_seq_packing_grad_verified_seg]
    assert policy._unsloth_seq_packing_grad_ok is True and min(verified) > 10**9


def test_without_unsloth_there_is_nothing_to_do(capsys):
    assert not training_pass.share_prompts()
    assert not capsys.readouterr().out


def test_vllm_is_back_after_the_pass():
    trainer = SimpleNamespace(use_vllm=True)
    with pytest.raises(ValueError), training_pass.prompts_shared(trainer):
        assert not trainer.use_vllm
        raise ValueError
    assert trainer.use_vllm


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_product_gets_the_bias(unsloth, bias):
    """q, k and v are what the layers with their LoRAs give; without a bias unsloth has them fused already."""
    torch.manual_seed(0)

    class Projection(torch.nn.Module):
        def __init__(self, out):
            super().__init__()
            self.base_layer = torch.nn.Linear(6, out, bias=bias)
            self.lora = torch.nn.Linear(6, out, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.lora(x)

    def apply_lora_qkv(attention, x):
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        return tuple(x @ p.base_layer.weight.T + p.lora(x) for p in projections)

    unsloth.kernels.apply_lora_qkv = apply_lora_qkv
    attention = SimpleNamespace(q_proj=Projection(8), k_proj=Projection(4), v_proj=Projection(4), apply_qkv="unsloth's")
    layers = [SimpleNamespace(self_attn=attention)]
    policy = SimpleNamespace(base_model=SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(layers=layers))))
    training_pass.fuse_qkv(policy)
    if not bias:
        assert attention.apply_qkv == "unsloth's"
        return
    x = torch.randn(2, 3, 6)
    for found, projection in zip(
        attention.apply_qkv(attention, x), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True
    ):
        torch.testing.assert_close(found, projection(x))


def test_another_unsloth_computes_q_k_and_v_its_own_way(unsloth, capsys):
    training_pass.fuse_qkv(policy=None)  # whose layers are not touched
    assert "this unsloth has no fused product for q, k and v" in capsys.readouterr().out


def test_the_last_layers_keep_their_activations_whatever_is_switched_on():
    class Layer(torch.nn.Module):
        gradient_checkpointing = False

    layers = torch.nn.ModuleList(Layer() for _ in range(4))
    policy = SimpleNamespace(base_model=SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(layers=layers))))
    training_pass.keep_activations(policy, 0)
    training_pass.keep_activations(policy, 3)
    for layer in layers:
        layer.gradient_checkpointing = True
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, False, False]
    assert {type(layer).__name__ for layer in layers} == {"Layer"}
