"""Blend, gate, sampling and the stream of tokens."""


import numpy as np
import pytest
import torch
from conftest import make_decoder, with_any_topic

import generation
from datastore import UserError, shared_prefix
from generation import Gate, MemoryAugmentedLM, VisibleText, blend, opinions, sample
from memory_decoder import MemoryDecoder


@pytest.fixture(scope="module")
def model(base):
    decoder = make_decoder(context=6)
    torch.nn.init.normal_(decoder.output_projection.weight)
    return MemoryAugmentedLM(base, decoder)


def test_the_blend_follows_both_formulas():
    base_logits, memory = torch.randn(3, 20), torch.randn(3, 20)
    torch.testing.assert_close(blend(base_logits, memory, 0.3), 0.7 * base_logits + 0.3 * memory)
    p = 0.7 * torch.softmax(base_logits, -1) + 0.3 * torch.softmax(memory, -1)
    torch.testing.assert_close(blend(base_logits, memory, 0.3, "probabilities").exp(), p)


@pytest.mark.parametrize("rule", generation.RULES)
def test_the_ends_of_alpha_are_base_and_memory(rule):
    base_logits, memory = torch.randn(20), torch.randn(20)
    for alpha, expected in ((0, base_logits), (1, memory)):
        torch.testing.assert_close(torch.softmax(blend(base_logits, memory, alpha, rule), -1), torch.softmax(expected, -1))


def test_temperature_zero_takes_the_most_probable_token():
    assert sample(torch.tensor([0.0, 3.0, 2.9]), 0, 50) == 1


def test_samples_stay_in_the_top_k_and_follow_their_probabilities():
    logits, generator = torch.tensor([2.0, 1.0, 1.5, -3.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits, 0.7, 2, generator) for _ in range(3000)])
    assert set(drawn.tolist()) == {0, 2}
    expected = torch.softmax(torch.tensor([2.0, 1.5]) / 0.7, 0)[0]
    assert abs((drawn == 0).float().mean() - expected) < 0.04
    assert sample(logits, 1.0, 200, generator) in range(4)


def greedy_twin(model, prompt, alpha, rule, count):
    """Greedy decoding with no cache at all: both models read the whole text for every token."""
    ids, out = model.base.encode(prompt), []
    for _ in range(count):
        hidden = model.base.hidden(torch.tensor([ids]))
        z = blend(model.base.logits(hidden[0, -1]), model.decoder(hidden[:, 1:])[0, -1], alpha, rule)
        ids.append(int(z.argmax()))
        out.append(ids[-1])
        if ids[-1] == model.base.eos:
            break
    return out


@pytest.mark.parametrize("rule", generation.RULES)
@pytest.mark.parametrize("alpha", [0, 0.6, 1])
def test_streaming_gives_the_tokens_that_uncached_decoding_gives(model, alpha, rule):
    prompt = "Question: May I keep a goat?\nAnswer:"
    steps = list(model.stream(prompt, alpha, temperature=0, max_new_tokens=25, rule=rule))
    assert [step.token for step in steps] == greedy_twin(model, prompt, alpha, rule, 25)


def test_the_topics_of_a_text_are_those_that_the_memory_reads(base):
    decoder = with_any_topic(make_decoder(context=1, topic=8))
    torch.nn.init.normal_(decoder.output_projection.weight)
    decoder.topic.entry.copy_(torch.arange(8) * 10)
    model, prompt = MemoryAugmentedLM(base, decoder, "Question:"), "Question: May I keep a goat?\nAnswer:"
    ids, logits, steps = base.encode(prompt), [], model.steps(base.encode(prompt))
    step = next(steps)
    for token in (5, 17, 33, 4):
        logits.append(step)
        ids.append(token)
        step = steps.send(token)
    led = model.topics(ids[:-1])[-4:]
    assert len(set(model.topics(ids))) > 1
    for (hidden, _, memory), entry in zip(logits, led, strict=True):
        decoder.topic.nearest = lambda tokens, cache, number=entry // 10: torch.full_like(tokens, number)
        torch.testing.assert_close(decoder(hidden[None, None], torch.zeros(1, 1, dtype=torch.long))[0, 0], memory)


def test_a_memory_without_topics_names_none(model):
    assert model.topics(model.base.encode("Question: Why?")) is None


def test_steps_carry_the_probabilities_under_base_memory_and_blend(model):
    prompt = "Question: Why?\nAnswer:"
    step = next(model.stream(prompt, 0.4, temperature=0))
    hidden = model.base.hidden(torch.tensor([model.base.encode(prompt)]))
    base_logits, memory = model.base.logits(hidden[0, -1]), model.decoder(hidden[:, 1:])[0, -1]
    for value, logits in ((step.base, base_logits), (step.memory, memory), (step.blended, blend(base_logits, memory, 0.4))):
        assert value == pytest.approx(torch.softmax(logits.detach(), -1)[step.token].item(), rel=1e-3)


