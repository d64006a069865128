r"""Multiple choice: options as text, and the letter that a free text settles on."""

import random
import re
from collections.abc import Sequence

from airl_fast.tasks.answers import last_boxed, wrong_number
from airl_fast.tasks.base import Example, Message, Prompt, split_steps

INSTRUCTION = (
    "Reason step by step. End with 'The answer is (X).', where X is the letter of the right option."
)
PLAIN = "Question: {question}\n{options}\nAnswer:\n"
LETTERS = "ABCDEFGHIJ"
# A sentence's end, or a line's; not the dot of a list's number. What follows opens the next step.
SENTENCES = r"(?m:(?<!^\d)(?<!^\d\d)[.!?](?=\s)|(?<![.!?\s])\n)"

# A letter that stands alone: bracketed, or bare before punctuation or the end of its line.
_LETTER = re.compile(
    r"[\s*_\"'$]*(?:option|choice)?[\s*_\"'$]*"
    r"(?:\\text\{)?(?:[(\[]\s*(?P<inside>[A-J])\s*[)\]]|(?P<bare>[A-J])(?=[\s*_\"'$}]*(?:[.,;:)]|$)))",
    re.IGNORECASE | re.MULTILINE,
)
_SECOND = re.compile(r"[\s*_\"'$]*(?:,|or|and|/|&)\s*[*_\"'$]*(?:\(\s*[A-J]\s*\)|[A-J]\b)")
_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PHRASE = re.compile(r"\banswer(?:\s+is)?\s*(?::|(?<=is))\s*(?=(.*))", re.IGNORECASE)
_NEXT_QUESTION = re.compile(r"(?:^|\n)[ \t]*Question:")


class MultipleChoice:
    """What tasks of lettered options share; ``chat`` asks for prompts as one user message."""

    step_boundary = SENTENCES
    chat: bool

    def prompt(self, question: str, options: Sequence[str]) -> Prompt:
        """Put a question as this task puts its own."""
        listed = format_options(options)
        if self.chat:
            return (Message(role="user", content=f"{question}\n{listed}\n\n{INSTRUCTION}"),)
        return PLAIN.format(question=question, options=listed)

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        """Return the letter of the final answer, or None; see ``find_choice``."""
        return find_choice(own_text(completion))

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the completion's final letter is the example's."""
        if example.answer is None:
            raise ValueError(f"example {example.id!r} has no answer to compare with")
        return self.extract_answer(completion) == example.answer

    def corrupt(self, completion: str, rng: random.Random) -> tuple[str, int]:
        """Make a number or the final letter wrong; return the text and the 0-based sentence.

        Raises:
            ValueError: the text has neither.
        """
        return wrong_choice(completion, self.step_boundary, rng)


def own_text(response: str) -> str:
    """Return a response up to the next ``Question:`` line, which base models go on to invent."""
    found = _NEXT_QUESTION.search(response)
    return (response[: found.start()] if found else response).strip()


def format_options(options: Sequence[str]) -> str:
    """Return the options a line each, ``A. ...`` first."""
    return "\n".join(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))


def find_choice(text: str, options: int = len(LETTERS)) -> str | None:
    r"""Return the letter of the final answer, or None where none can be read for certain.

    The forms, in the order in which they are looked for: the last ``\boxed{C}``, the last
    ``<answer>C</answer>``, the last ``the answer is (C)`` or ``Answer: C``, and a text that is
    nothing but a letter. A form that is there and holds no single letter gives None: ``the answer
    is (A) or (C)`` is no answer, and neither is a letter beyond the options.

    Args:
        text: a completion.
        options: how many there are.
    """
    boxed = last_boxed(text)
    tags = _TAGS.findall(text)
    phrases = _PHRASE.findall(text)
    if boxed is not None:
        candidate = boxed
    elif tags:
        candidate = tags[-1]
    elif phrases:
        candidate = phrases[-1]
    elif len(text.strip()) <= 4:
        candidate = text
    else:
        return None
    match = _LETTER.match(candidate.strip())
    if match is None or _SECOND.match(candidate.strip(), match.end()):
        return None
    letter = (match["inside"] or match["bare"]).upper()
    return letter if letter in LETTERS[:options] else None


def wrong_choice(text: str, boundary: str, rng: random.Random) -> tuple[str, int]:
    """Make one step wrong: a number in it, or the final letter.

    Each is taken half of the time where the text has both. The wrong letter is one of A, B and C,
    which every question has.

    Returns:
        The changed text and the 0-based index of the changed step.

    Raises:
        ValueError: the text has neither a digit nor a final letter.
    """
    steps = split_steps(text, boundary)
    lettered = [i for i, step in enumerate(steps) if find_choice(step) is not None]
    numbered = any(character in "0123456789" for character in text)
    if lettered and (not numbered or rng.random() < 0.5):
        i = lettered[-1]
        start, end, letter = _letter_place(steps[i])
        other = rng.choice([one for one in "ABC" if one != letter])
        steps[i] = steps[i][:start] + other + steps[i][end:]
        return "".join(steps), i
    if numbered:
        return wrong_number(text, boundary, rng)
    raise ValueError(f"neither a number nor a final letter to make wrong in {text[:80]!r}")


def _letter_place(step: str) -> tuple[int, int, str]:
    """Return where the letter of the step's answer is, and the letter."""
    letter = find_choice(step)
    places = list(re.finditer(rf"(?<![A-Za-z]){letter}(?![A-Za-z])", step, re.IGNORECASE))
    place = places[-1]
    return place.start(), place.end(), str(letter)
