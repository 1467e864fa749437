"""The sequential pass: one forward pass on calibration data that compresses each weight on its way.

The program is evaluated operation by operation on all batches at once. When it reaches a site, its
true input, made by predecessors that are already compressed, is at hand: statistics of it are
gathered, the weights of the input group are compressed, and evaluation goes on with the result.
Loops are unrolled, branches and loop bounds are followed as they turn out. Equations between sites
are compiled together, once for all layers that look the same.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp import calibration, host, out_of_memory, placing
from jaxcomp.errors import DataError, JaxcompError
from jaxcomp.formats import is_compressed
from jaxcomp.graph import _compat, sharded
from jaxcomp.graph.interpret import Handler, picked, quantizes_input, shard_mapped
from jaxcomp.graph.program import Op, Program
from jaxcomp.graph.sites import Site, is_grouped, splits_tokens, to_tokens
from jaxcomp.graph.views import View
from jaxcomp.io.stacked import densified
from jaxcomp.processes import told
from jaxcomp.triangle import Triangle

Index = tuple[int, ...]


class Compressor(Protocol):
    """What the pass asks for at sites."""

    def needs(self, site: Site) -> frozenset[str] | None:
        """Statistics wanted of a site's input; None where the site is to be left alone."""

    def takes_apart(self, group: Sequence["Target"]) -> bool:
        """Whether ``compress`` reads Hessians of a stack one by one, so that none need be made."""

    def overwrites_hessian(self, group: Sequence["Target"]) -> bool:
        """Whether ``compress`` takes a Hessian that is yet to be summed, where there is one."""

    def compress(self, program: Program, group: Sequence["Target"], statistics: Any) -> list[Any]:
        """Compresses weights that read the same input.

        Args:
          program: the (sub-)program that holds the sites.
          group: the weights, none of them compressed before.
          statistics: of their common input, or None if no statistics were wanted.

        Returns:
          For each what ``for_evaluation`` takes.
        """

    def for_evaluation(self, group: Sequence["Target"], finished: list[Any]) -> list[Any]:
        """What the pass goes on with; by then nobody holds the statistics any more.

        Args:
          group: the weights.
          finished: what ``compress`` gave for them.

        Returns:
          For each the leaf in its place: compressed or dense, without loop axes.
        """


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight at one position of the loops that enclose its site.

    Attributes:
      op: the site's operation.
      index: positions along the loops and fixed axes, the leading stack axes of the weight.
      leaf: the dense leaf at that position, host or device array.
    """

    op: Op
    index: Index
    leaf: Any

    @property
    def site(self) -> Site:
        """The site."""
        return self.op.site


class Many(list):
    """A value that differs from batch to batch."""


class _Leaf:
    """A weight in the environment: its leaf sliced by the loops so far, and where."""

    def __init__(self, value: Any, index: Index = ()):
        self.value = value
        self.index = index


class Sequential:
    """One pass; ``run`` makes it."""

    def __init__(
        self,
        compressor: Compressor,
        handler: Handler,
        batches: int,
        place: placing.Here | None = None,
    ):
        self.compressor = compressor
        self.handler = handler
        self.batches = batches
        self.place = place or placing.Here()
        self.done: dict[tuple[str, Index], Any] = {}
        self.cache: dict[Any, Callable] = {}
        self.contractions = 0
        self.loops = 0

    def run(self, program: Program, arguments: Sequence[Any], active: Sequence[int]) -> list[Any]:
        """Evaluates a program on the active batches.

        Args:
          program: what to evaluate.
          arguments: for each input a ``_Leaf``, a ``Many`` with a value for each active batch, or a
            value that all batches share.
          active: indices of the batches.

        Returns:
          Results, ``Many`` or shared.
        """
        env: dict[int, Any] = dict(program.constants)
        env.update(zip(program.inputs, arguments, strict=True))
        roots = _roots(program)
        pending: list[Op] = []
        steps: list[_Step] = []
        last = {i: k for k, op in enumerate(program.ops) for i in op.inputs}
        last.update(dict.fromkeys(program.outputs, len(program.ops)))
        used = self.used(program)

        def join(k):
            """Makes one step of the pending equations."""
            if pending:
                steps.extend(self.segment(program, list(pending), env, last, k))
                pending.clear()

        def execute(k):
            """Runs the steps, each batch through all of them."""
            kept = {*program.inputs, *(i for p in pending for i in p.inputs)}
            made = (i for step in steps for i in step.outputs)
            alive = {i for i in (*env, *made) if last.get(i, -1) >= k or i in kept}
            with self.near(program, k):
                self.contractions += _execute(steps, env, alive, len(active), self.place)
            steps.clear()

        for k, op in enumerate(program.ops):
            if op.kind == "view":
                env[op.outputs[0]] = env[op.inputs[0]]
                continue
            alive = bool(op.eqn.effects) or not used.isdisjoint(op.outputs)
            done = op.kind == "site" and self.compressor.needs(op.site) is None
            root = env.get(roots[op.inputs[op.site.operand]]) if done else None
            if (done or op.kind == "bind") and not alive:
                continue
            if done and _quantizes(root):
                join(k)
                leaf = self.place.shared(_fixed(op.site, root.value))
                steps.append(self.site(program, op, env, leaf))
                continue
            if op.kind == "bind" or done:
                self.contractions += op.kind == "site"
                pending.append(op)
                continue
            # What a site does not read can wait, and be compiled together with what follows.
            if op.kind != "site" or any(i in p.outputs for p in pending for i in op.inputs):
                join(k)
            if op.kind == "site":
                here = env[op.inputs[op.site.operand]]
                key = _key(op.site, here)
                if key not in self.done:
                    execute(k)
                    self.compress_group(program, op, env, roots, len(active))
                if alive:
                    steps.append(self.site(program, op, env, self.done[key]))
                if op.site.uses == 1 and len(here.index) == self.loops:
                    # The compressor keeps the result; this one is spent. (A loop whose iterations
                    # share the weight comes back to it.)
                    self.done[key] = None
            else:
                execute(k)
                with self.near(program, k):
                    self.structure(program, op, env, active)
            kept = {*program.inputs, *(i for p in pending for i in p.inputs)}
            for i in [i for i in env if last.get(i, -1) <= k and i not in kept]:
                del env[i]
        join(len(program.ops))
        execute(len(program.ops))
        return [self.read(program, env, i) for i in program.outputs]

    def near(self, program: Program, k: int) -> contextlib.AbstractContextManager:
        """Tells running out of memory before operation ``k`` by the weight that comes next."""
        ops = program.ops
        following = (site for op in ops[k:] for site in _sites(op))
        site = next(following, None)
        if site is not None:
            return out_of_memory.evaluating(
                site.path, site.layout.leaf_shape, "evaluating the model up to it"
            )
        site = next((s for op in reversed(ops) for s in reversed(_sites(op))), None)
        if site is None:
            return contextlib.nullcontext()
        return out_of_memory.evaluating(
            site.path, site.layout.leaf_shape, "evaluating the model with it"
        )

    def used(self, program: Program) -> set[int]:
        """Values that an output, a loop or the input of a weight to compress comes from."""
        used = set(program.outputs)
        for op in reversed(program.ops):
            plain = op.kind in ("bind", "view")
            if op.kind == "site":
                plain = self.compressor.needs(op.site) is None
            if not plain or op.eqn.effects or not used.isdisjoint(op.outputs):
                used.update(op.inputs)
        return used

    def read(self, program: Program, env: dict, i: int) -> Any:
        """A value as an array (or ``Many``)."""
        value = env[i]
        if isinstance(value, _Leaf):
            path, view = program.weights[i]
            if not is_compressed(value.value):
                return host.call(view.replay, value.value)
            return self.handler.dense(path, view, value.value)
        return value

    def segment(self, program, ops, env, last, now) -> list["_Step"]:
        """Plain equations, compiled together, as a step; none if nobody reads what they give."""
        made = {i for op in ops for i in op.outputs}
        inputs = list(dict.fromkeys(i for op in ops for i in op.inputs if i not in made))
        outputs = sorted(i for i in made if last.get(i, -1) >= now)
        if not outputs:
            return []
        function = self.compiled(ops, inputs, outputs)
        return [_Step(function, inputs, outputs, self.known(program, inputs, env))]

    def known(self, program, inputs, env) -> dict[int, Any]:
        """Those of a step's inputs that no earlier step has yet to make."""
        values = {i: self.read(program, env, i) for i in inputs if i in env}
        return {i: v if isinstance(v, Many) else self.place.shared(v) for i, v in values.items()}

    def compiled(self, ops, inputs, outputs) -> Callable:
        """A jitted function of some equations; one for all that look the same."""
        names = {i: n for n, i in enumerate(inputs)}
        key: list[Any] | None = []
        for op in ops:
            text = _compat.printable_params(op.eqn)
            if text is None:
                key = None
                break
            avals = ",".join(str(v.aval) for v in op.eqn.invars)
            key.append((text, avals, tuple(names[i] for i in op.inputs)))
            for i in op.outputs:
                names[i] = len(names)
        if key is not None:
            key = (tuple(key), tuple(names[i] for i in outputs))
            if key in self.cache:
                return self.cache[key]

        def evaluate(*values):
            local = dict(zip(inputs, values, strict=True))
            for op in ops:
                results = _compat.bind(op.eqn, *(local[i] for i in op.inputs))
                local.update(zip(op.outputs, results, strict=True))
            return [local[i] for i in outputs]

        function = jax.jit(evaluate)
        if key is not None:
            self.cache[key] = function
        return function

    def site(self, program, op, env, leaf) -> "_Step":
        """A site on its compressed weight, as a step."""
        function = self.applied(op)
        at = op.site.operand
        inputs = [i for j, i in enumerate(op.inputs) if j != at]

        def evaluate(*values):
            return function([*values[:at], None, *values[at:]], leaf)

        return _Step(evaluate, inputs, op.outputs, self.known(program, inputs, env), True)

    def applied(self, op: Op) -> Callable:
        """A jitted function that evaluates a site on a leaf without its loop axes."""
        site = op.site
        bare = dataclasses.replace(site, view=_without_fixed(site.view))
        layout = (bare.view, site.layout, site.operand, site.transposed)
        text = _compat.printable_params(op.eqn)
        key = (text, layout, tuple(str(v.aval) for v in op.eqn.invars)) if text else None
        if key is None or key not in self.cache:
            plain = dataclasses.replace(op, site=bare)
            function = jax.jit(
                lambda operands, leaf: self.handler.site(plain, operands, leaf, None)[0]
            )
            if key is None:
                return function
            self.cache[key] = function
        return self.cache[key]

    def compress_group(self, program, op, env, roots, count) -> None:
        """Gathers statistics of a site's input and compresses the weights that read it."""
        targets, seen = [], set()
        for other in program.ops:
            if other.kind != "site" or other.site.input_group != op.site.input_group:
                continue
            wanted = self.compressor.needs(other.site)
            root = env.get(roots[other.inputs[other.site.operand]])
            if wanted is None or root is None or other.site.transposed:
                continue
            key = _key(other.site, root)
            if key in self.done or key in seen:
                continue
            seen.add(key)
            targets.append(Target(other, key[1], _fixed(other.site, root.value)))
        if not targets:
            raise JaxcompError(
                f"{op.site.path}: its first use contracts the outputs of its later uses, so its "
                "input is not known when it is reached; exclude this path"
            )
        needs = frozenset().union(*(self.compressor.needs(t.site) for t in targets))
        is_large = sum(t.leaf.size for t in targets) >= host.LARGE
        statistics = None
        if needs:
            if is_large:
                host.trim()
            what = f"gathering statistics of its input ({', '.join(sorted(needs))})"
            with out_of_memory.evaluating(op.site.path, op.site.layout.leaf_shape, what):
                one = op.site.kind == "dot_general" and not op.site.batch_axes
                later = "hessian" in needs and (
                    self.compressor.takes_apart(targets)
                    or (one and self.compressor.overwrites_hessian(targets))
                )
                statistics = self.statistics(program, op, env, count, needs, later)
        finished = self.compress(program, targets, statistics)
        del statistics  # As large as the layer, maybe.
        if is_large:
            host.trim()
        self.go_on(targets, finished)

    def compress(self, program: Program, targets: Sequence[Target], statistics: Any) -> list[Any]:
        """Has an input group compressed."""
        hessian = getattr(statistics, "hessian", None)
        with _compressing(targets, None if hessian is None else hessian.shape[-1]):
            return self.compressor.compress(program, targets, statistics)

    def go_on(self, targets: Sequence[Target], finished: list[Any]) -> None:
        """Takes what came of an input group in place of its weights."""
        with _compressing(targets):
            leaves = self.compressor.for_evaluation(targets, finished)
        for target, leaf in zip(targets, leaves, strict=True):
            self.done[(target.site.path, target.index)] = leaf

    def statistics(self, program, op, env, count, needs, later=False) -> calibration.Statistics:
        """Statistics of a site's input over all batches; ``later`` leaves the Hessian unsummed."""
        site = op.site
        if is_grouped(op.eqn):
            raise JaxcompError(
                f"{site.path} {site.layout.leaf_shape}: a grouped convolution has no single input "
                "to calibrate on; use an algorithm without calibration for it (rtn, magnitude), "
                "or exclude this path"
            )
        operands = [
            None if j == site.operand else self.read(program, env, i)
            for j, i in enumerate(op.inputs)
        ]
        operands = [v if isinstance(v, Many) else self.place.shared(v) for v in operands]

        def load(b):
            return [self.place.load(v[b]) if isinstance(v, Many) else v for v in operands]

        # Otherwise a CPU still evaluates, with copies of weights, while Hessians are allocated.
        host.settle([list(v) if isinstance(v, Many) else v for v in operands])
        stack = site.layout.sizes(site.batch_axes)
        state = calibration.init(site.in_size, needs - {"hessian"} if later else needs, stack)
        x = operands[1 - site.operand]
        if self.place.hosts and isinstance(x, Many) and splits_tokens(op.eqn, site):
            own = functools.partial(self.own_statistics, op, x, state)
            state = self.place.summed(told("compress", self.place.processes, own))
        else:
            state = self.place.shared(state)
            function = None
            for values in placing.ahead(load, count):
                function = function or self.updating(op, values[1 - site.operand])
                state = function(state, values)
        hessian = state.hessian
        if self.place.mesh is None and isinstance(hessian, np.ndarray):
            # It stays NumPy's, so that a step can compute in its memory.
            state = host.to_device(state._replace(hessian=None))._replace(hessian=hessian)
        else:
            state = self.place.shared(host.to_device(state))
        for name, value in state._asdict().items():
            if value is not None:
                _check_known(site, name, value)
        if later:
            kind, read = (calibration.Hessians, _hessian) if stack else (calibration.Unsummed, _sum)
            shape = (*stack, site.in_size, site.in_size)
            state = state._replace(hessian=kind(functools.partial(read, op, load, count), shape))
        return state

    def own_statistics(self, op: Op, x: Many, state: Any) -> calibration.Statistics:
        """Adds the tokens that are this process's to count, of all batches, by NumPy."""
        state = jax.tree.map(np.asarray, state)
        for value in x:
            for part in filter(len, self.place.own(value)):
                tokens = to_tokens(op.eqn, op.site, part)
                state = calibration.update(state, tokens, in_place=True)
        return state

    def updating(self, op: Op, x: Any) -> Callable:
        """A function that adds a batch's input, such as ``x``, to statistics."""
        site = op.site
        if site.kind == "dot_general" and host.is_on_host(x):
            return lambda state, operands: calibration.update(
                jax.tree.map(np.asarray, state),
                to_tokens(op.eqn, site, np.asarray(operands[1 - site.operand])),
                in_place=True,
            )
        text = _compat.printable_params(op.eqn)
        layout = (site.view.axes, site.view.leaf_shape, site.operand)
        avals = tuple(str(v.aval) for v in op.eqn.invars)
        key = ("statistics", text, layout, avals) if text else None
        if key in self.cache:
            return self.cache[key]

        def update(state, operands):
            if site.kind == "ragged_dot":
                return _update_ragged(state, operands[0], operands[2])
            return calibration.update(state, to_tokens(op.eqn, site, operands[1 - site.operand]))

        function = self.place.jit(update)
        if key is not None:
            self.cache[key] = function
        return function

    def structure(self, program, op, env, active) -> None:
        """Evaluates a loop, a conditional or a call that holds sites."""
        results = getattr(self, "_" + op.kind)(program, op, env, active)
        env.update(zip(op.outputs, results, strict=True))

    def _shard_map(self, program, op, env, active):
        """A shard_map is one step: its sites are calibrated together, then it runs compressed."""
        (body,) = op.bodies
        count = len(active)
        inputs = dict(zip(body.inputs, op.inputs, strict=True))
        roots = _roots(body)
        sites = [
            o for o in body.ops if o.kind == "site" and self.compressor.needs(o.site) is not None
        ]
        direct = {o.site.id for o in body.ops if o.kind == "site"}
        for site in body.sites:
            if site.id not in direct and self.compressor.needs(site) is not None:
                raise JaxcompError(
                    f"{site.path}: used by a loop inside a shard_map, which calibration cannot "
                    "look into; put the shard_map inside the loop, or exclude this path"
                )
        values = [
            densified(env[i].value)
            if isinstance(env[i], _Leaf) and keep
            else self.read(program, env, i)
            for i, keep in zip(op.inputs, op.kept, strict=True)
        ]
        weights = {o.site.id: inputs[roots[o.inputs[o.site.operand]]] for o in sites}
        todo = [o for o in sites if _key(o.site, env[weights[o.site.id]]) not in self.done]
        needs = frozenset().union(*(self.compressor.needs(o.site) for o in todo))
        state = {}
        if needs:
            leading = {o.site.id: o.site.layout.sizes(o.site.batch_axes) for o in todo}
            state = {
                o.site.id: calibration.init(o.site.in_size, needs, leading[o.site.id]) for o in todo
            }
            state = self.place.shared(state)
            gather = self.place.jit(lambda state, values: sharded.statistics(op, values, state))
            for b in range(count):
                state = gather(state, [_at(v, b, self.place) for v in values])
        groups: dict[int, list[Op]] = {}
        for other in todo:
            groups.setdefault(other.site.input_group, []).append(other)
        for group in groups.values():
            targets = []
            for other in group:
                leaf = env[weights[other.site.id]]
                index = _key(other.site, leaf)[1]
                targets.append(Target(other, index, _fixed(other.site, leaf.value)))
            self.go_on(targets, self.compress(body, targets, state.get(group[0].site.id)))
        for other in sites:
            root = weights[other.site.id]
            for k, i in enumerate(op.inputs):
                if i == root and op.kept[k]:
                    values[k] = self.done[_key(other.site, env[root])]
        function = jax.jit(lambda *values: shard_mapped(op, values, self.handler))
        self.contractions += len(direct) * count
        return _each(function, values, count, self.place)

    def _remat(self, program, op, env, active):
        return self.run(op.bodies[0], [env[i] for i in op.inputs], active)

    def _scan(self, program, op, env, active):
        (body,) = op.bodies
        loop = _compat.scan_of(op.eqn.params)
        if not loop.length:
            values = [self.read(program, env, i) for i in op.inputs]
            bind = lambda *v: _compat.bind(op.eqn, *v)  # noqa: E731
            return _each(bind, values, len(active), self.place)
        split = loop.num_consts + loop.num_carry
        values = [
            env[i] if keep else self.read(program, env, i)
            for i, keep in zip(op.inputs, op.kept, strict=True)
        ]
        carry = values[loop.num_consts : split]
        kept = op.kept[loop.num_consts : split]
        stacked: list[list[Any]] = []
        order = range(loop.length)
        for t in reversed(order) if loop.reverse else order:
            xs = [
                _slice(v, t, body.weights[i][1] if keep else None, self.place)
                for v, i, keep in zip(
                    values[split:], body.inputs[split:], op.kept[split:], strict=True
                )
            ]
            self.loops += 1
            results = self.run(body, [*values[: loop.num_consts], *carry, *xs], active)
            self.loops -= 1
            carry = [
                old if keep else new
                for old, new, keep in zip(carry, results[: loop.num_carry], kept, strict=True)
            ]
            stacked.append(results[loop.num_carry :])
        if loop.reverse:
            stacked.reverse()
        ys = [_stack(column, len(active), self.place) for column in zip(*stacked, strict=True)]
        carry = [
            self.handler.dense(*program.weights[i], c.value) if keep else c
            for c, keep, i in zip(carry, kept, op.inputs[loop.num_consts : split], strict=True)
        ]
        return [*carry, *ys]

    def _while(self, program, op, env, active):
        (body,) = op.bodies
        params = op.eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        condition = self.place.jit(_compat.as_function(params["cond_jaxpr"]))
        cond_consts = [self.read(program, env, i) for i in op.inputs[:n_cond]]
        inputs, kept = op.inputs[n_cond:], op.kept[n_cond:]
        values = [
            env[i] if keep else self.read(program, env, i)
            for i, keep in zip(inputs, kept, strict=True)
        ]
        consts, start = values[:n_body], values[n_body:]
        kept = kept[n_body:]
        # The loop may end at another time for each batch, so from here on each has its own carry.
        carry = [
            v if keep else _spread(v, len(active)) for v, keep in zip(start, kept, strict=True)
        ]
        dense = [
            self.handler.dense(*program.weights[i], v.value) if keep else None
            for i, v, keep in zip(inputs[n_body:], carry, kept, strict=True)
        ]
        running = list(range(len(active)))
        while True:
            running = [
                b
                for b in running
                if condition(
                    *(_at(c, b, self.place) for c in cond_consts),
                    *(
                        d if keep else self.place.load(c[b])
                        for c, d, keep in zip(carry, dense, kept, strict=True)
                    ),
                )[0]
            ]
            if not running:
                break
            arguments = [_pick(v, running) for v in consts]
            arguments += [_pick(v, running) for v in carry]
            self.loops += 1
            results = self.run(body, arguments, [active[b] for b in running])
            self.loops -= 1
            for c, result, keep in zip(carry, results, kept, strict=True):
                for position, b in enumerate(running):
                    if not keep:
                        c[b] = _at(result, position)
        return [d if keep else c for c, d, keep in zip(carry, dense, kept, strict=True)]

    def _cond(self, program, op, env, active):
        index = _spread(self.read(program, env, op.inputs[0]), len(active))
        taken = [min(max(int(i), 0), len(op.bodies) - 1) for i in index]
        values = [env[i] for i in op.inputs[1:]]
        columns = [Many([None] * len(active)) for _ in op.outputs]
        for branch, body in enumerate(op.bodies):
            chosen = [b for b, t in enumerate(taken) if t == branch]
            if not chosen:
                continue
            results = self.run(
                body, [_pick(v, chosen) for v in values], [active[b] for b in chosen]
            )
            for column, result in zip(columns, results, strict=True):
                for position, b in enumerate(chosen):
                    column[b] = _at(result, position)
        return columns


