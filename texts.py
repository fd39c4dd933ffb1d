"""Rows of a dataset -> template -> texts -> token ids -> windows.

Letters: N entries, B windows, T positions.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from base_model import Literal
from command import UserError, one_line

MOST_VALIDATION_ROWS = 200
LONG_ANSWER = 100  # characters from which two equal answers are one answer to two questions
CHAT = "chat"  # the template that stands for the model's own chat template
CHAT_FIELDS = (("question", "answer"), ("prompt", "completion"), ("instruction", "response"), ("instruction", "output"))


class Template:
    """How a row of the dataset becomes a text, and a chat message the beginning of such a text.

    parts: (words, field) pairs, the words as Literals that stand in front of the field. tail: the Literal behind the last one.
    The last field is the answer and the one before it is the question.
    """

    def __init__(self, pattern, parts, tail=""):
        self.pattern, self.tail = pattern, Literal(tail)
        self.parts = [(Literal(words), field) for words, field in parts]
        self.fields = [field for _, field in parts]
        self.header = Literal(self.parts[-2:][0][0].lstrip())  # what every prompt begins with
        # What a prompt ends with (the answer brings its own first space), and what stands between two turns.
        self.reply = Literal(self.parts[-1][0].rstrip())
        self.between = self.tail if self.tail[-1:].isspace() else Literal(self.tail + "\n")

    @classmethod
    def parse(cls, pattern, base=None, columns=()):
        """A Template from its text, e.g. "Q: {question}\\nA: {answer}", or "chat" for the chat template of `base`.

        "chat {question} {answer}" names the two fields; "chat" alone finds them among the dataset's columns.
        Without a base the words of a chat template are left empty. Raises UserError for a text that is no template.
        """
        try:
            pieces = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise UserError(f"The template {pattern!r} cannot be read: {error}.") from None
        if any(field == "" or spec or conversion for _, field, spec, conversion in pieces):
            raise UserError(f"The template {pattern!r} cannot be read: braces hold the name of a field and nothing else.")
        parts, tail = [], ""
        for words, field, _, _ in pieces:  # doubled braces come in pieces without a field
            tail += words
            if field:
                parts.append((tail, field))
                tail = ""
        if pattern.strip() == CHAT or ([words.strip() for words, _ in parts] == [CHAT, ""] and not tail.strip()):
            return cls._chat([field for _, field in parts] or chat_fields(columns), base)
        if parts and parts[0][0].strip() == CHAT:
            raise UserError(f'The template {pattern!r} is neither a chat nor a text; write "{CHAT} {{question}} {{answer}}" '
                            "with the names of your two fields.")
        if not parts:
            raise UserError(f"The template {pattern!r} names no field; write fields in braces, e.g. {{Question}}, "
                            f"or name the model's chat template: {CHAT}.")
        return cls(pattern, parts, tail)

    @classmethod
    def _chat(cls, fields, base):
        """The base model's chat template around two fields, without a system line that the template adds by itself."""
        ask, middle, tail, reply, between = chat_words(base) if base else [""] * 5
        question, answer = fields
        template = cls(f"{CHAT} {{{question}}} {{{answer}}}", [(ask, question), (middle, answer)], tail)
        template.reply, template.between = Literal(reply), Literal(between)  # to the letter
        return template

    def render(self, row):
        """The whole text of one row (a dict that has every field), as strings and Literals."""
        text = [piece for words, field in self.parts for piece in (words, str(row[field]).strip())]
        return [*text, self.tail] if self.tail else text

    def prompt(self, message, turns=()):
        """The text that an answer continues, as strings and Literals; turns are earlier (message, answer) pairs.

        Fields before the question (a title, say) have no counterpart in a chat. They are left out with their words.
        """
        if len(self.parts) == 1:
            return [self.header, "\n".join([*(text for turn in turns for text in turn), message])]
        middle = self.parts[-1][0]
        text = [piece for question, answer in turns for piece in (self.header, question, middle, answer, self.between)]
        return [*text, self.header, message, self.reply]

    def answered(self, message, answer, turns=()):
        """The text of `prompt` with an answer behind it, as strings and Literals."""
        words = self.parts[-1][0]
        gap = words[len(self.reply):] if words.startswith(self.reply) else ""
        gap = " " if len(self.parts) == 1 else gap  # an answer to a text without fields goes on from the message
        return [*self.prompt(message, turns), gap + answer, *([self.tail] if self.tail else [])]

    def ends(self, base):
        """The ids of the tokens that end an answer: the base's own, and a special token that stands behind the answer."""
        mark = base.marks and base.marks.match(self.tail.lstrip())
        return base.ends | ({base.tokenizer.convert_tokens_to_ids(mark[0])} if mark else set())

    def stops(self, base):
        """Texts at which an answer ends: what begins a next field or turn, and plain words behind the answer.

        A single mark, such as a full stop, may stand inside an answer too, so it ends none.
        """
        def plain(words):
            return words.strip() and not (base.marks and base.marks.search(words))

        headers = {"\n" + words.strip() for words, _ in self.parts if plain(words)}
        return sorted(headers | ({self.tail.rstrip()} if plain(self.tail) and len(self.tail.rstrip()) > 2 else set()))


