"""Structured pruning of the embedded model: L0 gates with distillation against one-shot scores.

python -m benchmarks.structured [--seeds 3] [--steps 60] [--held-out 128] [--save]

Every row loses as many heads and neurons, hence the same number of parameters, and is cut
out physically before it is evaluated. Units are the neurons of all MLPs, and query heads with the
keys and values they share; both kinds are ranked over all layers, and each layer keeps one.

- magnitude: the l2 norm of a unit's parameters.
- Taylor: |sum of w g|, gradients of the next-token loss on as many tokens as training reads in
  ``TAYLOR_STEPS`` steps.
- either, then KD: the smaller model is trained for --steps steps on the dense model's logits.
- L0 with KD: hard-concrete gates and weights are trained together against the dense model's logits
  for the first part of the same steps, a Lagrangian for each kind of units holding their expected
  share; then the units with the lowest log_alpha go, and the smaller model is trained for the rest.
  In so few steps thousands of gates that start alike hardly part, so log_alpha starts from the
  Taylor scores of the same seed: ``SPREAD`` for a standard deviation of the log score.

Each finished row is kept in --work, so a run that is killed goes on.
"""

import argparse
import copy
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks import common
from benchmarks.training import BATCH, Bench, next_token_loss, same_as, summary
from jaxcomp import pruning

FRACTION = 0.4
HEADS, NEURONS = "*o_proj/kernel", "*down_proj/kernel"
RATE, GATE_RATE, MULTIPLIER_RATE, DROP_RATE, SPREAD = 1e-3, 0.2, 3.0, 0.2, 2.5
GATE_SHARE, WARMUP_SHARE = 0.4, 0.5
TAYLOR_STEPS = 16