def _compressing(
    targets: Sequence[Target], in_size: int | None = None
) -> contextlib.AbstractContextManager:
    """Tells running out of memory by the weights that are compressed."""
    paths = [t.site.path for t in targets]
    return out_of_memory.compressing(paths, [t.site.layout.leaf_shape for t in targets], in_size)


def _sites(op: Op) -> list[Site]:
    """The sites of an operation, those of its bodies too."""
    return [op.site] if op.site is not None else [s for body in op.bodies for s in body.sites]


def _quantizes(leaf: Any) -> bool:
    """Whether a weight came compressed, with a quantized input that evaluation must not drop."""
    return isinstance(leaf, _Leaf) and is_compressed(leaf.value) and quantizes_input(leaf.value)


@dataclasses.dataclass(frozen=True)
class _Step:
    """A compiled function that waits until somebody asks for what it gives.

    Attributes:
      function: of one batch's values.
      inputs: ids of the values.
      outputs: ids of the results.
      known: inputs that are there; earlier steps make the others.
      is_site: whether it is a contraction with a weight.
    """

    function: Callable
    inputs: Sequence[int]
    outputs: Sequence[int]
    known: dict[int, Any]
    is_site: bool = False

    def is_shared(self, others: Container[int]) -> bool:
        """Whether all batches share the results, if they share ``others``."""
        return all(
            i in others or (i in self.known and not isinstance(self.known[i], Many))
            for i in self.inputs
        )


