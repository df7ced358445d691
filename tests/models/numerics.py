"""Random models and rows, and how the tests of models hold them against mathematics in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.config import Model
from llm_jax.models import families

VOCAB, B, T = 19, 2, 9
SEGMENT_BxT = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [7, 3, 3, 4, 4, 4, 4, 0, 0]], np.int32)

run = jax.jit(families.apply, static_argnums=0)  # one compilation for each config and shape, shared by the tests


def path_name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@functools.lru_cache
def random_params(cfg: Model, seed: int = 0):
    """Every parameter random, also those that `init` sets to zero or one, behind which most mistakes hide."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(families.init, cfg), jax.random.key(0))

    def draw(path, leaf):
        mean = 1.0 if path_name(path).endswith("scale") else 0.0
        return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_tokens(seed: int = 0, shape=(B, T)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int32)


def change_token(tokens_BxT: np.ndarray, t: int) -> np.ndarray:
    """Another token at position t of every row."""
    changed_BxT = tokens_BxT.copy()
    changed_BxT[:, t] = (changed_BxT[:, t] + 1) % VOCAB
    return changed_BxT


def decode(cfg: Model, params, tokens_BxT, chunks, cache) -> np.ndarray:
    """Logits of the whole row, read in chunks of the given lengths."""
    logits, start = [], 0
    for chunk in chunks:
        assert int(getattr(cache, "length", start)) == start  # where a cache counts
        step_BxCxV, cache = run(cfg, params, tokens_BxT[:, start : start + chunk], None, cache)
        logits.append(step_BxCxV)
        start += chunk
    return np.concatenate(logits, axis=1)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.grad, argnums=1, has_aux=True)
def gradient_and_logits(cfg: Model, params, tokens_BxT, targets_BxT, segment_BxT=None):
    """Of the mean cross-entropy of all positions."""
    logits_BxTxV = families.apply(cfg, params, tokens_BxT, segment_BxT)
    logp_BxTx1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BxTxV), targets_BxT[:, :, None], axis=-1)
    return -logp_BxTx1.mean(), logits_BxTxV


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Largest difference as a share of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_gradient(grads, loss_of, params, h: float = 1e-4, tolerance: float = 1e-5, least: float = 1e-6) -> None:
    """A float32 gradient against central differences, at distance h, of a loss of float64 parameters that knows nothing of JAX.

    Each array moves along its own gradient, which shows a wrong length, and in a random direction, which shows what the
    gradient lacks. Each layer of it has some gradient, `least`: one that is never used would train to nothing unnoticed.
    """
    grads, exact, rng = in_float64(grads), in_float64(params), np.random.default_rng(2)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        norm = np.linalg.norm(grad)
        assert all(np.abs(layer).max() > least for layer in (grad if "blocks" in path_name(path) else [grad]))
        random = rng.normal(size=grad.shape)
        for direction in (grad / norm, random / np.linalg.norm(random)):

            def loss_at(step, direction=direction, path=path):
                moved = jax.tree_util.tree_map_with_path(lambda q, x: x + step * direction if q == path else x, exact)
                return loss_of(moved)

            slope = (loss_at(h) - loss_at(-h)) / (2 * h)  # off by the third derivative, O(h^2)
            assert abs(slope - np.sum(grad * direction)) <= tolerance * norm, path_name(path)


def in_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


# Parts of the references.


def mean_nll(logits_TxV, targets_T) -> float:
    return float(np.mean(np.log(np.exp(logits_TxV).sum(-1)) - logits_TxV[np.arange(len(targets_T)), targets_T]))


def layers_of(blocks, number: int) -> list:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(number)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_norm(kind: str, x, scale):
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def reference_rotation(x_TxH, theta: float):
    """Each pair (i, i + H/2) is a complex number that turns by theta^(-2i/H) a position."""
    half = x_TxH.shape[1] // 2
    turned = x_TxH[:, :half] + 1j * x_TxH[:, half:]
    turned = turned * np.exp(1j * np.outer(np.arange(len(x_TxH)), theta ** (-2 * np.arange(half) / (2 * half))))
    return np.concatenate([turned.real, turned.imag], axis=1)


def reference_mlp(cfg: Model, p, x_TxD):
    h_TxF = x_TxD @ p["up"]
    if cfg.mlp == "swiglu":
        gate_TxF = x_TxD @ p["gate"]
        h_TxF = gate_TxF * sigmoid(gate_TxF) * h_TxF
    elif cfg.mlp == "gelu":
        h_TxF = h_TxF / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h_TxF + 0.044715 * h_TxF**3)))
    else:
        h_TxF = np.maximum(h_TxF, 0) ** (1 if cfg.mlp == "relu" else 2)
    return h_TxF @ p["down"]
