"""Perplexity and divergence against sums written out in NumPy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomp import evaluation
from jaxcomp.errors import DataError, JaxcompError

VOCAB = 11


def apply(params, tokens):
    return jnp.asarray(params)[tokens]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def setting(rng):
    table = rng.normal(size=(VOCAB, VOCAB)).astype(np.float32)
    other = (table + 0.5 * rng.normal(size=table.shape)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (7, 6)).astype(np.int32)
    return table, other, tokens, [(tokens[:3],), (tokens[3:6],), (tokens[6:],)]


def test_perplexity_and_divergence(setting):
    table, other, tokens, batches = setting
    p, q = log_softmax(table)[tokens[:, :-1]], log_softmax(other)[tokens[:, :-1]]
    nats = -np.take_along_axis(p, tokens[:, 1:, None], -1).mean()
    divergence = (np.exp(q) * (q - p)).sum(-1).mean()
    calls = []
    got = evaluation.evaluate(
        apply, table, batches, reference=(apply, other), progress=calls.append
    )
    np.testing.assert_allclose(got.nats, nats, rtol=1e-6)
    np.testing.assert_allclose(got.perplexity, math.exp(nats), rtol=1e-6)
    np.testing.assert_allclose(got.kl, divergence, rtol=1e-5)
    np.testing.assert_allclose(got.agreement, (p.argmax(-1) == q.argmax(-1)).mean())
    assert got.tokens == 7 * 5 and calls == [1, 2, 3]
    assert evaluation.perplexity(apply, table, batches) == got.perplexity
    assert evaluation.kl(apply, other, apply, table, batches) == got.kl


def test_equal_models_do_not_diverge(setting):
    table, _, _, batches = setting
    assert evaluation.kl(apply, table, apply, table, batches) == 0
    assert evaluation.evaluate(apply, table, batches).kl is None


def test_a_uniform_model_has_the_vocabulary_as_perplexity(setting):
    _, _, _, batches = setting
    table = np.zeros((VOCAB, VOCAB), np.float32)
    np.testing.assert_allclose(evaluation.perplexity(apply, table, batches), VOCAB, rtol=1e-6)


def test_batch_size_does_not_matter_and_one_compilation_serves(setting):
    table, _, tokens, batches = setting
    traces = []

    def counted(params, tokens):
        traces.append(tokens.shape)
        return apply(params, tokens)

    split = evaluation.perplexity(counted, table, batches)
    assert traces == [(3, 6)]
    np.testing.assert_allclose(split, evaluation.perplexity(apply, table, [(tokens,)]), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(setting, bad):
    table, _, tokens, batches = setting
    table = table.copy()
    table[tokens[6, 2]] = bad  # Only the last, padded batch may see it.
    first = next(i for i in range(3) if (batches[i][0][:, :-1] == tokens[6, 2]).any())
    with pytest.raises(JaxcompError, match=f"batch {first}: the logits are NaN or infinite"):
        evaluation.perplexity(apply, table, batches)


def test_no_data_is_refused(setting):
    table = setting[0]
    with pytest.raises(DataError, match="no batches"):
        evaluation.perplexity(apply, table, [])
    with pytest.raises(DataError, match="at least 2 tokens"):
        evaluation.perplexity(apply, table, [(np.zeros((2, 1), np.int32),)])
    with pytest.raises(DataError, match="at least 2 tokens"):
        evaluation.perplexity(apply, jax.device_put(table), [(np.zeros(4, np.int32),)])
