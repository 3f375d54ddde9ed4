"""Rows of text: what is read of a line, what is no row, and what counts as a word."""

import io
import json

import pytest

from potstill.compress.data_rows import line_at, lines, normal, parse, parse_judging, words


def test_a_row_has_what_is_learned_and_what_it_answers() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {}}]},
    ]
    row = parse(json.dumps({"messages": messages, "text": "Me.", "reasoning": "Hm.", "finish_reason": "stop"}).encode())
    assert (row.prompt.strip(), row.text, row.reasoning, row.finish_reason) == ("Who?", "Me.", "Hm.", "stop")
    assert row.written == "Hm.\nMe."
    named = parse(b'{"answer": "Me.", "question": "Who?", "reasoning": null}', {"text": "answer", "prompt": "question"})
    assert (named.prompt, named.written, named.finish_reason) == ("Who?", "Me.", None)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut o', "is no JSON \\(Unterminated string"),
        (b"\xff\xfe", "is no JSON"),
        (b'["a"]', "is a list, expected an object"),
        (b'{"txt": "a"}', "has no 'text'"),
        (b'{"text": 3}', "has 'text' as a number, expected a text"),
        (b'{"text": null}', "has an empty 'text'"),
        (b'{"text": " \\n"}', "has an empty 'text'"),
        (b'{"text": "a", "prompt": ["b"]}', "has 'prompt' as a list, expected a text"),
        (b'{"text": "a", "messages": ["b"]}', "has 'messages' that are no list of objects with 'role' and 'content'"),
        (b'{"text": "a", "messages": [{"role": "user"}]}', "has 'messages' that are no list"),
    ],
)
def test_what_is_no_row_says_why(line: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(line)


def test_of_choices_the_right_one_is_the_text() -> None:
    row = parse_judging(b'{"prompt": "Two and two?", "choices": ["3", "4"], "answer": 1}')
    assert (row.prompt, row.text) == ("Two and two?", "4")
    assert parse_judging(b'{"text": "a"}').text == "a"
    for line in (b'{"choices": ["a"], "answer": 1}', b'{"choices": ["a"]}', b'{"choices": "a", "answer": 0}'):
        with pytest.raises(ValueError, match="has 'choices' without the number of one of them, from 0, as 'answer'"):
            parse_judging(line)


def test_lines_know_their_number_and_place() -> None:
    file = io.BytesIO(b'{"a": 1}\n\n  \r\n{"b": 2}\r\n{"c": 3}')
    found = list(lines(file))
    assert [number for number, _, _ in found] == [1, 4, 5]
    assert [line_at(file, place) for _, place, _ in found] == [line for _, _, line in found]


def test_forms_of_unicode_and_space_are_one() -> None:
    assert normal(" Cafe\u0301\u00a0au\n\nlait\t") == "Café au lait"
    assert normal("x²") != normal("x2")


def test_words_of_scripts_without_spaces_are_letters() -> None:
    assert words("The FILM, the film: Cafe\u0301!") == ["the", "film", "the", "film", "café"]
    assert words("我是GPT-4。") == ["我", "是", "gpt", "4"]
