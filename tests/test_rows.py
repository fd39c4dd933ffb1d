"""Values become text as they stand. Chats are read in every usual form. Some rows are held out."""

import datetime
from decimal import Decimal

import pytest
from conftest import DEMO_ROWS, ROWS, examples

from sources.rows import Example, messages_of, plain_text, read_rows, split_rows
from sources.tables import Table
from support.command import UserError
from texts import ORIGINAL, Template

TEMPLATE = Template.parse(ORIGINAL)
TURNS = [{"role": "user", "content": "May I?"}, {"role": "assistant", "content": "You may."}]


def sentence(error):
    assert "\n" not in str(error.value) and str(error.value).rstrip(")\"").endswith(".")
    return str(error.value)


def read(records, pattern="{q} {a}", **more):
    columns = list(dict.fromkeys(key for record in records for key in record))
    return read_rows(Table("rows.jsonl", columns, lambda _: records, **more), Template.parse(pattern, columns=columns))


@pytest.mark.parametrize(("value", "text"), [
    (" a \n", "a"), ("0071", "0071"), (None, ""), ([], ""), (True, "true"), (False, "false"), (71, "71"), (18.5, "18.5"),
    (Decimal("18.10"), "18.10"), (["One.", "Two."], "One.\nTwo."), ({"text": "Only this.", "id": 3}, "Only this."),
    ({"text": ["Denver", "Denver, Colorado"], "answer_start": [1, 1]}, "Denver"), ({"text": [], "answer_start": []}, ""),
    ({"text": ["One.", "Two."]}, "One.\nTwo."), (datetime.date(2021, 3, 5), "2021-03-05"),
    (datetime.datetime(2021, 3, 5), "2021-03-05"), (datetime.datetime(2021, 3, 5, 9, 30), "2021-03-05 09:30:00"),
    (datetime.datetime(2021, 3, 5, tzinfo=datetime.UTC), "2021-03-05 00:00:00+00:00"), (datetime.time(9, 30), "09:30:00"),
    ("\ud83d\ude00 \ud800!", "\U0001f600 \ufffd!"), (["\ud800"], "\ufffd")])
def test_a_value_becomes_the_text_that_stands_there(value, text):
    assert plain_text(value) == text


@pytest.mark.parametrize(("value", "kind"), [
    ({"a": 1, "b": 2}, "objects with a, b"), ({}, "empty objects"), ([1, 2], "lists of numbers"), (TURNS, "a chat"),
    ([{"x": "y"}], "lists of objects"), ([["a"]], "lists of lists of texts"), ([[]], "lists of empty lists"),
    (b"bytes", "bytes"), ([None], "lists of"),
    ({"text": [{"b": 1}]}, "lists of objects")])
def test_a_value_without_plain_text_is_named_by_its_kind(value, kind):
    with pytest.raises(ValueError, match=kind):
        plain_text(value)


@pytest.mark.parametrize(("value", "said"), [
    ({"begin": 1, "end": 2}, "The field a of rows.jsonl:2 holds objects with begin, end, not text; name a field of text with "
                             "--template, or a part of it, e.g. {a.begin}."),
    (TURNS, "The field a of rows.jsonl:2 holds a chat, not text; use --template chat.")])
def test_a_field_without_text_is_refused_by_its_name_and_kind(value, said):
    with pytest.raises(UserError) as error:
        read([{"q": "?", "a": "text"}, {"q": "?", "a": value}])
    assert sentence(error) == said


def test_a_part_of_a_nested_field_is_named_with_a_dot():
    records = [{"q": "?", "answers": {"best": {"words": f"So {n}."}}, "a.b": f"flat {n}"} for n in range(2)]
    found = read(records, "{q} {a.b} {answers.best.words}")
    assert [e.row for e in found] == [{"q": "?", "a.b": f"flat {n}", "answers.best.words": f"So {n}."} for n in range(2)]


@pytest.mark.parametrize("value", [
    TURNS, [{"from": "human", "value": "May I?"}, {"from": "gpt", "value": "You may."}],
    [{"role": "user", "content": [{"type": "text", "text": "May I?"}]},
     {"role": "assistant", "content": " You may. ", "name": "x"}]])
def test_a_chat_is_read_in_every_usual_form(value):
    assert messages_of(value) == TURNS


@pytest.mark.parametrize("value", [
    [{"role": "assistant", "content": None, "tool_calls": [1]}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"text": "x"}], "May I?", ["May I?"], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}], [{"role": "user", "content": None}]])
def test_a_chat_without_text_is_refused_in_words(value):
    with pytest.raises(UserError) as error:
        read([{"messages": value}], "chat {messages}")
    assert "The field messages of rows.jsonl:1 holds " in sentence(error) and "not a chat" in sentence(error)


