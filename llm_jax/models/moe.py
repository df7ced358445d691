"""Mixtures of experts: a router, and MLPs of which a token passes a few.

A choice is a token with one of its experts. Choices are sorted by expert into R = P x Q rows, P blocks of Q rows that belong to one
expert each, so that all experts are one batched product of matrices:

    dropless   blocks are small, and an expert has as many as its choices fill; nothing is dropped whatever the load
    capacity   one block an expert; the choices that it has no row for are dropped, the earliest kept

Tokens move by gathers alone, backwards too: a scatter that adds has no fixed order on a GPU, and is slow on a CPU. Parameters of a
layer are a dict: router_DxE, router_bias_E, up_ExDxF, gate_ExDxF, down_ExFxD, and shared_up, shared_gate, shared_down of an MLP as
wide as the shared experts together, which is their sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from llm_jax import axes, kernels
from llm_jax.config import Experts, Model
from llm_jax.models.layers import activate, normal, normal_out, project
from llm_jax.settings import BadInput

Params = dict[str, jax.Array]
Routing = dict[str, jax.Array]
"""What a layer tells of its router, sums over M tokens in float32: "load" (E; choices of each expert before any is dropped), "dropped"
(tokens' worth of choices), "balance" (M times the loss of Switch), "router_z" (of logsumexp^2), "entropy" (in nats)."""
BLOCKS_PER_EXPERT = 8
"""Of a dropless layer at even load. More pad less, at most a row in BLOCKS_PER_EXPERT, and copy the weights more often, once a block."""
LEAST_ROWS = 32
"""Of a block, where an expert has as many: smaller products cost a CPU two to three times as much (two cores, width 64)."""


class Layout(NamedTuple):
    """Where the choices lie in rows sorted by expert."""

    row_MxJ: jax.Array
    """Of each choice; R where it is dropped."""
    choice_R: jax.Array
    """The choice m J + j in each row; M J where there is none."""
    expert_P: jax.Array | None
    """Of each block; None where block and expert are one."""


def choose(experts: Experts, score_MxE: jax.Array, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Each token's k experts, int32 MxJ, best first, and their weights, float32 MxJ. The bias moves the choice alone."""
    ranked_MxE = score_MxE if bias_E is None else score_MxE + jnp.broadcast_to(bias_E, score_MxE.shape)
    expert_MxJ = jax.lax.top_k(jax.lax.stop_gradient(ranked_MxE), experts.per_token)[1]
    # A comparison and not a gather, as in losses.token_nll.
    weight_MxJ = jnp.where(_one_hot(expert_MxJ, experts.number), score_MxE[:, None, :], 0).sum(-1)
    if experts.normalize and experts.routing == "token":
        weight_MxJ = weight_MxJ / (weight_MxJ.sum(-1, keepdims=True) + 1e-20)
    return expert_MxJ, weight_MxJ


def _one_hot(index: jax.Array, number: int) -> jax.Array:
    return index[..., None] == jnp.arange(number, dtype=index.dtype).reshape((1,) * index.ndim + (-1,))


def block_rows(choices: int, number: int) -> int:
    """Rows of a dropless block: a power of two, so that at even load an expert fills about BLOCKS_PER_EXPERT of LEAST_ROWS or more."""
    wanted = max(LEAST_ROWS, choices // (BLOCKS_PER_EXPERT * number))
    return 2 ** int(math.log2(max(1, min(wanted, choices // number))))


def capacity(experts: Experts, tokens: int) -> int:
    """Rows of an expert of which choices beyond are dropped: ceil(c k M / E), at most M."""
    assert experts.capacity_factor is not None
    return min(tokens, math.ceil(experts.capacity_factor * experts.per_token * tokens / experts.number))


def layout(expert_MxJ: jax.Array, number: int, rows: int | None = None) -> Layout:
    """Rows for all choices, in blocks of `block_rows`; or `rows` an expert for its earliest, counted over tokens, then over J."""
    choices = expert_MxJ.size
    expert_A = expert_MxJ.reshape(-1)
    counting_A = jnp.arange(choices, dtype=jnp.int32)
    count_E = _one_hot(expert_A, number).sum(0, dtype=jnp.int32)
    sorted_A = jnp.argsort(expert_A, stable=True)
    place_A = jnp.zeros_like(counting_A).at[sorted_A].set(counting_A, unique_indices=True)
    rank_A = place_A - (jnp.cumsum(count_E) - count_E)[expert_A]
    if rows is None:
        block = block_rows(choices, number)
        blocks = (choices + number * (block - 1)) // block  # the most that can be needed, whatever the load
        padded_E = -(-count_E // block) * block
        end_E = jnp.cumsum(padded_E)
        row_A = (end_E - padded_E)[expert_A] + rank_A
        start_P = jnp.arange(blocks, dtype=jnp.int32) * block
        expert_P = jnp.minimum((start_P[:, None] >= end_E[None, :]).sum(1, dtype=jnp.int32), number - 1)
        total = blocks * block
    else:
        total, expert_P = number * rows, None
        row_A = jnp.where(rank_A < rows, expert_A * rows + rank_A, total)
    choice_R = jnp.full((total,), choices, jnp.int32).at[row_A].set(counting_A, mode="drop")
    return Layout(row_A.reshape(expert_MxJ.shape), choice_R, expert_P)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x; zeros where the index is beyond the last."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_MxD: jax.Array, where: Layout) -> jax.Array:
    """x_RxD: a token's activations in the row of each of its choices, zeros in rows without one."""
    return _take(x_MxD, where.choice_R // where.row_MxJ.shape[1])


def _dispatch_back(where: Layout, grad_RxD: jax.Array):
    return _take(grad_RxD, where.row_MxJ).sum(1), None


dispatch.defvjp(lambda x_MxD, where: (dispatch(x_MxD, where), where), _dispatch_back)


@jax.custom_vjp
def combine(y_RxD: jax.Array, weight_MxJ: jax.Array, where: Layout) -> jax.Array:
    """y_MxD: the sum over a token's choices, times their weights, in float32; a dropped one adds nothing."""
    y_MxJxD = _take(y_RxD, where.row_MxJ).astype(jnp.float32)
    return (y_MxJxD * weight_MxJ[:, :, None]).sum(1).astype(y_RxD.dtype)


def _combine_back(saved: tuple[jax.Array, jax.Array, Layout], grad_MxD: jax.Array):
    # The rows are gathered anew: kept, they would be the largest array of the layer.
    y_RxD, weight_MxJ, where = saved
    grad_RxD = _take(grad_MxD, where.choice_R // weight_MxJ.shape[1]).astype(jnp.float32)
    weight_R = _take(weight_MxJ.reshape(-1), where.choice_R)
    of_weight_MxJ = (_take(y_RxD, where.row_MxJ) * grad_MxD[:, None, :]).sum(-1, dtype=jnp.float32)
    return (grad_RxD * weight_R[:, None]).astype(y_RxD.dtype), of_weight_MxJ, None


combine.defvjp(lambda y, weight, where: (combine(y, weight, where), (y, weight, where)), _combine_back)


@jax.custom_vjp
def grouped_product(x_PxQxD: jax.Array, kernel_ExDxF: jax.Array, expert_P: jax.Array) -> jax.Array:
    """x_PxQxF: each block times the matrix of its expert, as one batched product with a copy of the matrix for each block.

    A faster kernel for it would have these arguments: tokamax's Mosaic one, for instance, which needs Python 3.12, jax >= 0.11.1 and
    a GPU.
    """
    return jnp.einsum("pqd,pdf->pqf", x_PxQxD, kernel_ExDxF[expert_P])


def sum_multiplied(by_block_PxDxF: jax.Array, expert_P: jax.Array, number: int) -> jax.Array:
    """The sum over each expert's blocks, ExDxF in float32, as a product: on a GPU sums by scattering have no fixed order."""
    one_hot_PxE = _one_hot(expert_P, number).astype(by_block_PxDxF.dtype)
    return jnp.einsum("pe,pdf->edf", one_hot_PxE, by_block_PxDxF, preferred_element_type=jnp.float32)


def sum_scattered(by_block_PxDxF: jax.Array, expert_P: jax.Array, number: int) -> jax.Array:
    """The same by scattering, which is in order on a CPU and takes half the time there."""
    wide_PxDxF = by_block_PxDxF.astype(jnp.float32)  # 128 blocks added up in bfloat16 are 2 % off
    return jax.ops.segment_sum(wide_PxDxF, expert_P, number, indices_are_sorted=True)


def _grouped_back(saved: tuple[jax.Array, jax.Array, jax.Array], grad_PxQxF: jax.Array):
    x_PxQxD, kernel_ExDxF, expert_P = saved
    of_x_PxQxD = jnp.einsum("pqf,pdf->pqd", grad_PxQxF, kernel_ExDxF[expert_P])
    by_block_PxDxF = jnp.einsum("pqd,pqf->pdf", x_PxQxD, grad_PxQxF)
    add = functools.partial(jax.lax.platform_dependent, by_block_PxDxF, expert_P)
    number = kernel_ExDxF.shape[0]
    of_kernel_ExDxF = add(
        cpu=functools.partial(sum_scattered, number=number), default=functools.partial(sum_multiplied, number=number)
    )
    return of_x_PxQxD, of_kernel_ExDxF.astype(kernel_ExDxF.dtype), None


grouped_product.defvjp(
    lambda x, kernel, expert: (grouped_product(x, kernel, expert), (x, kernel, expert)), _grouped_back
)


def ragged_product(x_PxQxD: jax.Array, kernel_ExDxF: jax.Array, expert_P: jax.Array) -> jax.Array:
    """The same by `jax.lax.ragged_dot`: what there is to compare with.

    On a CPU it multiplies every row with every expert: 54 ms where `grouped_product` takes 6, for 4,096 rows, 8 experts of 128 x 256
    (two cores, jax 0.10.2), and 177 ms where it takes 3 for 32 of 128 x 64.
    """
    blocks, rows, width = x_PxQxD.shape
    size_E = rows * _one_hot(expert_P, kernel_ExDxF.shape[0]).sum(0, dtype=jnp.int32)
    return jax.lax.ragged_dot(x_PxQxD.reshape(-1, width), kernel_ExDxF, size_E).reshape(blocks, rows, -1)


LANES, TILE = 128, (512, 1024, 1024)
"""Of a TPU's registers; and rows, inputs and outputs that its kernel holds: 10 MB with two tiles of each on their way."""


def tiled_product(
    x_PxQxD: jax.Array, kernel_ExDxF: jax.Array, expert_P: jax.Array, interpret: bool = False
) -> jax.Array:
    """The same by JAX's grouped matmul for TPUs, megablox (Gale et al. 2022), for matrices of whole LANES: no copies of them.

    `jax.lax.ragged_dot` has a TPU kernel too, but not for the gradient of the matrices, where each expert takes all rows (libtpu 0.0.42).
    """
    blocks, rows, width = x_PxQxD.shape
    size_E = rows * _one_hot(expert_P, kernel_ExDxF.shape[0]).sum(0, dtype=jnp.int32)
    sides = (blocks * rows, *kernel_ExDxF.shape[1:])
    tile = (math.gcd(TILE[0], sides[0]), *(min(most, side) for most, side in zip(TILE[1:], sides[1:], strict=True)))
    flat = gmm(x_PxQxD.reshape(-1, width), kernel_ExDxF, size_E, x_PxQxD.dtype, tile, interpret=interpret)
    return flat.reshape(blocks, rows, -1)


def _experts(cfg: Model, params: Params, x_PxQxD: jax.Array, expert_P: jax.Array | None) -> jax.Array:
    """Each block through its expert; block p through expert p where `expert_P` is None."""

    def product(x_PxQxD, name):
        kernel = params[name].astype(x_PxQxD.dtype)
        if expert_P is None:
            return x_PxQxD @ kernel
        tiled = kernels.platform() == "tpu" and all(side % LANES == 0 for side in kernel.shape[1:])
        return (tiled_product if tiled else grouped_product)(x_PxQxD, kernel, expert_P)

    gate_PxQxF = product(x_PxQxD, "gate") if cfg.mlp == "swiglu" else None
    return product(activate(cfg.mlp, product(x_PxQxD, "up"), gate_PxQxF), "down")


def _token_choice(cfg: Model, params: Params, x_MxD, expert_MxJ, weight_MxJ, train: bool, axis: str | None):
    """(y_MxD, choices dropped). With an axis, experts are spread over it and the rows travel to them and back (GShard)."""
    number, tokens = cfg.experts.number, x_MxD.shape[0]
    rows = capacity(cfg.experts, tokens) if train and cfg.experts.capacity_factor is not None else None
    if axis is not None:
        # An exchange has one shape for all: without a capacity, room for the case that all tokens go to one expert.
        where = layout(expert_MxJ, number, rows or tokens)
        x_ExQxD = dispatch(x_MxD, where).reshape(number, -1, x_MxD.shape[1])
        here_PxQxD = jax.lax.all_to_all(x_ExQxD, axis, split_axis=0, concat_axis=1, tiled=True)
        y_PxQxD = _experts(cfg, params, here_PxQxD, None)
        y_PxQxD = jax.lax.all_to_all(y_PxQxD, axis, split_axis=1, concat_axis=0, tiled=True)
    else:
        where = layout(expert_MxJ, number, rows)
        blocks = number if where.expert_P is None else len(where.expert_P)
        y_PxQxD = _experts(cfg, params, dispatch(x_MxD, where).reshape(blocks, -1, x_MxD.shape[1]), where.expert_P)
    y_MxD = combine(y_PxQxD.reshape(-1, x_MxD.shape[1]), weight_MxJ, where)
    return y_MxD, (where.row_MxJ == len(where.choice_R)).sum(dtype=jnp.float32)


def _collect(y_ExQxD: jax.Array, token_ExQ: jax.Array, tokens: int) -> jax.Array:
    """y_MxD: the sum of each token's rows, expert after expert, so that its order is fixed."""

    def add(total_MxD, expert):
        return total_MxD.at[expert[0]].add(expert[1], unique_indices=True), None

    zeros_MxD = jnp.zeros((tokens, y_ExQxD.shape[-1]), y_ExQxD.dtype)
    return jax.lax.scan(add, zeros_MxD, (token_ExQ, y_ExQxD))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fetch(x_MxD: jax.Array, token_ExQ: jax.Array, tokens: int) -> jax.Array:
    return x_MxD[token_ExQ]


_fetch.defvjp(
    lambda x_MxD, token_ExQ, tokens: (x_MxD[token_ExQ], token_ExQ),
    lambda tokens, token_ExQ, grad_ExQxD: (_collect(grad_ExQxD, token_ExQ, tokens), None),
)


def _expert_choice(cfg: Model, params: Params, x_MxD: jax.Array, score_MxE: jax.Array):
    """(y_MxD, token_ExQ): each expert takes the k M / E tokens of the highest scores for it, which are their weights (Zhou et al.)."""
    tokens = x_MxD.shape[0]
    rows = max(1, tokens * cfg.experts.per_token // cfg.experts.number)
    weight_ExQ, token_ExQ = jax.lax.top_k(score_MxE.T, rows)
    y_ExQxD = _experts(cfg, params, _fetch(x_MxD, token_ExQ, tokens), None)
    y_ExQxD = y_ExQxD.astype(jnp.float32) * weight_ExQ[:, :, None]
    return _collect(y_ExQxD, token_ExQ, tokens).astype(x_MxD.dtype), token_ExQ


def mixture(
    cfg: Model, params: Params, x_MxD: jax.Array, train: bool, axis: str | None = None, total: Callable | None = None
) -> tuple[jax.Array, Routing]:
    """(y_MxD, Routing) of one layer. The router computes in float32, whatever the experts do (Fedus et al. 2021, section 2.4).

    `train` decides about capacity and experts' choice, which evaluation and generation do without. Inside of shard_map, `axis` names
    the mesh axis that experts are spread over, and `total` adds up over all devices that have tokens, whose Routing it then is.
    """
    experts, tokens = cfg.experts, x_MxD.shape[0]
    logits_MxE = jnp.matmul(x_MxD.astype(jnp.float32), params["router"], precision=jax.lax.Precision.HIGHEST)
    score_MxE = jax.nn.softmax(logits_MxE) if experts.gate == "softmax" else jax.nn.sigmoid(logits_MxE)
    if experts.routing == "expert" and train:
        y_MxD, token_ExQ = _expert_choice(cfg, params, x_MxD, score_MxE)
        load_E = jnp.full((experts.number,), token_ExQ.shape[1], jnp.float32)
        chosen_M = jnp.zeros((tokens,), bool).at[token_ExQ.reshape(-1)].set(True)
        dropped = (~chosen_M).sum(dtype=jnp.float32)
    else:
        expert_MxJ, weight_MxJ = choose(experts, score_MxE, params.get("router_bias"))
        y_MxD, dropped = _token_choice(cfg, params, x_MxD, expert_MxJ, weight_MxJ, train, axis)
        dropped = dropped / experts.per_token
        load_E = _one_hot(expert_MxJ, experts.number).sum((0, 1), dtype=jnp.float32)
    if experts.shared:
        gate_MxF = project(x_MxD, params["shared_gate"]) if cfg.mlp == "swiglu" else None
        y_MxD += project(activate(cfg.mlp, project(x_MxD, params["shared_up"]), gate_MxF), params["shared_down"])
    share_MxE = score_MxE / score_MxE.sum(-1, keepdims=True)
    routing = {
        "load": load_E,
        "share": share_MxE.sum(0),
        "dropped": dropped,
        "router_z": jnp.square(jax.nn.logsumexp(logits_MxE, axis=-1)).sum(),
        "entropy": -jnp.where(share_MxE > 0, share_MxE * jnp.log(jnp.where(share_MxE > 0, share_MxE, 1)), 0).sum(),
    }
    if total is not None:
        routing = total(routing)
    # Switch, eq. 4: E sum_e f_e P_e, of the share of choices and the mean share of the score; 1 where both are even. Times M.
    f_E = routing["load"] / routing["load"].sum()
    routing["balance"] = experts.number * (f_E * routing.pop("share")).sum()
    return y_MxD, routing


class Mixture(nn.Module):
    """The experts of one block in place of its MLP; what its router does is sown in the collection "routing"."""

    cfg: Model
    train: bool

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        cfg, number, shared = self.cfg, self.cfg.experts.number, self.cfg.experts.shared * self.cfg.expert_width
        params = {"router": self.param("router", normal(("embed", "expert"), cfg.d_model), (cfg.d_model, number))}
        if cfg.experts.balance == "bias":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("expert",))
            params["router_bias"] = self.param("router_bias", zeros, (number,))
        kinds: list[tuple[str, tuple[str, ...], tuple[int, ...], int]] = [
            ("", ("expert",), (number,), cfg.expert_width)
        ]
        kinds += [("shared_", (), (), shared)] if shared else []
        for prefix, names, shape, width in kinds:
            for name in ("up", "gate") if cfg.mlp == "swiglu" else ("up",):
                init = normal((*names, "embed", "mlp"), cfg.d_model)
                params[prefix + name] = self.param(prefix + name, init, (*shape, cfg.d_model, width))
            init = normal_out((*names, "mlp", "embed"), width, cfg.num_layers)
            params[f"{prefix}down"] = self.param(f"{prefix}down", init, (*shape, width, cfg.d_model))
        if axes.mesh().empty or (self.train and cfg.experts.routing == "expert"):  # these choose among all rows
            y_MxD, routing = mixture(cfg, params, x_BxTxD.reshape(-1, cfg.d_model), self.train)
            y_BxTxD = y_MxD.reshape(x_BxTxD.shape)
        else:
            y_BxTxD, routing = expert_parallel(cfg, params, x_BxTxD, axes.mesh(), self.train)
        self.sow("routing", "sums", routing, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        return y_BxTxD


def rebalance(experts: Experts, bias: jax.Array, load: jax.Array) -> jax.Array:
    """The bias after a step, ...xE: up by `bias_rate` where an expert had less than the mean load, down where it had more.

    Algorithm 1 of Wang et al. 2024 (arXiv:2408.15664): a sign and not the difference, which they found to do less well.
    """
    return bias + experts.bias_rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def expert_parallel(cfg: Model, params: Any, x_BxTxD: jax.Array, mesh: Mesh | AbstractMesh, train: bool = True):
    """(y_BxTxD, Routing) as from `mixture`, with experts spread over the mesh axis "expert" (GShard, Lepikhin et al. 2020), and tokens as
    the table of llm_jax/axes.py says: over it too, and over all other axes but "tensor", which has the hidden width.

    Each device routes its own rows, sends the choices to the devices of their experts by one all-to-all, and gets the results back by
    another. Capacity counts for each pair of device and expert. Without a capacity there is room for every token at every expert: exact,
    at E / k times the products. Raises BadInput where the axis does not divide rows or experts, and for experts that choose.
    """
    sizes, number, axis = dict(mesh.shape), cfg.experts.number, "expert"
    size = sizes.get(axis, 1)
    for name, amount in (("model.experts.number", number), ("rows of a batch", x_BxTxD.shape[0])):
        if amount % size:
            near = max(size, size * round(amount / size))
            raise BadInput(f"{name}={amount} is no multiple of the mesh axis {axis}={size}; nearest that is: {near}")
    if cfg.experts.routing == "expert" and train:
        raise BadInput("model.experts.routing=expert chooses among all rows and is not spread over devices; use token")
    hidden = "mlp" if cfg.expert_width % sizes.get("tensor", 1) == 0 else None
    into, out = ("embed", hidden), (hidden, "embed")
    names: dict[str, tuple[str | None, ...]] = {"up": into, "gate": into, "down": out}
    names = {f"shared_{name}": of for name, of in names.items()} | {name: (axis, *of) for name, of in names.items()}
    specs = {name: axes.spec(names.get(name, ()), leaf.shape, sizes) for name, leaf in params.items()}
    rows = axes.spec(("rows", "sequence"), x_BxTxD.shape, sizes)
    partial = axes.spec((hidden,), (cfg.expert_width,), sizes)

    def local(params, x_BxTxD):
        params = {name: axes.gathered(leaf, specs[name], "fsdp") for name, leaf in params.items()}
        x_MxD, exchange = x_BxTxD.reshape(-1, cfg.d_model), axis if size > 1 else None
        y_MxD, routing = mixture(cfg, params, x_MxD, train, exchange, lambda sums: axes.total(sums, rows))
        return axes.total(y_MxD, partial).reshape(x_BxTxD.shape), routing

    # Before they are gathered, inside: half the bytes in bfloat16. The router computes in float32.
    params = {name: leaf if name.startswith("router") else leaf.astype(x_BxTxD.dtype) for name, leaf in params.items()}
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, rows), out_specs=(rows, PartitionSpec()), check_vma=False)
    return mapped(params, x_BxTxD)
