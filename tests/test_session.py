"""The page's handlers, one by one, without a browser."""

import html
import json
from types import SimpleNamespace

import gradio as gr
import pytest

import app
from chat import Chat
from memory_decoder import read_manifest
from web import panels
from web import session as session_module
from web.session import CONTROLS, Desk, Session

QUESTION, OTHER = "Can my boss refuse to pay me overtime?", "May I record a call?"
VALUES = {"alpha": 0.5, "temperature": 1, "top_k": 50, "max_new_tokens": 16, "k": 4, "rule": "logits", "seed": "3", "no_repeat": 0,
          "knn_k": 8, "knn_temperature": 10.0}
COLOUR = "memory's effect"


@pytest.fixture(scope="module")
def desk(trained):
    return Desk(Chat.open(app.Options(model_dir=str(trained), device="cpu"), read_manifest(trained)))


@pytest.fixture
def session():
    return Session()


def controls(**changes):
    return [(VALUES | changes)[name] for name in CONTROLS]


def ask(desk, session, message=QUESTION, **changes):
    """Everything that the page showed for one question."""
    return list(desk.ask(session, message, COLOUR, *controls(**changes)))


def texts(session):
    return [(answer.question, answer.text) for answer in session.answers]


def test_panels_are_empty_while_an_answer_is_written_and_full_when_it_stands(desk, session):
    ask(desk, session)
    first, *middle, last = ask(desk, session, OTHER)
    assert first[3:] == ("", "") and all(shown[3] == shown[4] == gr.skip() for shown in middle) and len(middle) > 5
    assert "<table" in last[3] and "passage" in last[4] and session.writing is None
    said = [html.unescape(message["content"]) for message in last[0]]
    assert said == [QUESTION, session.answers[0].text or panels.NO_ANSWER, OTHER]


def test_a_second_question_is_read_from_where_it_is_new(desk, session, monkeypatch):
    ask(desk, session)
    base, read = desk.chat.model.base, []
    hidden = base.hidden
    monkeypatch.setattr(base, "hidden", lambda ids, cache=None: (read.append(ids.shape[1]), hidden(ids, cache))[1])
    ask(desk, session, OTHER)
    assert read[0] < len(base.encode(desk.chat.prompt(OTHER, session.turns(1), 16))) - 20 and set(read[1:]) == {1}


def test_only_the_last_visitors_keep_what_was_read_of_their_conversations(desk, monkeypatch):
    monkeypatch.setattr(session_module, "READINGS", 2)
    visitors = [Session() for _ in range(3)]
    for visitor in (*visitors, visitors[1]):
        ask(desk, visitor, max_new_tokens=1)
    assert [visitor.reading is None for visitor in visitors] == [True, False, False]
    assert visitors[1].reading is not visitors[2].reading and all(answer.reading is None for answer in visitors[1].answers)


def test_the_token_that_the_memory_raised_most_is_opened_first(desk, session):
    last = ask(desk, session)[-1]
    tokens = session.answers[0].tokens
    best = max(range(len(tokens)), key=lambda i: tokens[i]["blended"] - tokens[i]["base"])
    assert f"Token {best + 1}:" in last[3] and last[1].count(" open") == 1


def test_stop_ends_within_a_token_and_keeps_what_was_written(desk, session):
    writing = desk.ask(session, QUESTION, COLOUR, *controls(max_new_tokens=200))
    for _ in range(5):
        next(writing)
    session.stop()
    (last,) = writing
    assert len(session.answers[0].tokens) in (4, 5) and "stopped after" in last[2] and "<table" in last[3] and "passage" in last[4]
    assert session.answers[0].tokens[-1]["neighbours"]


def test_clear_in_the_middle_stays_empty(desk, session):
    writing = desk.ask(session, QUESTION, COLOUR, *controls(max_new_tokens=200))
    for _ in range(5):
        next(writing)
    assert desk.clear(session, COLOUR) == ([], "", "", "", "")
    assert list(writing) == [([], "", "", "", "")] and session.answers == []


def test_undo_in_the_middle_gives_the_question_back_and_the_chat_before(desk, session):
    ask(desk, session)
    before = texts(session)
    writing = desk.ask(session, OTHER, COLOUR, *controls(max_new_tokens=200))
    for _ in range(3):
        next(writing)
    *_, candidates, passages, question = desk.undo(session, COLOUR)
    assert (candidates, passages, question) == ("", "", OTHER)
    assert list(writing)[-1][3:] == ("", "") and texts(session) == before
    assert desk.undo(session, COLOUR)[-1] == QUESTION and desk.undo(session, COLOUR)[-1] == "" and session.answers == []


