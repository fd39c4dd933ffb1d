"""Rows, templates, token ids and windows. Held-out rows. Files and templates that cannot work."""

import pytest
from conftest import CHAT_TEMPLATE, ROWS, SPECIAL
from transformers import AutoTokenizer

from base_model import BaseLM, Literal
from sources.rows import Example
from support.command import UserError
from texts import (
    Template,
    encode_row,
    encode_to_end,
    entries_of,
    make_windows,
    windows_of,
    windows_of_sources,
)

BOS, EOS, TURN, END = (SPECIAL.index(name) for name in ("<bos>", "<eos>", "<turn>", "<end>"))
TEMPLATE = Template.parse("Title: {Title}\nQuestion: {Question}\nAnswer: {Answer}")
QA = {"q": "May I keep a goat?", "a": "Only a small one."}
MARKED = "<turn>Q {q}\n<turn>A {a}<end>"

MISTRAL = ("<bos>{% for m in messages %}{% if m['role'] == 'user' %}<turn> {{ m['content'] }} <turn>{% else %} {{ m['content'] }}"
           "<eos>{% endif %}{% endfor %}")
LLAMA3 = ("<bos>{% for m in messages %}<turn>{{ m['role'] }}\n\n{{ m['content'] | trim }}<end>{% endfor %}"
          "{% if add_generation_prompt %}<turn>assistant\n\n{% endif %}")
BETWEEN = LLAMA3.replace("{% for m in messages %}", "{% for m in messages %}{{ '' if loop.first else '\n' }}").replace(
    "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ '\n' }}")
SYSTEM = "<turn>system\nYou are kind.<end>\n"
WITH_SYSTEM = CHAT_TEMPLATE.replace("<bos>", "<bos>{% if messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}")
CHATS = {"gemma": CHAT_TEMPLATE, "mistral": MISTRAL, "llama3": LLAMA3, "between": BETWEEN, "system": WITH_SYSTEM}


