"""One step: accumulation, adapters, optimisers, precision, preferences."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from omni_jax.train import lora, losses, optimiser
from omni_jax.train import step as S
from omni_jax.train.config import Lora, Optimizer, RunError
from tests import training


def _run(checkpoint, tmp_path, **changes):
    return training.run(checkpoint, tmp_path, "unread.jsonl", **changes)


@pytest.fixture(scope="module")
def rows(model, checkpoint):
    """Four rows of one sample each, media among them."""
    read = training.reader(model, checkpoint)
    return [[s] for s in training.samples(read, ["text", "image", "audio", "turns"])]


@pytest.fixture(scope="module")
def params(model, checkpoint):
    return S.flatten(training.stacked(checkpoint, model))


def _gradients(trainer, params, batch):
    state = trainer.init_state(params)
    run = jax.jit(lambda t, f, b: trainer.gradients(t, f, None, b, jax.random.key(0)))
    return run(state.params, trainer.freeze(params), batch)


def _micro(model, rows, count):
    """The rows as `count` micro batches of equal shapes."""
    from omni_jax.train.data.batch import collate, needed, shapes

    cfg, size = model.config.thinker, len(rows) // count
    parts = [rows[i * size : (i + 1) * size] for i in range(count)]
    sized = shapes(np.max([needed(cfg, p) for p in parts], axis=0), (512,), 1)
    return jax.tree.map(lambda *a: np.stack(a), *[collate(cfg, p, sized) for p in parts])


def test_accumulation_of_four_is_a_batch_of_four(model, checkpoint, tmp_path, rows, params):
    run = _run(checkpoint, tmp_path)
    trainer = S.make_trainer(run, model.config)
    whole, parts = (_gradients(trainer, params, _micro(model, rows, n)) for n in (1, 4))
    assert abs(float(whole[1]["loss"]) - float(parts[1]["loss"])) < 1e-6 * float(whole[1]["loss"])
    assert float(whole[1]["accuracy"]) == pytest.approx(float(parts[1]["accuracy"]))
    training.compare(S.nest(parts[0]), {n: np.asarray(g) for n, g in whole[0].items()}, 2e-5)


def test_adapters_have_the_gradients_of_the_weights(model, checkpoint, tmp_path, rows, params):
    """dB = s dW Aᵀ and dA = s Bᵀ dW, with dW of the full fine-tune at the merged weights, towers and head included."""
    targets = ("q_proj", "down_proj", "lm_head", "proj", "fc1")
    full = S.make_trainer(_run(checkpoint, tmp_path, rates={"thinker": 1e-3}), model.config)
    run = _run(checkpoint, tmp_path, rates={"thinker": 1e-3}, lora=Lora(3, 6.0, targets))
    low = S.make_trainer(run, model.config)
    rng = np.random.default_rng(0)
    adapters = {n: jnp.asarray(rng.normal(size=s.shape) * 0.05, jnp.float32) for n, s in low.trained.items()}
    merged = lora.merge(params, adapters, 2.0)
    assert any("visual" in n for n in adapters)
    assert any("audio_tower" in n for n in adapters)
    batch, key = _micro(model, rows, 1), jax.random.key(0)
    got, metrics = jax.jit(lambda t, b: low.gradients(t, low.freeze(params), None, b, key))(adapters, batch)
    want, same = jax.jit(lambda t, b: full.gradients(t, {}, None, b, key))(merged, batch)
    # Merged equals unmerged.
    assert abs(float(metrics["loss"]) - float(same["loss"])) < 1e-5 * float(same["loss"])
    theirs = {}
    for name in (n for n in adapters if n.endswith("lora_a")):
        module = name.removesuffix(".lora_a")
        weight = np.asarray(want[f"{module}.weight"])
        a, b = np.asarray(adapters[name]), np.asarray(adapters[f"{module}.lora_b"])
        theirs[f"{module}.lora_b"] = 2.0 * np.einsum("...oi,...ri->...or", weight, a)
        theirs[name] = 2.0 * np.einsum("...or,...oi->...ri", b, weight)
    training.compare(S.nest(got), theirs, 2e-4)


def test_fresh_adapters_change_nothing_and_wrong_targets_are_named(model, checkpoint, tmp_path, rows, params):
    run = _run(checkpoint, tmp_path, rates={"thinker.model": 1e-3}, lora=Lora(4))
    trainer = S.make_trainer(run, model.config)
    assert len(trainer.trained) == 14
    assert all(".model.layers." in n for n in trainer.trained)
    state = trainer.init_state(params)
    batch = jax.tree.map(lambda x: x[0], _micro(model, rows[:1], 1))
    tree = trainer.assemble(state.params, trainer.freeze(params))
    plain = S.in_loops(S.nest(params))
    run_ = jax.jit(lambda t: losses.text_logprobs(model.config, t, batch, training.FLOAT32)[0])
    np.testing.assert_allclose(run_(tree), run_(plain), atol=1e-6)
    with pytest.raises(RunError, match="qkv, but the trained parts' projections are down_proj, gate_proj"):
        S.make_trainer(dataclasses.replace(run, lora=Lora(4, 8.0, ("qkv",))), model.config)
    with pytest.raises(RunError, match=r"rates name 'thinker.vision'.*parts are .*thinker.visual"):
        S.make_trainer(_run(checkpoint, tmp_path, rates={"thinker.vision": 1.0}), model.config)
    with pytest.raises(RunError, match="has no talker"):
        S.make_trainer(dataclasses.replace(run, task="talker"), dataclasses.replace(model.config, talker=None))


NAMES = {
    "thinker.model.layers.mlp.up_proj.weight": (2, 6, 4), "thinker.model.norm.weight": (4,),
    "thinker.visual.merger.mlp.0.weight": (5, 4), "thinker.lm_head.weight": (7, 4),
}  # fmt: skip


def _toy(run, steps):
    """Steps of the run's optimiser on fixed gradients; returns the parameters after each."""
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in NAMES.items()}
    grads = [{n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in NAMES.items()} for _ in range(steps)]
    tx, made = optimiser.make(run, params), [params]
    state = tx.init(params)
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, made[-1])
        made.append(optax.apply_updates(made[-1], updates))
    return made, grads


