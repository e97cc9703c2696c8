r"""Command splitting by llama-swap's rules (core reference 1.6), and placeholders."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.command import UnterminatedQuote, placeholders, split, substitute


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        pytest.param("a b\tc\nd", ["a", "b", "c", "d"], id="space, tab and newline separate"),
        pytest.param("  a  \n\n b ", ["a", "b"], id="runs of separators count once"),
        pytest.param("a\rb", ["a\rb"], id="carriage return does not separate"),
        pytest.param("", [], id="nothing"),
        pytest.param(" \n\t", [], id="only separators"),
        pytest.param(r"""'a $b "c" \d'""", [r'a $b "c" \d'], id="single quotes keep everything"),
        pytest.param(r'"\$ \` \" \\"', ['$ ` " \\'], id="what a backslash escapes in double quotes"),
        pytest.param(r'"\a \n \'"', [r"\a \n \'"], id="and what not"),
        pytest.param(r"\a\ b\"\'\\c", ["a b\"'\\c"], id="outside quotes it escapes everything"),
        pytest.param("""a'b'"c"d""", ["abcd"], id="neighbours join"),
        pytest.param("""'' a "" """, ["", "a", ""], id="empty quotes are empty arguments"),
        pytest.param("""a''b""", ["ab"], id="but not within one"),
        pytest.param("'a\nb' \"c\nd\"", ["a\nb", "c\nd"], id="quotes span lines"),
        pytest.param("a \\\n b", ["a", "b"], id="a trailing backslash goes on"),
        pytest.param("a\\\nb", ["a", "b"], id="it becomes a space"),
        pytest.param("a \\  \n b", ["a", "b"], id="spaces may follow it"),
        pytest.param("a \\", ["a"], id="on the last line too"),
        pytest.param("# x\na\n  # y 'z\nb", ["a", "b"], id="comment lines go, with what is wrong in them"),
        pytest.param("a \\\n# x \\\n\n b", ["a", "b"], id="comments and blank lines between continuations"),
        pytest.param("a # b", ["a", "#", "b"], id="there are no comments within a line"),
        pytest.param("a *.gguf ~ $HOME | b", ["a", "*.gguf", "~", "$HOME", "|", "b"], id="there is no shell"),
        pytest.param("a\\\\\nb", ["a ", "b"], id="of two trailing backslashes the last one goes, the other escapes"),
        pytest.param('"a \\\n b"', ["a  \n b"], id="continuation within quotes: a space in place of the backslash"),
    ],
)
def test_split(text, arguments):
    """Each rule of the splitter, by example."""
    assert split(text) == arguments


def test_a_whole_command():
    """Continuations, both quotes, comments and blank lines collapse to the plain arguments."""
    text = """
        llama-server --port ${PORT} \\
          # the model
          --model "/my models/a b.gguf" \\

          --chat-template '{"x": 1}' \\
          --alias=""
    """

    arguments = split(text)

    expected = ["llama-server", "--port", "${PORT}", "--model", "/my models/a b.gguf"]
    assert arguments == [*expected, "--chat-template", '{"x": 1}', "--alias="]


@pytest.mark.parametrize(
    ("text", "quote", "line", "column"),
    [
        ("'", "'", 1, 1),
        ('a "b', '"', 1, 3),
        ("# '\na \\\n b 'c", "'", 3, 4),
        ('a "b\\"', '"', 1, 3),
        ("a 'b' 'c\nd", "'", 1, 7),
    ],
)
def test_an_open_quote_is_told_with_its_place(text, quote, line, column):
    """The place is that in the text as written, comment lines counted."""
    with pytest.raises(UnterminatedQuote) as caught:
        split(text)

    assert (caught.value.quote, caught.value.line, caught.value.column) == (quote, line, column)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n")), max_size=5))
def test_what_shlex_quotes_comes_back(arguments):
    """Any arguments without newlines, quoted as for a POSIX shell, are split into the same."""
    assert split(shlex.join(arguments)) == arguments


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.text(alphabet="ab \t\n\r'\"\\#$`"))
def test_any_text_is_split_or_has_an_open_quote(text):
    """No text makes the splitter fail otherwise, and the place it tells is that of the quote."""
    try:
        arguments, opened = split(text), None
    except UnterminatedQuote as exc:
        arguments, opened = [], exc

    assert len("".join(arguments)) <= len(text)
    if opened is not None:
        assert text.split("\n")[opened.line - 1][opened.column - 1] == opened.quote


def test_placeholders_are_named_in_their_order():
    """Names are letters, digits, _, - and the dot of llama-swap's ${env.X}; other ${...} is plain text."""
    text = "${PORT} $PORT ${} ${a b} ${x:-y} ${env.HOME}${b-1} ${PORT}"

    names = placeholders(text)

    assert names == ["PORT", "env.HOME", "b-1", "PORT"]


def test_substitution_is_done_once():
    """What is filled in is not looked at again, and what is unknown stays."""
    text = "${A}${B} ${C} ${A}"

    filled = substitute(text, {"A": "${B}", "B": "b"})

    assert filled == "${B}b ${C} ${B}"
