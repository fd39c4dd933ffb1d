"""Blend, gate, sampling and the stream of tokens."""

import numpy as np
import pytest
import torch
from conftest import SPECIAL, make_decoder

import generation
from base_model import Literal
from generation import DecodedText, Gate, MemoryAugmentedLM, Settings, VisibleText, blend, opinions, sample
from support.command import UserError
from texts import Template, shared_prefix

QA = Template.parse("Question: {q}\nAnswer: {a}")
PROMPT = QA.prompt("May I keep a goat?")
END = SPECIAL.index("<end>")


@pytest.fixture(scope="module", ids=["some seen", "all seen"], params=[{"backoff": 0.2}, {"seen": range(512)}])
def any_decoder(request):
    return make_decoder(context=6, **request.param)


@pytest.fixture(scope="module")
def model(base):
    return MemoryAugmentedLM(base, make_decoder(context=6))


def memory_of(base, decoder, hidden, skip=0):
    """The memory's log probabilities (T, V) for hidden states (1, T, H), the first `skip` left out."""
    hidden = hidden[:, skip:]
    return decoder.log_probabilities(decoder.features(hidden.float()), base.logits(hidden))[0].detach()


def test_the_blend_follows_both_formulas():
    base_logits, memory_logits = torch.randn(3, 20), torch.randn(3, 20)
    base, memory = torch.log_softmax(base_logits, -1), torch.log_softmax(memory_logits, -1)
    expected = torch.softmax(0.7 * base_logits + 0.3 * memory_logits, -1)
    torch.testing.assert_close(torch.softmax(blend(base, memory, 0.3), -1), expected)
    p = 0.7 * torch.softmax(base_logits, -1) + 0.3 * torch.softmax(memory_logits, -1)
    torch.testing.assert_close(blend(base, memory, 0.3, "probabilities").exp(), p)


def test_at_alpha_zero_the_blend_is_the_bases_own_logits_and_at_one_the_memory(model):
    hidden = model.base.hidden(torch.tensor([model.base.encode(PROMPT)]))[0]
    base_logits = model.base.logits(hidden)
    memory = memory_of(model.base, model.decoder, hidden[None])
    assert torch.equal(blend(base_logits, memory, 0), base_logits) and torch.equal(blend(base_logits, memory, 1), memory)


@pytest.mark.parametrize("rule", generation.RULES)
def test_the_ends_of_alpha_are_base_and_memory(rule):
    base_logits, memory = torch.randn(20), torch.randn(20)
    for alpha, expected in ((0, base_logits), (1, memory)):
        torch.testing.assert_close(torch.softmax(blend(base_logits, memory, alpha, rule), -1), torch.softmax(expected, -1))


def test_temperature_zero_takes_the_most_probable_token():
    for temperature in (0, 1e-9, 1e-40):  # logits divided by the last are infinite
        assert sample(torch.tensor([0.0, 3.0, 2.9]), temperature, 50) == 1


def test_samples_stay_in_the_top_k_and_follow_their_probabilities():
    logits, generator = torch.tensor([2.0, 1.0, 1.5, -3.0]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits, 0.7, 2, generator) for _ in range(3000)])
    assert set(drawn.tolist()) == {0, 2}
    expected = torch.softmax(torch.tensor([2.0, 1.5]) / 0.7, 0)[0]
    assert abs((drawn == 0).float().mean() - expected) < 0.04
    assert sample(logits, 1.0, 200, generator) in range(4)


def greedy_twin(model, prompt, alpha, rule, count):
    """Greedy decoding with no cache at all: both models read the whole text for every token."""
    base, ids, out = model.base, model.base.encode(prompt), []
    for _ in range(count):
        hidden = base.hidden(torch.tensor([ids]))
        memory = memory_of(base, model.decoder, hidden, shared_prefix(ids, model.header))[-1]
        ids.append(int(blend(base.logits(hidden[0, -1]).log_softmax(-1), memory, alpha, rule).argmax()))
        out.append(ids[-1])
        if ids[-1] in model.ends:
            break
    return out