def test_retry_answers_the_last_question_anew(desk, session):
    ask(desk, session)
    ask(desk, session, OTHER)
    before = texts(session)
    list(desk.again(session, COLOUR, *controls(seed="4")))
    after = texts(session)
    assert after[0] == before[0] and after[1][0] == OTHER and after[1] != before[1] and len(after) == 2
    with pytest.raises(gr.Error, match="no question"):
        next(desk.again(Session(), COLOUR, *controls()))


@pytest.mark.parametrize("index", [0, [0], (0, 0)])
def test_an_edited_question_replaces_its_answer_and_all_later_ones(desk, session, index):
    ask(desk, session)
    ask(desk, session, OTHER)
    list(desk.edited(session, COLOUR, SimpleNamespace(index=index, value="A &lt; B &amp; C?"), *controls()))
    assert [question for question, _ in texts(session)] == ["A < B & C?"] and session.answers[0].turns == []


def test_editing_the_second_question_keeps_the_first(desk, session):
    ask(desk, session)
    ask(desk, session, OTHER)
    first = texts(session)[0]
    list(desk.edited(session, COLOUR, SimpleNamespace(index=2, value="And now?"), *controls()))
    assert texts(session)[0] == first and texts(session)[1][0] == "And now?"


def another(session, number):
    token = session.answers[-1].tokens[number]
    return next(c["id"] for c in token["candidates"] if c["id"] != token["id"] and c["text"] != "(end)")


def test_going_on_keeps_the_prefix_and_takes_the_candidate(desk, session):
    ask(desk, session)
    old = session.answers[0]
    token = another(session, 5)
    *_, last = desk.go_on(session, COLOUR, SimpleNamespace(number=5, token=token), *controls())
    new = session.answers[0]
    assert new.tokens[:5] == old.tokens[:5] and new.tokens[5]["id"] == token and last[1].count(" kept") == 5


@pytest.mark.parametrize("changes", [{"seed": "x"}, {"max_new_tokens": 100_000}, {"alpha": 2}, {"rule": "mean"}])
def test_a_refused_question_loses_nothing(desk, session, changes):
    ask(desk, session)
    before, event = texts(session), SimpleNamespace(index=0, value="New?", number=2, token=another(session, 2))
    for handler in (lambda: desk.ask(session, OTHER, COLOUR, *controls(**changes)),
                    lambda: desk.again(session, COLOUR, *controls(**changes)),
                    lambda: desk.edited(session, COLOUR, event, *controls(**changes)),
                    lambda: desk.go_on(session, COLOUR, event, *controls(**changes))):
        with pytest.raises(gr.Error) as error:
            list(handler())
        assert texts(session) == before and error.value.print_exception is False and "\n" not in str(error.value)


def test_going_on_behind_the_longest_answer_is_refused_and_loses_nothing(desk, session):
    ask(desk, session)
    before = texts(session)
    with pytest.raises(gr.Error, match="raise max new tokens"):
        list(desk.go_on(session, COLOUR, SimpleNamespace(number=5, token=another(session, 5)), *controls(max_new_tokens=5)))
    assert texts(session) == before


def test_a_control_that_is_moved_acts_at_the_next_token_and_a_bad_number_is_ignored(desk, session):
    session.change(1, name="alpha")  # nothing is being written
    writing = desk.ask(session, QUESTION, COLOUR, *controls(alpha=0, rule="probabilities"))
    for _ in range(4):
        next(writing)
    for value in (None, "", 7, -1):
        session.change(value, name="alpha")
    session.change(1, name="alpha"), session.change(1.0, name="top_k")
    list(writing)
    alphas = [token["alpha"] for token in session.answers[0].tokens]
    assert alphas[:3] == [0, 0, 0] and alphas[3:] == [1] * (len(alphas) - 3) and session.answers[0].settings.top_k == 1


def test_a_clicked_token_is_opened_and_a_click_out_of_range_does_nothing(desk, session):
    ask(desk, session)
    tokens, candidates, passages = desk.open_token(session, COLOUR, SimpleNamespace(number=0))
    assert "Token 1:" in candidates and passages.count('class="passage"') == 4 and tokens.count(" open") == 1
    assert desk.open_token(session, COLOUR, SimpleNamespace(number=99)) == (gr.skip(),) * 3


def test_a_colouring_changes_the_tokens_and_the_legend(desk, session):
    ask(desk, session)
    for name, (word, *_) in panels.COLOURINGS.items():
        legend, tokens = desk.coloured(session, name)
        assert f'class="answer {word}"' in tokens and legend == panels.legend(name)


