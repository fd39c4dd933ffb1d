"""Memories of documents and of whole chats, from the command to the page's answer."""

import json

import pytest
from conftest import ROWS
from runs import command_line, jsonl
from test_chat import GOOD

import app
import train_memory_decoder
from chat import Chat
from memory_decoder import read_manifest
from texts import encode_row


def opened(folder):
    return Chat.open(app.Options(model_dir=str(folder), device="cpu"), read_manifest(folder))


def trained_on(source, base_model, folder, *more):
    train_memory_decoder.run(train_memory_decoder.parse_options(command_line(base_model, source, folder, *more)))
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory, tiny_gemma):
    """A memory of a folder of documents."""
    folder = tmp_path_factory.mktemp("my documents é")
    for number, row in enumerate(ROWS[:40:5]):
        name = f"notes {number}.md" if number % 2 else f"leases/{number}.txt"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"# {row['Title']}\n\n{row['Answer']}\n")
    return trained_on(folder, tiny_gemma, tmp_path_factory.mktemp("out") / "a memory")


def test_every_document_is_an_example_of_its_own(documents):
    store = opened(documents).store
    names = {example.name for example in store.examples}
    assert len(names) == len(store.examples) == 6 and all(name.endswith((".md", ".txt")) for name in names)
    held = [json.loads(line)["name"] for line in (documents / "held_out.jsonl").read_text().splitlines()]
    assert len(names | set(held)) == 8


def test_documents_are_asked_in_the_models_own_chat_form_and_traced_to_their_names(documents):
    chat = opened(documents)
    assert chat.model.base.tokenizer.decode(chat.model.base.encode(chat.prompt("Why?", [], 10))) == (
        "<bos><turn>user\nWhy?<end>\n<turn>assistant\n")
    *_, answer = chat.write(chat.begin("What is a deposit?", **GOOD))
    passages = chat.passages(chat.trace(answer).tokens[0]["neighbours"])
    assert answer.text and len(passages) == GOOD["k"] and {p["title"] for p in passages} <= {e.name for e in chat.store.examples}
    assert len(set(chat.questions())) == 6 and "What does " in chat.questions()[0]


def test_every_entry_of_a_document_remembers_its_next_token(documents):
    chat = opened(documents)
    ids = [encode_row(chat.model.base, chat.templates[0], example.row) for example in chat.store.examples]
    places = zip(chat.store.example, chat.store.position, strict=True)
    assert chat.store.values.tolist() == [ids[row][place + 1] for row, place in places]
    assert len(chat.store) == sum(len(text) - 2 for text in ids)  # a state after <bos> alone is no entry
    first = chat.passage(int((chat.store.position == 1).nonzero()[0][0]))
    assert first["before"].strip() == "#"


def test_a_single_document_trains_in_parts(tmp_path, tiny_gemma, capsys):
    (tmp_path / "one.txt").write_text("\n\n".join(row["Answer"] for row in ROWS[:12]))
    folder = trained_on(tmp_path / "one.txt", tiny_gemma, tmp_path / "out")
    store = opened(folder).store
    assert len(store.examples) >= 6 and {example.name.partition(":")[0] for example in store.examples} == {"one.txt"}
    assert "held out to test on: one.txt:" in capsys.readouterr().out


def test_whole_chats_train_and_are_asked_as_they_were(tmp_path, tiny_gemma):
    def said(*texts):
        return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}

    rows = [said(row["Question"][:80], row["Title"], f"And {n}?", row["Answer"][:60]) for n, row in enumerate(ROWS[:24:2])]
    chat = opened(trained_on(jsonl(tmp_path / "chats.jsonl", rows), tiny_gemma, tmp_path / "out"))
    stored = chat.store.examples[0].row["messages"]
    ids = encode_row(chat.model.base, chat.templates[0], chat.store.examples[0].row)
    prompt = chat.model.base.encode(chat.prompt(stored[2]["content"], [(stored[0]["content"], stored[1]["content"])], 10))
    assert ids[:len(prompt)] == prompt and chat.model.base.tokenizer.decode(ids[len(prompt):]) == stored[3]["content"] + "<end>"
    assert stored[0]["content"] in chat.questions()
