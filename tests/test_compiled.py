"""app.py --compile: a compiled graph for one more token, beside the model that it is made of."""

import os
import shutil
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import make_decoder, run_script
from models import make_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import compiled
from base_model import BaseLM, RowLinear
from compiled import compile_step
from generation import AUTO, Gate, MemoryAugmentedLM, Reading, Settings
from support.command import UserError

KINDS = {"llama": lambda: make_model(LlamaForCausalLM, LlamaConfig),
         # Every second layer looks back eight positions only.
         "gemma3": lambda: make_model(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=16, sliding_window=8, sliding_window_pattern=2),
         "gpt2": lambda: make_model(GPT2LMHeadModel, GPT2Config)}
GATE = Gate([0.5, -0.4, 0.3, -0.2, 0.1, 0.8, -0.6, 0.7], -0.5)
PROMPT = "Question: May I keep the deposit?\nAnswer:"


pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None and "CI" not in os.environ,
                                reason="there is no C++ compiler")


def pair(kind, tokenizer, dtype=torch.float32):
    """The same model twice: as it is, and compiled."""
    models = [MemoryAugmentedLM(BaseLM(KINDS[kind]().to(dtype), tokenizer), make_decoder(), gate=GATE) for _ in range(2)]
    compile_step(models[1].base)
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_says_what_the_model_says(base, kind):
    models = pair(kind, base.tokenizer)
    for settings in (Settings(0.5, temperature=0), Settings(rule=AUTO, temperature=0)):
        readings, told = [Reading(model.base) for model in models], []
        for model, reading in zip(models, readings, strict=True):
            first = list(model.stream(PROMPT, settings, 40, reading=reading))
            # The next turn goes on from the cache that the graph has filled, a part of which is taken back.
            turn = PROMPT + "".join(step.text for step in first[:20]) + " And then?"
            told.append([*first, *model.stream(turn, settings, 10, reading=reading)])
        assert [step.token for step in told[0]] == [step.token for step in told[1]] and len(told[0]) > 20
        for plain, other in zip(*told, strict=True):
            assert (other.base, other.memory, other.alpha) == pytest.approx((plain.base, plain.memory, plain.alpha), abs=1e-4)
        torch.testing.assert_close(told[0][-1].hidden, told[1][-1].hidden, atol=1e-3, rtol=1e-3)


def test_the_graph_is_compiled_once_for_all_lengths_and_threads(base):
    model, told = pair("llama", base.tokenizer, torch.bfloat16)[1], []
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):  # the page answers in threads that come and go
            thread = Thread(target=lambda: told.append([step.token for step in model.stream(PROMPT, Settings(temperature=0), 60)]))
            thread.start(), thread.join()
    assert told[0] == told[1] and len(told[0]) > 30


def test_a_single_position_is_read_alike_as_a_row_and_as_a_vector():
    for bias in (True, False):
        layer, x = nn.Linear(48, 20, bias).bfloat16(), torch.randn(1, 1, 48).bfloat16()
        expected = layer(x)
        layer.__class__ = RowLinear
        torch.testing.assert_close(layer(x), expected, atol=2e-2, rtol=2e-2)
        assert torch.equal(layer(x.expand(1, 3, 48)), nn.functional.linear(x.expand(1, 3, 48), layer.weight, layer.bias))


def test_a_graph_with_other_states_is_refused(base, monkeypatch):
    twice = SimpleNamespace(scaled_dot_product_attention=lambda q, k, v, **more: scaled_dot_product_attention(2 * q, k, v, **more))
    monkeypatch.setattr(compiled, "F", twice)
    plain = BaseLM(KINDS["llama"](), base.tokenizer)
    ids, before = torch.tensor([[1, 2, 3]]), plain.new_cache()
    expected = plain.hidden(ids)
    with pytest.raises(UserError, match="other states when it is compiled"):
        compile_step(plain)
    plain.hidden(ids[:, :-1], before)
    torch.testing.assert_close(plain.hidden(ids[:, -1:], before)[0, -1], expected[0, -1])  # the model is as it was


@pytest.mark.parametrize("change", [lambda model: model.set_attn_implementation("eager"),
                                    lambda model: setattr(model.config, "layer_types", ["chunked_attention"] * 2)])
def test_a_model_with_its_own_attention_is_refused(base, change):
    plain = BaseLM(KINDS["llama"](), base.tokenizer)
    change(plain.model)
    with pytest.raises(UserError, match="attends in a way of its own"):
        compile_step(plain)


def test_without_a_compiler_one_sentence_says_so(trained, tmp_path, monkeypatch):
    for name, value in {"CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setitem(os.environ, name, value)
    done = run_script("app.py", "--model_dir", trained, "--device", "cpu", "--compile", "--ask", "Why?")
    assert done.code == 2 and "Traceback" not in done.err and not done.out
    assert "No working C++ compiler" in done.err and "install a C++ compiler or leave out --compile." in done.err


def test_a_compiled_model_answers_in_the_terminal(trained):
    plain, other = (run_script("app.py", "--model_dir", trained, "--device", "cpu", "--ask", "Why?", "--temperature", "0", *more)
                    for more in ((), ("--compile",)))
    assert other.code == 0 and "compiling the base" in other.err
    assert other.out == plain.out