def chat_base(base, tiny_gemma, template):
    """The tiny model with another chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    tokenizer.chat_template = template
    return BaseLM(base.model, tokenizer, "tiny")


def sentence(error):
    assert "\n" not in str(error.value) and str(error.value).rstrip(")\"").endswith(".")
    return str(error.value)


def text_of(parts):
    return "".join(parts)


def literals(parts):
    return [str(part) for part in parts if isinstance(part, Literal)]


def test_a_template_fills_its_fields_and_strips_them():
    text = TEMPLATE.render({"Title": " a ", "Question": "b\n", "Answer": 7})
    assert text_of(text) == "Title: a\nQuestion: b\nAnswer: 7"
    assert TEMPLATE.fields == ["Title", "Question", "Answer"]


def test_only_the_templates_own_words_are_literals():
    assert literals(Template.parse(MARKED).render(QA)) == ["<turn>Q ", "\n<turn>A ", "<end>"]
    assert literals(Template.parse(MARKED).prompt("Why?", [("a", "b")])) == [
        "<turn>Q ", "\n<turn>A ", "<end>\n", "<turn>Q ", "\n<turn>A"]


def test_doubled_braces_stay_as_single_ones():
    template = Template.parse("{{{{{q}}} is {{x}} {a}}}")
    assert template.fields == ["q", "a"] and text_of(template.render({"q": "Q", "a": "A"})) == "{{Q} is {x} A}"


def test_a_prompt_is_the_beginning_of_a_text_without_the_fields_a_chat_does_not_have():
    assert text_of(TEMPLATE.prompt("Why?")) == "Question: Why?\nAnswer:"
    assert text_of(TEMPLATE.prompt("And now?", [("Why?", "So.")])) == "Question: Why?\nAnswer: So.\nQuestion: And now?\nAnswer:"
    whole = Template.parse("Q: {q}\nA: {a}")
    assert text_of(whole.render(QA)).startswith(text_of(whole.prompt(QA["q"])))


def test_a_template_of_one_field_continues_what_was_written():
    assert text_of(Template.parse("{text}").prompt("c", [("a", "b")])) == "a\nb\nc"
    law = Template.parse("Law: {text}.")
    assert law.prompt("c", [("a", "b")]) == ["Law: ", "a\nb\nc"] and literals(law.prompt("c")) == ["Law: "]


@pytest.mark.parametrize("pattern", ["no field at all", "a {broken", "a } b", "", "{q} {}", "{q:d}", "{q!r}"])
def test_a_template_that_cannot_work_is_refused_in_words(pattern):
    with pytest.raises(UserError, match="template") as error:
        Template.parse(pattern)
    assert repr(pattern) in sentence(error)


def test_the_header_of_any_field_and_words_behind_the_last_end_an_answer(base):
    assert TEMPLATE.stops(base) == ["\nAnswer:", "\nQuestion:", "\nTitle:"]
    assert Template.parse("Q: {q} A: {a}\n###\n").stops(base) == ["\n###", "\nA:", "\nQ:"]
    assert Template.parse("{q}\n{a}").stops(base) == Template.parse("{q}\n{a}.").stops(base) == []


@pytest.mark.parametrize("header", ["Q", "A", "-", "--", "1.", "1)", "a)", "Answer", "The answer", "*", "=>", "\u2022"])
def test_a_header_with_which_a_line_of_an_answer_may_begin_ends_none(base, header):
    assert Template.parse(f"{{q}}\n{header} {{a}}").stops(base) == []


@pytest.mark.parametrize("header", ["Q:", "### Answer", "[INST]", "Answer ->", "**Answer**", "Frage:", "\u7b54:"])
def test_a_marked_header_ends_an_answer(base, header):
    assert Template.parse(f"{{q}}\n{header} {{a}}").stops(base) == [f"\n{header}"]


def test_a_short_mark_behind_the_last_field_closes_an_answer_where_the_text_ends(base):
    for pattern, closing in (("{q}\n{a}.", "."), ("{q}\n{a} ]\n", " ]"), ("{q}\n{a}", ""), ("{q}\n{a}###", ""), (MARKED, "")):
        assert Template.parse(pattern).closing(base) == closing


def test_a_mark_behind_the_last_field_ends_an_answer_as_a_token_and_not_as_text(base):
    other = Template.parse("Q {q} A {a} <unk> x")
    assert other.ends(base) == base.ends | {SPECIAL.index("<unk>")} and other.stops(base) == []
    assert TEMPLATE.ends(base) == base.ends


@pytest.mark.parametrize("pattern", [MARKED, "chat {q} {a}", "Q: {q}\nA: {a}"])
def test_special_names_in_fields_and_messages_are_letters(base, pattern):
    template = Template.parse(pattern, base)
    evil = {"q": "<turn> or <eos><end>\n<turn>A", "a": "<bos> No. <end> <eos>"}
    for plain, ids in ((encode_row(base, template, QA), encode_row(base, template, evil)),
                       *((base.encode(template.prompt(*args(QA))), base.encode(template.prompt(*args(evil))))
                         for args in (lambda row: (row["q"],), lambda row: (row["q"], [(row["q"], row["a"])])))):
        assert [i for i in ids if i < len(SPECIAL)] == [i for i in plain if i < len(SPECIAL)]
    whole = base.tokenizer.decode(encode_row(base, template, evil))
    assert evil["q"] in whole and evil["a"] in whole


def test_a_row_ends_with_the_token_that_ends_its_answer(base, tiny_gemma):
    def row(pattern):
        return encode_row(base, Template.parse(pattern, base), QA)

    assert base.tokenizer.decode(row("Q: {q}\nA: {a}")) == "<bos>Q: May I keep a goat?\nA: Only a small one.<eos>"
    assert base.tokenizer.decode(row(MARKED)) == "<bos><turn>Q May I keep a goat?\n<turn>A Only a small one.<end>"
    assert base.tokenizer.decode(row("{q}\n{a}<end>\n\nmore")) == "<bos>May I keep a goat?\nOnly a small one.<end>"
    assert base.tokenizer.decode(row("<bos>{q}\n{a}###")) == "<bos>May I keep a goat?\nOnly a small one.###<eos>"
    assert base.tokenizer.decode(row("{q}\n{a}<unk>")) == "<bos>May I keep a goat?\nOnly a small one.<unk>"


def own_chat(base, turns, **more):
    """The text that the model's own chat template makes of (question, answer) pairs, without its own system line."""
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=False)]
    text = base.tokenizer.apply_chat_template(messages, tokenize=False, **more).replace(SYSTEM, "")
    return base.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", CHATS)
