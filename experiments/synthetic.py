"""Does the chain find a floor that is known? A source of exact entropy rate, its fitted E beside the truth.

    llm-jax sweep experiments/synthetic.py --workers 2
    llm-jax fit runs/synthetic
    llm-jax report runs/synthetic

Two CPU cores, three minutes. Measured 2026-11-22 against the true 0.8599 nats a token: E = 0.818 [0.774, 0.872] with seed 0, 0.859
[0.830, 0.895] with seed 1, 0.816 [0.750, 0.881] with seed 2; alpha 0.65 to 0.78, beta 0.36 to 0.44; minima inside the grid of each budget.
"""

from llm_jax.config import Data, Model, Synthetic, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, Target, chain, isoflop

experiment = Experiment(
    model=Model(vocab_size=256, rope_theta=100.0),
    data=Data(source="synthetic", context=64, synthetic=Synthetic(keys=16_384, exponent=1.3, noise=0.1)),
    train=Train(schedule="cosine"),
    ladder=Ladder(aspect=16, num_heads=4),
    axes=chain(
        isoflop(budgets=[6e10], depths=[1, 1.5, 2, 2.5]),
        isoflop(budgets=[1.8e11], depths=[1, 1.5, 2, 2.5]),
        isoflop(budgets=[5.4e11], depths=[1.5, 2, 2.5, 3]),
    ),
    forecast=Target(compute=1.6e12),
)