class Structured:
    """The model's units, and the ways to choose and train those that stay."""

    def __init__(self, bench: Bench):
        self.bench = bench
        c = bench.config
        size = c.head_dim * (c.num_attention_heads // c.num_key_value_heads)
        find = functools.partial(
            pruning.units, bench.apply, bench.params, bench.batch(0, 0), kind="head", size=size
        )
        self.groups = {
            "head": find(include=HEADS),
            "neuron": find(include=NEURONS, kind="neuron", size=None),
        }
        self.all = self.groups["head"] + self.groups["neuron"]
        self.run = jax.jit(bench.apply)

    def cut(self, params, scores):
        """The smaller weights: units with the lowest scores are gone."""
        return pruning.remove(params, self.all, pruning.select_units(self.all, scores, FRACTION))

    def magnitude(self):
        """The scores of one shot."""
        return pruning.unit_scores(self.bench.params, self.all)

    def taylor(self, seed: int):
        """The scores of one shot, from gradients on the training text."""
        grad = jax.jit(
            jax.grad(lambda p, tokens: next_token_loss(self.bench.apply(p, tokens), tokens))
        )
        grads = [grad(self.bench.params, self.bench.batch(i, seed)) for i in range(TAYLOR_STEPS)]
        total = jax.tree.map(lambda *g: sum(g), *grads)
        return pruning.unit_scores(self.bench.params, self.all, "taylor", total)

    def distilled(self, params, steps: int, seed: int, label: str):
        """Weights after ``steps`` steps on the dense model's logits."""
        bench = copy.copy(self.bench)
        bench.steps = steps

        def loss(params, aux, tokens, key, step):
            return same_as(bench.apply(bench.params, tokens), bench.apply(params, tokens)), aux

        params = jax.tree.map(jnp.asarray, params)
        return bench.train(loss, params, rate=RATE, seed=seed, label=label)[0]

    def start(self, seed: int) -> dict:
        """log_alpha before training, apart by the Taylor scores' order of magnitude."""
        scores, found = self.taylor(seed), {}
        for kind, groups in self.groups.items():
            alpha = pruning.gates(groups).init(jax.random.key(seed), DROP_RATE)
            logs = {name: jnp.log(scores[name]) for name in alpha}
            joined = jnp.concatenate([v.ravel() for v in logs.values()])
            mean, deviation = joined.mean(), joined.std()
            scale = SPREAD / deviation
            found[kind] = {k: v + scale * (logs[k] - mean) for k, v in alpha.items()}
        return found

    def gated(self, steps: int, seed: int):
        """Weights with test-time gates on them, and log_alpha, after ``steps`` steps."""
        bench = self.bench
        l0 = {kind: pruning.gates(groups) for kind, groups in self.groups.items()}
        lagrange = {}
        for kind, groups in self.groups.items():
            total = sum(g.count for g in groups)
            target = round(FRACTION * total) / total
            warmup = round(WARMUP_SHARE * steps)
            lagrange[kind] = pruning.lagrangian(target, warmup, total_steps=steps)

        def loss(trained, tokens, key, step):
            params, value = trained["weights"], 0.0
            for i, kind in enumerate(l0):
                alpha = trained["gates"][kind]
                params = l0[kind].apply(params, alpha, jax.random.fold_in(key, i))
                sparsity = l0[kind].expected_sparsity(alpha)
                value += lagrange[kind].penalty(trained["multipliers"][kind], sparsity, step)
            kd = same_as(bench.apply(bench.params, tokens), bench.apply(params, tokens))
            return kd + value, kd

        warmup = optax.linear_schedule(0, RATE, max(1, steps // 10))
        tx = optax.partition(
            {
                "weights": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warmup, b2=0.98)),
                "gates": optax.adam(GATE_RATE, b2=0.98),
                "multipliers": pruning.ascend(optax.sgd(MULTIPLIER_RATE)),
            },
            {name: name for name in ("weights", "gates", "multipliers")},
        )

        @jax.jit
        def update(trained, state, tokens, step):
            key = jax.random.fold_in(jax.random.key(seed), step)
            g, kd = jax.grad(loss, has_aux=True)(trained, tokens, key, step)
            updates, state = tx.update(g, state, trained)
            return optax.apply_updates(trained, updates), state, kd

        trained = {
            "weights": bench.params,
            "gates": self.start(seed),
            "multipliers": {k: lag.init() for k, lag in lagrange.items()},
        }
        state, began = tx.init(trained), time.time()
        for step in range(steps):
            trained, state, kd = update(trained, state, bench.batch(step, seed), step)
            if (step + 1) % 10 == 0:
                share = {k: float(l0[k].expected_sparsity(trained["gates"][k])) for k in l0}
                shown = ", ".join(f"{k}s {v:.3f}" for k, v in share.items())
                pace = (time.time() - began) / (step + 1)
                print(
                    f"  gates seed {seed} step {step + 1}: KL {float(kd):.3f}, expected sparsity "
                    f"{shown}, {pace:.2f} s a step",
                    flush=True,
                )
        params = trained["weights"]
        for kind in l0:
            params = l0[kind].apply(params, trained["gates"][kind])
        return params, trained["gates"]["head"] | trained["gates"]["neuron"]

    def l0(self, seed: int):
        """Gates and weights together, then the smaller model alone: as many steps in all."""
        first = round(GATE_SHARE * self.bench.steps)
        params, alpha = self.gated(first, seed)
        small = self.cut(params, alpha)
        print(f"  before the last {self.bench.steps - first} steps: "
              f"{self.bench.perplexity(small):.2f}", flush=True)  # fmt: skip
        return self.distilled(small, self.bench.steps - first, 1000 + seed, "L0, removed")


def main() -> None:
    """Measures all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=common.HELD_OUT)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/structured"))
    parser.add_argument("--save", action="store_true", help="keep the table in results/")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.steps, args.held_out, args.work)
    s = Structured(bench)
    dense, small = (
        sum(leaf.size for leaf in jax.tree.leaves(p))
        for p in (bench.params, s.cut(bench.params, s.magnitude()))
    )
    output = common.Output()
    output(common.machine("jax", "optax"))
    output(
        f"{args.steps} steps of {BATCH} x {common.LENGTH} tokens, {args.seeds} seeds; "
        f"{FRACTION:.0%} of heads and neurons removed: {dense} to {small} parameters"
    )

    def trained(scores, label):
        return lambda seed: bench.perplexity(
            s.distilled(s.cut(bench.params, scores(seed)), args.steps, seed, label)
        )

    def once(scores):
        return lambda seed: bench.perplexity(s.cut(bench.params, scores(seed)))

    rows = {
        "dense": (lambda seed: bench.perplexity(bench.params), 1),
        "magnitude": (once(lambda seed: s.magnitude()), 1),
        "Taylor": (once(s.taylor), args.seeds),
        "L0 with KD": (lambda seed: bench.perplexity(s.l0(seed)), args.seeds),
        "Taylor, then KD": (trained(s.taylor, "Taylor, then KD"), args.seeds),
        "magnitude, then KD": (trained(lambda seed: s.magnitude(), "magnitude, KD"), args.seeds),
    }
    found = {name: bench.row(name, seeds, measure) for name, (measure, seeds) in rows.items()}
    order = [
        "dense", "magnitude", "Taylor", "magnitude, then KD", "Taylor, then KD", "L0 with KD",
    ]  # fmt: skip
    output(common.table(("model", "perplexity"), [(n, summary(found[n])) for n in order]))
    mean = {name: statistics.mean(values) for name, values in found.items()}
    marks = [
        (f"L0 with KD below one-shot {other}", mean["L0 with KD"] < mean[other])
        for other in ("magnitude", "Taylor")
    ]
    for text, holds in marks:
        output(common.requirement(text, holds))
    for other in ("magnitude, then KD", "Taylor, then KD"):
        side = "below" if mean["L0 with KD"] < mean[other] else "NOT below"
        output(f"for comparison: L0 with KD is {side} {other}")
    if args.save:
        output.save("structured")
    sys.exit(not all(holds for _, holds in marks))


if __name__ == "__main__":
    main()
