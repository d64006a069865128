"""Traces for the tests of the report."""

from airl_fast.report import Piece, StepView, TraceView

HOSTILE = "</script><script>alert('1')</script> & \"quoted\" \0 \u202e \ud800 <!-- 😀"


def trace_of(*texts, title="trace", prompt="p", f=None, **options):
    """A trace of steps without tokens, whose f fall from 0."""
    f = f if f is not None else [-float(i) for i in range(len(texts))]
    steps = [StepView(text=t, values={"f": v}) for t, v in zip(texts, f, strict=True)]
    return TraceView(title=title, prompt=prompt, steps=steps, values={"f": sum(f)}, **options)


def full_trace(rng, title, *, steps=4, width=3, **options):
    """A trace with tokens and all three measures, drawn from ``rng`` (``random.Random``)."""
    made = []
    for i in range(steps):
        words = [f"{rng.randint(10, 99)} " for _ in range(width - 1)]
        words.append("\n" if i + 1 < steps else "")  # the last token is end of text
        tokens = [Piece(text=word, values=_values(rng)) for word in words]
        made.append(StepView(text="".join(words), values=_values(rng), tokens=tokens))
    values = {m: sum(step.values[m] for step in made) for m in ("f", "logp", "reward")}
    return TraceView(title=title, steps=made, values=values, **options)


def _values(rng):
    f, logp = rng.gauss(-1, 2), -rng.expovariate(1)
    return {"f": f, "logp": logp, "reward": f - logp}
