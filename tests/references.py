"""Independent NumPy float64 references of the layer algorithms, written from the papers.

One column at a time, no blocks, the inverse Hessian and its Cholesky factor as the papers print
them.
"""

import numpy as np


def int_grid(w, bits, symmetric=True, full_range=True):
    """Scale and zero point of one group: w (out, cols) -> (out, 1), unsigned codes 0..2^b-1."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    top = 2**bits - 1
    if symmetric:
        a = np.maximum(-low, high)
        a[a == 0] = 1
        if full_range:
            return (2 * a / top)[:, None], np.full((len(w), 1), 2.0 ** (bits - 1))
        return (a / (2 ** (bits - 1) - 1))[:, None], np.full((len(w), 1), 2.0 ** (bits - 1))
    empty = (low == 0) & (high == 0)
    low, high = np.where(empty, -1, low), np.where(empty, 1, high)
    scale = (high - low) / top
    return scale[:, None], np.round(-low / scale)[:, None]


def int_round(w, scale, zero, bits, narrow=False):
    q = np.clip(np.round(w / scale) + zero, 1 if narrow else 0, 2**bits - 1)
    return scale * (q - zero)


def rtn(w, bits, group=None, symmetric=True, full_range=True):
    group = group or w.shape[1]
    out = np.empty_like(w)
    for k in range(0, w.shape[1], group):
        part = w[:, k : k + group]
        grid = int_grid(part, bits, symmetric, full_range)
        out[:, k : k + group] = int_round(part, *grid, bits, symmetric and not full_range)
    return out


def damped(h, damping):
    """The Hessian that the solver inverts: dead inputs at the mean of the others, then damping."""
    h = np.array(h, np.float64)
    diagonal = np.diag(h).copy()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if (~dead).any() else 1.0
    h[dead, dead] = mean
    return h + damping * mean * np.eye(len(h)), dead


def inverse_factor(h):
    """Upper Cholesky factor U of the inverse, inv(h) = U.T @ U."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def gptq(
    w, h, bits, group=None, damping=0.01, symmetric=True, static=False, order=None, full_range=True
):
    """GPTQ column by column; returns the quantized weight and sum of squared errors over U_kk."""
    w = np.array(w, np.float64)
    original = w.copy()
    size = w.shape[1]
    group = group or size
    hd, dead = damped(h, damping)
    if not dead.all():
        w[:, dead] = original[:, dead] = 0
    perm = np.arange(size) if order is None else order
    w, hd = w[:, perm], hd[perm][:, perm]
    u = inverse_factor(hd)
    q = np.zeros_like(w)
    loss = 0.0

    def fit(cols):
        return int_grid(cols, bits, symmetric, full_range)

    narrow = symmetric and not full_range
    grids = [fit(original[:, k : k + group]) for k in range(0, size, group)]
    for k in range(size):
        if static or group == size:
            grid = grids[perm[k] // group]
        elif k % group == 0:
            grid = fit(w[:, k : k + group])
        q[:, k] = int_round(w[:, k : k + 1], *grid, bits, narrow)[:, 0]
        error = (w[:, k] - q[:, k]) / u[k, k]
        loss += (error**2).sum()
        w[:, k + 1 :] -= np.outer(error, u[k, k + 1 :])
    return q[:, np.argsort(perm)], loss


def sparsegpt(w, h, sparsity=None, nm=None, block=128, damping=0.01, bits=None, group=None):
    """SparseGPT column by column; masks at block (or M) starts, with exact counts."""
    w = np.array(w, np.float64)
    size = w.shape[1]
    hd, dead = damped(h, damping)
    if not dead.all():
        w[:, dead] = 0
    u = inverse_factor(hd)
    keep = np.ones(w.shape, bool)
    q = np.zeros_like(w)
    loss = 0.0
    step = nm[1] if nm else block
    group = group or size
    grid = int_grid(w, bits, full_range=False) if bits and group == size else None
    for k in range(size):
        if k % step == 0:
            cols = slice(k, min(k + step, size))
            scores = w[:, cols] ** 2 / np.diag(u)[cols] ** 2
            if nm:
                order = np.argsort(scores, axis=1, kind="stable")[:, : nm[1] - nm[0]]
                chosen = np.ones(scores.shape, bool)
                np.put_along_axis(chosen, order, False, 1)
            else:
                count = round(sparsity * scores.size)
                chosen = np.ones(scores.size, bool)
                chosen[np.argsort(scores.ravel(), kind="stable")[:count]] = False
                chosen = chosen.reshape(scores.shape)
            keep[:, cols] = chosen
        if bits and group < size and k % group == 0:
            cols = slice(k, k + group)
            seen = w[:, cols]
            if step >= group:
                seen = np.where(keep[:, cols], seen, 0)
            grid = int_grid(seen, bits, full_range=False)
        value = int_round(w[:, k : k + 1], *grid, bits, True)[:, 0] if bits else w[:, k]
        q[:, k] = np.where(keep[:, k], value, 0)
        error = (w[:, k] - q[:, k]) / u[k, k]
        loss += (error**2).sum()
        w[:, k + 1 :] -= np.outer(error, u[k, k + 1 :])
    return q, keep, loss


def wanda(w, x, sparsity=None, nm=None):
    """Mask of Wanda: per row, or per M consecutive inputs of a row."""
    scores = np.abs(w) * np.linalg.norm(x, axis=0)
    keep = np.ones(w.shape, bool)
    if nm:
        n, m = nm
        blocks = scores.reshape(len(w), -1, m)
        order = np.argsort(blocks, axis=-1, kind="stable")[..., : m - n]
        keep = keep.reshape(blocks.shape)
        np.put_along_axis(keep, order, False, -1)
        return keep.reshape(w.shape)
    order = np.argsort(scores, axis=1, kind="stable")[:, : round(sparsity * w.shape[1])]
    np.put_along_axis(keep, order, False, 1)
    return keep


def ldlq(w, h, scale, low, high):
    """LDLQ of QuIP: H = (U + I) D (U + I)ᵀ, linear feedback of errors, on a fixed uniform grid."""
    size = len(h)
    lower = np.linalg.cholesky(h[::-1, ::-1])
    upper = lower[::-1, ::-1]
    feedback = upper / np.diag(upper) - np.eye(size)
    q = np.zeros_like(w)
    for k in range(size):
        target = w[:, k] + (w[:, :k] - q[:, :k]) @ feedback[:k, k]
        q[:, k] = scale * np.clip(np.round(target / scale), low, high)
    return q


def prox(e, h):
    """tr(E H Eᵀ)."""
    return float(np.einsum("oi,ij,oj->", e, h, e))


def layer(seed, out=24, size=32, tokens=128, kind="correlated"):
    """A random layer: weights, inputs (tokens, in) and H = XᵀX, float64.

    kind: "iid", "correlated" (power-law spectrum), "outliers" (correlated, 4 channels times 20).
    """
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(out, size))
    x = rng.normal(size=(tokens, size))
    if kind != "iid":
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        x = x * np.arange(1, size + 1) ** -0.8 @ basis.T
    if kind == "outliers":
        x[:, rng.choice(size, 4, replace=False)] *= 20
    return w, x, x.T @ x