def _execute(
    steps: Sequence[_Step], env: dict, alive: Container[int], count: int, place: placing.Here
) -> int:
    """Runs steps, one batch after the other through all of them.

    So only one batch's intermediate values exist at a time, and an input that nobody reads again
    is let go batch by batch.

    Args:
      steps: in order.
      env: values by id, to which the results that are alive are added.
      alive: ids that are read later.
      count: number of batches.
      place: where batches are computed with, and where results wait.

    Returns:
      Number of contractions with weights.
    """
    common: dict[int, Any] = {}
    varying: list[_Step] = []
    for step in steps:
        if step.is_shared(common):
            values = [common[i] if i in common else step.known[i] for i in step.inputs]
            common.update(zip(step.outputs, step.function(*values), strict=True))
        else:
            varying.append(step)
    last = {i: n for n, step in enumerate(varying) for i in step.inputs}
    columns = {i: Many() for step in varying for i in step.outputs if i in alive}
    still_read = {id(v) for i, v in env.items() if i in alive}
    read = {id(v): v for step in varying for v in step.known.values() if isinstance(v, Many)}
    spent = [v for key, v in read.items() if key not in still_read]
    given = {i: v for step in varying for i, v in step.known.items() if isinstance(v, Many)}

    def load(b):
        return {i: place.load(v[b]) for i, v in given.items()}

    for b, loaded in enumerate(placing.ahead(load, count if varying else 0)):
        made: dict[int, Any] = {}
        for n, step in enumerate(varying):
            places = (made, common, loaded, step.known)
            values = [next(p[i] for p in places if i in p) for i in step.inputs]
            made.update(zip(step.outputs, step.function(*values), strict=True))
            for i in [i for i in made if last.get(i, -1) <= n and i not in columns]:
                del made[i]
        for i, column in columns.items():
            column.append(made[i])
            if b:  # The one before: waiting for this one's values would let the devices idle.
                column[b - 1] = place.keep(column[b - 1])
        for value in spent:
            value[b] = None
    for column in columns.values():
        column[-1] = place.keep(column[-1])
    env.update((i, v) for i, v in common.items() if i in alive)
    env.update(columns)
    return sum(s.is_site for s in steps) + sum(s.is_site for s in varying) * (count - 1)


