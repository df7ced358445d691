"""What do N parameters and D bytes of Python buy? Small models on the standard library's own sources.

make quickstart
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
