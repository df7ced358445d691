"""What do idle parameters buy? Loss against active and total parameters: Switch layers of 2 to 32 experts in models of four sizes.

    llm-jax sweep experiments/moe_sparsity.py --workers 2
    llm-jax fit runs/moe_sparsity --law routed
    llm-jax fit runs/moe_sparsity --law routed --where "num_experts <= 16"

The design of Clark et al. 2022 (arXiv:2202.01169): every layer has its MLP replaced by E experts of the same width, a token passes one
of them, and all models see the same tokens, so that active parameters and FLOPs hardly depend on E (the router adds its own) and
total ones grow with it. Their law, log L = a log N + b log E_hat + c log N log E_hat + d, takes N as the active parameters; b < 0 is what
experts buy, and c > 0 that they buy less the larger the model. In the table: N_active, N_params (total), num_experts, sparsity.

Measured 2026-11-22 on 16 CPU cores (--workers 16, two minutes), 24 trials of one seed, nats a byte:

    active        dense   2 experts   4       8       16      32
    10,336        1.973   1.930       1.944   1.923   1.953   1.961
    20,112        1.796   1.767       1.737   1.760   1.722   1.734
    32,960        1.687   1.674       1.672   1.640   1.638   1.665
    95,640        1.545   1.542       1.540   1.549   1.524   1.537

A million bytes feed no more than 8 to 16 experts, which buy 1 to 4 % of the loss, 1 % at the largest size. How much of that is
noise, one seed does not say: the loss of the second row rises by 1.3 % from 4 experts to 8 and falls again. Clark's law is fitted and
not determined: b, c, E_start and E_max are unbounded. It wants more tokens and seeds.
"""

from llm_jax.config import Data, Experts, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, axis, product

experiment = Experiment(
    # As experiments/quickstart.py, for two CPU cores. One expert a token, weighted by its probability, as in Switch; dropless.
    model=Model(vocab_size=256, rope_theta=100.0, experts=Experts(per_token=1, normalize=False)),
    data=Data(source="stdlib", context=64),
    train=Train(schedule="cosine", tokens=1_000_000),
    ladder=Ladder(aspect=16, num_heads=4),
    axes=product(axis("model.experts.number", [0, 2, 4, 8, 16, 32]), axis("depth", [1, 1.5, 2, 3])),
    law="routed",
)
