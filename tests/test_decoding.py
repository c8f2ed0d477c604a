"""The decode step's changes: what vLLM is started with, and one product for weights that lie side by side."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from support import decoding


class QuantState:
    """Stands in for bitsandbytes': a scale for each block of the weight; quantised, these have scales and an offset of their own."""

    def __init__(
        self, absmax, shape, code=None, blocksize=4, quant_type="nf4", dtype=torch.float32, offset=None, state2=None
    ):
        self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize
        self.quant_type, self.dtype, self.offset, self.state2 = quant_type, dtype, offset, state2
        self.nested = state2 is not None


def dequantised(weight, state):
    scales = state.absmax * state.state2 + state.offset if state.nested else state.absmax
    return (weight.view(-1, state.blocksize) * scales[:, None]).view(state.shape).to(state.dtype)


@pytest.fixture
def bitsandbytes(monkeypatch):
    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")
    package.products = []

    def matmul_4bit(x, weight, state, bias=None):
        package.products.append(tuple(state.shape))
        return torch.nn.functional.linear(x, dequantised(weight.t(), state), bias)

    package.matmul_4bit, functional.QuantState = matmul_4bit, QuantState
    functional.dequantize_blockwise = lambda absmax, state2: absmax * state2
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    return package


@pytest.mark.parametrize("nested", [True, False])
def test_one_product_for_weights_side_by_side(bitsandbytes, nested):
    torch.manual_seed(0)
    width, widths = 8, (12, 4, 4)
    second = {"state2": torch.tensor(0.5), "offset": torch.tensor(0.1)} if nested else {}
    states = [QuantState(torch.rand(out * width // 4), (out, width), **second) for out in widths]
    weights = [torch.randint(-8, 8, (out * width, 1)).float() for out in widths]
    weight = torch.nn.Parameter(torch.cat(weights), requires_grad=False)
    weight.bnb_quant_state = {
        1: states[1],
        0: states[0],
        2: states[2],
    }  # k before q, as a checkpoint's names are sorted
    x, bias = torch.randn(3, width), torch.randn(sum(widths))
    y = decoding.product(None, SimpleNamespace(weight=weight), x, bias)
    each = [x @ dequantised(w, state).T for w, state in zip(weights, states, strict=True)]
    torch.testing.assert_close(y, torch.cat(each, dim=1) + bias)
    assert bitsandbytes.products == [(20, 8)]


def test_the_product_has_the_dtype_of_its_rows(bitsandbytes):
    """Whatever the checkpoint says: unsloth's are in bfloat16, and a T4 computes in float16."""
    weight = torch.nn.Parameter(torch.ones(8, 1), requires_grad=False)
    weight.bnb_quant_state = {0: QuantState(torch.ones(2), (2, 4), dtype=torch.bfloat16)}
    y = decoding.product(
        None, SimpleNamespace(weight=weight), torch.ones(1, 4, dtype=torch.float16), torch.ones(2).half()
    )
    assert y.dtype == torch.float16
    assert y.tolist() == [[5.0, 5.0]]


def test_unsloth_is_given_the_product(monkeypatch):
    package, utils = ModuleType("unsloth_zoo"), ModuleType("unsloth_zoo.vllm_utils")
    package.vllm_utils, utils._apply_4bit_weight = utils, "unsloth's"
    monkeypatch.setitem(sys.modules, "unsloth_zoo", package)
    monkeypatch.setitem(sys.modules, "unsloth_zoo.vllm_utils", utils)
    decoding.merge_products()
    assert utils._apply_4bit_weight is decoding.product


def test_another_unsloth_keeps_its_own(monkeypatch, capsys):
    package = ModuleType("unsloth_zoo")
    package.vllm_utils = utils = ModuleType("unsloth_zoo.vllm_utils")
    monkeypatch.setitem(sys.modules, "unsloth_zoo", package)
    decoding.merge_products()
    assert not hasattr(utils, "_apply_4bit_weight")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("generation  this unsloth_zoo has no 4-bit product to replace")


@pytest.fixture
def vllm(monkeypatch):
    class LLM:
        def __init__(self, model, async_scheduling=False, **others):
            self.given = (model, async_scheduling, others)

    module = ModuleType("vllm")
    module.LLM, module.EngineArgs = LLM, SimpleNamespace(__dataclass_fields__={"async_scheduling": None})
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def test_vllm_schedules_ahead(vllm):
    imported_elsewhere = vllm.LLM
    decoding.schedule_ahead()
    assert imported_elsewhere(model="m", seed=1).given == ("m", True, {"seed": 1})


def test_another_vllm_is_left_alone(vllm, capsys):
    vllm.EngineArgs.__dataclass_fields__ = {}
    decoding.schedule_ahead()
    assert vllm.LLM("m").given == ("m", False, {})
    assert capsys.readouterr().out.startswith("generation  this vLLM cannot be told to schedule ahead")
