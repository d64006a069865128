"""Numbers that are read together; batches that remember where they came from."""

import torch

from airl_fast.packing import Trace, pack
from airl_fast.transfers import Readings, sent


def test_readings_are_the_weighted_sums():
    draw = torch.Generator().manual_seed(0)
    told = Readings(("a", "b", "never"))
    assert told.totals() == {"a": 0.0, "b": 0.0, "never": 0.0}
    expected = {"a": 0.0, "b": 0.0, "never": 0.0}
    for weight in (0.25, 2.0, 1.0):
        a, b = torch.randn(1, generator=draw).requires_grad_(), torch.tensor(7)
        told.add(weight, a=a, b=b)
        expected["a"] += weight * a.item()
        expected["b"] += weight * 7
    assert told.totals() == expected
    assert told.totals() == expected  # reading them again adds nothing


def test_a_batch_of_the_cpu_is_looked_at_itself():
    batch = pack([Trace(prompt=(1, 2), completion=(3, 4, 5), span_lengths=(1, 2))])
    assert batch.on_cpu is batch
    assert batch.to("cpu") is batch
    x = torch.arange(3)
    assert sent(x, "cpu") is x


def test_a_moved_batch_remembers_what_it_was_made_of():
    batch = pack([Trace(prompt=(1, 2), completion=(3, 4, 5), span_lengths=(1, 2))])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.on_cpu is batch
    assert moved.to("meta") is moved