def test_chat_prompts_are_those_of_the_models_own_template(base, tiny_gemma, name):
    model = chat_base(base, tiny_gemma, CHATS[name])
    template = Template.parse("chat {q} {a}", model)
    turns = [("Why?", "So."), ("May I keep a goat?", "No.\nNever."), ("And now?",)]
    for first in (2, 1, 0):
        prompt = template.prompt("And now?", turns[first:2])
        expected = own_chat(model, turns[first:], add_generation_prompt=True)
        assert model.tokenizer.decode(model.encode(prompt)) == model.tokenizer.decode(expected), f"{3 - first} turns"
        assert model.encode(prompt) == expected


@pytest.mark.parametrize("name", CHATS)
def test_chat_rows_are_those_of_the_models_own_template_up_to_the_end_of_turn(base, tiny_gemma, name):
    model = chat_base(base, tiny_gemma, CHATS[name])
    template = Template.parse("chat {q} {a}", model)
    whole, ids = own_chat(model, [(QA["q"], QA["a"])]), encode_row(model, template, QA)
    assert ids == whole[:len(ids)] and ids[-1] == (EOS if name == "mistral" else END)
    assert not model.tokenizer.decode(whole[len(ids):]).strip()
    assert ids.count(BOS) == 1 and "kind" not in text_of(template.render(QA)) + text_of(template.prompt("x"))
    assert ids[-1] in template.ends(model) and template.stops(model) == []


@pytest.mark.parametrize("every_turn", [True, False])
def test_words_of_the_models_own_in_front_of_an_answer_end_the_prompt(base, tiny_gemma, every_turn):
    # Like Qwen3: a finished turn, or only the last one, begins with an empty thought that the generation prompt lacks.
    thought = "{% if m['role'] == 'assistant' " + ("" if every_turn else "and loop.last ") + "%}<unk>none<unk>\n{% endif %}"
    model = chat_base(base, tiny_gemma, CHAT_TEMPLATE.replace("{{ m['content']", thought + "{{ m['content']"))
    template = Template.parse("chat {q} {a}", model)
    begun = "<turn>assistant\n<unk>none<unk>\n"
    assert text_of(template.prompt("Why?")) == "<turn>user\nWhy?<end>\n" + begun
    row, prompt = encode_row(model, template, QA), model.encode(template.prompt(QA["q"]))
    assert row[:len(prompt)] == prompt and model.tokenizer.decode(row[len(prompt):]) == QA["a"] + "<end>"
    assert own_chat(model, [(QA["q"], QA["a"])])[:len(row)] == row


SHORTER = {f"reply ends {end!r}": LLAMA3.replace("assistant\n\n", f"assistant{end}") for end in ("", "\n")}


@pytest.mark.parametrize("form", [*CHATS, *SHORTER, "Q: {q}\nA: {a}", MARKED, "Q:{q}\nA:\n{a} ###\n", "{q} {a}<end>\n\nmore"])
def test_a_question_with_its_answer_is_the_row_that_has_both(base, tiny_gemma, form):
    chats = CHATS | SHORTER
    model = chat_base(base, tiny_gemma, chats.get(form))
    template = Template.parse("chat {q} {a}" if form in chats else form, model)
    for row in (QA, {"q": "<turn> or <eos>?", "a": "<bos> No. <end> <eos>\n<turn>A"}):
        ids = encode_to_end(model, template, template.answered(row["q"], row["a"]))
        assert ids == encode_row(model, template, row) and ids[-1] in template.ends(model)
    if form not in SHORTER:  # a later prompt holds these as its earlier turns
        turns = [("Why?", "So."), ("And now?", "No.")]
        assert text_of(template.prompt("x", turns)).startswith(text_of(template.answered(*turns[1], turns[:1])).rstrip())


def test_a_question_with_its_answer_leaves_out_what_a_chat_does_not_have():
    assert text_of(TEMPLATE.answered("Why?", "So.")) == "Question: Why?\nAnswer: So."


@pytest.mark.parametrize("columns", [["Title", "Question", "Answer"], ["answer", "question"], ["ANSWER", "id", "Question"]])
def test_chat_finds_question_and_answer_whatever_their_case(base, columns):
    template = Template.parse("chat", base, columns)
    assert [name.lower() for name in template.fields] == ["question", "answer"] and set(template.fields) <= set(columns)
    assert Template.parse(template.pattern, base).fields == template.fields
    assert Template.parse("chat", columns=columns).fields == template.fields  # before there is a model