@pytest.mark.parametrize("header", ["", "Question:"])
def test_auto_streams_what_uncached_decoding_with_the_same_gate_gives(base, header):
    torch.manual_seed(4)
    decoder = MemoryDecoder(base.width, base.vocabulary, 32, num_layers=1, num_heads=4).eval()
    gate = Gate([0.5, -0.4, 0.3, -0.2, 0.1, 0.8, -0.6, 0.7], -0.5)
    steps = list(MemoryAugmentedLM(base, decoder, header, gate).stream("Question: Why not?", rule="auto", temperature=0,
                                                                       max_new_tokens=8))
    ids = base.encode("Question: Why not?")
    skip = shared_prefix(ids, base.encode(header))
    for step in steps:
        hidden = base.hidden(torch.tensor([ids]))
        memory = decoder(hidden[:, skip:].float())[0].log_softmax(-1)
        own = base.logits(hidden[0, skip:]).log_softmax(-1)
        evidence = np.zeros(3)
        for place, token in enumerate(ids[skip + 1:]):
            gain = (memory[place, token] - own[place, token]).clamp(-5, 5).item()
            evidence = np.array([0.6, 0.9, 0.98]) * evidence + np.array([0.4, 0.1, 0.02]) * gain
        alpha = float(gate.alpha(opinions(own[-1], memory[-1]).detach().numpy(), evidence))
        assert step.alpha == pytest.approx(alpha, abs=1e-3) and 0.01 < alpha < 0.99
        mixed = (1 - alpha) * own[-1].exp() + alpha * memory[-1].exp()
        assert step.blended == pytest.approx(mixed[step.token].item(), abs=1e-4) and step.blended >= mixed.max().item() - 1e-4
        ids.append(step.token)
    assert len({step.alpha for step in steps}) > 1


def test_auto_without_a_gate_is_refused_in_words(model):
    with pytest.raises(UserError, match="no automatic alpha"):
        next(model.stream("x", rule="auto"))


def test_opinions_are_entropies_top_probabilities_and_the_divergence():
    base, memory = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.1, 0.8])
    given = opinions(base.log() + 3, memory.log() - 2)  # logits, so any offset
    kl = sum(p * np.log(p / q) for p, q in ((0.1, 0.5), (0.1, 0.25), (0.8, 0.25)))
    expected = [-(0.5 * np.log(0.5) + 0.5 * np.log(0.25)), -(0.2 * np.log(0.1) + 0.8 * np.log(0.8)), np.log(0.5), np.log(0.8), kl]
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5)


def test_the_memory_skips_the_states_of_the_header(base):
    decoder = make_decoder(context=50)
    prompt = "Question: Why?\nAnswer:"
    step = next(MemoryAugmentedLM(base, decoder, header="Question:").stream(prompt, 1, temperature=0))
    skip = len(base.encode("Question:"))
    hidden = base.hidden(torch.tensor([base.encode(prompt)]))
    assert step.token == int(decoder(hidden[:, skip:])[0, -1].argmax())


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(model):
    def draw(seed):
        return [s.token for s in model.stream("Why?", 0.5, temperature=1.5, max_new_tokens=20, seed=seed)]

    assert draw(1) == draw(1) != draw(2)


def force_tokens(monkeypatch, tokens):
    """Make the sampler give these tokens, one after another."""
    left = iter(tokens)
    monkeypatch.setattr(generation, "sample", lambda *_: next(left))


def test_streamed_text_never_shows_a_broken_character(model, monkeypatch):
    text = "naïve 東京 café 🙂 end"
    force_tokens(monkeypatch, model.base.encode(text)[1:])
    shown = [s.text for s in model.stream("x", max_new_tokens=len(model.base.encode(text)) - 1)]
    assert "".join(shown) == text and not any("\ufffd" in piece for piece in shown)


def test_generation_ends_at_eos_and_does_not_show_it(model, monkeypatch):
    force_tokens(monkeypatch, [*model.base.encode("Yes.")[1:], model.base.eos, 77])
    steps = list(model.stream("x"))
    assert steps[-1].token == model.base.eos and "".join(s.text for s in steps) == "Yes."


def test_generation_ends_where_the_next_turn_begins(model, monkeypatch):
    force_tokens(monkeypatch, model.base.encode("Yes, it is.\nQuest for more.\nQuestion: And now?")[1:])
    steps = list(model.stream("x", stops=["\nQuestion:"]))
    assert "".join(s.text for s in steps) == "Yes, it is.\nQuest for more."


def test_what_was_held_back_is_shown_when_the_answer_ends(model, monkeypatch):
    ids = model.base.encode("Yes.\nQuest")[1:]
    force_tokens(monkeypatch, ids)
    steps = list(model.stream("x", stops=["\nQuestion:"], max_new_tokens=len(ids)))
    assert "".join(s.text for s in steps) == "Yes.\nQuest"


@pytest.mark.parametrize("pieces", [["a\nQ", ":b"], ["a\n", "Q:", "b"], [" a", "\nQ:"], list("a\nQ: b")])
def test_a_stop_text_is_found_however_it_is_cut(pieces):
    visible = VisibleText(["\nQ:"])
    assert "".join(visible.add(piece) for piece in pieces if not visible.stopped) == "a" and visible.stopped


@pytest.mark.parametrize("pieces", [["\nQ:", " b"], [" Q:"], ["\n", "\n", "Q", ": b"]])
def test_a_stop_text_may_come_first(pieces):
    visible = VisibleText(["\nQ:"])
    assert "".join(visible.add(piece) for piece in pieces if not visible.stopped) == "" and visible.stopped


def test_a_prompt_that_does_not_fit_is_refused_in_words(model):
    with pytest.raises(UserError, match="reads at most 512"):
        next(model.stream("word " * 600))


def test_a_decoder_of_another_model_is_refused_in_words(base):
    with pytest.raises(UserError, match="hidden size 16"):
        MemoryAugmentedLM(base, make_decoder(hidden=16))
