"""What do N parameters and D bytes of Python buy? Small models on the standard library's own sources.

    make quickstart

Two CPU cores, 330 seconds with the installation: twelve trials of 10 k to 165 k parameters, 3.1e12 FLOPs, and the target of 1.6e12.
Measured 2026-11-22 on Python 3.11's library, seed 0: N* = 2.3e4, 3.9e4, 5.5e4, inside the grid of each budget; forecast for
N = 95,640, D = 2,788,480: 1.4488 [1.4091, 1.4896] nats per token; trained: 1.4572.
"""

from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, Target, chain, isoflop

experiment = Experiment(
    # Four heads on every rung: with one, the loss of the smallest models is 3 % higher and depends twice as much on the seed.
    # Short rows want a short rotary period, and cost a CPU less.
    model=Model(vocab_size=256, rope_theta=100.0),
    data=Data(source="stdlib", context=64),
    train=Train(schedule="cosine"),
    ladder=Ladder(aspect=16, num_heads=4),
    axes=chain(
        isoflop(budgets=[6e10], depths=[1, 1.5, 2, 2.5]),
        isoflop(budgets=[1.8e11], depths=[1.5, 2, 2.5, 3]),
        isoflop(budgets=[5.4e11], depths=[2, 2.5, 3, 3.5]),
    ),
    forecast=Target(compute=1.6e12),
)
