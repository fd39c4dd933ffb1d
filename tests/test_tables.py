"""Files, folders, documents and datasets in the hub's layout become tables. No value is interpreted."""

import csv
import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROWS
from matplotlib.figure import Figure

from sources.rows import read_rows
from sources.tables import ENOUGH, LEAST_PART, PART, cut, in_smaller_parts, read_table
from support.command import UserError
from texts import ORIGINAL, Template, usual_template

TEMPLATE = Template.parse(ORIGINAL)
WORDS = [{"q": f"q{n}", "a": answer} for n, answer in enumerate((
    "0071", "18.10", "1e5", "-0", "TRUE", "true", "False", "None", "NaN", "null", "N/A", "2021-03-05", "2021-03-05T00:00:00Z",
    "1,5", "12-CV-7", "٣", "=SUM(A1)", "Infinity", "0x1F", "1_000", "x" * 200_000))]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)


def write_layout(path, rows):
    path.mkdir(), jsonl(path / "train.jsonl", rows)


def write_layout_csv(path, rows):
    path.mkdir(), write_csv(path / "train.csv", rows)


WRITERS = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "lines.json": jsonl,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "inside.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "rows.csv": write_csv,
    "semicolons.csv": lambda path, rows: write_csv(path, rows, ";"),
    "excel.csv": lambda path, rows: write_csv(path, rows, "\t", "utf-16"),
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t", "utf-8-sig"),
    "ROWS.CSV": write_csv,
    "rows.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": write_saved,
    "layout": write_layout,
    "layout of csv": write_layout_csv,
}


def sentence(error):
    assert "\n" not in str(error.value) and str(error.value).rstrip(")\"").endswith(".")
    return str(error.value)


def refusal(source, split=None):
    with pytest.raises(UserError) as error:
        read_table(str(source), split)
    return sentence(error)


def read(path, template=TEMPLATE, split=None):
    return [example.row for example in read_rows(read_table(str(path), split), template)]


@pytest.mark.parametrize("name", WRITERS)
def test_rows_are_read_from_every_kind_of_source(name, tmp_path):
    rows = [{**row, "Number": n, "Unused": "x"} for n, row in enumerate(ROWS[:5])]
    rows[2]["Answer"] = 'Löst "das",\nsagt\u2028man; ja.'
    WRITERS[name](tmp_path / name, rows)
    found = read(tmp_path / name, Template.parse("{Title} {Number}\n{Answer}"))
    assert found == [{field: str(row[field]) for field in ("Title", "Number", "Answer")} for row in rows]


@pytest.mark.parametrize("name", WRITERS)
def test_no_text_is_taken_for_a_number_a_date_or_a_truth_value(name, tmp_path):
    WRITERS[name](tmp_path / name, WORDS)
    assert read(tmp_path / name, Template.parse("{q} {a}")) == WORDS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "layout"])
def test_numbers_and_truth_values_of_json_stay_as_they_are_written(name, tmp_path):
    written = ["0.10", "18.10", "1e5", "-0", "12345678901234567890123", "true", "false", "1E400", "NaN"]
    rows = [{"q": f"q{n}", "a": f"here {n}"} for n in range(len(written))]
    WRITERS[name](tmp_path / name, rows)
    path = tmp_path / name if name != "layout" else tmp_path / name / "train.jsonl"
    text = path.read_text()
    for n, number in enumerate(written):
        text = text.replace(f'"here {n}"', number)
    path.write_text(text)
    assert [row["a"] for row in read(tmp_path / name, Template.parse("{q} {a}"))] == written


