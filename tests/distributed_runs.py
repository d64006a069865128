"""Runs in several processes, for test_distributed.py: what each does, and how they are started.

A server that has imported everything, and computed nothing, forks them: one import for all.
"""

import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import peft  # noqa: F401  (imported by the server, not by each process)
import torch
import torch._dynamo
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from airl_fast.config import load_config
from airl_fast.distributed import World, clip_grad_norm_, join, leave
from airl_fast.loading import resolve
from airl_fast.ops import dispatch
from airl_fast.packing import Trace, pack
from airl_fast.policy import Policy
from airl_fast.rollout import sample
from airl_fast.run_folder import RunFolder, write_models
from airl_fast.tasks import arithmetic  # noqa: F401
from airl_fast.trainer import Trainer

BASE = [
    "run.steps=3",
    "run.threads=1",
    "run.eval_every=0",
    "run.checkpoint_every=100",
    "run.token_budget=150",
    "algorithm.sft_warmup=3",
    "algorithm.sft_batch=3",
    "discriminator.warmup_updates=2",
    "discriminator.perturbed_per_update=2",
    "discriminator.logp_floor=-30",
    "sampling.prompts_per_step=4",
    "sampling.group_size=2",
    "sampling.max_new_tokens=6",
    "task.demonstrations=16",
    "task.unlabelled=12",
    "task.validation=4",
    "task.test=0",
]
SHORT = ["algorithm.sft_warmup=2", "discriminator.warmup_updates=1", "run.steps=4"]
SECONDS = 3000  # that a run may take: nobody waits for ever