def test_a_row_without_a_value_is_left_out_and_counted(capsys):
    blank = [{**ROWS[0], "Answer": value} for value in (None, "", " \n ", [])]
    found = read([*blank, ROWS[1], {"Title": "no more"}, ROWS[2]], ORIGINAL)
    assert found == [Example("rows.jsonl:5", ROWS[1]), Example("rows.jsonl:7", ROWS[2])]
    assert capsys.readouterr().out == "left out: 5 rows of rows.jsonl in which one of Title, Question, Answer is empty\n"


def test_rows_that_are_all_empty_are_refused():
    with pytest.raises(UserError) as error:
        read([{"q": "", "a": "x"}])
    assert "no row in which all of q, a are filled" in sentence(error)


def test_a_field_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError) as error:
        read(ROWS[:3], "{Title} {Nothing}")
    assert "no field Nothing; it has Title, Question, Answer" in sentence(error)


def split(rows, held=None, template=TEMPLATE, fraction=0.05, most=None, seed=0):
    kept, held = split_rows(examples(rows), held and examples(held), template, fraction, most, seed, "rows.jsonl")
    return [example.row for example in kept], [example.row for example in held]


def texts(rows, template=TEMPLATE):
    return {"".join(template.render(row)) for row in rows}


def test_a_row_that_occurs_twice_is_never_on_both_sides():
    kept, held = split(ROWS[:10] * 2, fraction=0.3)
    assert not texts(kept) & texts(held) and texts(kept) | texts(held) == texts(ROWS[:10])


def test_a_row_of_the_validation_dataset_is_not_trained_on():
    kept, held = split(ROWS[:10], ROWS[:3])
    assert held == ROWS[:3] and kept == ROWS[3:10]


def test_a_long_answer_of_the_validation_dataset_is_not_trained_on_under_another_question():
    (first, twin), others = DEMO_ROWS[:2], ROWS[1:9]
    assert first["Answer"] == twin["Answer"] and first["Question"] != twin["Question"]
    assert split([twin, *others], [first, ROWS[9]])[0] == others


def test_one_seed_splits_one_way_and_another_another():
    first, second, other = (split(ROWS[:24], seed=seed) for seed in (3, 3, 4))
    assert first == second and first[1] != other[1]
    assert sorted(map(str, first[0] + first[1])) == sorted(map(str, ROWS[:24]))


def test_a_long_answer_stands_on_one_side_of_the_split_only_and_short_ones_may_stand_on_both(capsys):
    rows = [{"Title": f"t{n}", "Question": f"q{n}?", "Answer": f"answer {n // 3} " + "and so on " * 12} for n in range(12)]
    rows += [{"Title": f"s{n}", "Question": f"short {n}?", "Answer": "Yes."} for n in range(12)]
    kept, held = split(rows, fraction=0.3)
    kept_answers, held_answers = ({row["Answer"] for row in part} for part in (kept, held))
    assert kept_answers & held_answers == {"Yes."}
    assert any(len(answer) > 100 for answer in kept_answers) and any(len(answer) > 100 for answer in held_answers)
    assert 0 < len(rows) - len(kept) - len(held) == int(capsys.readouterr().out.split("left out: ")[1].split()[0])
    long = [row["Answer"] for row in held if len(row["Answer"]) > 100]
    assert len(set(long)) == len(long)  # otherwise both halves of the report would have one answer


@pytest.mark.parametrize(("rows", "fraction", "held"), [(24, 0.05, 2), (24, 0.25, 6), (440, 0.9, 200)])
def test_the_held_out_share_is_at_least_2_and_at_most_200_rows(rows, fraction, held):
    assert [len(part) for part in split(ROWS[:rows], fraction=fraction)] == [rows - held, held]


def test_max_examples_takes_fewer_rows_and_holds_out_the_same():
    all_rows, held = split(ROWS[:24])
    some, same = split(ROWS[:24], most=7)
    assert len(some) == 7 and same == held and all(row in all_rows for row in some)


@pytest.mark.parametrize(("rows", "held", "most"), [(3, None, None), (24, None, 1), (24, 1, None), (2, 2, None)])
def test_too_few_rows_are_refused_in_words(rows, held, most):
    with pytest.raises(UserError, match="is too small") as error:
        split(ROWS[:rows], held and ROWS[:held], most=most)
    assert "at least 2 of each" in sentence(error)


def test_one_long_reply_to_two_chats_stands_on_one_side_of_the_split_only():
    def chat(number, reply):
        return {"messages": [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": reply}]}

    rows = [chat(n, f"reply {n // 2} " + "and so on " * 12) for n in range(12)]
    kept, held = split(rows, template=Template.parse("chat {messages}"), fraction=0.3)
    replies = [{row["messages"][1]["content"] for row in part} for part in (kept, held)]
    assert len(held) == 2 and len(kept) == 8 and not replies[0] & replies[1]
