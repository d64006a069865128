"""A trained reward, used: score traces, rank them, find their weakest step.

f is the discriminator's energy, free of the policy; the AIRL reward is f - log pi (Fu et al.
2018, arXiv 1710.11248). Rank and locate with f: -log pi is large exactly where a token is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import get_args

import torch

from airl_fast.alignment import Aligner
from airl_fast.calibration import Calibration
from airl_fast.discriminator import Discriminator
from airl_fast.encoding import Completion, EncodedPair, PairEncoder, Prompt
from airl_fast.language_model import LanguageModel
from airl_fast.loading_checks import known_device
from airl_fast.policy import Policy
from airl_fast.ranking import (
    AnswerReader,
    Method,
    Ranking,
    check_method,
    rank,
    task_reader,
)
from airl_fast.reading import Passes, Reader, Reading
from airl_fast.results import columns, result
from airl_fast.reward_folder import read_calibration, read_trained, reward_folder
from airl_fast.scores import By, Location, Scored, Trained, locate_step
from airl_fast.spans import span_rule
from airl_fast.tasks import TASKS


class RewardScorer:
    """Scores completions with a trained reward, in eval mode and without gradients.

    A value of several tokens: with an ``lm`` head, the sum (or mean, as trained) of its tokens'
    values; with a ``score`` head, f is read at its last token.

    A policy with another tokenizer meets the reward at the ends of steps (alignment.py): steps and
    the whole have a ``reward``, tokens have none.

    Args:
        discriminator: gives f.
        trained: what it was trained for.
        policy: gives log pi; without one there is no ``reward``.
        calibration: what ``locate`` decides by.
        passes: "packed", as many pairs a pass as the token budget holds; or "alone", each prompt
            and each completion in a pass of its own. None is "packed", but on a CPU whose matrix
            products do not allow exact packed passes (reading.py) "alone".
        token_budget: tokens of a packed pass; None is 16,384, on a CPU 2,048 or the longest pair
            where that is longer.
        merge_steps: with a policy of another tokenizer, join a step whose end one of the two
            lacks with the next one, instead of refusing the completion.

    Raises:
        ValueError: the discriminator reads the policy's states and there is none; the policy has
            another tokenizer and the reward was trained on spans that it does not have.

    Attributes:
        passes, token_budget: as chosen.
        invariant: the bits of a score do not depend on what is scored with it, nor on the order;
            otherwise equal up to rounding.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        trained: Trained,
        *,
        policy: LanguageModel | None = None,
        calibration: Calibration | None = None,
        passes: Passes | None = None,
        token_budget: int | None = None,
        merge_steps: bool = False,
    ) -> None:
        body = discriminator.body or policy
        if body is None:
            raise ValueError(
                "this discriminator (trunk='policy') reads f from the policy's hidden states: "
                "pass policy= (--policy), such as DIR/policy of the run that trained it"
            )
        if passes not in (None, *get_args(Passes)):
            raise ValueError(f"expected passes='alone' or 'packed', received {passes!r}")
        if token_budget is not None and token_budget < 1:
            raise ValueError(
                f"expected a token_budget of 1 or more, received {token_budget}: leave it out, or "
                "raise it"
            )
        self.discriminator = discriminator.eval()
        self.policy = policy if policy is None else policy.eval()
        self.trained = trained
        self.calibration = calibration
        self.tokenizer = body.tokenizer
        self._body = body
        self._encoder = _encoder(body, trained)
        self._aligner = None
        if policy is not None and policy.tokenizer.get_vocab() != body.tokenizer.get_vocab():
            self._aligner = _aligner(self._encoder, policy, trained, merge_steps)
        self._rule = span_rule(
            trained.granularity,
            interval=trained.interval,
            boundary=trained.boundary,
            tokenizer=self.tokenizer,
        )
        self._reader = Reader(
            discriminator,
            policy,
            temperature=trained.temperature,
            passes=passes,
            token_budget=token_budget,
        )
        self.passes, self.invariant = self._reader.passes, self._reader.invariant
        self.token_budget = self._reader.token_budget

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        policy: Policy | str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        passes: Passes | None = None,
        token_budget: int | None = None,
        merge_steps: bool = False,
    ) -> RewardScorer:
        """Load a run's reward (DIR/reward, with DIR/policy where present), or a reward alone.

        Args:
            directory: a run's folder, or the reward folder in it; the latter has no policy.
            policy: a policy, or its hub name or folder, instead of the run's own.
            dtype: of the weights, such as torch.bfloat16 for a GPU; None: as they were saved. A
                policy that is given as an object stays as it is.
            device: where the models go.
            passes: as the constructor; so are the other two.
            token_budget: of a packed pass.
            merge_steps: join steps that the policy's tokenizer does not end.

        Raises:
            ValueError: no trained reward there, or one that needs a policy and has none.
        """
        directory, device = Path(directory), known_device(device)
        reward = reward_folder(directory)
        trained = read_trained(reward)
        if policy is None and reward != directory and (directory / "policy").is_dir():
            policy = directory / "policy"
        if isinstance(policy, (str, Path)):
            policy = Policy.from_pretrained(policy, dtype=dtype)
        return cls(
            Discriminator.from_pretrained(reward, dtype=dtype, device=device),
            trained,
            policy=policy if policy is None else policy.to(device),
            calibration=read_calibration(reward),
            passes=passes,
            token_budget=token_budget,
            merge_steps=merge_steps,
        )

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        end_of_text: bool = True,
    ) -> list[Scored]:
        """Score completions, one of each prompt.

        Args:
            prompts: each a text, a list of ``{"role", "content"}`` messages, or token ids.
            completions: each a text, a list of texts (its steps), one assistant message, or
                token ids, which are taken as they are.
            end_of_text: append the end-of-text token, as training does; False for completions
                that are not finished.

        Raises:
            ValueError: unequal numbers, an empty or unknown input, a text that the tokenizer
                cannot represent, or one longer than the model's context.
        """
        for name, value in (("prompts", prompts), ("completions", completions)):
            if isinstance(value, str):
                raise ValueError(f"expected {name} as a list, received a text: pass [{name}]")
        if len(prompts) != len(completions):
            raise ValueError(
                f"expected as many completions as prompts, received {len(completions)} for "
                f"{len(prompts)}: repeat a prompt for each of its completions"
            )
        pairs = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                pairs.append(self.encode(prompt, completion, end_of_text=end_of_text))
            except ValueError as error:
                raise ValueError(f"pair {i}: {error}") from error
        return self.score_encoded(pairs)

    def rerank(
        self,
        prompt: Prompt,
        completions: Sequence[Completion],
        *,
        by: By = "f",
        method: Method = "best",
        answers: AnswerReader | Sequence[str | None] | None = None,
        temperature: float = 1.0,
        end_of_text: bool = True,
    ) -> Ranking:
        """Rank completions of one prompt, best first, and elect an answer; see ``ranking.rank``.

        Args:
            prompt: as ``score``.
            completions: N of them.
            by: "f", or "reward", the AIRL form.
            method: "best", "weighted" (softmax of the scores) or "majority" (ties by score).
            answers: of the completions, None for no answer; or a function that reads one in a
                completion's text; by default that of the task that the reward was trained for.
            temperature: of the softmax.
            end_of_text: as ``score``.

        Raises:
            ValueError: as ``score`` and ``ranking.rank``, ``by="reward"`` without a policy, or no
                ``answers`` for a task that this package does not know.
        """
        given = answers if answers is None or callable(answers) else [answers]
        return self.rerank_all(
            [prompt],
            [completions],
            by=by,
            method=method,
            answers=given,
            temperature=temperature,
            end_of_text=end_of_text,
        )[0]

    def rerank_all(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        by: By = "f",
        method: Method = "best",
        answers: AnswerReader | Sequence[Sequence[str | None]] | None = None,
        temperature: float = 1.0,
        end_of_text: bool = True,
    ) -> list[Ranking]:
        """Rank the completions of several prompts together; as ``rerank``."""
        self.check_by(by)
        check_method(method, temperature)
        if len(prompts) != len(completions) or not all(completions):
            raise ValueError(
                f"expected a list of one completion or more for each of {len(prompts)} prompts, "
                f"received {[len(group) for group in completions]} completions"
            )
        given = None if answers is None or callable(answers) else answers
        reader = None
        if given is None:
            reader = self.answer_reader(method, answers if callable(answers) else None)
        elif len(given) != len(prompts):
            raise ValueError(
                f"expected a list of answers for each of {len(prompts)} prompts, received "
                f"{len(given)}"
            )
        flat = self.score(
            [p for p, group in zip(prompts, completions, strict=True) for _ in group],
            [completion for group in completions for completion in group],
            end_of_text=end_of_text,
        )
        rankings = []
        for i, (start, end) in enumerate(pairwise(accumulate(map(len, completions), initial=0))):
            scored = flat[start:end]
            read = given[i] if given is not None else None
            if reader is not None:
                read = [reader(one.text) for one in scored]
            rankings.append(rank(scored, by, method=method, answers=read, temperature=temperature))
        return rankings

    def answer_reader(
        self, method: Method, given: AnswerReader | None = None
    ) -> AnswerReader | None:
        """What reads answers for a method: the given one, or the trained task's.

        None for "best" with a task that this package does not know: it can do without.

        Raises:
            ValueError: there is none, and the method votes.
        """
        if given is not None:
            return given
        if method == "best" and self.trained.task not in TASKS:
            return None
        return task_reader(self.trained.task)

    def check_by(self, by: str) -> None:
        """Refuse to rank by what this scorer does not know.

        Raises:
            ValueError: neither "f" nor "reward", or "reward" without a policy.
        """
        if by not in ("f", "reward"):
            raise ValueError(f"expected by='f' or 'reward', received {by!r}")
        if by == "reward" and self.policy is None:
            raise ValueError(
                "the AIRL reward f - log pi needs a policy and this reward was loaded alone: pass "
                "policy= (on the command line --policy), or rank by 'f'"
            )

    def locate(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> Location:
        """Find the first step that deviates; see ``Location``.

        A calibrated scorer says None where no step does, and how sure it is. An uncalibrated one
        gives the step with the lowest f, the likeliest error if there is one.

        Raises:
            ValueError: as ``score``.
        """
        scored = self.score([prompt], [completion], end_of_text=end_of_text)[0]
        return locate_step(scored, self.calibration)

    def encode(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> EncodedPair:
        """Encode one pair for ``score_encoded``; see ``score``.

        Raises:
            ValueError: as ``score``.
        """
        pair = self._encoder.encode(prompt, completion, end_of_text=end_of_text)
        if self._aligner is not None:
            pair = self._aligner.align(prompt, pair)
            assert pair.of_policy is not None
            assert self.policy is not None
            _check_length(pair.of_policy, self.policy)
            _check_length(pair, self._body)
        else:
            for model in (self._body, self.policy or self._body):
                _check_length(pair, model)
        return pair

    @torch.no_grad()
    def score_encoded(self, pairs: Sequence[EncodedPair]) -> list[Scored]:
        """Score pairs that ``encode`` made; in their order."""
        results: dict[int, Scored] = {}
        for indices, reading in self._reader.read(pairs):
            found = self._scored([pairs[i] for i in indices], reading)
            results.update(zip(indices, found, strict=True))
        return [results[i] for i in range(len(pairs))]

    def _scored(self, pairs: Sequence[EncodedPair], reading: Reading) -> list[Scored]:
        policys = [pair.of_policy or pair for pair in pairs]
        steps = [pair.step_lengths for pair in pairs]
        of_steps = reading.spans(steps, [pair.step_lengths for pair in policys])
        spans, of_spans = steps, of_steps
        if self.trained.granularity != "step":  # or else the given steps, where there are some
            spans = [self._rule(pair.completion) for pair in pairs]
            of_spans = reading.spans(spans, [self._rule(pair.completion) for pair in policys])
        sizes = [len(pair.completion) for pair in pairs]
        logp = reading.logp if self._aligner is None else None  # of tokens that are not these
        of_tokens = (reading.f, logp, None if logp is None else reading.f - logp)
        return [
            result(pair, self.trained.granularity, cut, *values)
            for pair, cut, *values in zip(
                pairs,
                spans,
                columns(of_tokens, sizes),
                columns(of_steps, [len(lengths) for lengths in steps]),
                columns(of_spans, [len(lengths) for lengths in spans]),
                strict=True,
            )
        ]


def _check_length(pair: EncodedPair, model: LanguageModel) -> None:
    length = len(pair.prompt) + len(pair.completion)
    if length > model.context:
        raise ValueError(
            f"{length} tokens (prompt {len(pair.prompt)}, completion {len(pair.completion)}) do "
            f"not fit the model's context of {model.context:.0f}: shorten them, or use a model "
            "with a longer context; nothing is truncated"
        )


def _encoder(model: LanguageModel, trained: Trained) -> PairEncoder:
    return PairEncoder(model.tokenizer, trained.boundary, model.head.weight.shape[0])


def _aligner(
    reward: PairEncoder, policy: LanguageModel, trained: Trained, merge_steps: bool
) -> Aligner:
    if trained.granularity not in ("step", "sparse"):
        raise ValueError(
            f"the policy {policy.origin.model!r} has another tokenizer than the reward, which was "
            f"trained with granularity {trained.granularity!r}: its spans are tokens of its own, "
            "and none of the policy's; use a reward of granularity 'step' or 'sparse', or the "
            "policy that it was trained with"
        )
    return Aligner(reward, _encoder(policy, trained), merge_steps=merge_steps)
