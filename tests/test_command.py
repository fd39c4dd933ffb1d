"""The command line: presets, flags that are given, flags that do not exist, and errors."""

from dataclasses import dataclass

import pytest

from support.command import UserError, check_filled, fail, one_line, option, parse_options


@dataclass
class Options:
    size: int = option(1, "how large")
    word: str = option("plain", "how it looks", choices=["plain", "fancy"])
    rate: float | None = option(None, "how fast")
    big: bool = option(False, "a preset")
    fast: bool = option(False, "another preset")


PRESETS = {"big": {"size": 9, "word": "fancy"}, "fast": {"size": 5, "rate": 2.0}}


def parse(*arguments):
    return parse_options(Options, "What it is for.", list(arguments), PRESETS)


def test_without_flags_every_option_has_its_default():
    assert parse() == Options()


def test_a_preset_changes_the_defaults_it_names_and_no_others():
    assert parse("--big") == Options(size=9, word="fancy", big=True)


def test_the_later_of_two_presets_goes_before_the_earlier_wherever_the_flags_stand():
    for flags in (("--big", "--fast"), ("--fast", "--big")):
        assert parse(*flags) == Options(size=5, word="fancy", rate=2.0, big=True, fast=True)


def test_a_preset_may_depend_on_what_those_before_it_led_to():
    presets = {"big": PRESETS["big"], "fast": lambda options: {"rate": options.size / 2}}
    assert parse_options(Options, "", ["--fast", "--big"], presets) == Options(9, "fancy", 4.5, True, True)
    assert parse_options(Options, "", ["--fast", "--size", "4"], presets) == Options(4, "plain", 2.0, False, True)


def test_a_given_flag_wins_over_a_preset_before_and_behind_it():
    for arguments in (("--big", "--size", "7"), ("--size", "7", "--big")):
        assert parse(*arguments) == Options(size=7, word="fancy", big=True)


def test_a_given_flag_wins_even_with_the_plain_default():
    assert parse("--big", "--size", "1", "--word", "plain") == Options(big=True)


def test_a_preset_leaves_nothing_behind_for_the_next_command_line():
    parse("--big", "--fast")
    assert parse() == Options()


@pytest.mark.parametrize("arguments", [("--colour", "red"), ("--siz", "3"), ("stray",), ("--size", "3", "4")])
def test_an_unknown_flag_ends_with_code_2_and_its_name(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"unknown: {arguments[2] if len(arguments) == 3 else arguments[0]}" in last
    assert "--help" in last


@pytest.mark.parametrize(("arguments", "named"), [(("--size", "three"), "--size"), (("--word", "ugly"), "--word")])
def test_a_value_of_the_wrong_kind_ends_with_code_2_and_the_flags_name(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2 and f"argument {named}: " in capsys.readouterr().err


def test_help_says_what_the_script_and_each_option_are_for(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(words in text for words in ("What it is for.", "--size", "how large", "how it looks", "how fast", "a preset"))


def test_fail_prints_one_sentence_and_returns_2(capsys):
    assert fail(str(UserError("The house is too small."))) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: The house is too small.\n")


def test_an_errors_text_is_put_on_one_short_line():
    assert one_line(ValueError("one\n  two\tthree ")) == "one two three"
    assert one_line(ValueError("x" * 1000)) == "x" * 300


def test_an_errors_sentence_is_one_line_of_some_hundred_letters_whatever_a_name_in_it_holds(capsys):
    fail("There is no file a\nb\r\nc; check it.")
    fail(f"There is no file {'x' * 5000}; check it.")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: There is no file a b c; check it."
    assert len(second) < 700 and second.startswith("error: There is no file xxx") and second.endswith("xxx; check it.")


def test_the_parsers_own_errors_are_one_such_line_too(capsys):
    for arguments in (("--size", "3\n4"), ("--colour",), ("--size",), ("--size", "9" * 6000)):
        with pytest.raises(SystemExit) as stopped:
            parse(*arguments)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and line.startswith("error: ") and line.endswith("; --help lists the options.")


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_an_option_that_is_empty_is_refused_by_its_name_and_one_that_is_not_given_is_not(value):
    check_filled(Options(), "word", "rate")
    with pytest.raises(UserError, match="--word is empty"):
        check_filled(Options(word=value), "rate", "word")
