"""Rows -> template -> texts -> token ids -> windows.

Letters: N entries, B windows, T positions.
"""

import re
import string
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from base_model import Literal
from sources.rows import document
from sources.tables import MESSAGES, TEXT
from support.command import UserError, one_line

CHAT = "chat"  # the template that stands for the model's own chat template
DOCUMENT = "document"  # the template that reads a text as it stands; questions are asked as in a chat
ORIGINAL = "Title: {Title}\nQuestion: {Question}\nAnswer: {Answer}"  # the template for the original demo's dataset
CHAT_FIELDS = (("question", "answer"), ("question", "answers"), ("prompt", "completion"), ("instruction", "response"),
               ("instruction", "output"))
Q, A = "\u2e28", "\u2e2e"  # marks that no template contains


class Template:
    """Turns a row of the dataset into a text, and a chat message into the beginning of such a text.

    parts: (words, field) pairs. The words are a Literal in front of the field. tail: the Literal after the last field.
    The last field is the answer. The one before it is the question.
    """

    def __init__(self, pattern, parts, tail=""):
        self.pattern, self.tail = pattern, Literal(tail)
        self.parts = [(Literal(words), field) for words, field in parts]
        self.fields = [field for _, field in parts]
        self.header = Literal(self.parts[-2:][0][0].lstrip())  # what every prompt begins with
        # What ends a prompt (the answer brings its own first space), and what separates two turns.
        self.reply = Literal(self.parts[-1][0].rstrip())
        self.between = self.tail if self.tail[-1:].isspace() else Literal(self.tail + "\n")
        self.asked = self  # the Template for a chat's prompts
        self.whole_chats = False  # whether its one field holds lists of messages

    @classmethod
    def parse(cls, pattern, base=None, columns=()):
        """A Template from its text, e.g. "Q: {question}\\nA: {answer}", or from "chat ..." or "document ...".

        "chat {question} {answer}" puts two fields into the chat template of `base`, "chat {messages}" whole chats. "chat" alone
        finds the fields among the dataset's columns. "document {text}" is the text alone, and questions are asked as in a chat.
        Without a base the words of a chat template are empty. Raises UserError for a text that is no template.
        """
        if pattern.strip() == CHAT:
            return cls._chat(chat_fields(columns), base)
        try:
            pieces = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise UserError(f"The template {pattern!r} cannot be read: {error}.") from None
        if any(field == "" or spec or conversion for _, field, spec, conversion in pieces):
            raise UserError(f"The template {pattern!r} cannot be read: braces hold the name of a field and nothing else.")
        parts, tail = [], ""
        for words, field, _, _ in pieces:  # a doubled brace gives a piece without a field
            tail += words
            if field:
                parts.append((tail, field))
                tail = ""
        fields, form = [field for _, field in parts], parts[0][0].strip() if parts else ""
        if form in (CHAT, DOCUMENT):
            if any(words.strip() for words, _ in parts[1:]) or tail.strip() or len(parts) > (2 if form == CHAT else 1):
                raise UserError(f'The template {pattern!r} is neither a {form} nor a text; write "{CHAT} {{question}} {{answer}}" '
                                f'or "{DOCUMENT} {{text}}" with the names of your fields.')
            return cls._chat(fields, base) if form == CHAT else cls._document(fields[0], base)
        if not parts:
            raise UserError(f"The template {pattern!r} names no field; write fields in braces, e.g. {{Question}}, "
                            f"or name the model's chat template: {CHAT}.")
        return cls(pattern, parts, tail)

    @classmethod
    def _chat(cls, fields, base):
        """The base model's chat template around two fields, or around whole chats. Its own system line is left out."""
        ask, middle, tail, reply, between = chat_words(base) if base else [""] * 5
        if len(fields) == 1:
            return WholeChats(f"{CHAT} {{{fields[0]}}}", fields[0], cls._chat(["question", "answer"], base), base)
        question, answer = fields
        template = cls(f"{CHAT} {{{question}}} {{{answer}}}", [(ask, question), (middle, answer)], tail)
        template.reply, template.between = Literal(reply), Literal(between)  # exactly as the model's template has them
        return template

    @classmethod
    def _document(cls, field, base):
        """A text as it stands. Questions use the base model's chat template. Without one, an answer continues the message."""
        chat = cls._chat(["question", "answer"], base) if base and base.tokenizer.chat_template else None
        return Document(f"{DOCUMENT} {{{field}}}", field, chat)

    def render(self, row):
        """The whole text of one row (a dict that has every field), as strings and Literals."""
        text = [piece for words, field in self.parts for piece in (words, str(row[field]).strip())]
        return [*text, self.tail] if self.tail else text

    def prompt(self, message, turns=()):
        """The text that an answer continues, as strings and Literals. turns: earlier (message, answer) pairs.

        A chat has no fields before the question, such as a title. They are left out with their words.
        """
        if len(self.parts) == 1:
            return [self.header, "\n".join([*(text for turn in turns for text in turn), message])]
        middle = self.parts[-1][0]
        text = [piece for question, answer in turns for piece in (self.header, question, middle, answer, self.between)]
        return [*text, self.header, message, self.reply]

    def answered(self, message, answer, turns=()):
        """The text of `prompt` followed by an answer, as strings and Literals."""
        words = self.parts[-1][0]
        gap = words[len(self.reply):] if words.startswith(self.reply) else ""
        gap = " " if len(self.parts) == 1 else gap  # with a single field the answer continues the message
        return [*self.prompt(message, turns), gap + answer, *([self.tail] if self.tail else [])]

    def ends(self, base):
        """The ids of the tokens that end an answer: the base's own, and a special token right after the answer."""
        mark = base.marks and base.marks.match(self.tail.lstrip())
        return base.ends | ({base.tokenizer.convert_tokens_to_ids(mark[0])} if mark else set())

    def stops(self, base):
        """Texts that end an answer: the header of a next field or turn, and plain words after the answer.

        "Q:" and "### Answer" are headers. A letter, a word, a dash or a number is not: a line of an answer may begin with it.
        One or two characters after the answer, such as a full stop, are left to `closing`.
        """
        headers = {"\n" + words.strip() for words, _ in self.parts if is_header(words.strip()) and plain(words, base)}
        return sorted(headers | ({self.tail.rstrip()} if plain(self.tail, base) and len(self.tail.strip()) > 2 else set()))

    def closing(self, base):
        """One or two plain characters after the answer, which end it only where the text ends; "" if there are none."""
        return self.tail.rstrip() if plain(self.tail, base) and len(self.tail.strip()) <= 2 else ""

    def title(self, example):
        """The title of an example's passages: its first field, mostly a title or a question."""
        return " ".join(example.row[self.fields[0]].split())

    def question(self, example):
        """What an example asks, as a user would type it."""
        return example.row[self.fields[-2:][0]]

    def begun(self, row):
        """The text of a row up to its answer."""
        return [*self.render(row)[:2 * len(self.parts) - 2], self.reply]


