"""Training-time methods on the embedded model: same budget, several seeds, held-out perplexity.

python -m benchmarks.training [--seeds 3] [--steps 100] [--only qat,qlora,distill,cost] [--save]

Every trained row takes the same number of steps on the same batches; seeds choose the batches (and
what a method draws). Each finished row is kept in --work, so a run that is killed goes on.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from benchmarks import common
from jaxcomp import data, distillation, evaluation, models, presets
from jaxcomp.formats import Codebook, Int
from jaxcomp.quantization import FakeQuant, lora
from jaxcomp.recipe import KEPT, Recipe

BATCH = 8


class Bench:
    """The model, its training tokens and its held-out batches."""

    def __init__(self, steps: int, held_out: int, work: pathlib.Path):
        model = models.load(common.TINYLM)
        self.config, self.apply = model.config, model.apply
        # Updates are smaller than the spacing of the bfloat16 that is stored.
        self.params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), model.params)
        texts, _ = data.standard_library()
        names = sorted(texts, key=data.name_hash)
        tokens, size = [], 0
        for name in names:  # Far more than the steps read.
            tokens.append(data.encode(texts[name], model.tokenizer, where=name))
            size += len(tokens[-1])
            if size > 1_500_000:
                break
        self.tokens = np.concatenate(tokens)
        options = {"length": common.LENGTH, "batch_size": common.BATCH_SIZE}
        read = lambda name, n: data.batches(  # noqa: E731
            common.TINYLM / name, model.tokenizer, **options, samples=n
        )
        self.calibration = read("calibration.txt", common.SAMPLES)
        self.held = read("heldout.txt", held_out)
        self.steps, self.work = steps, work
        self.evaluations: dict = {}

    def perplexity(self, params, apply=None) -> float:
        """On the held-out text."""
        return evaluation.perplexity(self.apply if apply is None else apply, params, self.held)

    def batch(self, step: int, seed: int):
        """Tokens of a training step."""
        return data.random_windows(self.tokens, common.LENGTH, BATCH, step, seed)

    def train(self, loss, trained, aux=None, *, rate, seed, label):
        """Minimises ``loss(trained, aux, tokens, key, step) -> (scalar, aux)``; returns both."""
        warmup = max(1, self.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0, rate, warmup, self.steps, 0.05 * rate)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

        @jax.jit
        def update(trained, aux, state, tokens, step):
            key = jax.random.fold_in(jax.random.key(seed), step)
            (value, aux), g = jax.value_and_grad(loss, has_aux=True)(
                trained, aux, tokens, key, step
            )
            updates, state = tx.update(g, state, trained)
            return optax.apply_updates(trained, updates), aux, state, value

        state, began = tx.init(trained), time.time()
        for step in range(self.steps):
            tokens = self.batch(step, seed)
            trained, aux, state, value = update(trained, aux, state, tokens, step)
            if (step + 1) % 25 == 0:
                spent = time.time() - began
                print(
                    f"  {label} seed {seed} step {step + 1}: loss {float(value):.3f}, "
                    f"{spent / (step + 1):.2f} s a step",
                    flush=True,
                )
        return trained, aux

    def row(self, name: str, seeds: int, measure) -> list[float]:
        """``measure(seed)`` for each seed, kept on disk."""
        values = []
        for seed in range(seeds):
            path = self.work / f"{name}-{self.steps}-{seed}.json".replace("/", "_").replace(
                " ", "_"
            )
            if not path.exists():
                path.write_text(json.dumps(float(measure(seed))))
            values.append(json.loads(path.read_text()))
        print(f"{name}: {values}", flush=True)
        return values


def next_token_loss(logits, tokens):
    """Mean cross entropy of the next token."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def same_as(teacher, logits):
    """Mean KL divergence from the teacher's logits."""
    return distillation.kl_divergence(logits, teacher).mean()


WIDTHS = {
    "W3 g128": Int(3, 128, scale_dtype="bfloat16"),
    "W2 g64": Int(2, 64, scale_dtype="bfloat16"),
}


