"""The text of a memory: reading what the options name, adding and forgetting."""

import json

import pytest
from conftest import ROWS, examples
from runs import jsonl

from corpus import Corpus, typed
from datastore import write_examples
from sources.rows import Example
from support.command import UserError
from texts import ORIGINAL, Template
from train_memory_decoder import Options

QA = [{"name": "rows.jsonl", "template": ORIGINAL}]


def sentence(error):
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


@pytest.fixture
def corpus():
    return Corpus(QA, examples(ROWS[:6]), [Example("held.jsonl:1", ROWS[6]), Example("held.jsonl:2", ROWS[7])])


def read(dataset, **more):
    return Corpus.read(Options(dataset=str(dataset), **more))


def test_what_is_read_and_what_is_not_is_said(tmp_path, capsys):
    rows = [{"question": f"q{n}", "answer": f"a{n}", "source": "x", "id": n} for n in range(9)]
    corpus = read(jsonl(tmp_path / "rows.jsonl", rows))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "template: chat {question} {answer}; not used: source, id"
    assert second == f"examples: 7 to learn; held out to test on: {', '.join(e.name for e in corpus.held)}"


def test_a_split_of_the_dataset_may_be_what_is_held_out(tmp_path):
    for split, letter in (("train", "a"), ("dev", "b")):
        jsonl(tmp_path / f"{split}.jsonl", [{"question": f"{letter}{n}", "answer": f"{n}"} for n in range(4)])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
                                        "    path: train.jsonl\n  - split: dev\n    path: dev.jsonl\n---\n")
    corpus = read(tmp_path, validation_split="dev")
    assert [e.row["question"] for e in corpus.examples] == ["a0", "a1", "a2", "a3"]
    assert [e.row["question"] for e in corpus.held] == ["b0", "b1", "b2", "b3"]
    assert not {e.name for e in corpus.held} & {e.name for e in corpus.examples} and corpus.held[0].name.startswith("validation/")


@pytest.mark.parametrize(("given", "meant"), [
    (r"Q: {q}\nA: {a}", "Q: {q}\nA: {a}"), (r"{q}\t{a}", "{q}\t{a}"), ("{q}\n{a}", "{q}\n{a}")])