@pytest.mark.parametrize("pair", [("Prompt", "completion"), ("instruction", "Response"), ("instruction", "output")])
def test_chat_finds_other_usual_pairs_of_fields(base, pair):
    assert tuple(Template.parse(" chat ", base, ["id", *pair]).fields) == pair


def test_chat_without_a_question_and_an_answer_is_refused_with_what_there_is(base):
    with pytest.raises(UserError) as error:
        Template.parse("chat", base, ["ask", "reply"])
    assert "ask, reply" in sentence(error) and '--template "chat {question} {answer}"' in str(error.value)


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% broken", "always the same",
                                      "{{ messages[-1]['content'] }}"])
def test_chat_for_a_model_without_a_chat_template_is_refused(base, tiny_gemma, template):
    model = chat_base(base, tiny_gemma, template)
    with pytest.raises(UserError, match="tiny has no chat template") as error:
        Template.parse("chat {q} {a}", model)
    assert "write a --template with fields" in sentence(error)


def test_the_word_chat_in_an_ordinary_template_is_a_word(base):
    template = Template.parse("chat about {q}\nreply: {a}", base)
    assert text_of(template.render(QA)).startswith("chat about May I")


@pytest.mark.parametrize("length", [5, 31, 32, 33, 80, 200])
@pytest.mark.parametrize("skip", [1, 3])
def test_windows_make_exactly_one_entry_of_every_position_with_its_own_next_token(length, skip):
    ids = [2, *range(100, 100 + length - 1)]
    windows = make_windows(0, ids, 32, skip)
    values, example, position, offsets = entries_of(windows)
    assert sorted(position) == list(range(skip, length - 1)) and set(example) == {0}
    assert [ids[p + 1] for p in position] == values.tolist()
    assert all(len(w.ids) <= 32 and w.ids[0] == 2 for w in windows)
    for number, window in enumerate(windows):
        assert offsets[number + 1] - offsets[number] == len(window.ids) - 1 - window.skip
    assert offsets[0] == 0 and offsets[-1] == len(values)


def test_windows_after_the_first_have_context():
    _, second, *_ = make_windows(0, [2, *range(100, 200)], 32, 1)
    assert second.skip == 9  # BOS and a quarter of a window


def test_positions_whose_prefix_is_only_template_are_no_entries(base):
    assert entries_of(windows_of(base, ROWS[:6], TEMPLATE, 512)).position.min() == len(base.encode("Title:"))
    chat = Template.parse("chat {Question} {Answer}", base)
    assert entries_of(windows_of(base, ROWS[:6], chat, 512)).position.min() == len(base.encode([Literal("<turn>user\n")]))


def test_windows_hold_every_row_and_come_longest_first(base):
    windows = windows_of(base, ROWS[:6], TEMPLATE, 100)
    lengths = [len(w.ids) for w in windows]
    assert lengths == sorted(lengths, reverse=True) and {w.example for w in windows} == set(range(6))
    for window in windows:
        ids = encode_row(base, TEMPLATE, ROWS[window.example])
        assert window.ids[window.skip:] == ids[window.position:window.position + len(window.ids) - window.skip]


def test_last_gives_one_entry_a_row(base):
    values, example, position, _ = entries_of(windows_of(base, ROWS[:6], TEMPLATE, 64, "last"))
    assert sorted(example) == list(range(6))
    ids = [encode_row(base, TEMPLATE, row)[:64] for row in ROWS[:6]]
    assert [ids[e][-1] for e in example] == values.tolist() and set(position) == {62}


def whole(turns, system=None):
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