def chat_fields(columns):
    """The names of question and answer among a dataset's columns; raises UserError when there are none."""
    lower = {name.lower(): name for name in columns}
    for question, answer in CHAT_FIELDS:
        if question in lower and answer in lower:
            return lower[question], lower[answer]
    raise UserError(f"The dataset has no question and answer among its fields {', '.join(columns)}; "
                    f'name them: --template "{CHAT} {{question}} {{answer}}".')


def chat_words(base):
    """(words before a question, between question and answer, behind an answer, at the end of a prompt, between two turns).

    They are read off a conversation of marks. Raises UserError for a model without a chat template.
    """
    q, a = "\u2e28", "\u2e2e"  # marks that no template contains
    turns = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    try:
        once = base.tokenizer.apply_chat_template(turns, tokenize=False)
        twice = base.tokenizer.apply_chat_template(turns + turns, tokenize=False)
        begun = base.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        tail, reply = once.rpartition(a)[2], begun.partition(q)[2]
        between = twice[twice.index(a) + 1:twice.rindex(q)]  # what ends one turn and begins the next
        middle = once[once.rindex(q) + 1:once.rindex(a)]
        if middle.startswith(reply) and middle[len(reply):].strip():  # words of the model's own, such as an empty thought
            reply = middle
        ask = between[len(tail.rstrip()):].lstrip()
        assert between.startswith(tail.rstrip()) and middle and reply
    except Exception as error:  # a chat template is a program of its own and may fail in any way
        raise UserError(f"The model {base.name} has no chat template for questions and answers ({one_line(error)[:100]}); "
                        "write a --template with fields.") from None
    return ask, middle, tail, reply, between[:len(between) - len(ask)]


@dataclass
class Window:
    """A stretch of one example that the base model reads at once.

    Its first `skip` positions only give context; every later one but the last is the key of an entry.
    """

    example: int
    ids: list
    skip: int
    position: int  # of the first entry's key, in the example's ids


def make_windows(example, ids, max_length, skip):
    """Windows of at most max_length ids that together make an entry of every position from `skip` on.

    Each window after the first starts with BOS and repeats a quarter of a window for context.
    """
    windows, position, overlap = [], skip, max_length // 4
    if skip < min(max_length, len(ids)) - 1:
        windows.append(Window(example, ids[:max_length], skip, position))
    position = max(position, max_length - 1)
    while position < len(ids) - 1:
        start = max(1, position - overlap)
        piece = [ids[0], *ids[start:start + max_length - 1]]
        windows.append(Window(example, piece, position - start + 1, position))
        position = start + max_length - 2
    return windows


def shared_prefix(ids, template_ids):
    """How many leading ids are template and nothing else."""
    count = 0
    while count < min(len(ids), len(template_ids)) and ids[count] == template_ids[count]:
        count += 1
    return count


def encode_row(base, template, row):
    """Token ids of one row from BOS to the token that ends its answer."""
    return encode_to_end(base, template, template.render(row))


def encode_to_end(base, template, text):
    """Token ids of a text that a template's tail ends, from BOS to the token that ends its answer."""
    ids, ends = base.encode(text), template.ends(base)
    tail = len(base.encode([template.tail])) if template.tail else 0
    for i in range(max(1, len(ids) - tail), len(ids)):
        if ids[i] in ends:
            return ids[:i + 1]
    return [*ids, base.eos]


def windows_of(base, rows, template, max_length, positions="all"):
    """All windows of all rows, longest first, so that what does not fit in memory shows at once."""
    prefix = base.encode([Literal(template.parts[0][0].rstrip(" "))])
    windows = []
    for example, row in enumerate(rows):
        ids = encode_row(base, template, row)
        if positions == "last":  # the original demo: one entry a row, after cutting at max_length
            ids = ids[:max_length]
            windows += make_windows(example, ids, max_length, len(ids) - 2)
        else:
            windows += make_windows(example, ids, max_length, shared_prefix(ids, prefix))
    return sorted(windows, key=lambda window: len(window.ids), reverse=True)


