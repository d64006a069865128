"""Rows of text that go on a token at a time: the keys and values of what they hold so far.

    P prompts   T tokens of them   R rows   D hidden size   H query heads   Hk key heads
    E head size   m keys of the longest row   M keys, or own tokens, that a row has room for

Prompts are read packed, each once, however many rows go on from it. Where csrc/row_attention.h
serves (float32 on a CPU, no soft-capping, no sinks) rows share their prompt's keys and values;
elsewhere each has a copy, its own behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from airl_fast.attention import Kept, last_hidden, unmasked
from airl_fast.buckets import Scoring, attend
from airl_fast.layout import Bucket
from airl_fast.ops import _row_attention
from airl_fast.packing import Trace, pack
from airl_fast.transfers import sent

if TYPE_CHECKING:
    from airl_fast.language_model import LanguageModel

_ROOM = 64  # tokens that a row gets room for at a time


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where the prompts of rows lie in the pass that read them.

    Attributes:
        starts: [R] int64, the first token of a row's prompt.
        counts: [R] int64, its tokens.
        longest: tokens of the longest that there was.
    """

    starts: Tensor
    counts: Tensor
    longest: int

    def only(self, rows: Tensor) -> Prompts:
        """Those of some rows."""
        return Prompts(self.starts[rows], self.counts[rows], self.longest)


class Place:
    """Where the next token of every row is.

    Attributes:
        own: tokens that every row holds beyond its prompt, the next one included.
        position: [R] int64, of the token in its row.
        bucket: which of its row's keys it sees; no row has more than ``bucket.shape[2]``.
    """

    def __init__(self, prompts: Prompts, own: int) -> None:
        self.own = own
        self.position = prompts.counts + (own - 1)
        self.bucket = Bucket(
            shape=(len(self.position), 1, prompts.longest + own),
            query_positions=self.position[:, None],
            causal=False,
        )


class Rows:
    """Rows that go on together, a token each at a time, from prompts that were read once.

    Args:
        model: the language model.
        prompts: token ids, one or more each.
        of: the prompt of each row.

    Attributes:
        hidden: [R, D], the last states of the rows.
    """

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], of: Sequence[int]
    ) -> None:
        # A pass reads texts of a token or more after a prompt: here the prompt's last one again.
        traces = [Trace(prompt=tuple(p), completion=(p[-1],), span_lengths=(1,)) for p in prompts]
        batch = pack(traces, lone_prompts=True)
        lengths, rows = torch.tensor([len(p) for p in prompts]), torch.tensor(of)
        last = batch.state_index
        self._model = model
        kept = Kept()
        states = model.hidden(batch.to(model.device), keep=kept)
        self.hidden = states[sent(last[rows], model.device)]
        self._prompts = Prompts(
            starts=sent((last - lengths + 1)[rows], model.device),
            counts=sent(lengths[rows], model.device),
            longest=int(lengths.max()),
        )
        self._read = kept.calls  # by calls of attention in their order, as what is held
        self._held: list[_Shared | _Copied] = []
        self._place = Place(self._prompts, 0)

    def go_on(self, tokens: Tensor) -> None:
        """Put a token [R] int64 after every row; ``hidden`` is then that of it.

        Raises:
            ValueError: attention is not called as often as it was for the prompts.
        """
        self._place, self._calls = Place(self._prompts, self._place.own + 1), 0
        self.hidden = self._model.inside(self._passed, tokens)
        if self._read or self._calls != len(self._held):
            raise self._unlike()

    def _passed(self, tokens: Tensor) -> Tensor:
        trunk = self._model.causal_lm.base_model
        with self._model.active():
            output = trunk(
                input_ids=tokens[None],
                position_ids=self._place.position[None],
                attention_mask=unmasked(len(tokens), tokens.device),
                use_cache=False,
                rows=self,
            )
        return last_hidden(trunk, output)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """What the new tokens take from all that their rows hold, [1, R, H, Ev].

        Arguments as of :func:`airl_fast.attention.packed_attention`; a token for every row. Calls
        belong together by their order in a pass.
        """
        if self._calls == len(self._held):
            if not self._read:
                raise self._unlike()
            plain = scoring.softcap is None and scoring.s_aux is None
            kind = _Shared if plain and _row_attention.serves(query, key, value) else _Copied
            self._held.append(kind(*self._read.pop(0), self._prompts))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [R, heads, E]
        held = self._held[self._calls]
        self._calls += 1
        return held.attend(self._place, q, k, v, scoring)[None]

    def only(self, rows: Tensor) -> None:
        """Go on with those rows alone, by their numbers, int64."""
        self.hidden, self._prompts = self.hidden[rows], self._prompts.only(rows)
        for held in self._held:
            held.only(rows)

    def _unlike(self) -> ValueError:
        name = type(self._model.causal_lm).__name__
        return ValueError(
            f"{name} does not attend as often in a pass of tokens as in one of prompts, so that "
            "their keys cannot be told apart: expected passes that are alike; use another model"
        )


class _Shared:
    """Keys and values of one layer: those of the prompts once, and of every row its own."""

    def __init__(self, key: Tensor, value: Tensor, prompts: Prompts) -> None:
        heads, size, rows = key.shape[1], key.shape[3], len(prompts.starts)
        self._held = _row_attention.Held(
            prompt_keys=key[0].transpose(1, 2).contiguous(),
            prompt_values=value[0].contiguous(),
            starts=prompts.starts,
            counts=prompts.counts,
            own_keys=key.new_empty(rows, heads, size, 0),
            own_values=value.new_empty(rows, heads, 0, size),
        )

    def attend(self, place: Place, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        held = self._held
        if held.own_keys.shape[3] < place.own:
            own_keys, own_values = pad(held.own_keys, (0, _ROOM)), held.own_values
            own_values = pad(own_values, (0, 0, 0, _ROOM))
            held = self._held = replace(held, own_keys=own_keys, own_values=own_values)
        window = scoring.window or 1 << 62
        return _row_attention.attend(held, place.own, q, k, v, scoring.scale, window)

    def only(self, rows: Tensor) -> None:
        held = self._held
        self._held = replace(
            held,
            starts=held.starts[rows],
            counts=held.counts[rows],
            own_keys=held.own_keys[rows],
            own_values=held.own_values[rows],
        )


class _Copied:
    """Keys and values of one layer, [R, M, Hk, E]: of every row's prompt and its own behind it."""

    def __init__(self, key: Tensor, value: Tensor, prompts: Prompts) -> None:
        token = torch.arange(prompts.longest, device=key.device)
        index = prompts.starts[:, None] + token.minimum(prompts.counts[:, None] - 1)
        # what lies beyond a shorter prompt is written over before it is seen
        self._keys, self._values = (x[0].transpose(0, 1)[index] for x in (key, value))

    def attend(self, place: Place, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        longest = place.bucket.shape[2]
        if self._keys.shape[1] < longest:  # zeros: a score of what is no number cannot be hidden
            more = (0, 0, 0, 0, 0, _ROOM)
            self._keys, self._values = pad(self._keys, more), pad(self._values, more)
        row = torch.arange(len(q), device=q.device)
        self._keys[row, place.position], self._values[row, place.position] = k, v
        keys, values = (x[:, :longest].transpose(1, 2) for x in (self._keys, self._values))
        return attend(place.bucket, q[:, :, None], keys, values, scoring)[:, :, 0]

    def only(self, rows: Tensor) -> None:
        self._keys, self._values = self._keys[rows], self._values[rows]
