"""How the gradient sweep cuts the rows into chunks: complete, within its limits, and few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.ops import _head
from airl_fast.ops._cpu_gradients import chunk_rows, home_rows, plan
from airl_fast.ops._cpu_head import chunks

SIZES = st.integers(1, 300)


@given(st.integers(0, 2000), st.integers(0, 300), SIZES)
def test_chunks_cover_the_rows_in_as_few_as_the_limits_allow(count, home, limit):
    first, others = plan(count, home, limit, False)
    cut = list(chunks(count, others, first))
    assert [row for chunk in cut for row in range(chunk.start, chunk.stop)] == list(range(count))
    sizes = [chunk.stop - chunk.start for chunk in cut]
    assert first <= home
    assert others <= limit
    without, with_home = -(-count // limit), 1 + max(0, -(-(count - home) // limit))
    assert len(sizes) <= (min(without, with_home) if home else without)


@given(SIZES, SIZES, SIZES)
def test_whole_sequences_get_the_full_limits(count, home, limit):
    assert plan(count, home, limit, True) in ((0, limit), (home, limit))


def test_no_chunk_is_a_sliver():
    assert plan(600, 576, 220, False) == (380, 220)  # not 576, and 24 more
    assert plan(1200, 576, 682, False) == (576, 624)
    assert plan(512, 2048, 261, False)[0] == 512  # all of them at home
    assert plan(1024, 64, 1024, False) == (0, 1024)  # a first chunk of 64 would be one more


@pytest.mark.parametrize("copied", [0, 2 * 576, 2 * 8192])
def test_the_rows_state_their_budget(copied):
    budget, tile = _head.CHUNK_BYTES // 4, _head.CHUNK_BYTES // 32
    for converted in (False, True):
        taken = chunk_rows(49_152, copied, converted) * (49_152 + copied) + converted * tile
        assert budget - (49_152 + copied) < taken <= budget
    assert home_rows(8192, copied) <= 8192
    assert home_rows(8192, copied) * copied + 2 * tile <= budget