def test_adamw_clipping_and_rates_are_torchs(checkpoint, tmp_path):
    """Global clipping, decay of matrices alone, and a rate for each part, against torch's AdamW on its schedule."""
    rates = {"thinker": 1e-2, "thinker.visual": 1e-3}
    opt = Optimizer(warmup=3, final=0.1, clip=0.5, weight_decay=0.1, b2=0.99)
    run = _run(checkpoint, tmp_path, rates=rates, optimizer=opt, steps=8)
    made, grads = _toy(run, 8)
    theirs = {n: torch.tensor(np.asarray(a), requires_grad=True) for n, a in made[0].items()}
    groups = [
        {
            "params": [t],
            "weight_decay": 0.0 if "norm" in n else 0.1,
            "top": rates[f"thinker{'.visual' * ('visual' in n)}"],
        }
        for n, t in theirs.items()
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    for i, g in enumerate(grads):
        part = i / 3 if i < 3 else 0.1 + 0.9 * (1 + np.cos(np.pi * (i - 3) / 5)) / 2
        for group in adam.param_groups:
            group["lr"] = group["top"] * part
        for n, t in theirs.items():
            t.grad = torch.tensor(np.asarray(g[n]))
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), 0.5)
        adam.step()
        for n, t in theirs.items():
            np.testing.assert_allclose(made[i + 1][n], t.detach().numpy(), rtol=2e-5, atol=2e-6)


def _own_rule(checkpoint, tmp_path, name, shape, steps):
    """Parameters before and after each step of one rule at a constant rate of 0.01, decay 0.1, and the gradients."""
    run = _run(checkpoint, tmp_path, rates={"thinker.model": 1e-2, "thinker.lm_head": 1e-2}, steps=1000)
    run = dataclasses.replace(run, optimizer=Optimizer(name, clip=None, final=1.0, weight_decay=0.1))
    rng = np.random.default_rng(0)
    names = {"thinker.model.layers.mlp.up_proj.weight": shape, "thinker.lm_head.weight": shape[1:]}
    names |= {"thinker.model.norm.weight": shape[1:2]}
    made = [{n: jnp.asarray(rng.normal(size=s) * 0.02, jnp.float32) for n, s in names.items()}]
    grads = [{n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in names.items()} for _ in range(steps)]
    tx = optimiser.make(run, made[0])
    state = tx.init(made[0])
    for g in grads:
        updates, state = jax.jit(tx.update)(g, state, made[-1])
        made.append(optax.apply_updates(made[-1], updates))
    return made, grads


@pytest.mark.parametrize("name", ["adafactor", "lion", "sgd"])
def test_other_rules_are_their_papers(checkpoint, tmp_path, name):
    """Adafactor against torch's (whose scaling by the parameter is pinned to one), Lion and SGD written out."""
    made, grads = _own_rule(checkpoint, tmp_path, name, (2, 130, 140), 4)
    for n, first in made[0].items():
        decay = 0.0 if "norm" in n else 0.1
        p, m = np.asarray(first), np.zeros(first.shape, np.float32)
        if name == "adafactor":
            theirs = torch.tensor(p, requires_grad=True)
            rule = torch.optim.Adafactor([theirs], lr=1e-2, eps=(1e-15, 1.0), weight_decay=decay)
        for step, g in enumerate(np.asarray(g[n]) for g in grads):
            if name == "adafactor":
                theirs.grad = torch.tensor(g)
                rule.step()
                p = theirs.detach().numpy()
            elif name == "lion":
                p = p - 1e-2 * (np.sign(0.9 * m + 0.1 * g) + decay * p)
                m = 0.95 * m + 0.05 * g
            else:
                m = 0.9 * m + g
                p = p - 1e-2 * (m + decay * p)
            np.testing.assert_allclose(made[step + 1][n], p, rtol=1e-5, atol=2e-6, err_msg=f"{n} step {step}")


