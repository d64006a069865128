"""A tiny policy and discriminator, traces of two groups, and what an update should do to them."""

import torch

from airl_fast.config import load_config
from airl_fast.discriminator import Discriminator
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.packing import Source, Trace
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

BUDGETS = [4096, 40, 23]  # one micro-batch; a few; about one a trace


def make_policy(seed=0):
    model = tiny_model("llama", seed=seed).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    return LanguageModel(model, tiny_tokenizer(), Origin(model="tiny"))


def make_discriminator(head, policy):
    if head == "policy-trunk":
        made = Discriminator(None, head="score", trunk="policy", width=32)
    elif head == "shaped":
        made = Discriminator(make_policy(3), head="score", trunk="own", width=32, shaping_gamma=0.9)
    else:
        span_logp = "mean" if head == "lm-mean" else "sum"
        body = make_policy(3)
        made = Discriminator(body, head="lm", trunk="own", width=32, span_logp=span_logp)
    with torch.no_grad():
        for i, p in enumerate(made.head_parameters().values()):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return made


def make_traces():
    """Two groups with an expert each, and a perturbed expert; prompts are shared."""
    generator = torch.Generator().manual_seed(8)

    def draw(n):
        return tuple(torch.randint(3, VOCAB, (n,), generator=generator).tolist())

    prompts = [draw(6), draw(4)]
    shapes = [
        (0, (3, 2), Source.EXPERT),
        (1, (2, 2, 1), Source.EXPERT),
        (0, (4, 1, 2), Source.POLICY),
        (0, (6,), Source.POLICY),
        (1, (1, 1, 1), Source.POLICY),
        (1, (2, 5), Source.POLICY),
        (1, (2, 3), Source.PERTURBED),
    ]
    return [
        Trace(
            prompt=prompts[group],
            completion=draw(sum(spans)),
            span_lengths=spans,
            group=group,
            source=source,
        )
        for group, spans, source in shapes
    ]


TRACES = make_traces()


def make_config(*overrides):
    return load_config(
        "arithmetic",
        [
            "run.output_dir=unused",
            "discriminator.label_smoothing=0",
            "discriminator.final_lr_fraction=1",
            "algorithm.reward=f",
            *overrides,
        ],
    )


class Spy:
    """Stands for an optimiser: keeps the gradient it would use."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.gradients = []

    def clear(self):
        pass

    def collect(self):
        pass

    def step(self):
        self.gradients.append(
            {n: None if p.grad is None else p.grad.clone() for n, p in self.parameters.items()}
        )
        for p in self.parameters.values():
            p.grad = None
        return 0.0


def assert_gradients(found, expected, rtol=2e-4):
    assert set(found) == set(expected)
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            scale = max(value.abs().max().item(), 1e-3)
            torch.testing.assert_close(found[name], value, atol=rtol * scale, rtol=0, msg=name)


def gradients(loss, parameters):
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, values, strict=True))


def alone(model, trace):
    """The hidden states of a trace run alone: at each state and at each action."""
    ids = torch.tensor([[*trace.prompt, *trace.completion]])
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
    start = len(trace.prompt)
    return hidden[start - 1 : -1], hidden[start:]


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)