def _each(function: Callable, values: Sequence[Any], count: int, place: placing.Here) -> Any:
    """Results of a function for each batch, or the shared ones if all values are shared."""
    if not any(isinstance(v, Many) for v in values):
        return function(*values)
    rows = [map(place.keep, function(*(_at(v, b, place) for v in values))) for b in range(count)]
    return [Many(column) for column in zip(*rows, strict=True)]


def _key(site: Site, leaf: _Leaf) -> tuple[str, Index]:
    """A weight's name and its position along the leading stack axes of its matrix."""
    axes = [f.axis for f in site.view.loops] + [f.axis for f, _ in site.view.fixed]
    at = dict(zip(axes, (*leaf.index, *(i for _, i in site.view.fixed)), strict=True))
    return site.path, tuple(at[a] for a in site.layout.stack_axes if a in at)


def _roots(program: Program) -> dict[int, int]:
    """For ids of weights the id that has the same leaf and is known when the program starts."""
    roots = {i: i for i in program.weights}
    for op in program.ops:
        if op.kind == "view":
            roots[op.outputs[0]] = roots[op.inputs[0]]
    return roots


def _without_fixed(view: View) -> View:
    """The view of a leaf from which fixed axes have been sliced away like loops."""
    return view.replace(loops=(*view.loops, *(f for f, _ in view.fixed)), fixed=())


