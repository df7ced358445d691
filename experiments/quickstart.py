"""What do N parameters and D bytes of Python buy? Small models on the standard library's own sources.

make quickstart
"""

from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, Target, chain, isoflop

experiment = Experiment(
    model=Model(vocab_size=256),
    data=Data(source="stdlib", context=128),
    train=Train(schedule="cosine"),
    ladder=Ladder(aspect=8),
    axes=chain(
        isoflop(budgets=[7e10, 2e11], depths=[2, 3, 4, 5]),
        isoflop(budgets=[6e11], depths=[3, 4, 5, 6]),
    ),
    forecast=Target(compute=2e12),
)
