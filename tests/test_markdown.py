"""Markdown on a terminal while it comes: what is shown, and that nothing of it is lost, flickers or commands."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistralcli.cli.chat.markdown import MarkdownStream
from mistralcli.cli.chat.markdown_code import _style_of, highlighter_for
from mistralcli.cli.console import printable

SGR = re.compile(r"\x1b\[[0-9;]*m")
STATUS = re.compile(r"\r\x1b\[K(?:\x1b\[2m\(table: row \d+\)\x1b\[0m)?")
MARKS = re.compile(r"[\s*_~`#\[\]()|\\:─-]")


def shown(*pieces, color=True, width=1000):
    written = []
    stream = MarkdownStream(written.append, width=lambda: width, color=color)
    for piece in pieces:
        stream.write(piece)
    stream.close()
    return "".join(written)


def plain(*pieces, **options):
    """What stands on the terminal in the end, without colours."""
    assert shown(*"".join(pieces), **options) == shown(*pieces, **options)
    return SGR.sub("", STATUS.sub("", shown(*pieces, **options)))


def styled(text):
    """What is shown, with SGR codes in angle brackets."""
    assert shown(*text) == shown(text)
    return re.sub(r"\x1b\[([0-9;]*)m", r"<\1>", shown(text)).removesuffix("\n")


WORDS = [
    "a",
    "b1",
    "é",
    "漢",
    " ",
    "  ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "*",
    "**",
    "***",
    "_",
    "__",
    "~~",
    "`",
    "``",
]
WORDS += [
    "```",
    "```py\n",
    "~~~",
    "#",
    "# ",
    "> ",
    "- ",
    "1. ",
    "---\n",
    "|",
    "| a | b |\n",
    "|---|:-:|\n",
    "\\",
    "$",
]
WORDS += [
    "[",
    "](",
    "](u)",
    ")",
    "(",
    '"',
    "'''",
    "/*",
    "//",
    "    ",
    "\x1b[31m",
    "\u202e",
    "👩‍👩‍👧",
    "x" * 50,
    "w " * 70,
]
WORDS += ["def f(x):\n", "\n```\n", "y**2", "snake_case", "\u2028", "\x85", "\ud800"]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map("".join) | st.text(max_size=60)


@given(text=texts, cuts=st.lists(st.integers(0, 300), max_size=8), color=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_output_is_the_same_however_the_text_was_cut(text, cuts, color):
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    whole = shown(text, color=color, width=30)
    assert shown(*pieces, color=color, width=30) == whole
    assert shown(*text, color=color, width=30) == whole


@pytest.mark.parametrize(
    "text",
    [
        "-" * 200 + "\nx",
        "- " * 200 + "\nx",
        "> " * 200 + "\nx",
        " " * 200 + "x",
        "```" + "py " * 100 + "\nx\n```",
        "```py\n" + "x = 1; " * 100 + "\ny\n```",
        "```\nx\n" + " " * 200 + "```\n*y*",
        "```py\nx\n```" + " " * 600 + "\n*y*",
        "> ```\n> " + "x" * 600 + "\n> ```\n",
        "| a |\n|---|\n| " + "b" * 3000 + " |\n",
        "| " + "a" * 3000 + " |\n|---|\n",
        "*" * 119 + "**a**",
        "*" * 200 + "a" + "*" * 200,
        "**" + "a" * 117 + "**b**",
        "[" + "a" * 116 + "](u)",
        "`" * 130 + "a" + "`" * 130,
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_very_long_lines_lose_nothing_however_they_were_cut(text):
    whole = plain(text)
    assert MARKS.sub("", whole) == MARKS.sub("", text)
    for n in (1, 7, 119, 120, 121, 499, 501):
        assert shown(*(text[at : at + n] for at in range(0, len(text), n))) == shown(text)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_every_character_but_marks_is_shown_in_order(text):
    as_text = printable(text.replace("\r\n", "\n"))
    assert MARKS.sub("", plain(text)) == MARKS.sub("", as_text)


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_nothing_but_colours_and_the_count_of_rows_commands_the_terminal(text):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain(text))
    colorless = shown(text, color=False)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", colorless)


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_an_answer_ends_at_the_start_of_a_line_in_no_style(text):
    output = shown(text)
    assert output == "" or re.search(r"\n(\r\x1b\[K)?\Z", output)
    codes = SGR.findall(output)
    assert not codes or codes[-1] == "\x1b[0m"
    assert not re.search(r"\x1b\[[1-9][0-9;]*m[^\x1b]*\n", output)  # nor does any line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**bold** and *italic*, ***both***", "<1>bold<0> and <3>italic<0>, <1;3>both<0>"),
        ("_so_ ~~not~~ `x * y`", "<3>so<0> <9>not<0> <36>x * y<0>"),
        ("**a *b* `c**`**", "<1>a <0;1;3>b<0;1> <0;1;36>c**<0>"),
        ("``a`b``", "<36>a`b<0>"),
        ("这是**重要**的", "这是<1>重要<0>的"),
        ("**R**andom", "<1>R<0>andom"),
        ("see [the *page*](https://x.org/a_(b)).", "see <4>the <0;4;3>page<0> (https://x.org/a_(b))."),
        ("\\*no\\* \\`no\\`", "*no* `no`"),
        ("# One", "<1;4;35>One<0>"),
        ("## Two **words**", "<1;35>Two <0;1;35;1>words<0>"),
        ("###### Six", "<1>Six<0>"),
        ("- a\n  * b\n10. c", "<36>- <0>a\n<36>  * <0>b\n<36>10. <0>c"),
        ("> a\n> > - *b*", "<36>> <0>a\n<36>> > - <0;3>b<0>"),
        ("- - -", "<2>────────────────────<0>"),
        ("***", "<2>────────────────────<0>"),
    ],
)
def test_markup_becomes_style(text, expected):
    assert styled(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "2 * 3 * 4",
        "2*3*4 and f(x)*g(x)*h(x)",
        "x**2 + y**2, x**n + y**n",
        "snake_case_name, _private_name, __init__ and __all__",
        "*args and **kwargs",
        "a lone ` backtick, and ``` three",
        r"$a_b$, \(x_1\), \[ a^* b^* \], \sum_{i}_{j}",
        "[1] and arr[0](x y) and [a [b] c](u)",
        "* \n*",
        "#hashtag, #! and ####### seven",
        "1.5 and 2024.",
        "-5 and --flag",
        "**never closed",
        "~5 and ~~6",
        "`never closed",
        "|x| is a norm",
        "5 > 3 < 7 & <b>html</b> [b]markup[/b]",
        "**" + "long " * 40 + "**",
        "C:\\dir\\file \\",
        "# ",
        "\u05e9\u05dc\u05d5\u05dd e\u0301 👩‍👩‍👧 हिन्दी",
    ],
)
def test_what_is_no_markup_is_shown_as_it_is(text):
    assert plain(text).removesuffix("\n").replace("# ", "") == text.replace("# ", "")


def test_without_colour_the_text_stays_as_it_is():
    text = "# A\n\n**b** `c` [d](e) \\*\n\n- x\n> y\n\n---\n```py\ndef f(): ...\n```\n"
    assert shown(text, color=False) == text


def test_control_characters_are_shown_escaped():
    assert plain("a\x1b[2Jb\rc\x07\x9b\u202e`\x1b]8;;u`") == ("a\\x1b[2Jb\\x0dc\\x07\\x9b\\u202e\\x1b]8;;u\n")


def test_line_ends_of_two_characters_are_line_ends_also_when_cut_between():
    assert shown("a\r", "\nb\r\n") == "a\nb\n"
    assert shown("a\r") == "a\\x0d\n"


def test_words_are_shown_as_they_come():
    written = []
    stream = MarkdownStream(written.append, width=lambda: 80, color=True)
    for piece, expected in [
        ("Hello", "Hello"),
        (" wor", " wor"),
        ("ld **b", "ld "),
        ("old**", ""),
        (".", "\x1b[1mbold\x1b[0m."),
    ]:
        written.clear()
        stream.write(piece)
        assert "".join(written) == expected


def test_a_marker_is_held_back_for_a_few_words_only():
    written = []
    stream = MarkdownStream(written.append, width=lambda: 80, color=True)
    stream.write("**" + "word " * 40)
    assert len("".join(written)) > 100


PYTHON = '```python\ndef f(x):\n    """Two\n    lines."""\n    return 12  # why\n```\n'


def test_code_is_highlighted_by_its_language():
    assert styled(PYTHON).splitlines() == [
        "<2>```python<0>",
        "<35>def<0> <1>f<0>(x):",
        '    <32>"""Two<0>',
        '<32>    lines."""<0>',
        "    <35>return<0> <36>12<0>  <2># why<0>",
        "<2>```<0>",
    ]