def gptq_row(bench: Bench, fmt: Int) -> float:
    """Post-training quantization of the same format, on the demo's calibration text."""
    preset = presets.w3a16_gptq if fmt.bits == 3 else presets.w2a16_gptq
    recipe = preset(group_size=fmt.group_size)
    result = jc.compress(bench.apply, bench.params, recipe, bench.calibration, progress=False)
    return bench.perplexity(result.params, jc.dispatch(bench.apply))


def dense_row(bench: Bench, seed: int) -> float:
    """The dense model, trained as long as the others: what more training alone gives."""

    def loss(params, aux, tokens, key, step):
        return next_token_loss(bench.apply(params, tokens), tokens), aux

    params, _ = bench.train(loss, bench.params, rate=1e-4, seed=seed, label="dense")
    return bench.perplexity(params)


def qat_row(bench: Bench, fmt: Int, scale: str, seed: int) -> float:
    """Quantization-aware training, distilled from the dense model."""
    step = FakeQuant(format=fmt, scale=scale, exclude=KEPT)
    qat = jc.qat(bench.apply, Recipe(steps=(step,)))
    state = qat.init(bench.params, bench.calibration[0][0])

    def loss(trained, state, tokens, key, step):
        params, learned = trained
        logits, state = qat.apply(params, state.replace(learned=learned), tokens)
        return same_as(bench.apply(bench.params, tokens), logits), state

    trained = (bench.params, state.learned)
    label = f"qat {fmt.bits} {scale}"
    (params, learned), state = bench.train(loss, trained, state, rate=5e-4, seed=seed, label=label)
    compressed = qat.convert(params, state.replace(learned=learned))
    return bench.perplexity(compressed, jc.dispatch(bench.apply))


def qlora_row(bench: Bench, base, rank: int, seed: int) -> float:
    """Adapters on a frozen quantized base, distilled from the dense model."""
    graph = jc.trace(bench.apply, base, bench.calibration[0][0])
    adapters = lora.init(jax.random.key(seed), graph, rank=rank, alpha=2 * rank)
    run = jc.dispatch(bench.apply)

    def loss(adapters, aux, tokens, key, step):
        logits = run(lora.attach(base, adapters), tokens)
        return same_as(bench.apply(bench.params, tokens), logits), aux

    adapters, _ = bench.train(loss, adapters, rate=2e-3, seed=seed, label="qlora")
    return bench.perplexity(lora.attach(base, adapters), run)


def half_depth(bench: Bench):
    """A model of every other layer."""
    import dataclasses

    layers = bench.config.num_hidden_layers // 2
    config = dataclasses.replace(bench.config, num_hidden_layers=layers)
    apply, _ = jc.functional(models.build(config))
    kept = {str(i): bench.params["layers"][str(2 * i)] for i in range(layers)}
    return apply, bench.params | {"layers": kept}


def distill_row(bench: Bench, kd: bool, seed: int) -> float:
    """A student of half the depth, from every other layer of the model."""
    apply, student = half_depth(bench)
    teacher = jc.tap(bench.apply, ["hidden"])
    tapped = jc.tap(apply, ["hidden"])

    def loss(params, aux, tokens, key, step):
        if not kd:
            return next_token_loss(apply(params, tokens), tokens), aux
        theirs, states = jax.lax.stop_gradient(teacher(bench.params, tokens))
        ours, mine = tapped(params, tokens)
        hard = next_token_loss(ours, tokens)
        soft = same_as(theirs, ours)
        features = distillation.cosine_loss(mine["hidden"], states["hidden"][1::2]).mean()
        return 0.2 * hard + 0.8 * soft + features, aux

    params, _ = bench.train(
        loss, student, rate=1e-3, seed=seed, label="student with KD" if kd else "student"
    )
    return bench.perplexity(params, apply)


