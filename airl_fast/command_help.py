"""What ``airl-fast COMMAND --help`` says below the options, by command."""

DEMO = """\
Trains on chained additions with imperfect experts: no network, no GPU, five to ten minutes on
two cores. Prints how the learned reward and policy compare with SFT and with the true outcome.

example:
  airl-fast demo --output-dir runs/demo
"""
STUDY = """\
A study's file names warm starts and variants of a recipe; every variant is trained from every
seed's warm start, measured, and its reward used. Says first how long it will take. Stopped or
interrupted, the same command goes on: finished cells are kept, a run goes on from its checkpoint. A
cell that fails is named at the end (exit status 1) and is run again the next time. DIR gets
results.json, results.md and report.html. docs/studies/README.md explains the file.

examples:
  airl-fast study
  airl-fast study arithmetic-grid --jobs 2 --output-dir runs/grid --page docs/studies/grid.md
"""
TRAIN = """\
An interrupted run goes on from its last checkpoint when the same command is given again. SIGTERM
and Ctrl-C finish the step and save it first; Ctrl-C twice stops at once. The run's folder gets
policy/, reward/, metrics.jsonl and config.yaml.

examples:
  airl-fast train arithmetic run.output_dir=runs/first run.steps=20
  airl-fast train my.yaml algorithm.granularity=sparse 'policy.betas=[0.9, 0.95]'
"""
EXPORT = """\
Writes policy/ and reward/ as they were at a checkpoint, for every command that takes the folder of
a finished run. The best has the highest pass@1 on the validation problems (run.eval_every) after
the warm starts; best.json in DIR names its step. The run may still be going on.

examples:
  airl-fast export runs/a && airl-fast score runs/a/best traces.jsonl
  airl-fast export runs/a --checkpoint last --output early
"""
INPUTS = """\
A prompt is a text, a list of messages or a list of token ids; so is a completion, which may also
be a list of texts, one a step."""
SCORE = f"""\
A line: {{"prompt": "2+3=", "completion": "2+3=5;#5."}}. {INPUTS} One line comes out for each, in
order: f and the AIRL reward (f - log pi) of the sequence, of every step and of every token, with
character offsets into "text". "id" is passed on.

example:
  airl-fast score runs/demo traces.jsonl --output scores.jsonl
"""
RERANK = f"""\
A line: {{"prompt": "2+3=", "completions": ["2+3=5;#5.", "2+3=6;#6."]}}. {INPUTS} One line
comes out for each, in order: "order" (indices of the completions, best first), their "scores" in
that order, and the "answer" of the winner. "id" is passed on. --method weighted adds up softmax
weights per answer, majority counts answers and lets the reward decide ties; both give every
answer's "weight" in "votes". Answers are read as in the task that the reward was trained for,
unless the line has "answers" (texts or null, one for each completion).

examples:
  airl-fast rerank runs/demo samples.jsonl --output ranked.jsonl
  airl-fast rerank runs/demo samples.jsonl --method majority
"""
LOCATE = f"""\
A line: {{"prompt": "2+3=", "completion": "2+3=5;#5."}} or {{"problem": "2+3=", "steps": ["2+3=5;",
"#5."]}} (as in ProcessBench; joined by newlines where a step does not end as the reward was
trained). {INPUTS} One line comes out for each, in order: the 0-based "step", its text and
offsets, all steps' scores, the "lowest", and its margin to the second lowest. "id" and "label" are
passed on. After `airl-fast calibrate`, "step" is null where no step deviates, and "confidence" is
the probability that "step" is right; before it, "step" is the lowest and "confidence" null.

example:
  airl-fast locate runs/demo traces.jsonl --output steps.jsonl
"""
EVAL = """\
Judged traces come in one of three formats:
  jsonl         {"prompt": ..., "completions": ["...", "..."], "correct": [true, false]}, with
                "answers" to vote on (else read from the texts); or {"prompt": ..., "steps":
                ["...", "..."], "label": 1}: the first wrong step, from 0, or -1
  processbench  its rows, as JSON lines or a JSON array
  prm800k       its rows: the first chosen step rated -1 is the error
What a format's rules leave out is counted. Written are metrics.json, metrics.md and plots:
best-of-n curves, AUC, first-error localisation, calibration, length and format bias, beside a
random pick, the majority, log pi (sum and mean) and an oracle.

examples:
  airl-fast eval runs/demo judged.jsonl
  airl-fast eval runs/gsm8k gsm8k.json --format processbench --max-tokens 2048
"""
SERVE = """\
Speaks POST /score (all that `airl-fast score` writes), OpenRLHF's /get_reward, vLLM's /pooling and
/classify; GET /health and /metrics (Prometheus). Needs the serve extra. A token is required on any
address that other machines can reach. SIGTERM finishes what has been asked and exits with 0.
docs/serving.md has the requests and answers.

example:
  airl-fast serve runs/demo --port 8000
"""
REPORT = """\
One HTML file that holds everything it shows: learning curves, distributions of rewards, results
of an evaluation, and a viewer that colours traces by reward. Files of traces go together line for
line; a line may also say "correct", "label" (as in ProcessBench), "group", "source" and "title".

example:
  airl-fast score runs/arithmetic traces.jsonl --output scores.jsonl
  airl-fast locate runs/arithmetic traces.jsonl --output steps.jsonl
  airl-fast report runs/arithmetic --scores scores.jsonl --traces traces.jsonl \\
      --located steps.jsonl
"""
CALIBRATE = """\
Lines as of `airl-fast locate`, with "label": the 0-based first wrong step, or -1 for none (as in
ProcessBench); ten or more of each kind. Chooses the threshold of the highest ProcessBench F1, fits
the confidence, judges both by cross-validation, and writes reward/calibration.json, which score
and locate read from then on.

example:
  airl-fast calibrate runs/demo labelled.jsonl
"""
DOCTOR = """\
Prints versions, devices, the backend of every operator and why, and what each missing extra
would add. The exit status is 1 if something is broken.

example:
  airl-fast doctor
"""
RECIPES = """\
example:
  airl-fast recipes
"""
