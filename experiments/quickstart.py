"""What do N parameters and D bytes of Python buy? Small models on the standard library's own sources.

    make quickstart

Two CPU cores, three to four minutes after the installation: twelve trials of 10 k to 165 k parameters, 3.1e12 FLOPs, and the target
of 1.6e12, N = 95,640 and D = 2,788,480. Measured 2026-11-22 on Python 3.11's library: N* = 2.3e4, 3.9e4, 5.7e4 with seed 0, inside
the grid of each budget; forecast 1.4493 [1.4107, 1.4890] nats per token, trained 1.4552. Errors of seeds 0 to 4: +0.41, -1.23, -0.11,
-0.02 and -1.22 %, all inside their 90 % intervals. On one H100, with Python 3.12's library: forecast 1.4014 [1.3608, 1.4431],
trained 1.4166.
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