class WholeChats(Template):
    """Chats of any number of turns in the base model's chat template. The one field holds lists of {"role", "content"}."""

    def __init__(self, pattern, field, asked, base):
        super().__init__(pattern, [(asked.parts[0][0], field)], asked.tail)
        self.asked, self.whole_chats, self.base = asked, True, base

    def render(self, row):
        """The whole text of one chat, as strings and Literals. Raises UserError if the chat template refuses it."""
        messages = row[self.fields[0]]
        roles = ", ".join(message["role"] for message in messages)
        try:
            text = self._marked(messages)
        except Exception as error:  # a chat template is a program and may raise anything
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise UserError(f"The chat template of {self.base.name} refuses a chat of {roles}: "
                                f"{one_line(error)[:120].rstrip('.')}.") from None
            told = "\n\n".join(message["content"] for message in messages[:2])  # for a model without system messages
            return self.render({self.fields[0]: [messages[1] | {"content": told}, *messages[2:]]})
        words, numbers = text[::2], text[1::2]
        if [int(number) for number in numbers] != list(range(len(messages))):
            raise UserError(f"The chat template of {self.base.name} leaves out a message of a chat of {roles}.")
        if messages[0]["role"] == "user":
            words[0] = self.asked.header  # leaves out the template's own system line
        contents = [message["content"] for message in messages]
        text = [piece for own, content in zip(words, contents, strict=False) for piece in (Literal(own), content)]
        return [*text, Literal(words[-1])]

    def _marked(self, messages):
        """[words, message number, words, ..., words]: the chat template's words around the numbers of the messages."""
        marked = [{"role": message["role"], "content": f"{Q}{number}{A}"} for number, message in enumerate(messages)]
        return re.split(f"{Q}(\\d+){A}", self.base.tokenizer.apply_chat_template(marked, tokenize=False))

    def title(self, example):
        return " ".join(self.question(example).split())

    def question(self, example):
        messages = example.row[self.fields[0]]
        return next((message for message in messages if message["role"] == "user"), messages[0])["content"]

    def begun(self, row):
        return [self.asked.header]


class Document(Template):
    """A text that is read as it stands. asked: the chat template for questions; if None, an answer continues the message."""

    def __init__(self, pattern, field, asked):
        super().__init__(pattern, [("", field)])
        self.asked = asked or self

    def title(self, example):
        return example.name

    def question(self, example):
        return f"What does {document(example.name)} say?"

    def begun(self, row):
        return []


def plain(words, base):
    """Whether words are more than space and hold no special token."""
    return bool(words.strip()) and not (base.marks and base.marks.search(words))


