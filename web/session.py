"""One visitor's answers on the page, and a handler for each event."""

import contextlib
import html
import json

import gradio as gr
import pandas as pd

from chat import check_ranges, is_changed
from generation import RULES, Reading
from support.command import UserError, whole_text
from web import panels
from web.api import is_token, refusal
from web.records import answers_of

KEPT_TURNS = 20  # in the browser
MOST_TURNS = 100  # in a session
DETAILED = 2000  # tokens of a session's last answers that keep their candidates; those of one token take 8 KB
READINGS = 4  # conversations whose caches are kept; each takes tens of megabytes
# What a record of another version, or one that somebody made up, may raise.
NONSENSE = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, UserError)
NO_SUCH_PLACE = "This is no place in the last answer."
# The controls, in the order in which handlers get their values.
CONTROLS = ("alpha", "temperature", "top_k", "max_new_tokens", "k", "rule", "seed", "no_repeat", "knn_k", "knn_temperature")


class Session:
    """One visitor's answers. Handlers run at the same time, so stop and clear only set what is wanted."""

    def __init__(self):
        self.answers, self.writing = [], None  # writing: the Answer that is wanted; None stops any that is being written
        self.reading = None  # what the models have read of this conversation
        # Numbers of the last answers that were asked for, begun, stopped, and cleared or undone while they waited.
        self.asked = self.begun = self.stopped = self.dropped = 0

    def turns(self, number=None):
        """(question, answer) pairs of the first `number` questions."""
        return [(answer.question, answer.text) for answer in self.answers[:number] if answer.text.strip()]

    def messages(self):
        """Gradio's messages: all but the last answer, which is shown below as tokens.

        Texts are escaped, since gr.Chatbot renders HTML even when Markdown is turned off.
        """
        said = [{"role": role, "content": html.escape(text, quote=False)} for answer in self.answers
                for role, text in (("user", answer.question), ("assistant", answer.text or panels.NO_ANSWER))]
        return said[:-1]

    def records(self):
        """The answers as plain data. Only the last one keeps its candidates, since a browser has little storage."""
        kept = [answer.record() for answer in self.answers[-KEPT_TURNS:]]
        return [{**record, "tokens": without_candidates(record["tokens"])} for record in kept[:-1]] + kept[-1:]

    def add(self, answer, number):
        """Put an answer in the place of answer `number` and all later ones. What is too old to be kept is dropped."""
        self.answers[number:] = [answer]
        del self.answers[:-MOST_TURNS]
        left = DETAILED
        for earlier in reversed(self.answers[:-1]):
            left -= len(earlier.tokens)
            if left < 0:
                earlier.tokens = without_candidates(earlier.tokens)

    def ask(self):
        """Note that an answer was asked for. It may have to wait for those of other visitors."""
        self.asked = self.begun + 1
        self.stopped, self.dropped = min(self.stopped, self.begun), min(self.dropped, self.begun)

    def stop(self):
        """Stop the answer that is being written, or the one that waits."""
        self.writing, self.stopped = None, self.begun if self.writing else self.asked

    def drop(self):
        """Stop the answer that is being written, or drop the one that waits. Returns whether one waits."""
        waits = self.asked > max(self.begun, self.dropped)
        self.stop()
        self.dropped = self.asked
        return waits

    def begin(self, answer):
        """Want an answer, unless it was stopped while it waited."""
        self.begun += 1
        self.writing = answer if self.begun > self.stopped else None

    def change(self, value, name):
        """Apply a moved control to the answer that is being written, from its next token on."""
        with contextlib.suppress(UserError):  # a number that is still being typed
            moved = check_ranges(**{name: value})
            if self.writing:
                setattr(self.writing.settings, name, moved[name])

    def restore(self, records, vocabulary, entries):
        """Restore the answers of an earlier visit, or none of them if this version cannot read them."""
        self.answers = []
        with contextlib.suppress(*NONSENSE):
            records = json.loads(whole_text(json.dumps(records[-KEPT_TURNS:], ensure_ascii=False)))
            self.answers = answers_of(records, vocabulary, entries)