def _fixed(site: Site, leaf: Any) -> Any:
    """A leaf sliced at the fixed indices of a site, on the host if it lies there."""
    if is_compressed(leaf):
        return picked(leaf, site)
    gone = [f.axis for f in site.view.loops]
    for factor, index in site.view.fixed:
        at = factor.axis - sum(a < factor.axis for a in gone)
        leaf = leaf[(slice(None),) * at + (index,)]
        gone.append(factor.axis)
    return leaf


def _slice(value: Any, t: int, view: View | None, place: placing.Here) -> Any:
    """Position ``t`` of a scanned operand."""
    if isinstance(value, _Leaf):
        if is_compressed(value.value) and value.value.first_axis == view.loops[-1].axis:
            return _Leaf(jax.tree.map(lambda a: a[t], value.value), (*value.index, t))
        if is_compressed(value.value):
            value = _Leaf(value.value.materialize(), value.index)
        axis = view.loop_axis()
        return _Leaf(value.value[(slice(None),) * axis + (t,)], (*value.index, t))
    if isinstance(value, Many):
        return Many(place.item(v, t) for v in value)
    return value[t]


def _stack(column: Sequence[Any], count: int, place: placing.Here) -> Any:
    if not any(isinstance(v, Many) for v in column):
        return jnp.stack([jnp.asarray(v) for v in column])
    spread = [_spread(v, count) for v in column]
    return Many(place.stack([v[b] for v in spread]) for b in range(count))


