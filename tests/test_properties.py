"""Whatever a template, a row or a request holds: it works, or one sentence says why not. Hypothesis draws the values."""

import json
import re
import string

import gradio as gr
import pytest
from conftest import CHAT_TEMPLATE, SPECIAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app
from base_model import Literal
from chat import RANGES, Chat
from corpus import typed
from memory_decoder import read_manifest
from sources.rows import messages_of, plain_text, read_rows
from sources.tables import parse_json, read_file, table_of
from support.command import UserError, whole_text
from texts import Template, encode_row, usual_template
from web.api import Api

# The same examples in every run. The clock decides nothing.
COMMON = {"derandomize": True, "deadline": None, "database": None,
          "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]}
quick, slow = settings(max_examples=100, **COMMON), settings(max_examples=60, **COMMON)

SPECIAL_IDS = set(range(len(SPECIAL)))
PIECES = st.sampled_from([*SPECIAL, "{", "}", "{{", "}}", "{q}", "{a}", "chat ", "document ", "\n", " ", ":", "!r", ".x", "[0]",
                          "\u2e28", "\u2e2e", "\ud800", "\udc80", "\0", "é", "\U0001f642", "\u202e", "\u2028", "user", "assistant"])
LETTERS = st.text(st.characters(exclude_categories=[]), max_size=12)  # lone surrogates too
TEXTS = st.lists(st.one_of(PIECES, LETTERS), max_size=6).map("".join)
FILLED = TEXTS.filter(lambda text: whole_text(text).strip())
NUMBERS = st.one_of(st.integers(), st.floats(), st.booleans(), st.integers(10**400, 10**401))
JSON = st.recursive(st.one_of(st.none(), NUMBERS, TEXTS), lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXTS, st.sampled_from(["text", "role", "content", "from", "value"])),
                                                 inner, max_size=4)), max_leaves=8)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.one_of(st.sampled_from(["user", "assistant", "system"]), JSON),
                                           "content": st.one_of(FILLED, JSON)}), max_size=4)


def one_sentence(error):
    """Whether a UserError has the form of all others. Its text is put on one line where it is printed."""
    return bool(str(error).strip()) and str(error).rstrip(")\"`").endswith((".", "auto"))


@quick
@given(st.one_of(TEXTS, st.text("{}qa !:.[]", max_size=12)), st.lists(TEXTS, max_size=3))
def test_any_text_is_a_template_or_is_refused(base, pattern, columns):
    for model in (None, base):
        try:
            template = Template.parse(typed(pattern), model, columns)
        except UserError as error:
            assert one_sentence(error)
        else:
            assert template.fields and template.asked.prompt("Why?")


@quick
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_any_columns_have_a_usual_template_or_are_refused(columns):
    try:
        pattern = usual_template(columns)
    except UserError as error:
        assert one_sentence(error)
    else:
        assert isinstance(pattern, str)


@quick
@given(FILLED, FILLED, st.sampled_from(["Q: {q}\nA: {a}", "{q}{a}", "chat {q} {a}", "<turn>{q}<end>{a}<end>"]))
def test_a_row_is_one_stream_of_tokens_and_its_text_holds_no_special_token(base, question, answer, pattern):
    table = table_of("rows.jsonl", [{"q": question, "a": answer}])
    template = Template.parse(pattern, base, ["q", "a"])
    row = read_rows(table, template)[0].row
    parts = template.render(row)
    own = [part for part in parts if isinstance(part, Literal)]
    expected = [token for part in own for token in base.encode([part])[1:]]  # without BOS
    ids = encode_row(base, template, row)
    specials = [token for token in ids[1:] if token in SPECIAL_IDS and SPECIAL[token] != "<unk>"]
    allowed = [token for token in expected if token in SPECIAL_IDS]
    assert specials[:len(allowed)] == allowed and len(specials) <= len(allowed) + 1  # the end of the answer may be added
    assert ids[0] == base.bos and ids[-1] in template.ends(base)
    assert base.encode(parts)[:len(ids) - 1] == ids[:-1]


@quick
@given(st.lists(st.one_of(TEXTS, FILLED), min_size=1, max_size=3))
def test_text_that_a_person_types_holds_no_special_token(base, texts):
    ids = base.encode([whole_text(text) for text in texts])
    assert ids[0] == base.bos and not {token for token in ids[1:] if token in SPECIAL_IDS and SPECIAL[token] != "<unk>"}
    decoded = base.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert decoded.replace("\u2581", " ") == "".join(map(whole_text, texts)).replace("\u2581", " ")


@quick
@given(JSON)
def test_any_value_has_a_text_or_a_kind(value):
    for read in (plain_text, messages_of):
        try:
            found = read(value)
        except ValueError as error:
            assert str(error)
        else:
            json.dumps(found).encode("utf-8")
            assert isinstance(found, str | list)


@quick
@given(st.lists(st.dictionaries(st.sampled_from(["q", "a", "messages", "prompt", "completion", "text", "", "\ud800"]),
                                st.one_of(JSON, FILLED, MESSAGES), max_size=3), max_size=4),
       st.sampled_from(["{q} {a}", "{a.text}", "{q.x.y} {a}", "chat", "chat {messages}", "document {text}", None]))
