"""What was read of a conversation is not read again, and the answers stay what they would be without that."""

import pytest
import torch
from conftest import make_decoder, make_tokenizer
from transformers import MistralConfig, MistralForCausalLM

from base_model import BaseLM
from datastore import Datastore
from generation import AUTO, KNN, RULES, Evidence, Gate, MemoryAugmentedLM, Reading, Settings
from index import build_index
from texts import Template

GATE = Gate([0.5, -0.4, 0.3, -0.2, 0.1, 0.8, -0.6, 0.7], -0.5)
FIRST, SECOND = "May I keep a goat?", "And two goats?"


@pytest.fixture(scope="module")
def template(base):
    return Template.parse("chat {q} {a}", base)


@pytest.fixture(scope="module")
def model(base, template):
    keys = torch.randn(60, base.width).half().numpy()
    store = Datastore(*build_index(keys, "Flat"), torch.randint(512, (60,)).numpy(), None, None, [])
    return MemoryAugmentedLM(base, make_decoder(context=6), template, GATE, store)


@pytest.fixture
def read(model, monkeypatch):
    """The numbers of tokens that the base reads, one for each forward."""
    lengths, hidden = [], model.base.hidden
    monkeypatch.setattr(model.base, "hidden", lambda ids, cache=None: (lengths.append(ids.shape[1]), hidden(ids, cache))[1])
    return lengths


def answer(model, prompt, rule="logits", reading=None, count=12, kept=()):
    settings = Settings(rule=rule, temperature=0, knn_temperature=20.0, knn_k=5)
    return list(model.stream(prompt, settings, count, kept=kept, reading=reading))


def same(steps, others):
    assert [step.token for step in steps] == [other.token for other in others]
    for step, other in zip(steps, others, strict=True):
        for name in ("base", "memory", "blended", "alpha"):
            assert getattr(step, name) == pytest.approx(getattr(other, name), rel=1e-3, abs=1e-5)
        torch.testing.assert_close(step.hidden, other.hidden, atol=1e-4, rtol=1e-4)


def said(steps):
    return "".join(step.text for step in steps)


@pytest.mark.parametrize("rule", [*RULES, AUTO, KNN])
def test_a_second_turn_reads_only_what_is_new_and_says_the_same(model, template, read, rule):
    reading = Reading(model.base)
    first = answer(model, template.prompt(FIRST), rule, reading)
    read.clear()
    prompt = template.prompt(SECOND, [(FIRST, said(first))])
    kept = answer(model, prompt, rule, reading)
    whole = len(model.base.encode(prompt))
    assert read[0] < whole - 15 and read[1:] == [1] * (len(kept) - 1)
    same(kept, answer(model, prompt, rule))


@pytest.mark.parametrize("rule", ["logits", AUTO])
@pytest.mark.parametrize("turns", [[], [(FIRST, "No.")]])
def test_a_question_in_another_place_is_read_from_where_it_differs(model, template, read, rule, turns):
    reading = Reading(model.base)
    first = answer(model, template.prompt(FIRST), rule, reading)
    answer(model, template.prompt(SECOND, [(FIRST, said(first))]), rule, reading)
    read.clear()
    prompt = template.prompt("May I keep a cow?", turns)
    kept = answer(model, prompt, rule, reading)
    assert 1 < read[0] < len(model.base.encode(prompt))
    same(kept, answer(model, prompt, rule))


def test_an_answer_goes_on_from_any_of_its_tokens(model, template, read):
    reading, prompt = Reading(model.base), template.prompt(FIRST)
    tokens = [step.token for step in answer(model, prompt, AUTO, reading)]
    read.clear()
    kept = answer(model, prompt, AUTO, reading, kept=tokens[:5])
    assert read[0] == 1
    same(kept, answer(model, prompt, AUTO, kept=tokens[:5]))


@pytest.mark.parametrize(("before", "after"), [("logits", AUTO), (KNN, "logits"), (AUTO, KNN)])
def test_under_another_rule_the_conversation_is_read_anew(model, template, before, after):
    reading, prompt = Reading(model.base), template.prompt(FIRST)
    answer(model, prompt, before, reading)
    same(answer(model, prompt, after, reading), answer(model, prompt, after))


def test_an_answer_that_was_stopped_can_be_gone_on_from(model, template):
    reading, prompt = Reading(model.base), template.prompt(FIRST)
    writing = model.stream(prompt, Settings(rule=AUTO, temperature=0), 12, reading=reading)
    next(writing), next(writing)
    writing.close()
    same(answer(model, prompt, AUTO, reading), answer(model, prompt, AUTO))


def test_a_read_that_failed_is_not_gone_on_from(model, template, monkeypatch):
    reading, prompt = Reading(model.base), template.prompt(FIRST)
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(model.decoder, "features", lambda *_: (_ for _ in ()).throw(MemoryError()))
        answer(model, prompt, reading=reading)
    same(answer(model, prompt, reading=reading), answer(model, prompt))


def test_a_full_sliding_window_is_read_anew(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, max_position_embeddings=512, sliding_window=16, initializer_range=0.3)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer(["May I keep a goat? No."]).save_pretrained(tmp_path)
    base = BaseLM.load(str(tmp_path), "float32", "cpu")
    model, reading = MemoryAugmentedLM(base, make_decoder()), Reading(base)
    answer(model, FIRST * 3, reading=reading)
    assert len(reading.ids) > 16
    same(answer(model, FIRST * 3 + SECOND, reading=reading), answer(model, FIRST * 3 + SECOND))


def test_evidence_can_be_taken_back():
    gains, whole, part = [0.5, -7.0, 1.0, 2.0], Evidence(), Evidence()
    for gain in gains:
        whole.add(gain)
    for gain in gains[:2]:
        part.add(gain)
    whole.cut(2)
    assert whole.means.tolist() == part.means.tolist() and whole.gains == gains[:2]


def test_two_conversations_share_nothing(model, template):
    one, other = Reading(model.base), Reading(model.base)
    writing = model.stream(template.prompt(FIRST), Settings(rule=AUTO, temperature=0), 12, reading=one)
    steps = [next(writing) for _ in range(4)]
    answer(model, template.prompt(SECOND), AUTO, other)
    same(steps + list(writing), answer(model, template.prompt(FIRST), AUTO))
