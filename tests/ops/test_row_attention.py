"""Rows that go on a token at a time, against softmax attention in float64, on every vector path."""

import pytest
import torch

import airl_fast
from airl_fast.ops import _row_attention as rows

pytestmark = pytest.mark.usefixtures("path")
COUNTS = (1, 40, 16, 3)  # tokens of the prompts
OF = (0, 1, 1, 3, 2, 1)  # the prompt of each row


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(key_heads, size, room, seed=0):
    counts = torch.tensor(COUNTS)
    starts = counts.cumsum(0) - counts
    of, tokens = torch.tensor(OF), sum(COUNTS)
    return rows.Held(
        prompt_keys=numbers(key_heads, size, tokens, seed=seed),
        prompt_values=numbers(key_heads, tokens, size, seed=seed + 1),
        starts=starts[of],
        counts=counts[of],
        own_keys=torch.full((len(OF), key_heads, size, room), torch.nan),
        own_values=torch.full((len(OF), key_heads, room, size), torch.nan),
    )


def formula(kept, own, query, keys, values, scale, window):
    """Row by row, from the prompts and lists of the rows' own keys and values [R, Hk, E]."""
    group = query.shape[1] // keys[0].shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for r, (start, count) in enumerate(
        zip(kept.starts.tolist(), kept.counts.tolist(), strict=True)
    ):
        for h in range(query.shape[1]):
            k = [kept.prompt_keys[h // group, :, start : start + count].T]
            v = [kept.prompt_values[h // group, start : start + count]]
            k += [one[r, h // group][None] for one in keys[:own]]
            v += [one[r, h // group][None] for one in values[:own]]
            k, v = (torch.cat(x).double()[-window:] for x in (k, v))
            out[r, h] = (scale * (k @ query[r, h].double())).softmax(0) @ v
    return out


@pytest.mark.parametrize("window", [1 << 62, 5, 1])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(4, 4, 24), (6, 2, 7), (3, 1, 64), (2, 2, 130)]
)
def test_rows_attend_to_their_prompt_and_to_themselves(heads, key_heads, size, window):
    kept = held(key_heads, size, room=40)
    keys, values = [], []
    for own in range(1, 40):
        query = numbers(len(OF), heads, size, seed=3 * own)
        keys.append(numbers(len(OF), key_heads, size, seed=3 * own + 1))
        values.append(numbers(len(OF), key_heads, size, seed=3 * own + 2))
        out = rows.attend(kept, own, query, keys[-1], values[-1], size**-0.5, window)
        if own in (1, 2, 17, 39):
            expected = formula(kept, own, query, keys, values, size**-0.5, window)
            torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


def test_a_row_has_the_same_bits_whatever_goes_on_beside_it_and_on_any_number_of_threads():
    query, key, value = (numbers(len(OF), 4, 24, seed=s) for s in (7, 8, 9))
    together = rows.attend(held(4, 24, 8), 1, query, key, value, 0.2, 1 << 62)
    torch.set_num_threads(2)
    try:
        kept = held(4, 24, 8)
        assert torch.equal(rows.attend(kept, 1, query, key, value, 0.2, 1 << 62), together)
    finally:
        torch.set_num_threads(1)
    for r in range(len(OF)):
        alone = held(4, 24, 8)
        alone = rows.Held(
            alone.prompt_keys, alone.prompt_values, alone.starts[r : r + 1],
            alone.counts[r : r + 1], alone.own_keys[:1], alone.own_values[:1],
        )  # fmt: skip
        one = slice(r, r + 1)
        out = rows.attend(alone, 1, query[one], key[one], value[one], 0.2, 1 << 62)
        assert torch.equal(out, together[one])


def test_scores_of_any_size_are_no_overflow():
    kept = held(1, 16, 4)
    query = 1e4 * numbers(len(OF), 1, 16, seed=3)
    key, value = numbers(len(OF), 1, 16, seed=4), numbers(len(OF), 1, 16, seed=5)
    out = rows.attend(kept, 1, query, key, value, 1.0, 1 << 62)
    expected = formula(kept, 1, query, [key], [value], 1.0, 1 << 62)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)


def test_a_number_that_is_none_is_passed_on_in_its_row_alone():
    query, key, value = (numbers(len(OF), 2, 16, seed=s) for s in (3, 4, 5))
    query[2, 1, 3] = torch.nan
    out = rows.attend(held(2, 16, 4), 1, query, key, value, 1.0, 1 << 62)
    assert out[2, 1].isnan().all()
    assert out.isnan().sum() == 16


def test_it_serves_what_it_can():
    x = torch.zeros(2, 1, 16)
    assert rows.serves(x, x, x)
    assert not rows.serves(x, x, torch.zeros(2, 1, 8))
    assert not rows.serves(*[x.bfloat16()] * 3)
    with airl_fast.backend("reference"):
        assert not rows.serves(x, x, x)