def without_candidates(tokens):
    return [{k: v for k, v in t.items() if k != "candidates"} | {"changed": is_changed(t)} for t in tokens]


def of(event, name):
    """A value of an event, or None if whoever sent it left it out."""
    try:
        return getattr(event, name)
    except NONSENSE:
        return None


def whole(event, name, size):
    """A whole number of an event, from 0 to size - 1. Gradio sends some as the first of a pair."""
    value = of(event, name)
    value = value[0] if isinstance(value, list | tuple) and value else value
    if not is_token(value, size):
        raise refusal(UserError(NO_SUCH_PLACE))
    return int(value)


class Desk:
    """Handlers over a Chat. Those that write tokens are generators."""

    def __init__(self, chat):
        self.chat, self.readers = chat, []  # the sessions that have a Reading, the last one last

    def reading(self, session):
        """The session's Reading. Only the last READINGS sessions keep theirs."""
        self.readers = [*(reader for reader in self.readers if reader is not session), session]
        while len(self.readers) > READINGS:
            self.readers.pop(0).reading = None
        session.reading = session.reading or Reading(self.chat.model.base)
        return session.reading

    def shown(self, session, colouring, opened=None, stopped=False):
        """(chat, tokens, facts, candidates, passages) of the session's last answer."""
        if not session.answers:
            return [], "", "", "", ""
        answer, name = session.answers[-1], panels.COLOURINGS[colouring][0]
        found = self.token_panels(answer, opened) if opened is not None else ("", "")
        return session.messages(), panels.tokens(answer, name, opened), panels.facts(answer, stopped), *found

    def token_panels(self, answer, number):
        """(candidates, passages) of one token."""
        token = answer.tokens[number]
        found = self.chat.passages(token.get("neighbours", [])[:answer.k])
        title = f"Stored texts nearest to this place, and the token that each went on with ({len(found)})"
        return panels.candidates(answer, number), panels.passages(found, title)

    @staticmethod
    def most_changed(answer):
        """The number of the token whose probability the memory raised most, among those just written."""
        new = range(answer.kept, len(answer.tokens))
        return max(new, key=lambda i: answer.tokens[i]["blended"] - answer.tokens[i]["base"], default=None)

    def write(self, session, answer, colouring, first=None):
        """Write an answer of the session, which may be stopped or cleared meanwhile. Yields what is shown."""
        answer.reading = self.reading(session)
        yield self.shown(session, colouring)
        try:
            for _ in self.chat.write(answer, first) if session.writing else ():
                if session.writing is not answer:
                    break
                tokens = panels.tokens(answer, panels.COLOURINGS[colouring][0])
                yield gr.skip(), tokens, panels.facts(answer), gr.skip(), gr.skip()
        finally:
            stopped, session.writing, answer.reading = session.writing is not answer, None, None
            self.chat.trace(answer)
        here = bool(session.answers) and session.answers[-1] is answer  # it may have been cleared or undone
        yield self.shown(session, colouring, self.most_changed(answer) if here else None, here and stopped)

    def put(self, session, number, answer, colouring, first=None):
        """Write an answer in the place of answer `number` and all later ones. These stay if it was stopped while it waited."""
        session.begin(answer)
        if session.writing or (number == len(session.answers) and session.begun > session.dropped):
            session.add(answer, number)
            yield from self.write(session, answer, colouring, first)
        else:
            yield self.shown(session, colouring)

    def ask(self, session, message, colouring, *controls, number=None):
        """Answer a message. It replaces question `number` and all later ones. None: it comes after the last."""
        number = len(session.answers) if number is None else number
        answer = self.begin(message, session.turns(number), *controls)
        yield from self.put(session, number, answer, colouring)

    def again(self, session, colouring, *controls):
        """Answer the last question again."""
        if not session.answers:
            raise gr.Error("There is no question to ask again.", title="Nothing yet", print_exception=False)
        last = len(session.answers) - 1
        yield from self.ask(session, session.answers[last].question, colouring, *controls, number=last)

    def edited(self, session, colouring, event: gr.EventData, *controls):
        index, value = whole(event, "index", 2 * len(session.answers)), of(event, "value")
        yield from self.ask(session, html.unescape(value if isinstance(value, str) else ""), colouring, *controls,
                            number=index // 2)

    def go_on(self, session, colouring, event: gr.EventData, *controls):
        """Take another candidate at a token of the last answer, and continue from there."""
        number = whole(event, "number", len(session.answers[-1].tokens) if session.answers else 0)
        token, old = whole(event, "token", self.chat.model.base.vocabulary), session.answers[-1]
        try:
            answer = old.going_on(number, self.begin(old.question, [], *controls))
        except UserError as error:
            raise refusal(error) from None
        yield from self.put(session, len(session.answers) - 1, answer, colouring, token)

    def begin(self, message, turns, *controls):
        """An Answer from the values of the page's controls."""
        try:
            return self.chat.begin(message, turns, **dict(zip(CONTROLS, controls, strict=True)))
        except UserError as error:
            raise refusal(error) from None

    def open_token(self, session, colouring, event: gr.EventData):
        number = of(event, "number")
        if session.writing or not session.answers or number not in range(len(session.answers[-1].tokens)):
            return gr.skip(), gr.skip(), gr.skip()
        answer, number = session.answers[-1], int(number)
        return panels.tokens(answer, panels.COLOURINGS[colouring][0], number), *self.token_panels(answer, number)

    def clear(self, session, colouring):
        session.drop()
        session.answers = []
        return self.shown(session, colouring)

    def undo(self, session, colouring):
        """Take the last question back into the box. One that waits is only dropped."""
        if session.drop():
            return *self.shown(session, colouring), gr.skip()
        question = session.answers.pop().question if session.answers else ""
        return *self.shown(session, colouring), question

    def coloured(self, session, colouring):
        name = panels.COLOURINGS[colouring][0]
        return panels.legend(colouring), panels.tokens(session.answers[-1], name) if session.answers else ""

    def restore(self, records, session, colouring):
        """Show the answers that the browser kept from an earlier visit."""
        if records and not session.answers:
            session.restore(records, self.chat.model.base.vocabulary, len(self.chat.store))
        return self.shown(session, colouring)

    def take(self, session):
        return (session.answers[-1].question, session.answers[-1].text) if session.answers else ("", "")

    def voices(self, session, message, colouring, *controls):
        answer = self.begin(message, [], *controls)
        session.begin(answer)
        name, shown = panels.COLOURINGS[colouring][0], ""
        for answers in self.chat.voices(answer) if session.writing else ():
            shown = panels.voices(answers, name)
            if session.writing is not answer:
                break
            yield shown
        session.writing = None
        yield shown

    def explore(self, question, text, alpha):
        try:
            found = self.chat.explore(question, text)
        except UserError as error:
            raise refusal(error) from None
        lines = [(a, p, rule) for rule in RULES for a, p in zip(found["alpha"], found[rule], strict=True)]
        lines += [(a, found["auto"], "automatic alpha") for a in (0, 1)]
        least, most = min(p for _, p, _ in lines), max(p for _, p, _ in lines)
        lines += [(alpha, least, "the slider"), (alpha, most, "the slider")]
        best = {rule: min(zip(found[rule], found["alpha"], strict=True)) for rule in RULES}
        words = (f"{found['tokens']} tokens. Base alone {found['logits'][0]:.2f}, memory alone {found['logits'][-1]:.2f}; "
                 "the best fixed alpha: " + ", ".join(f"{p:.2f} at {a:.2f} for {rule}" for rule, (p, a) in best.items())
                 + f". The gate: {found['auto']:.2f}, with alpha {found['mean_auto_alpha']:.2f} on average.")
        return gr.LinePlot(pd.DataFrame(lines, columns=["alpha", "perplexity", "rule"]), visible=True), words

    def export(self, session):
        """The whole conversation as JSON, with the passages behind each token."""
        records = [answer.record() for answer in session.answers]
        for record in records:
            record["tokens"] = [token | {"passages": self.chat.passages(token.get("neighbours", []))} for token in record["tokens"]]
        return json.dumps({"base_model": self.chat.model.base.title, "answers": records}, ensure_ascii=False, indent=1)