def test_a_comment_of_several_lines_is_one_before_its_end_has_come():
    assert "<2>/* one<0>\n<2>two<0>\n" in styled("```js\n/* one\ntwo\n*/\n```")


def test_markup_in_code_is_text():
    code = "```\n# a **b** `c`\n| d |\n|---|\n- x\n> y\n``\n```\n"
    assert plain(code) == code


LANGUAGES = ["python", "js", "c", "html", "yaml", "bash", "diff", "json", "php", "none", ""]
LANGUAGES += ["rconsole", "fortranfixed"]  # Pygments drops or doubles some of the text


@pytest.mark.parametrize("language", LANGUAGES)
def test_code_of_any_language_keeps_its_text(language):
    source = "int main() { /* a */ return 'x'; }\n\n  <p class=\"b\">&amp;</p>\n\n- a: [1, 2]\n+ b\n"
    source += '\t$x = "\n>>> print(1)\ndef f(x):\n'
    code = f"```{language}\n{source * 30}```\n"
    assert plain(code) == code


def test_code_in_quotes_and_items_ends_where_it_does():
    quoted = "> ```py\n> x = 1\n> ```\n> *a*\n\n> ```\n> y\n*b*\n"
    assert plain(quoted) == quoted.replace("*", "")
    item = "1. a\n\n   ```py\n   x = 1\n   ```\n\n   *b*\n"
    assert plain(item) == item.replace("*", "")


