"""Which answers stay."""

import pytest

from potstill.compress.api_answers import final_answer, is_right, judge_prompt, majority, normal, verdict


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,200.0", "1200"), ("$1,200.50", "2401/2"), ("50\\%", "50"), ("−3", "-3"), ("\\frac{2}{4}", "1/2"),
        ("2/4", "1/2"),
        (".5", "1/2"), ("1/0", "1/0"), ("(B)", "b"), ("  **Paris.** ", "paris"),
        ("\\text{Paris}", "paris"), ("New  York", "new york"), ("1e999999999", "1e999999999"),
        ("3,14", "3,14"), ("", ""),
    ],
)  # fmt: skip
def test_the_same_answer_is_the_same_text(text: str, found: str) -> None:
    assert normal(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6 and 7, so \\boxed{42}.", "42"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{never closed 5", "5"),
        ("48/2 = 24\n48+24 = 72\n#### 72", "72"),
        ("The answer is 12 apples, and not 13.", "12"),
        ("Answer: **Paris**.", "paris"),
        ("First 3, then 4.", "4"),
        ("version v2", "version v2"),
        ("No number here.", "no number here"),
    ],
)
def test_what_a_text_ends_up_with(text: str, found: str) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It takes 3 + 4 = 7 days", "7", True),
        ("It takes 7 days, not 8", "7", False),
        ("7.0", "7", True),
        ("\\boxed{8}, and 7", "7", False),
        ("The answer is 2 March 2020", "2 March 2020", True),
        ("the answer is (B)", "B", True),
        ("Paris", "paris.", True),
        ("It is Paris", "Paris", False),
    ],
)
def test_an_answer_is_right_by_what_it_ends_up_with(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


def test_a_majority_is_more_than_half_of_all_samples() -> None:
    assert majority(["it is 4", "4.0", "5"], 3) == "4"
    assert majority(["4", "4", "5", "5"], 4) is None
    assert majority(["4", "4", None, None], 4) is None
    assert majority([None, None, None], 3) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", True), ("**Yes**, it is; no faults.", True), ("No.", False), ("It is right: yes", True), ("Well", None),
        ("I say yes and no", None), ("not good, nothing is known", None), ("", None),
    ],
)  # fmt: skip
def test_a_judge_says_yes_or_no(text: str, said: bool | None) -> None:
    assert verdict(text) is said


def test_a_judge_sees_the_task_the_answer_and_the_reference() -> None:
    asked = judge_prompt("Add {2} and 2", "{4}", "4")
    assert "[Task]\nAdd {2} and 2\n" in asked
    assert "[Answer]\n{4}\n" in asked
    assert "[Reference answer]\n4\n" in asked
    assert "Reference" not in judge_prompt("a", "b", None)
