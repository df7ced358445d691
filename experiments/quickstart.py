"""What do N parameters and D bytes of Python buy? Small models on the standard library's own sources.

make quickstart
"""

from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, Target, isoflop

experiment = Experiment(
    model=Model(vocab_size=256),
    data=Data(source="stdlib", context=128),
    train=Train(schedule="cosine"),
    ladder=Ladder(aspect=16, head_dim=32),
    axes=isoflop(budgets=[1e11, 3e11, 1e12], depths=[2, 3, 4, 5]),
    forecast=Target(compute=3e12),
)