def test_the_chat_outlives_its_records(desk, session):
    ask(desk, session)
    ask(desk, session, OTHER)
    records = json.loads(json.dumps(session.records()))
    assert all("candidates" not in token for token in records[0]["tokens"]) and "candidates" in records[1]["tokens"][0]
    again = Session()
    old, new = desk.shown(session, COLOUR), desk.restore(records, again, COLOUR)
    assert new[:2] == old[:2] and texts(again) == texts(session) and again.answers[1].record() == records[1]
    assert again.answers[1].turns == session.answers[1].turns == texts(session)[:1]
    assert "not kept" in panels.candidates(again.answers[0], 0)


@pytest.mark.parametrize("nonsense", [[], None, [{}], [1], [{"question": "a", "tokens": 3}], "text"])
def test_records_of_another_kind_give_an_empty_chat(desk, session, nonsense):
    assert desk.restore(nonsense, session, COLOUR) == ([], "", "", "", "")


def test_the_export_holds_settings_probabilities_and_passages(desk, session):
    ask(desk, session, rule="probabilities", alpha=0.25)
    found = json.loads(desk.export(session))
    (answer,) = found["answers"]
    assert (answer["rule"], answer["alpha"], answer["seed"], answer["question"]) == ("probabilities", 0.25, 3, QUESTION)
    assert answer["answer"] == session.answers[0].text == "".join(token["text"] for token in answer["tokens"])
    assert all(0 <= token["base"] <= 1 and len(token["passages"]) == 4 for token in answer["tokens"])
    assert "passages" not in session.answers[0].tokens[0]


def test_an_answer_that_is_stopped_while_it_waits_is_not_written(desk, session):
    session.ask()
    session.stop()
    *_, last = ask(desk, session)
    assert texts(session) == [(QUESTION, "")] and "stopped after 0 tokens" in last[2]
    session.ask()
    ask(desk, session, OTHER)
    assert len(session.answers[1].tokens) == 16
    session.ask()
    session.stop()
    assert list(desk.voices(session, QUESTION, COLOUR, *controls())) == [""]


@pytest.mark.parametrize("taken_back", ["clear", "undo"])
def test_a_question_that_is_cleared_or_undone_while_it_waits_does_not_come_back(desk, session, taken_back):
    ask(desk, session)
    before = [] if taken_back == "clear" else texts(session)
    session.ask()
    getattr(desk, taken_back)(session, COLOUR)
    *_, last = ask(desk, session, OTHER)
    assert texts(session) == before and last[0] == session.messages()
    session.ask()
    ask(desk, session, OTHER)
    assert [question for question, _ in texts(session)] == [question for question, _ in before] + [OTHER]
    desk.undo(session, COLOUR)
    assert texts(session) == before


def test_what_a_stopped_answer_would_have_replaced_stays(desk, session):
    for question in (QUESTION, OTHER, QUESTION):
        ask(desk, session, question)
    before = texts(session)

    def stopped(shown):
        session.ask()
        session.stop()
        *_, last = shown
        assert texts(session) == before and last[0] == session.messages() and "stopped" not in last[2]
    stopped(desk.again(session, COLOUR, *controls()))
    stopped(desk.edited(session, COLOUR, SimpleNamespace(index=0, value="Another?"), *controls()))
    stopped(desk.go_on(session, COLOUR, SimpleNamespace(number=2, token=9), *controls()))


def test_a_stop_holds_for_no_later_answer(desk, session):
    ask(desk, session)  # the page may hear of it late, or never
    session.stop()
    ask(desk, session, OTHER)
    session.ask()
    session.stop()  # that question was refused because the queue was full
    session.ask()
    ask(desk, session)
    assert len(session.answers) == 3 and all(answer.tokens for answer in session.answers)


def test_three_voices_can_be_stopped(desk, session):
    writing = desk.voices(session, QUESTION, COLOUR, *controls(max_new_tokens=200))
    for _ in range(3):
        shown = next(writing)
    session.stop()
    assert shown.count('class="voice"') == 3 and len(list(writing)) == 1 and session.writing is None


def test_the_explorer_draws_both_rules_the_gate_and_the_slider(desk, session):
    ask(desk, session)
    question, text = desk.take(session)
    plot, words = desk.explore(question, text or "Yes.", 0.3)
    table = plot.constructor_args["value"] if hasattr(plot, "constructor_args") else plot["value"]
    assert "The gate:" in words and "tokens" in words and table is not None
    assert desk.take(Session()) == ("", "")
    with pytest.raises(gr.Error, match="Type a question"):
        desk.explore("", "", 0.3)


def test_an_answer_without_candidates_is_shown_when_the_later_one_is_undone(desk, session):
    ask(desk, session)
    ask(desk, session, OTHER)
    again = Session()
    desk.restore(json.loads(json.dumps(session.records())), again, COLOUR)
    shown = desk.undo(again, COLOUR)
    assert shown[0] == desk.undo(session, COLOUR)[0] and f"at {session.answers[0].changed:.0%}" in shown[2]
    later = Session()
    desk.restore(json.loads(json.dumps(again.records())), later, COLOUR)
    assert texts(later) == texts(session) and later.answers[0].changed == session.answers[0].changed