def test_muon_makes_the_layers_matrices_orthogonal(checkpoint, tmp_path):
    """The first step is torch's Muon's (which multiplies in bf16), layer by layer; heads and norms take AdamW."""
    made, grads = _own_rule(checkpoint, tmp_path, "muon", (2, 24, 40), 3)
    name = "thinker.model.layers.mlp.up_proj.weight"
    for layer in range(2):
        p = torch.tensor(np.asarray(made[0][name][layer]), requires_grad=True)
        p.grad = torch.tensor(np.asarray(grads[0][name][layer]))
        torch.optim.Muon([p], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw").step()
        want = p.detach().numpy() - np.asarray(made[0][name][layer])
        got = np.asarray(made[1][name][layer] - made[0][name][layer])
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)
        for before, after in itertools.pairwise(made):
            change = np.asarray(after[name][layer] - before[name][layer] * (1 - 1e-2 * 0.1))
            sizes = np.linalg.svd(change, compute_uv=False) / (1e-2 * 0.2 * np.sqrt(40))
            assert 0.5 < sizes.min() < sizes.max() < 1.3
    others = [n for n in made[0] if n != name]
    params = {n: torch.tensor(np.asarray(made[0][n]), requires_grad=True) for n in others}
    groups = [{"params": [t], "weight_decay": 0.0 if "norm" in n else 0.1} for n, t in params.items()]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for g in grads:
        for n, t in params.items():
            t.grad = torch.tensor(np.asarray(g[n]))
        adam.step()
    for n, t in params.items():
        np.testing.assert_allclose(made[-1][n], t.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_bfloat16_computes_and_float32_remembers(model, checkpoint, tmp_path, rows, params):
    """An update far below bf16's resolution is kept, and the computation is bf16."""
    run = _run(checkpoint, tmp_path, rates={"thinker.model": 1e-6}, dtype="bfloat16", remat="full")
    trainer = S.make_trainer(run, model.config)
    state, frozen = trainer.init_state(params), trainer.freeze(params)
    assert {a.dtype for a in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    before = {n: np.asarray(a) for n, a in state.params.items()}
    exact = S.make_trainer(dataclasses.replace(run, dtype="float32"), model.config)
    want = float(_gradients(exact, params, _micro(model, rows[:1], 1))[1]["loss"])
    state, metrics = trainer.step(state, frozen, None, _micro(model, rows[:1], 1))
    assert {a.dtype for a in state.params.values()} == {jnp.dtype(jnp.float32)}
    assert 1e-6 < abs(float(metrics["loss"]) - want) < 0.02 * want
    name = "thinker.model.layers.mlp.up_proj.weight"
    change = np.abs(np.asarray(state.params[name]) - before[name])
    assert 0.9e-6 < np.median(change) < 1.1e-6
    assert np.median(change) < np.median(np.abs(before[name])) * 2**-9
    assert int(state.step) == 1


@pytest.mark.parametrize(("task", "full"), [("dpo", True), ("talker_dpo", False)])
def test_preferences_are_learnt(task, full, speaker, checkpoint, tmp_path):
    """At the start every loss is log 2 and no reward has a margin; then the chosen replies win."""
    parts = "talker" if task == "talker_dpo" else "thinker.model"
    run = _run(checkpoint, tmp_path, task=task, rates={parts: 2e-3}, lora=None if full else Lora(4, 8.0), steps=6)
    read = training.reader(speaker, checkpoint, task)
    ask = [{"role": "user", "content": "Is it true?"}]
    record = {"messages": ask, "chosen": "Yes.", "rejected": "No, never at all.", "name": "x line 1"}
    if task == "talker_dpo":
        record |= {"chosen_codes": [1, 2, 3, 4], "rejected_codes": [9, 8, 7]}
    read.check(record)
    batch = training.batch(speaker, [[s] for s in read.samples(record)])
    batch = jax.tree.map(lambda x: x[None], batch)
    trainer = S.make_trainer(run, speaker.config)
    weights = S.flatten(training.stacked(checkpoint, speaker, trainer.parts))
    state, frozen = trainer.init_state(weights), trainer.freeze(weights)
    base = trainer.base(state)
    assert (base is not None) == full
    seen = []
    for _ in range(6):
        state, metrics = trainer.step(state, frozen, base, batch)
        seen.append({k: float(v) for k, v in metrics.items()})
    assert seen[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert abs(seen[0]["margin"]) < 1e-4
    assert seen[-1]["preferred"] == 1
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.02
