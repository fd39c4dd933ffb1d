"""Rows: the text in the records of a table, and which rows are held out.

No value is interpreted: 0071 stays 0071, and true stays true.
"""

import datetime
from typing import NamedTuple

import numpy as np

from sources.tables import TEXT, Number, is_chat
from support.command import UserError, whole_text

MOST_VALIDATION_ROWS = 200
LONG_ANSWER = 100  # characters; equal answers of at least this length are one answer to two questions
SHAREGPT = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of roles


class Example(NamedTuple):
    """A row, a chat or a part of a document. An example never learns from itself."""

    name: str  # table:row, or document, or document:part
    row: dict  # field -> text; the field of a chat -> list of {"role", "content"}
    source: int = 0  # number of its source in the memory; each source has its own template


def plain_text(value):
    """The text of a value, as it stands in the file; "" for a missing one. Raises ValueError with its kind if it has no text."""
    if isinstance(value, str):
        return whole_text(str(value)).strip()
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and all(isinstance(part, str) and not isinstance(part, Number) for part in value):
        return "\n".join(map(plain_text, value))
    if isinstance(value, dict) and TEXT in value:
        several = value[TEXT]
        return plain_text(several[:1] if isinstance(several, list) and "answer_start" in value else several)  # alternatives
    if isinstance(value, datetime.datetime) and value.tzinfo is None and value.time() == datetime.time():
        return value.date().isoformat()  # a date that became a timestamp somewhere
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta) or hasattr(value, "as_tuple") \
            or isinstance(value, int | float):
        return str(value)
    raise ValueError(kind_of(value))


def kind_of(value):
    """What a value is, in words."""
    if isinstance(value, dict):
        return f"objects with {', '.join(map(str, value))}" if value else "empty objects"
    if isinstance(value, list) and value:
        return "a chat" if is_chat(value) else f"lists of {kind_of(value[0])}"
    names = {list: "empty lists", str: "texts", bytes: "bytes", Number: "numbers", int: "numbers", float: "numbers"}
    return names.get(type(value), type(value).__name__)


def messages_of(value):
    """A chat as a list of {"role", "content"}, from TRL's form or ShareGPT's. Raises ValueError with its kind if it is no chat."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(kind_of(value) if value else "nothing")
    messages = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get(TEXT), str) for part in content):
            content = "\n".join(part[TEXT] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a message of {role or 'nobody'} without text")
        messages.append({"role": SHAREGPT.get(role, role), "content": whole_text(content).strip()})
    return messages


def document(name):
    """The name of the document or table of the example with this name."""
    return name.rsplit(":", 1)[0] if name.rpartition(":")[2].isdigit() else name


def find(record, field):
    """The value of a field. a.b is b within a, unless there is a field named a.b."""
    if field in record or "." not in field:
        return record.get(field)
    first, rest = field.split(".", 1)
    return find(record[first], rest) if isinstance(record.get(first), dict) else None


def read_rows(table, template, source=0):
    """The Examples of a table: the template's fields of each record. Records with an empty field are left out.

    Raises UserError for a field that does not exist or holds no text.
    """
    names = {field: field if field in table.columns else field.split(".")[0] for field in template.fields}
    missing = [field for field, column in names.items() if column not in table.columns]
    if missing:
        raise UserError(f"The dataset {table.name} has no field {', '.join(missing)}; it has {', '.join(table.columns)}. "
                        "Name those you want with --template.")
    examples, left_out = [], 0
    for number, record in enumerate(table.fetch(list(dict.fromkeys(names.values())))):
        name = table.names[number] if table.names else f"{table.name}:{number + 1}"
        row = {field: value_of(name, field, find(record, field), template.whole_chats) for field in template.fields}
        if all(row.values()):
            examples.append(Example(name, row, source))
        left_out += not all(row.values())
    if not examples:
        raise UserError(f"The dataset {table.name} holds no row in which all of {', '.join(template.fields)} are filled.")
    if left_out:
        print(f"left out: {left_out} rows of {table.name} in which one of {', '.join(template.fields)} is empty", flush=True)
    return examples


def value_of(name, field, value, whole_chats):
    """The text of a value, or its messages. Raises UserError if it has none."""
    try:
        if whole_chats:
            return messages_of(value) if value else []
        return plain_text(value)
    except ValueError as error:
        inside = f", or a part of it, e.g. {{{field}.{next(iter(value))}}}" if isinstance(value, dict) and value else ""
        hint = f"name a field of text with --template{inside}"
        if whole_chats or is_chat(value):
            hint = '--template "chat {question} {answer}" takes two fields of text' if whole_chats else "use --template chat"
        raise UserError(f"The field {field} of {name} holds {error}, not {'a chat' if whole_chats else 'text'}; {hint}.") from None


def words(value):
    """All text of a field's value."""
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def telltale(row, template):
    """Texts that must not be on both sides of the split: the whole text, since data repeat rows, and a long answer."""
    answer = row[template.fields[-1]]
    answer = answer if isinstance(answer, str) else answer[-1]["content"]
    return ["\0".join(map(words, row.values())), *([answer] if len(answer) >= LONG_ANSWER else [])]


def split_rows(examples, held, template, fraction, most, seed, source=""):
    """(training examples, held-out examples). Held-out examples never enter the datastore.

    held: separate held-out examples, or None to draw a share. Rows with the same text, or the same long answer, are drawn as one:
    the first is held out and the others are left out. Raises UserError if fewer than 2 are left of either.
    """
    draw = np.random.default_rng(seed)
    if held is not None:
        held = held[:MOST_VALIDATION_ROWS]
        known = {part for example in held for part in telltale(example.row, template)}
        order = [i for i in draw.permutation(len(examples)) if not known & set(telltale(examples[i].row, template))]
    else:
        groups = {}
        for i, example in enumerate(examples):
            groups.setdefault(telltale(example.row, template)[-1], []).append(i)
        groups = list(groups.values())
        drawn = [groups[i] for i in draw.permutation(len(groups))]
        count = min(MOST_VALIDATION_ROWS, max(2, round(fraction * len(groups))))
        held, order = [examples[group[0]] for group in drawn[:count]], [i for group in drawn[count:] for i in group]
        if len(held) + len(order) < len(examples):
            print(f"left out: {len(examples) - len(held) - len(order)} rows whose text or long answer is held out too", flush=True)
    kept = np.sort(order[:most])
    check_enough(len(kept), len(held), source)
    return [examples[i] for i in kept], held


def check_enough(kept, held, source):
    """Raise UserError if there are too few examples."""
    if kept < 2 or held < 2:
        raise UserError(f"The dataset {source} is too small: {kept} rows to train on and {held} held out; "
                        "at least 2 of each are needed, since an example never learns from itself.")