def test_a_typed_backslash_n_is_a_newline(given, meant, tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", [{"q": f"q{n}", "a": rf"C:\new {n}"} for n in range(5)])
    corpus = read(rows, template=given)
    assert typed(given) == corpus.sources[0]["template"] == meant
    assert all(e.row["a"].startswith(r"C:\new") for e in corpus.examples)  # but not in the rows


def test_a_model_without_a_chat_template_gets_questions_and_answers_in_plain_words(base, tmp_path, capsys):
    corpus = read(jsonl(tmp_path / "rows.jsonl", [{"question": f"q{n}", "Answer": f"a{n}"} for n in range(5)]))
    assert corpus.fitting(base) is corpus
    bare = type("Bare", (), {"name": "bare", "tokenizer": type("T", (), {"chat_template": None})})
    assert corpus.fitting(bare).sources[0]["template"] == "Question: {question}\nAnswer: {Answer}"
    assert "template: Question: {question} Answer: {Answer}; bare has no chat template" in capsys.readouterr().out
    for template in (ORIGINAL, "document {text}", "chat {messages}"):
        other = Corpus([{"name": "x", "template": template}], [], [])
        assert other.fitting(bare) is other


def test_an_added_source_stands_behind_with_its_own_template(corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("Lanterns are blue.")
    grown = corpus.added(str(tmp_path / "notes.txt"))
    assert grown.sources == [*QA, {"name": "notes.txt", "template": "document {text}"}] and grown.held == corpus.held
    assert grown.examples == [*corpus.examples, Example("notes.txt", {"text": "Lanterns are blue."}, 1)]
    more = grown.added(str(jsonl(tmp_path / "more.jsonl", [{"q": "a", "a": "b"}])), pattern=r"{q}\n{a}")
    assert more.examples[-1] == Example("more.jsonl:1", {"q": "a", "a": "b"}, 2) and more.sources[2]["template"] == "{q}\n{a}"


def test_what_is_added_is_read_as_the_first_source_was_where_it_has_its_columns(corpus, tmp_path):
    corpus.sources = [{"name": "rows.jsonl", "template": "chat {Question} {Answer}"}]
    grown = corpus.added(str(jsonl(tmp_path / "more.jsonl", [ROWS[20]])))
    assert grown.sources[1] == {"name": "more.jsonl", "template": "chat {Question} {Answer}"}
    assert grown.examples[-1].row == {name: ROWS[20][name] for name in ("Question", "Answer")}


def test_text_that_is_held_out_and_then_added_is_no_longer_held_out(corpus, tmp_path):
    corpus.held += [Example("held.jsonl:3", ROWS[8])]
    grown = corpus.added(str(jsonl(tmp_path / "more.jsonl", [ROWS[8]])))
    assert [e.name for e in grown.held] == ["held.jsonl:1", "held.jsonl:2"] and len(grown.examples) == 7


def test_where_all_that_is_held_out_is_added_it_is_refused(corpus, tmp_path):
    with pytest.raises(UserError) as error:
        corpus.added(str(jsonl(tmp_path / "more.jsonl", [ROWS[6]])))
    assert "more.jsonl is what this memory holds out to test on" in sentence(error)


def test_what_a_memory_holds_is_not_added_again(corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("Lanterns are blue. " * 400)
    grown = corpus.added(str(tmp_path / "notes.txt"))
    (tmp_path / "notes.txt").write_text("Lanterns are red.")
    for source, name in ((tmp_path / "notes.txt", "notes.txt"), (jsonl(tmp_path / "rows.jsonl", ROWS[20:22]), "rows.jsonl")):
        with pytest.raises(UserError) as error:
            grown.added(str(source))
        assert f"holds {name} already; --forget it first" in sentence(error)


NAMED = Corpus([*QA, {"name": "leases", "template": "document {text}"}],
               [*examples(ROWS[:3]), Example("a.txt", {"text": "a"}, 1), Example("sub/b.txt:1", {"text": "b"}, 1),
                Example("sub/b.txt:2", {"text": "c"}, 1), Example("a.txt.bak", {"text": "d"}, 1)],
               [Example("sub/b.txt:3", {"text": "e"}, 1), Example("rows.jsonl:9", ROWS[9]), Example("rows.jsonl:10", ROWS[10])])


@pytest.mark.parametrize(("name", "gone"), [
    ("a.txt", ["a.txt"]), ("sub/b.txt", ["sub/b.txt:1", "sub/b.txt:2", "sub/b.txt:3"]),
    ("sub", ["sub/b.txt:1", "sub/b.txt:2", "sub/b.txt:3"]),
    ("rows.jsonl:2", ["rows.jsonl:2"]), ("rows.jsonl:1", ["rows.jsonl:1"]), ("rows.jsonl:9", ["rows.jsonl:9"]),
    ("leases", ["a.txt", "sub/b.txt:1", "sub/b.txt:2", "a.txt.bak", "sub/b.txt:3"])])
def test_a_document_a_row_a_folder_or_a_source_is_forgotten_by_its_name(name, gone):
    left = NAMED.without(name, 0)
    names = {e.name for e in [*NAMED.examples, *NAMED.held]} - {e.name for e in [*left.examples, *left.held]}
    assert names == set(gone) and left.sources == NAMED.sources and len(left.held) >= 2


def test_a_name_that_a_memory_lacks_is_refused_with_those_that_it_holds():
    with pytest.raises(UserError) as error:
        NAMED.without("b.txt", 0)
    assert "holds nothing of the name b.txt; it holds a.txt, a.txt.bak, rows.jsonl, sub/b.txt." in sentence(error)


def test_where_too_little_is_left_nothing_is_forgotten(corpus):
    with pytest.raises(UserError) as error:
        corpus.without("rows.jsonl", 0)
    assert "too small: 0 rows to train on" in sentence(error)


def test_two_stay_held_out_when_those_that_were_are_forgotten(corpus):
    left = corpus.without("held.jsonl", 0)
    assert len(left.held) == 2 and len(left.examples) == 4
    assert sorted(left.held + left.examples) == sorted(corpus.examples) and left == corpus.without("held.jsonl", 0)


def test_an_answer_that_is_held_out_anew_is_not_left_under_another_question(corpus):
    answers = [f"Answer {n}: " + ROWS[0]["Answer"].ljust(100) for n in range(4)]
    corpus.examples = [Example(f"more.jsonl:{n}", ROWS[n] | {"Answer": answers[n // 2]}) for n in range(8)]
    left = corpus.without("held.jsonl", 0)
    assert len(left.held) == 2 and len(left.examples) == 4
    assert not {e.row["Answer"] for e in left.held} & {e.row["Answer"] for e in left.examples}


def test_a_corpus_is_opened_as_it_was(corpus, tmp_path):
    write_examples(corpus.examples, tmp_path / "examples.jsonl"), write_examples(corpus.held, tmp_path / "held_out.jsonl")
    assert Corpus.open(tmp_path, {"sources": json.loads(json.dumps(QA))}) == corpus
    assert [template.pattern for template in corpus.templates(None)] == [ORIGINAL] and Template.parse(ORIGINAL).asked