def test_indented_code_is_text_but_not_in_a_list():
    assert plain("a:\n\n    x = a *b* c\n    y\n\nb *c*\n") == "a:\n\n    x = a *b* c\n    y\n\nb c\n"
    assert plain("- a\n\n    b *c*\n") == "- a\n\n    b c\n"


def test_a_fence_that_is_never_closed_loses_nothing():
    assert plain("```py\nx = 1\ny") == "```py\nx = 1\ny\n"


TABLE = (
    "| Name | Größe | 数量 |\n|:-----|:---:|---:|\n| `a` | **b** | 1 |\n| 漢字 | 👩‍👩‍👧 | 12345 |\n| \\| |\n"
)


def test_a_table_is_aligned_by_what_its_cells_take():
    assert plain(TABLE).splitlines() == [
        "Name | Größe |  数量",
        ":--- | :---: | ----:",
        "a    |   b   |     1",
        "漢字 |  👩‍👩‍👧   | 12345",
        "|    |       |",
    ]


def test_a_table_that_is_too_wide_is_shown_a_cell_a_line():
    text = f"| Name | Text |\n|---|---|\n| a | {'long ' * 20}|\n| b | c | d |\n"
    long = ("long " * 20).strip()
    assert plain(text, width=80) == f"Name: a\nText: {long}\n\nName: b\nText: c\n: d\n"


def test_while_a_table_comes_its_rows_are_counted_in_one_short_line():
    written = []
    stream = MarkdownStream(written.append, width=lambda: 80, color=True)
    stream.write("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 ")
    held = "".join(written)
    assert held.endswith("\r\x1b[K\x1b[2m(table: row 1)\x1b[0m") and "\n" not in held
    stream.write("| 4 |\n\nafter")
    stream.close()
    assert "".join(written).startswith(held + "\r\x1b[K\x1b[2m(table: row 2)\x1b[0m\r\x1b[K\x1b[1ma")
    assert SGR.sub("", STATUS.sub("", "".join(written))) == "a   | b\n--- | ---\n1   | 2\n3   | 4\n\nafter\n"


def test_rows_without_a_delimiter_are_text():
    assert plain("| a | *b* |\nc\n| d\n| e |\n") == "| a | b |\nc\n| d\n| e |\n"


ANSWER = PYTHON + "\nSome **bold** words and `code`, and more of it.\n\n" * 8 + "- item\n" * 8 + TABLE + "\n"


@pytest.mark.parametrize(
    "part", [ANSWER, "words ", "*a ", "*", "`a", "[a", "[\\", "> ", "| ", "**漢", "x\r", "- "], ids=ascii
)
def test_an_answer_of_100_kb_letter_by_letter_costs_a_second_or_two(part):
    answer = (part * 100_000)[:100_000]
    stream = MarkdownStream(lambda text: None, width=lambda: 80, color=True)
    start = time.process_time()
    for letter in answer:
        stream.write(letter)
    stream.close()
    assert (
        time.process_time() - start < 3.0
    )  # 0.1 to 1.1 where it was written; what is quadratic takes minutes


LONG_BLOCKS = {
    "python": [
        'def f():\n    """First.\n',
        "    if it is: a line of {words} for 1\n",
        '    """\n    return 1\n',
    ],
    "c": ["/* First.\n", " * if it is a line of words for 1\n", " */\nint f(void) { return 1; }\n"],
    "js": ["const a = 1;\n", "const b = {c: `d ${e} f`, g: 1}; // h\n", "const i = 1;\n"],
}


@pytest.mark.parametrize("language", LONG_BLOCKS)
def test_a_long_string_comment_or_block_without_blank_lines_is_highlighted_as_in_one_piece_and_quickly(
    language,
):
    first, line, last = LONG_BLOCKS[language]
    text = first + 400 * line + last
    highlighter = highlighter_for(language)
    lexer, n_read = highlighter._lexer, []

    class Counting:
        def get_tokens_unprocessed(self, read):
            n_read.append(len(read))
            return lexer.get_tokens_unprocessed(read)

    highlighter._lexer = Counting()
    shown = [piece for one in text.splitlines() for piece in highlighter.read_line(one)]
    whole = [(value, _style_of(kind)) for _, kind, value in lexer.get_tokens_unprocessed(text)]
    assert letters(shown) == letters(whole)
    assert sum(n_read) < 10 * len(text)


def letters(pieces):
    return [(letter, style) for text, style in pieces for letter in text if not letter.isspace()]