@pytest.mark.parametrize("rule", generation.RULES)
@pytest.mark.parametrize("alpha", [0, 0.6, 1])
def test_streaming_gives_the_tokens_that_uncached_decoding_gives(base, any_decoder, alpha, rule):
    model = MemoryAugmentedLM(base, any_decoder)
    steps = list(model.stream(PROMPT, Settings(alpha, rule, temperature=0), 25))
    assert [step.token for step in steps] == greedy_twin(model, PROMPT, alpha, rule, 25)


def test_a_conversation_in_the_models_own_chat_form_streams_what_uncached_decoding_gives(base):
    template = Template.parse("chat {q} {a}", base)
    model, prompt = MemoryAugmentedLM(base, make_decoder(), template), template.prompt("And <end> now?", [("Why?", "So.")])
    steps = list(model.stream(prompt, Settings(0.5, temperature=0), 15))
    assert [step.token for step in steps] == greedy_twin(model, prompt, 0.5, "logits", 15)


def test_at_alpha_zero_the_model_says_what_the_base_alone_says(base, model):
    ids = torch.tensor([base.encode(PROMPT)])
    own = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
                              eos_token_id=sorted(base.ends))[0, ids.shape[1]:].tolist()
    assert [step.token for step in model.stream(PROMPT, Settings(0, temperature=0), 20)] == own


def test_steps_carry_the_probabilities_under_base_memory_and_blend(base, any_decoder):
    ids, moved = base.encode(PROMPT), []
    for step in MemoryAugmentedLM(base, any_decoder).stream(PROMPT, Settings(0.4, temperature=0), 12):
        hidden = base.hidden(torch.tensor([ids]))  # the whole text again, with no cache
        base_logits, memory = base.logits(hidden[0, -1]), memory_of(base, any_decoder, hidden, 1)[-1]
        for value, logits in ((step.base, base_logits), (step.memory, memory), (step.blended, blend(base_logits, memory, 0.4))):
            assert value == pytest.approx(torch.softmax(logits, -1)[step.token].item(), rel=1e-3, abs=1e-6)
        torch.testing.assert_close(step.hidden, hidden[0, -1], atol=1e-4, rtol=1e-4)
        ids.append(step.token)
        moved.append(abs(step.memory - step.base))
    assert len(moved) > 3 and max(moved) > 0.01


@pytest.mark.parametrize("rows", [512, 3])
@pytest.mark.parametrize("template", [None, QA])
def test_auto_streams_what_uncached_decoding_with_the_same_gate_gives(base, template, rows, monkeypatch):
    monkeypatch.setattr(generation, "LOGITS_AT_ONCE", rows * base.vocabulary)  # a prompt's positions are weighed in such blocks
    decoder = make_decoder(seed=4)
    gate = Gate([0.5, -0.4, 0.3, -0.2, 0.1, 0.8, -0.6, 0.7], -0.5)
    model, prompt = MemoryAugmentedLM(base, decoder, template, gate), QA.prompt("Why not?")
    steps = list(model.stream(prompt, Settings(rule="auto", temperature=0), 8))
    ids = base.encode(prompt)
    skip = shared_prefix(ids, base.encode("Question:" if template else ""))
    for step in steps:
        hidden = base.hidden(torch.tensor([ids]))
        memory = memory_of(base, decoder, hidden, skip)
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
        next(model.stream("x", Settings(rule="auto")))