def _spread(value: Any, count: int) -> Many:
    return Many(value) if isinstance(value, Many) else Many([value] * count)


def _pick(value: Any, chosen: Sequence[int]) -> Any:
    return Many(value[b] for b in chosen) if isinstance(value, Many) else value


def _at(value: Any, position: int, place: placing.Here | None = None) -> Any:
    """A batch's value, brought to ``place``'s devices if one is given."""
    if not isinstance(value, Many):
        return value
    return value[position] if place is None else place.load(value[position])


def _check_known(site: Site, name: str, value: Any) -> None:
    if host.any_rows(np.isnan, value):
        raise DataError(
            f"{site.path} {site.layout.leaf_shape}: the {name} of its input is NaN on the "
            "calibration data: the model makes NaN before this layer; check the weights, "
            "the dtype (float16 overflows) and the data"
        )


def _hessian(op: Op, load: Callable[[int], list[Any]], count: int, k: int) -> np.ndarray:
    """The Hessian of what the matrix at position ``k`` of a stack reads, of its tokens alone."""
    site, state = op.site, None
    for b in range(count):
        values = [None if v is None else np.asarray(v) for v in load(b)]
        tokens = to_tokens(op.eqn, site, values[1 - site.operand])
        if site.kind == "ragged_dot":
            end = int(values[2][: k + 1].sum())
            tokens = tokens[end - int(values[2][k]) : end]
        else:
            tokens = tokens[k]
        if state is None:
            state = calibration.init(site.in_size, frozenset({"hessian"}), tokens.shape[:-2])
        state = calibration.update(state, tokens, in_place=True)
    _check_known(site, "hessian", state.hessian)
    return state.hessian


def _sum(op: Op, load: Callable[[int], list[Any]], count: int) -> Triangle:
    """The Hessian of what a matrix reads."""
    total = Triangle(op.site.in_size)
    for b in range(count):
        x = load(b)[1 - op.site.operand]
        total.add_gram(to_tokens(op.eqn, op.site, np.asarray(x)))
    _check_known(op.site, "hessian", total.diagonal())
    return total


def _update_ragged(state, x, group_sizes):
    """Statistics of each expert's own tokens."""
    ends = jnp.cumsum(group_sizes)
    token = jnp.arange(x.shape[0])

    def one(state, end, size):
        mine = (token < end) & (token >= end - size)
        return calibration.update(state, x, mine)

    return jax.lax.map(lambda a: one(*a), (state, ends, group_sizes))
