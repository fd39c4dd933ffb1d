"""The page's endpoints for programs: answers, a token's candidates and its passages, as data."""

import gradio as gr

from chat import RANGES, logprobs
from generation import token_bytes
from support.command import UserError


class Api:
    """Endpoints over a Chat. A setting that is not given has the value with which the page opens."""

    def __init__(self, chat, defaults):
        """defaults: {name: value} of the page's controls."""
        self.chat_model, self.defaults = chat, defaults

    def begin(self, message, history, tokens=(), **values):
        given = {name: value for name, value in values.items() if value is not None}
        try:
            check_history(history)
            answer = self.chat_model.begin(message, [tuple(turn) for turn in history or []], **self.defaults | given)
            answer.tokens = [{"id": int(token), "text": "", "end": False} for token in tokens]
            answer.kept = len(answer.tokens)
            yield from self.chat_model.write(answer)
        except UserError as error:
            raise refusal(error) from None

    def chat(self, message: str, alpha: float | None = None, temperature: float | None = None, top_k: int | None = None,
             max_new_tokens: int | None = None, rule: str | None = None, seed: int | str | None = None,
             no_repeat: int | None = None, history: list[list[str]] | None = None) -> tuple[str, dict]:
        """Answer a message. Streams pairs of the text so far and {}. The last pair has the log probabilities instead of {}.

        history: pairs of message and answer. The log probabilities have the usual shape of language model APIs, with base and
        memory beside the blend. A token's bytes are its own. Its text is the text it completes. An end token has no text.
        """
        for answer in self.begin(message, history, alpha=alpha, temperature=temperature, top_k=top_k,
                                 max_new_tokens=max_new_tokens, rule=rule, seed=seed, no_repeat=no_repeat):
            yield answer.text, {}
        yield answer.text, self.log_probabilities(answer)

    def candidates(self, message: str, tokens: list[int] | None = None, alpha: float | None = None, rule: str | None = None,
                   history: list[list[str]] | None = None) -> dict:
        """The candidates for the token after the first `tokens` (ids, as in the log probabilities) of an answer to the message.

        Returns alpha, the memory's share there, and candidates: id, text, and probability under base, memory and blend, the
        blend's best first.
        """
        token = self.next_token(message, tokens, alpha=alpha, rule=rule, history=history)[1]
        return {"alpha": token["alpha"], "candidates": token["candidates"]}

    def passages(self, message: str, tokens: list[int] | None = None, k: int | None = None,
                 history: list[list[str]] | None = None) -> list[dict]:
        """The k stored entries nearest to the hidden state after the first `tokens` (ids) of an answer to the message.

        Each has entry, row, title, before, token (the next one in the stored text), after, squared distance, weight.
        """
        answer, token = self.next_token(message, tokens, k=k, history=history)
        self.chat_model.trace(answer)
        return self.chat_model.passages(token["neighbours"])

    def log_probabilities(self, answer):
        """The log probabilities of an answer, with every token's own bytes. A token without bytes, as at the end, has no text."""
        model, found = self.chat_model.model, logprobs(answer.tokens)
        for entry in found["content"]:
            for token in (entry, *entry["top_logprobs"]):
                own = b"" if token["id"] in model.ends else token_bytes(model.base.tokenizer, token["id"])
                token["bytes"], token["token"] = list(own), token["token"] if own else ""
        return found

    def next_token(self, message, tokens, history=None, **values):
        """(answer, token) of one step after the given tokens."""
        tokens, size = [] if tokens is None else tokens, self.chat_model.model.base.vocabulary
        if not isinstance(tokens, list) or not all(is_token(token, size) for token in tokens):
            raise refusal(UserError(f"tokens is a list of whole numbers from 0 to {size - 1}."))
        if len(tokens) >= (most := RANGES["max_new_tokens"][1]):
            raise refusal(UserError(f"tokens has at most {most - 1} tokens, not {len(tokens)}."))
        # At temperature 0, so that no token is among the candidates only because it was sampled.
        answer = next(self.begin(message, history, tokens, max_new_tokens=len(tokens) + 1, temperature=0, no_repeat=0, **values))
        return answer, answer.tokens[-1]


def is_token(value, size):
    """Whether a value is the id of one of `size` tokens: a whole number, which may be a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < size and value == int(value)


def check_history(history):
    """Raise UserError unless the history is a list of pairs of texts, or None."""
    pairs = [] if history is None else history
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs):
        raise UserError("history is a list of pairs of message and answer.")


def refusal(error):
    """A UserError as the page and its clients show it."""
    return gr.Error(str(error), title="Please change one thing", print_exception=False)