@pytest.mark.parametrize("change", [{"tokens": None}, {"tokens": [5]}, {"tokens": [{}]}, {"question": None}, {"alpha": "x"},
                                    {"tokens": [{"text": "a", "end": False}]}, {"seconds": "x"}], ids=str)
def test_a_record_in_which_one_thing_is_nonsense_gives_an_empty_chat(desk, session, change):
    ask(desk, session)
    (record,), again = json.loads(json.dumps(session.records())), Session()
    assert desk.restore([record | change], again, COLOUR) == ([], "", "", "", "") and again.answers == []


def test_an_earlier_visit_does_not_replace_what_was_asked_meanwhile(desk, session):
    ask(desk, session)
    again = Session()
    ask(desk, again, OTHER)
    desk.restore(session.records(), again, COLOUR)
    assert [question for question, _ in texts(again)] == [OTHER]


def test_the_answer_before_one_that_is_undone_midway_is_not_said_to_be_stopped(desk, session):
    ask(desk, session)
    writing = desk.ask(session, OTHER, COLOUR, *controls(max_new_tokens=200))
    for _ in range(3):
        next(writing)
    shown = desk.undo(session, COLOUR)
    assert list(writing) == [shown[:-1]] and "stopped" not in shown[2]


def test_a_visitor_who_leaves_midway_leaves_a_session_that_answers(desk, session):
    writing = desk.ask(session, QUESTION, COLOUR, *controls(max_new_tokens=200))
    for _ in range(4):
        next(writing)
    writing.close()
    assert session.writing is None and all("neighbours" in token for token in session.answers[0].tokens)
    ask(desk, session, OTHER)
    assert session.answers[1].turns == texts(session)[:1]


@pytest.mark.parametrize("message", ["", " \n", "why " * 600], ids=["empty", "blank", "long"])
def test_a_message_that_cannot_be_answered_loses_nothing(desk, session, message):
    ask(desk, session)
    before = texts(session)
    for handler in (desk.ask(session, message, COLOUR, *controls()), desk.voices(session, message, COLOUR, *controls()),
                    desk.edited(session, COLOUR, SimpleNamespace(index=0, value=message), *controls())):
        with pytest.raises(gr.Error):
            list(handler)
        assert texts(session) == before and session.writing is None


def test_no_token_opens_while_an_answer_is_written(desk, session):
    writing = desk.ask(session, QUESTION, COLOUR, *controls())
    for _ in range(3):
        next(writing)
    assert desk.open_token(session, COLOUR, SimpleNamespace(number=0)) == (gr.skip(),) * 3


@pytest.mark.parametrize(("name", "given", "taken"), [
    ("top_k", 7.0, 7), ("top_k", 7.5, 50), ("top_k", 10**400, 50), ("top_k", "7", 50), ("top_k", None, 50), ("alpha", 1, 1.0),
    ("alpha", True, 0.5), ("no_repeat", 2e0, 2), ("knn_k", float("nan"), 8)])
def test_a_control_moved_during_an_answer_gives_a_whole_number_or_nothing(desk, session, name, given, taken):
    writing = desk.ask(session, QUESTION, COLOUR, *controls())
    next(writing)
    session.change(given, name)
    now = getattr(session.answers[0].settings, name)
    assert (now, type(now)) == (taken, type(taken))
    assert len([*writing]) > 1


def test_halves_of_surrogates_in_what_the_browser_kept_or_the_user_typed_break_nothing(desk, session):
    list(desk.ask(session, "\ud800 why?", COLOUR, *controls()))
    records = json.loads(json.dumps(session.records()).replace("ufffd", "ud800"))
    records[0]["tokens"][0]["text"] += "\udc00"
    assert "\ud800" in records[0]["question"]
    later = Session()
    json.dumps(desk.restore(records, later, COLOUR), ensure_ascii=False).encode()
    assert later.answers[0].question == "\ufffd why?" and later.answers[0].tokens[0]["text"].endswith("\ufffd")
    shown = [*desk.ask(later, f"{OTHER}\udfff", COLOUR, *controls()), *desk.voices(later, "\udfff?", COLOUR, *controls())]
    json.dumps([shown[0], shown[-1], later.records(), desk.export(later)], ensure_ascii=False).encode()
    assert later.answers[1].turns[0][0] == "\ufffd why?" and "tokens. Base alone" in desk.explore("\ud800", "\udfff", 0.5)[1]