def test_opinions_are_entropies_top_probabilities_and_the_divergence():
    base, memory = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.1, 0.8])
    given = opinions(base.log(), memory.log())
    kl = sum(p * np.log(p / q) for p, q in ((0.1, 0.5), (0.1, 0.25), (0.8, 0.25)))
    expected = [-(0.5 * np.log(0.5) + 0.5 * np.log(0.25)), -(0.2 * np.log(0.1) + 0.8 * np.log(0.8)), np.log(0.5), np.log(0.8), kl]
    np.testing.assert_allclose(given.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("pattern", ["Question: {q}\nAnswer: {a}", "Title: {t}\nQuestion: {q}\nAnswer: {a}", "chat {q} {a}"])
def test_the_memory_skips_the_states_of_the_header(base, pattern):
    template, decoder = Template.parse(pattern, base), make_decoder(context=50)
    model, prompt = MemoryAugmentedLM(base, decoder, template), template.prompt("Why?")
    step = next(model.stream(prompt, Settings(1, temperature=0)))
    skip = len(base.encode([Literal("<turn>user\n" if template.pattern.startswith("chat") else "Question:")]))
    hidden = base.hidden(torch.tensor([base.encode(prompt)]))
    memory, all_states = (memory_of(base, decoder, hidden, n)[-1] for n in (skip, 0))
    assert step.memory == pytest.approx(memory.exp()[step.token].item(), rel=1e-3)
    assert step.memory != pytest.approx(all_states.exp()[step.token].item(), rel=1e-2)
    assert model.skipped(base.encode(prompt)) == skip and model.skipped(base.encode(prompt)[:skip]) == skip - 1


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(model):
    def draw(seed):
        return [s.token for s in model.stream("Why?", Settings(temperature=1.5), 20, seed)]

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
    assert sum(bool(piece) for piece in shown) > 10  # and not all at the end


def test_bytes_that_are_no_character_do_not_hold_up_an_answer(model, monkeypatch):
    first, lone = (SPECIAL.index("<end>") + 1 + byte for byte in (0xE2, 0xFF))  # of a character of three bytes, and of none
    tokens = [*[first] * 9, *model.base.encode("So.")[1:], lone, lone, *model.base.encode("No.")[1:]]
    force_tokens(monkeypatch, tokens)
    shown = [s.text for s in model.stream("x", max_new_tokens=len(tokens))]
    assert "".join(shown).replace("\ufffd", "").replace(" ", "") == "So.No." and "".join(shown).count("\ufffd") == 11
    decoded = DecodedText(model.base.tokenizer)
    assert [bool(decoded.add(first)) for _ in range(9)] == [False] + 8 * [True] and decoded.flush() == "\ufffd"


@pytest.mark.parametrize("end", ["<eos>", "<end>"])
def test_generation_ends_at_any_end_token_and_does_not_show_it(model, monkeypatch, end):
    token = SPECIAL.index(end)
    force_tokens(monkeypatch, [*model.base.encode("Yes.")[1:], token, 77])
    steps = list(model.stream("x"))
    assert steps[-1].token == token and "".join(s.text for s in steps) == "Yes."


@pytest.mark.parametrize("pattern", ["chat {q} {a}", "<turn>{q}\n<turn>{a}<unk>\n"])
def test_the_mark_behind_the_last_field_ends_an_answer_and_is_not_shown(base, monkeypatch, pattern):
    mark = END if pattern.startswith("chat") else SPECIAL.index("<unk>")
    force_tokens(monkeypatch, [*base.encode("It is.")[1:], mark, 77])
    steps = list(MemoryAugmentedLM(base, make_decoder(), Template.parse(pattern, base)).stream("x"))
    assert steps[-1].token == mark and "".join(s.text for s in steps) == "It is."


def test_letters_that_spell_an_end_token_do_not_end_an_answer(base, monkeypatch):
    ids = base.encode("Write <end> or <eos>.")[1:]
    force_tokens(monkeypatch, ids)
    model = MemoryAugmentedLM(base, make_decoder(), Template.parse("chat {q} {a}", base))
    assert "".join(s.text for s in model.stream("x", max_new_tokens=len(ids))) == "Write <end> or <eos>."


@pytest.mark.parametrize(("pattern", "said"), [
    ("Question: {q}\nAnswer: {a}", "Yes, it is.\nQuest for more.\nQuestion: And now?"),
    ("Title: {t}\nQuestion: {q}\nAnswer: {a}", "Yes, it is.\nQuest for more.\nTitle: Goats"),
    ("{q}\n{a} ### \n", "Yes, it is.\nQuest for more. ### and so on")])
def test_generation_ends_where_the_template_goes_on(base, monkeypatch, pattern, said):
    force_tokens(monkeypatch, base.encode(said)[1:])
    steps = list(MemoryAugmentedLM(base, make_decoder(), Template.parse(pattern)).stream("x"))
    assert "".join(s.text for s in steps) == "Yes, it is.\nQuest for more."


def test_what_was_held_back_is_shown_when_the_answer_ends(base, monkeypatch):
    ids = base.encode("Yes.\nQuest")[1:]
    force_tokens(monkeypatch, ids)
    steps = list(MemoryAugmentedLM(base, make_decoder(), QA).stream("x", max_new_tokens=len(ids)))
    assert "".join(s.text for s in steps) == "Yes.\nQuest"


@pytest.mark.parametrize("pieces", [["a\nQ", ":b"], ["a\n", "Q:", "b"], [" a", "\nQ:"], list("a\nQ: b")])
def test_a_stop_text_is_found_however_it_is_cut(pieces):
    visible = VisibleText(["\nQ:"])
    assert "".join(visible.add(piece) for piece in pieces if not visible.stopped) == "a" and visible.stopped


@pytest.mark.parametrize("pieces", [["\nQ:", " b"], [" Q:"], ["\n", "\n", "Q", ": b"]])
def test_a_stop_text_may_come_first(pieces):
    visible = VisibleText(["\nQ:"])
    assert "".join(visible.add(piece) for piece in pieces if not visible.stopped) == "" and visible.stopped


@pytest.mark.parametrize(("closing", "pieces", "shown"), [
    (".", ["A goat", ". Two", " goats", "."], "A goat. Two goats"), (" ]", ["[a ]", " b", " ", "]"], "[a ] b"),
    ("]", ["a]", "]"], "a]"), (".", ["a", "!"], "a!"), (".", ["."], ""), ("", ["a."], "a.")])
def test_a_mark_of_the_template_behind_an_answer_is_shown_only_inside_it(closing, pieces, shown):
    visible = VisibleText(["\nQ:"], closing)
    assert "".join(map(visible.add, pieces)) + visible.end() == shown
    cut = VisibleText([], closing)  # if the answer was cut off, its end is unknown
    assert ("".join(map(cut.add, pieces)) + cut.flush()).strip() == "".join(pieces).strip()


@pytest.mark.parametrize("pattern", ["Q: {q}\nA: {a}.", "Q: {q}\nA: {a} ###", "Q: {q}\nA: {a}\n-- end --\n"])
def test_the_templates_own_words_behind_an_answer_are_not_shown(base, pattern, monkeypatch):
    template = Template.parse(pattern)
    words = [*base.encode(["Only a small one", template.tail])[1:], base.eos]
    model = MemoryAugmentedLM(base, make_decoder(), template)
    monkeypatch.setattr(generation, "sample", lambda *_: words.pop(0))
    assert "".join(step.text for step in model.stream(template.prompt("May I?"))) == "Only a small one"


def test_a_prompt_that_does_not_fit_is_refused_in_words(model):
    with pytest.raises(UserError, match="reads at most 512"):
        next(model.stream("word " * 600))


def test_a_decoder_of_another_model_is_refused_in_words(base):
    with pytest.raises(UserError, match="hidden size 16"):
        MemoryAugmentedLM(base, make_decoder(hidden=16))
    with pytest.raises(UserError, match="500 tokens"):
        MemoryAugmentedLM(base, make_decoder(vocab=500))


def test_no_run_of_so_many_tokens_comes_twice_in_an_answer(model, monkeypatch):
    fixed = torch.full((512,), -50.0)
    fixed[300:400] = torch.arange(100.0, 0, -1)  # 300 is always the best token, then 301 and so on
    monkeypatch.setattr(generation, "blend", lambda *_: fixed)

    def answer(no_repeat, temperature=0, count=9):
        return [step.token for step in model.stream("Why?", Settings(temperature=temperature, no_repeat=no_repeat), count)]

    assert answer(0) == [300] * 9
    assert answer(1) == list(range(300, 309))
    assert answer(2) == [300, 300, 301, 300, 302, 300, 303, 300, 304]
    assert answer(3) == [300, 300, 300, 301, 300, 300, 302, 300, 300]
    assert answer(9) == [300] * 9  # the only run of nine
    drawn = answer(2, temperature=2, count=60)
    assert len({tuple(drawn[i:i + 2]) for i in range(59)}) == 59 < len(drawn)


def test_a_run_of_the_prompt_may_come_in_the_answer(model, monkeypatch):
    *_, last = model.base.encode("Why?")
    monkeypatch.setattr(generation, "blend", lambda *_: torch.nn.functional.one_hot(torch.tensor(last), 512).float())
    assert next(model.stream("Why?", Settings(temperature=0, no_repeat=1))).token == last
