"""Speed and memory of the operators beside their peers: ``python -m benchmarks --help``.

harness.py   what a case, a variant and a row are
runner.py    checks variants and times them, interleaved
memory.py    peak extra memory, in a process of its own
heads.py     the operators over the language-model head; head_peers.py: the other formulations
segments.py  segment operators and discounted returns
attention.py attention of a packed batch alone
packing.py   packed against padded scoring on GSM8K-like lengths
step.py      a whole AIRL step; step_peers.py: padded and unfused; step_inputs.py: what both train
sampling.py  sampling, timed apart
language.py  models and traces of these four; padded.py: the padded rectangle
truth.py     float64 results that the timed outputs are checked against
suite.py     which cases exist, at which shapes; runs them
report.py    JSON, Markdown, and plots

No speed is printed for a result that is wrong.
"""