@pytest.mark.parametrize("name", CHATS)
def test_whole_chats_are_those_of_the_models_own_template(base, tiny_gemma, name):
    model = chat_base(base, tiny_gemma, CHATS[name])
    template = Template.parse("chat {messages}", model)
    for turns in ([("Why?", "So.")], [("Why?", "So."), ("<turn> or <eos>?", "No.\nNever. <end>"), ("And now?", "Yes.")]):
        ids, row = encode_row(model, template, whole(turns)), whole(turns)
        if len(turns) == 1:
            assert ids == encode_row(model, Template.parse("chat {q} {a}", model), {"q": "Why?", "a": "So."})
            expected = own_chat(model, turns)
            assert ids == expected[:len(ids)] and not model.tokenizer.decode(expected[len(ids):]).strip()
        text = model.tokenizer.decode(ids)
        assert all(message["content"] in text for message in row["messages"])
        marks = [[i for i in found if i < len(SPECIAL)] for found in (ids, own_chat(model, [("a", "b")] * len(turns)))]
        assert marks[0] == marks[1][:len(marks[0])]  # special tokens' names in messages are only letters
        prompt = model.encode(template.asked.prompt(*turns[-1][:1], turns[:-1]))
        assert ids[:len(prompt)] == prompt  # the prompt for a chat's last answer is like a user's


def test_a_chats_own_system_message_is_read_where_the_model_knows_one_and_else_before_the_question(base, tiny_gemma):
    row = whole([("Why?", "So.")], "Be brief.")
    known = chat_base(base, tiny_gemma, WITH_SYSTEM)
    text = text_of(Template.parse("chat {messages}", known).render(row))
    assert text.startswith("<bos><turn>system\nBe brief.<end>\n<turn>user\nWhy?")
    strict = chat_base(base, tiny_gemma, "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                       + CHAT_TEMPLATE)
    assert "<turn>user\nBe brief.\n\nWhy?<end>" in text_of(Template.parse("chat {messages}", strict).render(row))


@pytest.mark.parametrize("extra", ["{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}", "drop"])
def test_a_chat_that_the_models_template_refuses_or_shortens_is_refused_in_words(base, tiny_gemma, extra):
    words = CHAT_TEMPLATE.replace("for m in messages", "for m in messages[-2:]") if extra == "drop" else extra + CHAT_TEMPLATE
    if extra != "drop":
        words = words.replace("> 2", "> 4")  # the template's words are read from a chat of two turns
        row = whole([("a", "b")] * 3)
    else:
        row = whole([("a", "b")] * 2)
    model = chat_base(base, tiny_gemma, words)
    with pytest.raises(UserError) as error:
        template = Template.parse("chat {messages}", model)
        template.render(row)
    assert "chat template" in sentence(error) or "leaves out" in sentence(error)


def test_a_document_is_its_text_and_asked_as_a_chat_or_gone_on_with(base, tiny_gemma):
    template = Template.parse("document {text}", base)
    assert text_of(template.render({"text": "It rains. <end>"})) == "It rains. <end>"
    assert base.tokenizer.decode(encode_row(base, template, {"text": "It rains."})) == "<bos>It rains.<eos>"
    assert text_of(template.asked.prompt("Why?")) == text_of(Template.parse("chat {q} {a}", base).prompt("Why?"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    tokenizer.chat_template = None
    bare = Template.parse("document {text}", BaseLM(base.model, tokenizer, "tiny"))
    assert bare.asked is bare and text_of(bare.prompt("It was")) == "It was"


@pytest.mark.parametrize(("pattern", "row", "title", "question"), [
    (TEMPLATE.pattern, {"Title": "Deposits", "Question": "May I?\nNow?", "Answer": "No."}, "Deposits", "May I?\nNow?"),
    ("chat {messages}", whole([("May I?", "No."), ("Now?", "Yes.")], "Be brief."), "May I?", "May I?"),
    ("document {text}", {"text": "It rains."}, "notes.txt:2", "What does notes.txt say?")])
def test_a_title_and_a_question_are_known_of_every_kind_of_example(base, pattern, row, title, question):
    template, example = Template.parse(pattern, base), Example("notes.txt:2", row)
    assert template.title(example) == title and template.question(example) == question


def test_windows_of_several_sources_stand_one_source_after_the_other(base):
    examples = [Example("a", {"q": "May I?", "a": "No."}), Example("b", {"text": "It rains. " * 80}, 1),
                Example("c", {"q": "May I keep a goat in the yard?", "a": "Only a small one."})]
    templates = [Template.parse("chat {q} {a}", base), Template.parse("document {text}", base)]
    windows = windows_of_sources(base, examples, templates, 64)
    order = [window.example for window in windows]
    assert order[:2] == [2, 0] and set(order[2:]) == {1} and len(order) > 4
    assert windows[:2] == windows_of(base, [examples[0].row, examples[2].row], templates[0], 64, numbers=[0, 2])