def write_model(folder: Path, *, layers: int, tied: bool) -> str:
    """A tiny random model that speaks arithmetic; sizes that 2 and 4 do not divide."""
    base = resolve("arithmetic-base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=18,
            intermediate_size=22,
            num_hidden_layers=layers,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=6,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Watched(Trainer):
    """A trainer that keeps the whole gradient of every update, in order."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.gradients = []
        for learner in (self.sft_learner, self.policy_learner, self.disc_learner):
            if learner is not None:
                learner.optimiser.adamw.register_step_pre_hook(self._keep)

    def _keep(self, adamw, *_):
        grads = [p.grad for group in adamw.param_groups for p in group["params"]]
        self.gradients.append([None if grad is None else full(grad) for grad in grads])


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A whole copy of a tensor that may be in pieces."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def train(folder, overrides, steps=None):
    """A run: its metrics, gradients and weights. ``steps`` stops it early, with a checkpoint."""
    config = load_config("arithmetic", [*BASE, f"run.output_dir={folder}", *overrides])
    trainer = Watched(config)
    if steps is not None:
        trainer.total_steps = steps
    metrics = trainer.train()
    weights = {f"policy.{k}": full(p) for k, p in trainer.policy.trainable().items()}
    if trainer.discriminator is not None:
        weights |= {f"disc.{k}": full(p) for k, p in trainer.discriminator.trainable().items()}
    return {"metrics": metrics, "gradients": trainer.gradients, "weights": weights}


def in_processes(size, function, *arguments):
    """What ``function`` returns on rank 0 of ``size`` processes, which call it together.

    Returns:
        (result, {}) where all of them end well, else (None, {rank: its error}); a rank that is
        ended by another's failure counts as failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_runs"])
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server, if it is not there yet
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_one, args=(rank, size, port, results, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found, failed, until = None, {}, time.monotonic() + SECONDS
    for _ in processes:
        try:
            rank, error, value = results.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        if error:
            failed[rank] = error
        elif rank == 0:
            found = pickle.loads(value)
    for rank, process in enumerate(processes):
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            failed[rank] = "did not end"
    return (None, failed) if failed else (found, {})


def _one(rank, size, port, results, function, arguments):
    """One process: set what torchrun would, call the function, hand over what it returns."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        value = function(*arguments)
        leave(join("cpu"))
        results.put((rank, "", pickle.dumps(value if rank == 0 else None)))  # no shared memory
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None))


# What several processes do besides training


def train_until_one_fails(folder, overrides):
    """A run in which rank 1 fails in the third step, between two collectives."""

    class Failing(Trainer):
        def _sft_step(self, step):
            if step == 2 and self.world.rank == 1:
                raise RuntimeError("planted")
            return super()._sft_step(step)

    Failing(load_config("arithmetic", [*BASE, f"run.output_dir={folder}", *overrides])).train()


FAULTS = {2: "loss", 3: "f", 5: "logp", 6: "loss"}  # where the last rank meets NaN, by step


class Faulty(Watched):
    """A trainer whose last rank meets NaN: in a loss, in f, in a pass without gradients."""

    def __init__(self, config):
        super().__init__(config)
        if self.world.rank == self.world.size - 1:
            for learner in (self.sft_learner, self.policy_learner):
                learner.loss = self._spoilt("loss", learner.loss, before=True)
            self.policy._logprob = self._spoilt("logp", self.policy._logprob, before=True)
            self.discriminator.f = self._spoilt("f", self.discriminator.f, before=False)

    def _spoilt(self, where, right, *, before):
        def function(first, *rest):
            factor = float("nan") if FAULTS.get(self.step + 1) == where else 1.0
            return right(first * factor, *rest) if before else right(first, *rest) * factor

        return function


def train_over_faults(folder, overrides):
    """What ``train`` returns, of a run that skips the steps of ``FAULTS``."""
    options = [*BASE, *SHORT, "guards.non_finite=skip", f"run.output_dir={folder}", *overrides]
    trainer = Faulty(load_config("arithmetic", options))
    metrics = trainer.train()
    weights = {f"policy.{k}": full(p) for k, p in trainer.policy.trainable().items()}
    return {"metrics": metrics, "gradients": trainer.gradients, "weights": weights}


def audits(folder, model):
    """The errors of every rank where operators are wrong by 1% on rank 1 alone."""
    world, found = join("cpu"), []
    for op in ("linear_policy_loss", "linear_logprob_backward", "discriminator_loss"):
        right = dispatch._registry[op]["cpu"]

        def wrong(*arguments, function=right.function):
            return tuple(1.01 * x for x in function(*arguments))

        if world.rank == 1:
            dispatch._registry[op]["cpu"] = replace(right, function=wrong)
        # In the third step every operator has its turn: of imitation, of f, of both.
        options = [*BASE, *SHORT, "guards.audit_every=1", f"policy.model={model}"]
        if op != "linear_policy_loss":
            options.append("algorithm.sft_warmup=0")
        config = load_config("arithmetic", [*options, f"run.output_dir={folder / op}"])
        found.append(message(Trainer(config).train))
        dispatch._registry[op]["cpu"] = right
    return world.gather(found)


def writes(model, folder):
    """The errors of every rank where rank 0 cannot write weights; then they are written."""
    world = join("cpu")
    config = load_config("arithmetic", [*BASE, f"policy.model={model}"])
    policy = Policy.from_pretrained(model)
    policy.shard(world)

    def write(where):
        write_models(where, policy, None, config, SimpleNamespace())

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    (folder / "file").touch()
    found = [message(write, folder / "file")]
    tokenizer = policy.tokenizer
    if world.first:
        policy.tokenizer = SimpleNamespace(save_pretrained=full_disk)
    found.append(message(write, folder / "full"))
    left = list((folder / "full").iterdir())
    policy.tokenizer = tokenizer
    found.append(message(write, folder / "full"))
    whole = {name: full(p) for name, p in policy.trainable().items()}
    return world.gather(found), left, whole


def message(function, *arguments):
    """The error that a call raises."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(model, folder):
    """The errors of every rank where ranks hold different things, or rank 0 alone fails."""
    world = join("cpu")
    policy = Policy.from_pretrained(model)
    with torch.no_grad():
        policy.head.weight[0, 0] += 0.001 * world.rank
    other = Policy.from_pretrained(model)
    other.causal_lm._no_split_modules = ["NoSuchLayer"]

    def fail():
        raise ValueError(f"of rank {world.rank}")

    found = {
        "same": message(world.check_same, "data", ["a", "b"][world.rank]),
        "weights": message(policy.shard, world),
        "layers": message(other.shard, world),
        "first": message(world.first_does, fail),
        "folder": message(_unlike_folder, model, Path(folder), world),
    }
    return world.gather(found)


def _unlike_folder(model, folder, world):
    """Rank 0 goes on from a checkpoint that rank 1 does not see."""
    options = [*BASE, f"policy.model={model}"]
    if world.first:
        config = load_config("arithmetic", [*options, f"run.output_dir={folder}"])
        run = RunFolder(config)
        run.open()
        run.record({"step": 1})
        run.save(1, {"a": torch.zeros(1)}, {})
    else:
        config = load_config("arithmetic", [*options, f"run.output_dir={folder / 'elsewhere'}"])
    RunFolder(config).open_together(world)


def operators(model):
    """The head's operators on a sharded model: values, gradients, their norm; and sampling."""
    world = join("cpu")
    alone, policy = Policy.from_pretrained(model), Policy.from_pretrained(model)
    policy.shard(world)
    traces = [
        Trace(prompt=(4, 5, 6 + i), completion=(7, 8, 9)[: i + 1], span_lengths=(i + 1,))
        for i in range(3)
    ]
    batch = pack(traces)

    def loss(language_model):
        logp, entropy = language_model.logprob(language_model.hidden(batch), batch)
        return logp.sum() + 0.1 * entropy.sum()

    values = []
    for language_model, share in ((alone, 1.0), (policy, [0.75, 0.25][world.rank])):
        value = language_model.inside(loss, language_model)
        (share * value).backward()  # the ranks' shares add up to one
        values.append(value.item())
    gradients = [
        {name: full(p.grad) for name, p in language_model.trainable().items()}
        for language_model in (alone, policy)
    ]
    lone = clip_grad_norm_(list(alone.trainable().values()), 0.5, World())
    norms = [lone, clip_grad_norm_(list(policy.trainable().values()), 0.5, world)]
    clipped = [
        {name: full(p.grad) for name, p in language_model.trainable().items()}
        for language_model in (alone, policy)
    ]
    prompts = [(4, 5, 6), (7,), (8, 9)]
    samples = [
        sample(language_model, prompts, group_size=2, max_new_tokens=5, seed=3)
        for language_model in (alone, policy)
    ]
    return values, gradients, norms, clipped, samples