def cost(bench: Bench, output) -> None:
    """Time of a QAT step against the plain step, in pairs."""
    tx = optax.adam(1e-4)
    recipe = {
        "W4 g128, STE": FakeQuant(format=Int(4, 128), exclude=KEPT),
        "W4 g128, LSQ": FakeQuant(format=Int(4, 128), scale="learned", exclude=KEPT),
        "W4A8": FakeQuant(
            format=Int(4, 128, full_range=False), activation=jc.step.Activation(), exclude=KEPT
        ),
        "NF4": FakeQuant(format=Codebook("nf4", group_size=64), exclude=KEPT),
    }

    def stepper(apply, trained):
        def loss(trained, tokens):
            return next_token_loss(apply(trained, tokens), tokens)

        @jax.jit
        def step(trained, state, tokens):
            value, g = jax.value_and_grad(loss)(trained, tokens)
            updates, state = tx.update(g, state, trained)
            return optax.apply_updates(trained, updates), state, value

        return step, trained, tx.init(trained)

    tokens = bench.batch(0, 0)
    plain = stepper(bench.apply, bench.params)
    rows = []
    for name, item in recipe.items():
        qat = jc.qat(bench.apply, Recipe(steps=(item,)))
        state = qat.init(bench.params, tokens)

        def run(trained, tokens, qat=qat, state=state):
            return qat.apply(trained[0], state.replace(learned=trained[1]), tokens)[0]

        trained = stepper(run, (bench.params, state.learned))
        times = {"plain": [], "qat": []}
        for k in range(14):
            for label, (step, params, opt) in (("plain", plain), ("qat", trained)):
                began = time.perf_counter()
                jax.block_until_ready(step(params, opt, tokens))
                if k > 1:
                    times[label].append(time.perf_counter() - began)
        ratios = [q / p for q, p in zip(times["qat"], times["plain"], strict=True)]
        assert trained[0]._cache_size() == 1
        ratio = statistics.median(ratios)
        rows.append((name, f"{statistics.median(times['plain']):.3f}", f"{ratio:.2f}"))
        output(
            common.requirement(f"{name}: at most 1.35x the plain step ({ratio:.2f})", ratio <= 1.35)
        )
    output(common.table(("step", "plain, s", "ratio (median of 12 pairs)"), rows))


def summary(values: list[float]) -> str:
    """Mean and spread."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main() -> None:
    """Measures what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=common.HELD_OUT)
    parser.add_argument("--only", default="qat,qlora,distill,cost")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/training"))
    parser.add_argument("--save", action="store_true", help="keep the tables in results/")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    only, output = set(args.only.split(",")), common.Output()
    output(common.machine("jax", "optax"))
    output(f"{args.steps} steps of {BATCH} x {common.LENGTH} tokens, {args.seeds} seeds")
    bench = Bench(args.steps, args.held_out, args.work)
    found: dict[str, list[float]] = {}

    def row(name, measure, seeds=args.seeds):
        found[name] = bench.row(name, seeds, measure)
        return statistics.mean(found[name])

    marks = []
    dense = row("dense", lambda seed: bench.perplexity(bench.params), 1)
    if "qat" in only:
        row("dense, trained as long", lambda seed: dense_row(bench, seed))
        for name, fmt in WIDTHS.items():
            ptq = row(f"{name} GPTQ", lambda seed, fmt=fmt: gptq_row(bench, fmt), 1)
            ste = row(f"{name} QAT, STE", lambda s, fmt=fmt: qat_row(bench, fmt, "dynamic", s))
            lsq = row(f"{name} QAT, LSQ", lambda s, fmt=fmt: qat_row(bench, fmt, "learned", s))
            marks.append((f"{name}: QAT (STE) below GPTQ", ste < ptq))
            marks.append((f"{name}: LSQ at most STE", lsq <= ste))
    if "qlora" in only:
        recipe = presets.w3a16_gptq()
        base = jc.compress(bench.apply, bench.params, recipe, bench.calibration, progress=False)
        before = row(
            "W3 base", lambda s: bench.perplexity(base.params, jc.dispatch(bench.apply)), 1
        )
        after = row("W3 base + LoRA r16", lambda s: qlora_row(bench, base.params, 16, s))
        share = (before - after) / (before - dense)
        marks.append((f"LoRA recovers half of the W3 loss ({share:.0%})", share >= 0.5))
    if "distill" in only:
        without = row("half depth", lambda seed: distill_row(bench, False, seed))
        with_kd = row("half depth, KD", lambda seed: distill_row(bench, True, seed))
        marks.append(("the student with KD below the one without", with_kd < without))
    output(common.table(("model", "perplexity"), [(n, summary(v)) for n, v in found.items()]))
    for text, holds in marks:
        output(common.requirement(text, holds))
    if "cost" in only:
        cost(bench, output)
    if args.save:
        output.save("training")


if __name__ == "__main__":
    main()