def test_any_rows_of_a_file_are_read_or_refused_in_a_sentence(base, tmp_path, rows, pattern):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        table = read_file(path)
        template = Template.parse(pattern or usual_template(table.columns), base, table.columns)
        examples = read_rows(table, template)
        ids = [encode_row(base, template, example.row) for example in examples]
    except UserError as error:
        assert one_sentence(error)
    else:
        assert examples and all(len(one) >= 2 and max(one) < base.vocabulary for one in ids)
        assert all(all(example.row.values()) for example in examples)


@quick
@given(st.one_of(st.binary(max_size=60), TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")),
                 JSON.map(lambda value: json.dumps(value).encode())),
       st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz"]))
def test_any_bytes_are_a_table_or_are_refused_in_a_sentence(tmp_path, content, kind):
    path = tmp_path / f"data{kind}"
    path.write_bytes(content)
    try:
        table = read_file(path)
        rows = table.fetch(table.columns)
    except UserError as error:
        assert one_sentence(error)
    else:
        assert all(isinstance(row, dict) for row in rows)


@quick
@given(JSON)
def test_a_number_in_json_stays_as_it_is_written(value):
    text = json.dumps(value)
    written = re.findall(r"-?Infinity|NaN|-?\d[\d.eE+-]*", re.sub(r'"(?:[^"\\]|\\.)*"', "", text))
    found = []

    def collect(one):
        if isinstance(one, dict | list):
            for inner in (one.values() if isinstance(one, dict) else one):
                collect(inner)
        elif type(one).__name__ == "Number":
            found.append(str(one))
    collect(parse_json(text))
    if json.loads(text) == value or value != value:  # no key stands in it twice
        assert found == written or len(found) <= len(written)


@pytest.fixture(scope="module")
def chat(trained):
    return Chat.open(app.parse_options(["--model_dir", str(trained), "--device", "cpu"]), read_manifest(trained))


@pytest.fixture(scope="module")
def api(chat):
    return Api(chat, {"alpha": 0.5, "temperature": 0.7, "top_k": 50, "max_new_tokens": 3, "rule": "logits", "seed": None,
                      "no_repeat": 0})


ANY = st.one_of(JSON, NUMBERS, TEXTS, st.text(string.digits + ".e-", max_size=8))
VALUES = {name: st.one_of(ANY, st.floats(low, high), st.integers(int(low), int(high))) for name, (low, high) in RANGES.items()}
RULES = st.one_of(ANY, st.sampled_from(["logits", "probabilities", "auto", "kNN-LM"]))
QUESTIONS = st.one_of(FILLED, ANY)
HISTORIES = st.one_of(st.none(), ANY, st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=3))
SETTINGS = st.fixed_dictionaries({}, optional={**{name: VALUES[name] for name in ("alpha", "temperature", "top_k", "no_repeat")},
                                               "max_new_tokens": st.one_of(ANY, st.integers(1, 3)), "rule": RULES, "seed": ANY})


def answered(chat, answer):
    assert 1 <= len(answer.tokens) <= answer.max_new_tokens
    json.dumps(chat.trace(answer).record(), allow_nan=False).encode("utf-8")


@slow
@given(QUESTIONS, st.dictionaries(st.sampled_from(sorted(RANGES)), ANY, max_size=2), RULES, ANY)
def test_any_values_begin_an_answer_or_are_refused(chat, message, values, rule, seed):
    try:
        answer = chat.begin(message, seed=seed, rule=rule, **values)
    except UserError as error:
        assert one_sentence(error)
    else:
        assert answer.question == answer.question.strip() and 0 <= answer.seed < 2**31


@slow
@given(QUESTIONS, SETTINGS, HISTORIES)
def test_any_request_for_an_answer_is_answered_or_refused(api, message, values, history):
    try:
        *_, (text, found) = api.chat(message, history=history, **values)
    except gr.Error as error:
        assert one_sentence(error.message)
    else:
        assert len(found["content"]) <= 1000 and "".join(entry["token"] for entry in found["content"]) == text
        json.dumps([text, found], allow_nan=False).encode("utf-8")


TOKENS = st.one_of(st.none(), ANY, st.lists(st.one_of(st.integers(0, 511), st.floats(0, 511), NUMBERS), max_size=5),
                   st.lists(st.integers(0, 511), max_size=5))


@slow
@given(QUESTIONS, TOKENS, VALUES["alpha"], RULES, HISTORIES)
def test_any_request_for_candidates_is_answered_or_refused(api, message, tokens, alpha, rule, history):
    try:
        found = api.candidates(message, tokens, alpha, rule, history)
    except gr.Error as error:
        assert one_sentence(error.message)
    else:
        assert 0 <= found["alpha"] <= 1 and found["candidates"]
        json.dumps(found, allow_nan=False).encode("utf-8")


@slow
@given(QUESTIONS, TOKENS, VALUES["k"], HISTORIES)
def test_any_request_for_passages_is_answered_or_refused(api, message, tokens, k, history):
    try:
        found = api.passages(message, tokens, k, history)
    except gr.Error as error:
        assert one_sentence(error.message)
    else:
        assert found and sum(passage["weight"] for passage in found) == pytest.approx(1, abs=1e-3)
        json.dumps(found, allow_nan=False).encode("utf-8")


def test_the_tiny_model_has_a_chat_template_for_these_tests(base):
    assert base.tokenizer.chat_template == CHAT_TEMPLATE