def test_typed_values_of_parquet_become_plain_text(tmp_path):
    day = datetime.datetime(2021, 3, 5)
    columns = {"q": ["a", "b"], "date": [day, day], "flag": [True, False], "form": [71, 82], "list": [["x", "y"], ["z"]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet", Template.parse("{q} {date} {flag} {form} {list}"))
    assert found == [{"q": "a", "date": "2021-03-05", "flag": "true", "form": "71", "list": "x\ny"},
                     {"q": "b", "date": "2021-03-05", "flag": "false", "form": "82", "list": "z"}]


@pytest.mark.parametrize("last", [{"note": "reviewed"}, {"note": 3}, {"note": {"x": [1]}}, {"more": None}, {"note": "2021-03-05"}])
def test_a_column_that_nobody_asks_for_may_hold_anything(last, tmp_path):
    rows = [{"q": f"q{n}", "a": f"a{n}", "note": None} for n in range(3)]
    jsonl(tmp_path / "rows.jsonl", [*rows, {"q": "q3", "a": "a3", **last}])
    assert len(read(tmp_path / "rows.jsonl", Template.parse("{q} {a}"))) == 4


def test_a_column_of_parquet_or_of_a_saved_dataset_is_not_converted_unless_asked_for(tmp_path):
    pictures = datasets.Dataset.from_dict({"q": ["a"], "a": ["b"], "photo": [{"bytes": b"no picture", "path": None}]})
    pictures.cast_column("photo", datasets.Image()).save_to_disk(tmp_path / "saved")
    pictures.to_parquet(tmp_path / "rows.parquet")
    for name in ("saved", "rows.parquet"):
        assert read(tmp_path / name, Template.parse("{q} {a}")) == [{"q": "a", "a": "b"}]
    with pytest.raises(UserError, match=r"The field photo of .*:1 holds objects with bytes, path, not text"):
        read(tmp_path / "saved", Template.parse("{q} {photo}"))


@pytest.mark.parametrize(("content", "template"), [
    ({"messages": [{"role": "user", "content": "May I?"}, {"role": "assistant", "content": "Yes."}]}, "chat {messages}"),
    ({"conversations": [{"from": "human", "value": "May I?"}, {"from": "gpt", "value": "Yes."}]}, "chat {messages}"),
    ({"prompt": [{"role": "user", "content": "May I?"}], "completion": [{"role": "assistant", "content": "Yes."}]},
     "chat {messages}"),
    ({"prompt": "May I?", "completion": "Yes."}, "chat {prompt} {completion}"),
    ({"id": "7", "Question": "May I?", "Answer": "Yes."}, "chat {Question} {Answer}"),
    ({"question": "May I?", "context": "c", "answers": {"text": ["Yes."], "answer_start": [1]}}, "chat {question} {answers}"),
    ({"instruction": "May I?", "output": "Yes."}, "chat {instruction} {output}"),
    ({"text": "It may.", "id": "7"}, "document {text}"), ({"body": "It may."}, "document {body}"), (ROWS[0], ORIGINAL)])
def test_the_template_of_usual_columns_need_not_be_given(content, template, tmp_path):
    table = read_table(str(jsonl(tmp_path / "rows.jsonl", [content, content])))
    assert usual_template(table.columns) == template
    (row, same) = [example.row for example in read_rows(table, Template.parse(template))]
    assert row == same and (template != "chat {messages}" or row["messages"] == [
        {"role": "user", "content": "May I?"}, {"role": "assistant", "content": "Yes."}])


def test_a_chat_that_lacks_its_completion_is_left_out_or_named(tmp_path):
    good = {"prompt": [{"role": "user", "content": "May I?"}], "completion": [{"role": "assistant", "content": "Yes."}]}
    chats = Template.parse("chat {messages}")
    assert len(read(jsonl(tmp_path / "a.jsonl", [good, {"prompt": None}, good]), chats)) == 2
    with pytest.raises(UserError, match=r"messages of b.jsonl:2 holds texts, not a chat"):
        read(jsonl(tmp_path / "b.jsonl", [good, good | {"completion": "Yes."}]), chats)


def test_one_chat_in_a_json_file_is_one_row(tmp_path):
    chat = {"messages": [{"role": "user", "content": "May I?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    assert read(tmp_path / "chat.json", Template.parse("chat {messages}")) == [chat]


def test_a_tab_parts_the_values_of_a_tsv_file_whatever_its_header_holds(tmp_path):
    (tmp_path / "rows.tsv").write_text("Question (who, what, where)\tAnswer\nMay I?\tYes, you may.\n")
    assert read_table(str(tmp_path / "rows.tsv")).columns == ["Question (who, what, where)", "Answer"]


def test_unusual_columns_ask_for_a_template():
    with pytest.raises(UserError) as error:
        usual_template(["a", "b"])
    assert "the fields a, b is not known" in str(error.value) and "--template" in str(error.value)


BAD_FILES = [
    ("empty.jsonl", b"", "is empty"), ("empty.csv", b"", "is empty"), ("empty.parquet", b"", "is empty"),
    ("mark.csv", b"\xef\xbb\xbf", "is empty"), ("nothing.csv.gz", gzip.compress(b""), "is empty"),
    ("lines.csv", b"\n\n", "is empty"), ("~backup.csv", b"", "is empty"), ("~nobody here.csv", None, "check the path"),
    ("list.json", b"[]", "its list is empty"), ("garbage.jsonl", b"{not json\n", "line 1 is no JSON"),
    ("later.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 is no JSON"), ("words.jsonl", b'"a"\n', "line 1 is no object"),
    ("items.json", b'[{"a": 1}, 2]', "item 2 is no object"), ("garbage.parquet", b"{not\n", "cannot be read"),
    ("wide.csv", b'q,a\n1,2\n3,4,5\n', "3 values in line 3 and 2 columns"), ("twice.csv", b"q,a,q\n1,2,3\n", "two columns q"),
    ("quote.csv", b'q,a\n1,"2\n', "cannot be read"), ("latin.csv", b"q,a\n1,Stra\xdfe\n", "not UTF-8 text (at byte 10)"),
    ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ("deep.json", b"[" * 100_000, "cannot be read"), ("broken.jsonl.gz", gzip.compress(b"{}")[:12], "cannot be unpacked"),
    ("broken.txt", gzip.compress(b"{}")[:12], "cannot be unpacked"), ("comma.json", b'[{"a": 1},]', "line 1 column 1"),
    ("latin.txt", b"Stra\xdfe", "not UTF-8 text"), ("notes.docx", b"PK", "of no kind that is read"),
    ("missing.csv", None, "check the path"), ("missing.txt", None, "check the path"),
    ("nowhere/at/all", None, "check the path"), ("empty.txt", b" \n", "no row")]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES, ids=[name for name, *_ in BAD_FILES])
def test_a_file_that_holds_no_rows_is_refused_in_words(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        table = read_table(str(path))
        read_rows(table, Template.parse(usual_template(table.columns)))
    assert said in sentence(error) and name.split("/")[0] in sentence(error)


@pytest.mark.parametrize("values", [
    pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]),
    pyarrow.array([10**12], pyarrow.timestamp("s"))], ids=["no UTF-8", "the year 33658"])
def test_a_value_that_cannot_be_converted_is_one_sentence(values, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"question": values, "answer": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet cannot be read"):
        read_rows(read_table(str(tmp_path / "rows.parquet")), Template.parse("{question} {answer}"))


def test_a_name_that_begins_with_a_tilde_and_is_no_user_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~rows.csv").write_text("question,answer\na,b\n")
    assert read_table("~rows.csv").columns == ["question", "answer"]


@pytest.mark.parametrize("name", ["rows.xlsx", "../rows", "a/b/c", "./rows", "some/rows.csv"])
def test_a_name_that_no_hub_dataset_can_have_is_not_looked_for_there(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the hub was asked"))
    assert name in refusal(name)


@pytest.fixture
def layouts(tmp_path):
    """Folders in the hub's layout: one with two configurations, one with one split, one that datasets saved with splits."""
    two, one = tmp_path / "two configs", tmp_path / "only_test"
    two.mkdir(), one.mkdir()
    (two / "README.md").write_text("---\nconfigs:\n- config_name: leases\n  data_files: a.jsonl\n- config_name: torts\n"
                                   "  data_files:\n  - split: train\n    path: b.jsonl\n  - split: extra\n    path: c.csv\n---\n")
    for name in ("a", "b"):
        jsonl(two / f"{name}.jsonl", [{"q": f"{name}{n}", "a": "2021-03-05"} for n in range(3)])
    write_csv(two / "c.csv", [{"q": "c", "a": "0071"}])
    jsonl(one / "test.jsonl", [{"q": f"t{n}", "a": "0071"} for n in range(3)])
    datasets.DatasetDict({name: datasets.Dataset.from_list([{"q": name, "a": "x"}]) for name in ("train", "dev")}).save_to_disk(
        tmp_path / "saved")
    return tmp_path


QA = Template.parse("{q} {a}")


def test_a_configuration_is_named_behind_the_dataset(layouts):
    assert read(f"{layouts}/two configs:leases", QA) == [{"q": f"a{n}", "a": "2021-03-05"} for n in range(3)]
    for name in ("two configs", "two configs:nothing"):
        assert "has several configurations: leases, torts; name one, e.g. --dataset" in refusal(layouts / name)


def test_a_split_is_named_or_those_that_are_there_are_listed(layouts):
    assert [row["a"] for row in read(layouts / "only_test", QA, "test")] == ["0071"] * 3
    assert read(layouts / "saved", QA) == [{"q": "train", "a": "x"}]
    assert read(layouts / "saved", QA, "dev") == [{"q": "dev", "a": "x"}]
    assert "has no split train; it has test. Name one with --split." in refusal(layouts / "only_test")
    assert "has no split test; it has train, dev." in refusal(layouts / "saved", "test")
    assert "has no splits" in refusal(jsonl(layouts / "rows.jsonl", WORDS), "train")
    assert read_table(str(layouts / "only_test"), "test").name == "only_test:test"  # so that each split has its own name
    assert read_table(f"{layouts}/two configs:torts").name == "two configs:torts"
    assert read(layouts / "two configs:torts", QA) == [{"q": f"b{n}", "a": "2021-03-05"} for n in range(3)]


def test_configurations_that_are_wrong_themselves_are_one_sentence(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: a.jsonl\n---\n")
    jsonl(tmp_path / "a.jsonl", WORDS)
    assert str(tmp_path) in refusal(tmp_path)


def test_a_folders_own_name_may_hold_a_colon(tmp_path):
    write_layout(tmp_path / "a:b", WORDS)
    assert read(tmp_path / "a:b", QA) == WORDS


def test_tables_of_another_kind_in_a_folder_are_named_as_left_out(tmp_path, capsys):
    write_layout(tmp_path / "data", WORDS)
    write_csv(tmp_path / "data/more.csv", WORDS[:2])
    assert len(read(tmp_path / "data", QA)) in (2, len(WORDS)) and "left out: " in capsys.readouterr().out


def test_a_readme_beside_packed_data_is_no_document(tmp_path):
    (tmp_path / "README.md").write_text("# About the data")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, WORDS)).encode()))
    assert read(tmp_path, QA) == WORDS


def test_a_readme_alone_is_a_document_and_json_files_beside_notes_are_left_out(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# About")
    assert read_table(str(tmp_path)).names == ["README.md"]
    (tmp_path / "a.md").write_text("words"), (tmp_path / "package.json").write_text("{}")
    assert read_table(str(tmp_path)).names == ["README.md", "a.md"]
    assert "left out: package.json, beside README.md and 1 more" in capsys.readouterr().out
    assert "has no splits" in refusal(tmp_path, "train")


def test_a_folder_without_anything_to_read_is_refused(tmp_path):
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert "The saved dataset" in refusal(tmp_path)


DOCUMENTS = {"leases/a.txt": "The tenant pays.\r\n\r\nKeys come back.", "b.md": "# Goats\n\nSmall ones.",
             "C.TXT": "Dogs on a lead.", ".hidden/x.txt": "no", ".y.txt": "no", "photo.jpg": "no"}


def write_documents(folder):
    for name, text in DOCUMENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def test_a_folder_of_documents_is_one_example_a_file_named_by_it(tmp_path):
    table = read_table(str(write_documents(tmp_path / "my notes ü")))
    assert usual_template(table.columns) == "document {text}" and table.name == "my notes ü"
    found = {example.name: example.row for example in read_rows(table, Template.parse("document {text}"))}
    assert found == {"leases/a.txt": {"text": "The tenant pays.\n\nKeys come back."}, "b.md": {"text": "# Goats\n\nSmall ones."},
                     "C.TXT": {"text": "Dogs on a lead."}}


def test_documents_beside_tables_are_left_out_and_named(tmp_path, capsys):
    write_layout(tmp_path / "data", WORDS)
    (tmp_path / "data/notes.txt").write_text("words"), (tmp_path / "data/README.md").write_text("# about")
    assert read(tmp_path / "data", QA) == WORDS
    assert capsys.readouterr().out == "left out: notes.txt, beside train.jsonl\n"


def test_a_packed_document_and_a_name_that_is_no_text_are_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"words"))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("more words")
    assert read_table(str(tmp_path)).names == ["a.txt.gz", "caf\ufffd.txt"]


def test_documents_without_text_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("words"), (tmp_path / "b.txt").write_text(" \n")
    assert read_table(str(tmp_path)).names == ["a.txt"] and "left out: b.txt, without text" in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["\n\n", "\n", ". ", " ", ""])
