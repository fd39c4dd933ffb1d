"""The command line of both scripts: options from a dataclass, and a user's error as one sentence."""

import io
import signal
import sys
from contextlib import contextmanager
from dataclasses import field

from transformers import HfArgumentParser

LONGEST = 600  # characters of an error's sentence


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


class Parser(HfArgumentParser):
    """A parser whose errors are one sentence, as a user's other errors are."""

    def error(self, message):
        sys.exit(fail(f"{one_line(message).rstrip('.')}; --help lists the options."))


def parse_options(options, description, arguments, presets):
    """Return an `options` dataclass filled from command-line arguments (None: those of this process).

    presets: {flag: {name: default}}. A flag that is set changes only defaults, so a value that is given wins. The defaults
    may also be a function of the options so far that returns them.
    """
    parser = Parser(options, description=description, allow_abbrev=False)

    def parse():
        parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown: {' '.join(unknown)}")
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


def print_all_characters():
    r"""Let print show a character that the terminal does not have, as \xe9. Names and answers may hold any."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(sentence):
    """Print the sentence as an error and return the exit code 2. A name in it may hold line breaks, or be very long."""
    line = " ".join(sentence.splitlines())
    print("error:", line if len(line) <= LONGEST else f"{line[:LONGEST // 2]} ... {line[-LONGEST // 2:]}", file=sys.stderr)
    return 2


def check_filled(options, *names):
    """Raise UserError if one of these options is an empty text, as an unset variable of a shell gives it."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, str) and not value.strip():
            raise UserError(f"--{name} is empty; give it a value, or leave it out.")
