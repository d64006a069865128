"""Final answers in free text: finding them, comparing them, and making one number wrong."""

import random
import re

from airl_fast.tasks.base import other_digit, split_steps

# A number that stands alone: with thousands separators or not, then no further digit, be it
# straight or after a sign of arithmetic: "3/4", "12,34" and "3 + 4" are no single number.
_NUMBER = re.compile(
    r"(?P<sign>[-−+]?)\s*\\?[$€£]?\s*(?P<inner>[-−]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.(?P<part>[0-9]+))?"
    r"(?!\s*[/:*x×÷^+=−-]?\s*[0-9])(?!\.[0-9]|,\s*[0-9]|[eE][+-]?[0-9])"
)
_DECORATION = " \t\r\n*_`\"'()[]{}\\$:"
_HASHES = re.compile(r"^[ \t]*####[ \t]*(.*)$", re.MULTILINE)
_OPEN, _CLOSE = "<answer>", "</answer>"
_PHRASE = re.compile(  # greedy: a line's last one; from its start, or a long line takes n^2 steps
    r"^.*\banswer is:?\s*(.*)", re.IGNORECASE | re.MULTILINE
)


def find_answer(text: str) -> str | None:
    r"""Return the text of the final answer, or None.

    The forms, in the order in which they are looked for: the first ``#### 72`` line (it ends a
    solution, what follows it is not part of it), the last ``<answer>72</answer>``, the last
    ``\boxed{72}``, the last ``the answer is 72``.
    """
    hashes = _HASHES.search(text)
    if hashes:
        return hashes[1].strip()
    tagged = _last_tagged(text)
    if tagged is not None:
        return tagged.strip()
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    phrases = _PHRASE.findall(text)
    return str(phrases[-1]).strip() if phrases else None


def last_boxed(text: str) -> str | None:
    r"""Return what the last complete ``\boxed{...}`` holds; braces may nest."""
    opener = r"\boxed{"
    open_braces: list[int] = []
    last: tuple[int, int] | None = None
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif open_braces:
            begin = open_braces.pop() + 1
            boxed = text.startswith(opener, begin - len(opener)) if begin >= len(opener) else False
            if boxed and (last is None or begin > last[0]):
                last = begin, brace.start()
    return None if last is None else text[last[0] : last[1]]


def _last_tagged(text: str) -> str | None:
    """What the last ``<answer>...</answer>`` holds."""
    found, start = None, text.find(_OPEN)
    while start >= 0 and (end := text.find(_CLOSE, start)) >= 0:
        found = text[start + len(_OPEN) : end]
        start = text.find(_OPEN, end)
    return found


def parse_number(text: str) -> str | None:
    """Return the number that a text begins with, in one canonical form, or None.

    Currency signs, percent signs, thousands separators, units, emphasis and a final full stop are
    no part of it: ``$1,200.50.`` and ``1200.5 dollars`` both give ``1200.5``. A fraction, a sum
    or a malformed number gives None. Exact at any length: digits are never rounded.
    """
    match = _NUMBER.match(text.lstrip(_DECORATION))
    if match is None or (match["sign"] and match["inner"]):
        return None
    whole = match["whole"].replace(",", "").lstrip("0") or "0"
    part = (match["part"] or "").rstrip("0")
    number = f"{whole}.{part}" if part else whole
    negative = (match["sign"] or match["inner"]) in ("-", "−") and number != "0"
    return f"-{number}" if negative else number


def canonical(answer: str) -> str:
    """Return a comparable form: the number, if the answer is one, else the plain words.

    Words are compared without case, emphasis, outer brackets, a final full stop or extra spaces.
    """
    plain = " ".join(answer.split()).rstrip(".").strip(_DECORATION).rstrip(".").casefold()
    bare = plain.rstrip("%").rstrip(" \\")
    match = _NUMBER.match(bare)
    number = parse_number(bare)
    return number if number is not None and match and match.end() == len(bare) else plain


def same_answer(found: str, answer: str) -> bool:
    """Say whether a found answer is the true one; beside a true number, units do not count."""
    true = canonical(answer)
    return canonical(found) == true or (parse_number(true) == true and parse_number(found) == true)


def wrong_number(text: str, boundary: str, rng: random.Random) -> tuple[str, int]:
    r"""Change one number in one step of a free text.

    The number is the step's result (the first one after its last ``=``) where it has one,
    otherwise any of its numbers. The closing ``#### 72`` line is changed only if no other step
    has a number, and a calculator mark ``<<48/2=24>>24`` changes with its result. Later steps
    stay as they are.

    Args:
        text: the completion.
        boundary: regex; a step ends where a match of it ends.
        rng: draws the step, the number and the digit.

    Returns:
        The changed text and the 0-based index of the changed step.

    Raises:
        ValueError: the text has no digit.
    """
    steps = split_steps(text, boundary)
    numbered = [i for i, step in enumerate(steps) if re.search(r"[0-9]", step)]
    if not numbered:
        raise ValueError(f"no number to make wrong in {text[:80]!r}")
    inner = [i for i in numbered if not steps[i].lstrip().startswith("####")]
    i = rng.choice(inner or numbered)
    steps[i] = _wrong_step(steps[i], rng)
    return "".join(steps), i


def _wrong_step(step: str, rng: random.Random) -> str:
    spoken = list(re.finditer(r"[0-9][0-9,.]*(?<![,.])", _blank_marks(step)))
    if not spoken:  # every number is inside a mark
        spoken = list(re.finditer(r"[0-9]+", step))
    equals = max(step.rfind("="), step.rfind(">>"))
    results = [match for match in spoken if 0 <= equals < match.start()]
    number = results[0] if results else rng.choice(spoken)
    start, end = number.span()
    place = rng.choice([i for i in range(start, end) if step[i].isdigit()])
    changed = other_digit(step, place, rng)
    mark = f"={step[start:end]}>>"  # the calculator's copy, straight before
    if step[:start].endswith(mark):
        head = step[:start].removesuffix(mark)
        changed = head + f"={changed[start:end]}>>" + changed[start:]
    return changed


def _blank_marks(step: str) -> str:
    """Return the step with calculator marks blanked out, at the same length."""
    return re.sub(r"<<[^<>]*>>", lambda mark: " " * len(mark[0]), step)
