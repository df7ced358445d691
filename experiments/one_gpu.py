"""A sweep for one GPU: five shapes of 1 to 36 million parameters at four budgets, on Python's own sources.

llm-jax sweep experiments/one_gpu.py
llm-jax bench sweep experiments/one_gpu.py --alone 3

The second, on an H100 with 16 CPU cores (jax 0.11.2), data prepared and nothing compiled: 125.7 s for the sweep, 573 trials an hour;
in a process each 32.0 s a trial (mean of three), 113 an hour: x 5.09. Losses of the two ways differ by 0.22 % at most.
"""

from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, isoflop

experiment = Experiment(
    model=Model(vocab_size=256, dtype="bfloat16"),
    data=Data(source="stdlib", context=256),
    train=Train(schedule="cosine", tokens_per_step=8_192),
    ladder=Ladder(aspect=64),
    axes=isoflop(budgets=[1e14, 2e14, 4e14, 8e14], depths=[3, 4, 5.5, 7, 9]),
)
