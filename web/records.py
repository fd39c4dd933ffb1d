"""Answers as plain data, as a browser keeps them. What comes back from there is only believed where it makes sense.

Anybody may send other records to the page, and their texts and numbers become part of what it shows.
"""

import dataclasses

from chat import EVERY_RULE, Answer, check_ranges, whole_seed
from generation import Settings

NAMES = ("base", "memory", "blended")


def answers_of(records, vocabulary, entries):
    """The Answers of some records, each with the turns before it. Raises ValueError, UserError and the like for nonsense.

    vocabulary, entries: how many tokens and how many stored entries there are.
    """
    answers = []
    for record in records:
        turns = [(answer.question, answer.text) for answer in answers if answer.text.strip()]
        answers.append(Answer.of_record(checked(record, vocabulary, entries), turns))
    return answers


def checked(record, vocabulary, entries):
    """A record with nothing but what belongs there."""
    numbers = [field.name for field in dataclasses.fields(Settings) if field.name != "rule"]
    tokens = [checked_token(token, vocabulary, entries) for token in kind(record["tokens"], list)]
    return {"question": kind(record["question"], str), "rule": one_of(EVERY_RULE, record["rule"]), "tokens": tokens,
            **check_ranges(**{name: record[name] for name in (*numbers, "max_new_tokens", "k")}),
            "seed": whole_seed(kind(record["seed"], int)), "kept": below(len(tokens) + 1, record["kept"]),
            "seconds": number(record["seconds"])}


def checked_token(token, vocabulary, entries):
    found = chances(token, vocabulary, (*NAMES, "alpha", "cut")) | {"end": kind(token["end"], bool)}
    if "neighbours" in token:
        found["neighbours"] = [[number(distance), below(entries, entry)] for distance, entry in token["neighbours"]]
    if "candidates" not in token:
        return found | {"changed": kind(token["changed"], bool)}
    candidates = [chances(candidate, vocabulary, NAMES) for candidate in token["candidates"]]
    one_of([candidate["id"] for candidate in candidates], found["id"])
    return found | {"candidates": candidates}


def chances(token, vocabulary, names):
    """Id, text, and some numbers from 0 to 1 of a token."""
    return {"id": below(vocabulary, token["id"]), "text": kind(token["text"], str),
            **{name: number(token[name], 1) for name in names}}


def kind(value, wanted):
    if type(value) is not wanted:
        raise TypeError(value)
    return value


def one_of(values, value):
    if value not in values:
        raise ValueError(value)
    return value


def below(size, value):
    return one_of(range(size), kind(value, int))


def number(value, most=float("inf")):
    """A number that is not negative. It may be a little too large, since it is rounded."""
    if type(value) not in (int, float) or not 0 <= value <= 1.001 * most:
        raise ValueError(value)
    return value