class Entries(NamedTuple):
    """What is known of N entries beside their keys, window after window."""

    values: np.ndarray  # (N,) int32, the next token
    example: np.ndarray  # (N,) int32, which row
    position: np.ndarray  # (N,) int32, the key's place in that row's ids
    offsets: np.ndarray  # (B+1,) int64: window b holds entries offsets[b]:offsets[b+1]


def entries_of(windows):
    """The Entries of all windows, in their order."""
    values = [token for w in windows for token in w.ids[w.skip + 1:]]
    counts = [len(w.ids) - 1 - w.skip for w in windows]
    example = np.repeat(np.array([w.example for w in windows], np.int32), counts)
    position = [w.position + i for w, count in zip(windows, counts, strict=True) for i in range(count)]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Entries(np.array(values, np.int32), example, np.array(position, np.int32), offsets)


def read_table(source):
    """A hub dataset (split train) or a local JSON, JSONL, CSV or Parquet file, as datasets gives it."""
    path = Path(source)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    try:
        if path.is_file() and kind:
            if path.stat().st_size == 0:
                raise UserError(f"The dataset file {source} is empty.")
            plain = {"keep_default_na": False} if kind == "csv" else {}  # an answer may well read "None"
            return datasets.load_dataset(kind, data_files=str(path), split="train", **plain)
        if path.is_file() or path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            raise UserError(f"There is no JSON, JSONL, CSV or Parquet file {source}; check the path.")
        return datasets.load_dataset(source, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(explain_dataset_error(source, kind, error)) from None


def read_rows(table, source, template):
    """The rows of a table as dicts of the template's fields; rows that lack a value are left out."""
    missing = [name for name in template.fields if name not in table.column_names]
    if missing:
        raise UserError(f"The dataset {source} has no field {', '.join(missing)}; it has {', '.join(table.column_names)}. "
                        "Name those you want with --template.")
    rows = [{name: row[name] for name in template.fields} for row in table.select_columns(template.fields)]
    rows = [row for row in rows if all(str(value if value is not None else "").strip() for value in row.values())]
    if not rows:
        raise UserError(f"The dataset {source} holds no row in which all of {', '.join(template.fields)} are filled.")
    return [{name: str(value).strip() for name, value in row.items()} for row in rows]


def explain_dataset_error(source, local, error):
    """One sentence for a dataset that could not be read."""
    text = f"{error} {error.__cause__ or ''}".lower()
    if local:
        return f"The dataset file {source} cannot be read: {one_line(error.__cause__ or error)}"
    if "doesn't exist" in text and "connect" not in text and "offline" not in text:
        return f"There is no dataset {source} on the hub and no file of that name; check --dataset."
    return (f"The dataset {source} is not on this machine and cannot be fetched from the hub; check its name and the network, "
            f"or name a local file. ({one_line(error)[:120]})")


def telltale(row, template):
    """What must not stand on both sides of the split: the text (data repeat rows), and an answer too long to be chance."""
    answer = row[template.fields[-1]]
    return ["\0".join(row.values()), *([answer] if len(answer) >= LONG_ANSWER else [])]


def split_rows(rows, held, template, fraction, most, seed, source=""):
    """(training rows, validation rows); those held out never enter the datastore.

    held: validation rows of their own, or None to draw a share of the rows. Rows with one text or one long answer are
    drawn as one: the first is held out and its twins are left out. Raises UserError when fewer than 2 are left of either.
    """
    draw = np.random.default_rng(seed)
    if held is not None:
        held = held[:MOST_VALIDATION_ROWS]
        known = {part for row in held for part in telltale(row, template)}
        order = [i for i in draw.permutation(len(rows)) if not known & set(telltale(rows[i], template))]
    else:
        groups = {}
        for i, row in enumerate(rows):
            groups.setdefault(telltale(row, template)[-1], []).append(i)
        groups = list(groups.values())
        drawn = [groups[i] for i in draw.permutation(len(groups))]
        count = min(MOST_VALIDATION_ROWS, max(2, round(fraction * len(groups))))
        held, order = [rows[group[0]] for group in drawn[:count]], [i for group in drawn[count:] for i in group]
        if len(held) + len(order) < len(rows):
            print(f"left out: {len(rows) - len(held) - len(order)} rows whose text or long answer is held out too", flush=True)
    kept = np.sort(order[:most])
    if len(kept) < 2 or len(held) < 2:
        raise UserError(f"The dataset {source} is too small: {len(kept)} rows to train on and {len(held)} held out; "
                        "at least 2 of each are needed, since an example never learns from itself.")
    return [rows[i] for i in kept], held
