"""The command line of both scripts: options from a dataclass, and a user's error as one sentence."""

import signal
import sys
from contextlib import contextmanager
from dataclasses import field

from transformers import HfArgumentParser


class UserError(Exception):
    """An error that the user can fix. The message is one sentence that says how."""


class Terminated(KeyboardInterrupt):
    """The signal SIGTERM, which ends a run like Ctrl-C does."""


def terminated(*_):
    """A signal handler that raises Terminated. It ignores a second SIGTERM, since `timeout` may send two."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def undisturbed():
    """Hold back Ctrl-C and SIGTERM until the end of what must not be left half done."""
    held, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, _: held.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in held[:1]:
        signal.raise_signal(number)


def option(default, text, **more):
    """A dataclass field that is also a command-line flag with this help text."""
    return field(default=default, metadata={"help": text, **more})


def parse_options(options, description, arguments, presets):
    """Return an `options` dataclass filled from command-line arguments (None: those of this process).

    presets: {flag: {name: default}}. A flag that is set changes only defaults, so a value that is given wins. The defaults
    may also be a function of the options so far that returns them.
    """
    parser = HfArgumentParser(options, description=description, allow_abbrev=False)

    def parse():
        parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown: {' '.join(unknown)} (--help lists the options)")
        return parsed

    for flag, defaults in presets.items():
        if getattr(parsed := parse(), flag):
            parser.set_defaults(**(defaults(parsed) if callable(defaults) else defaults))
    return parse()


def whole_text(text):
    """The text without surrogates: a pair becomes its character, a lone one becomes U+FFFD.

    JSON may hold surrogates, and Python makes one of each argument byte that is not UTF-8. No tokenizer accepts them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(error):
    """An error's text on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def fail(sentence):
    """Print the sentence as an error and return the exit code 2."""
    print(f"error: {sentence}", file=sys.stderr)
    return 2