def is_header(words):
    """Whether words look like a header, with which no line of an answer begins by chance."""
    letters = sum(map(str.isalpha, words))
    return letters > 0 and (words.endswith((":", "\uff1a")) or (letters >= 3 and not (words[0].isalnum() and words[-1].isalnum())))


def chat_fields(columns):
    """The column of whole chats, or the columns of question and answer, as a list. Raises UserError if there are none."""
    lower = {name.lower(): name for name in columns}
    if MESSAGES in lower:
        return [lower[MESSAGES]]
    for question, answer in CHAT_FIELDS:
        if question in lower and answer in lower:
            return [lower[question], lower[answer]]
    raise UserError(f"The dataset has no question and answer among its fields {', '.join(columns)}; "
                    f'name them: --template "{CHAT} {{question}} {{answer}}".')


def usual_template(columns):
    """The default template for a dataset with these columns. Raises UserError if there is none."""
    if set(Template.parse(ORIGINAL).fields) <= set(columns):
        return ORIGINAL
    try:
        return f"{CHAT} {' '.join(f'{{{field}}}' for field in chat_fields(columns))}"
    except UserError:
        if TEXT in columns or len(columns) == 1:
            return f"{DOCUMENT} {{{TEXT if TEXT in columns else columns[0]}}}"
        raise UserError(f"How a text is made of the fields {', '.join(columns)} is not known; name those you want: --template "
                        f'"{CHAT} {{question}} {{answer}}" or "{DOCUMENT} {{text}}".') from None


def chat_words(base):
    """(words before a question, between question and answer, after an answer, at the end of a prompt, between two turns).

    They are read from a conversation of marks. Raises UserError for a model without a chat template.
    """
    q, a = Q, A
    turns = [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    try:
        once = base.tokenizer.apply_chat_template(turns, tokenize=False)
        twice = base.tokenizer.apply_chat_template(turns + turns, tokenize=False)
        begun = base.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        tail, reply = once.rpartition(a)[2], begun.partition(q)[2]
        between = twice[twice.index(a) + 1:twice.rindex(q)]  # what ends one turn and begins the next
        middle = once[once.rindex(q) + 1:once.rindex(a)]
        if middle.startswith(reply) and middle[len(reply):].strip():  # words that the template adds, such as an empty thought
            reply = middle
        ask = between[len(tail.rstrip()):].lstrip()
        assert between.startswith(tail.rstrip()) and middle and reply
    except Exception as error:  # a chat template is a program and may raise anything
        raise UserError(f"The model {base.name} has no chat template for questions and answers ({one_line(error)[:100]}); "
                        "write a --template with fields.") from None
    return ask, middle, tail, reply, between[:len(between) - len(ask)]


@dataclass
class Window:
    """Consecutive positions of one example that the base model reads at once.

    The first `skip` positions only give context. Each later one, except the last, is the key of an entry.
    """

    example: int
    ids: list
    skip: int
    position: int  # of the first entry's key, in the example's ids


def make_windows(example, ids, max_length, skip):
    """Windows of at most max_length ids. Together they make one entry of every position from `skip` on.

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
    """How many leading ids equal those of the template."""
    count = 0
    while count < min(len(ids), len(template_ids)) and ids[count] == template_ids[count]:
        count += 1
    return count


def encode_row(base, template, row):
    """Token ids of one row from BOS to the token that ends its answer."""
    return encode_to_end(base, template, template.render(row))


def encode_to_end(base, template, text):
    """Token ids of a text that ends with a template's tail, from BOS to the token that ends its answer."""
    ids, ends = base.encode(text), template.ends(base)
    tail = len(base.encode([template.tail])) if template.tail else 0
    for i in range(max(1, len(ids) - tail), len(ids)):
        if ids[i] in ends:
            return ids[:i + 1]
    return [*ids, base.eos]


def windows_of_sources(base, examples, templates, max_length, positions="all"):
    """All windows of all examples, source after source, so that a source added later comes last."""
    windows = []
    for source, template in enumerate(templates):
        own = [number for number, example in enumerate(examples) if example.source == source]
        windows += windows_of(base, [examples[number].row for number in own], template, max_length, positions, own)
    return windows


def windows_of(base, rows, template, max_length, positions="all", numbers=None):
    """All windows of all rows, longest first, so that a lack of memory shows at once.

    numbers: each row's example number; default: counted from 0.
    """
    prefix = base.encode([Literal(template.parts[0][0].rstrip(" "))])
    windows = []
    for example, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        ids = encode_row(base, template, row)
        if positions == "last":  # the original demo: one entry a row, after cutting at max_length
            ids = ids[:max_length]
            windows += make_windows(example, ids, max_length, len(ids) - 2)
        else:
            windows += make_windows(example, ids, max_length, shared_prefix(ids, prefix))
    return sorted(windows, key=lambda window: len(window.ids), reverse=True)


class Entries(NamedTuple):
    """The data of N entries besides their keys, window after window."""

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