def test_a_long_document_is_cut_at_its_paragraphs_lines_sentences_or_words_and_nothing_is_lost(mark):
    pieces = [f"{n}" * 30 for n in range(10, 60)]
    parts = cut(mark.join(pieces), 400)
    assert all(200 <= len(part) <= 400 for part in parts[:-1]) and len(parts) > 5
    assert "".join("".join(parts).split()) == "".join(mark.join(pieces).split())
    assert not mark or all(part.removesuffix(".").endswith(tuple(pieces)) for part in parts)


def test_a_paragraph_ends_a_part_before_a_line_or_a_sentence_does():
    text = "One. " * 50 + "\n" + "Two. " * 10 + "\n\n" + "Three. " * 30
    assert cut(text, 400)[0].endswith("Two.") and not cut("", 400)


def test_a_long_document_has_several_parts_named_by_their_number(tmp_path):
    (tmp_path / "long.txt").write_text("Some words. " * 900), (tmp_path / "short.txt").write_text("Few words.")
    assert read_table(str(tmp_path)).names == ["long.txt:1", "long.txt:2", "long.txt:3", "short.txt"]
    assert all(len(record["text"]) <= PART for record in read_table(str(tmp_path)).fetch(["text"]))


def test_a_single_document_is_cut_smaller_so_that_its_parts_can_learn_from_each_other(tmp_path):
    (tmp_path / "one.txt").write_text("The tenant pays rent. " * 100)
    table = in_smaller_parts(read_table(str(tmp_path / "one.txt")))
    assert ENOUGH <= len(table.names) < 2 * ENOUGH and table.names[0] == "one.txt:1"
    (tmp_path / "one.txt").write_text("The tenant pays rent. " * (LEAST_PART // 22))
    assert in_smaller_parts(read_table(str(tmp_path / "one.txt"))).names == ["one.txt"]
    rows = read_table(str(jsonl(tmp_path / "rows.jsonl", WORDS)))
    assert in_smaller_parts(rows) is rows


def write_pdf(path):
    figure = Figure()
    figure.text(0.1, 0.8, "The tenant pays on the first day.")
    figure.savefig(path, metadata={"CreationDate": None})


def test_a_pdf_file_is_read_by_datasets_own_reader_or_asks_for_what_that_needs(tmp_path, monkeypatch):
    write_pdf(tmp_path / "lease.pdf")
    pytest.importorskip("pdfplumber")
    assert "The tenant pays on the first day." in read_table(str(tmp_path / "lease.pdf")).fetch(["text"])[0]["text"]
    (tmp_path / "bad.pdf").write_bytes(b"no pdf")
    assert "The PDF file" in refusal(tmp_path / "bad.pdf")


def test_a_pdf_file_without_its_reader_is_refused_with_the_command_that_installs_it(tmp_path, monkeypatch):
    write_pdf(tmp_path / "lease.pdf")
    monkeypatch.setitem(sys.modules, "pdfplumber", None)
    assert "pip install pdfplumber" in refusal(tmp_path / "lease.pdf")
