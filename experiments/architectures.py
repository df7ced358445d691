"""Which architecture buys the most at equal FLOPs? Transformers with and without encoder or experts, LSTMs, RNNs, and what was before.

    llm-jax sweep experiments/architectures.py
    llm-jax fit runs/architectures --by family
    llm-jax report runs/architectures

The counterpart of Kaplan et al. 2020, figure 7, with the law of each family and its intervals. An encoder needs tokens to read before
its decoder predicts any: all families read the first half of a row and are scored on the second, the same targets after the same
context; C = 6 N D counts the tokens of both halves. 94 trials, 6.6e13 FLOPs.

Measured 2026-11-22 on 16 CPU cores (--workers 16, 17 minutes), Python 3.12's library, one seed, as this file was before the encoder:
87 trials that predicted every token of a row, at larger budgets. Least loss in nats a byte at each budget of C = 6 N D, N active:

    C          experts   Transformer   LSTM     RNN      feed-forward
    3e11       1.553     1.633         1.723    1.665    1.716
    1.2e12     1.382     1.446         1.530    1.506    1.599
    4.8e12     1.270     1.318         1.375    1.401    1.514
    alpha      0.61 [0.51, 0.70]   0.54 [0.46, 0.60]   0.31 [0.20, 0.37]   0.48 [0.35, 0.61]   0.90 [0.74, 1.08]
    beta       0.53 [0.40, 0.62]   0.51 [0.38, 0.56]   0.35 [0.24, 0.51]   0.48 [0.34, 0.68]   0.49 [0.32, 0.67]

5-grams counted on 1 M and 10 M bytes: 1.44 and 1.379. The LSTM overtakes the RNN between 1.2e12 and 4.8e12. The RNN's minima
still lie at the largest shapes tried for the two larger budgets.
"""

from llm_jax.config import Data, Model, Train
from llm_jax.ladder import Ladder
from scaling.experiment import Experiment, axis, chain, isoflop, product


def grid(*depths: list[float]):
    """The shapes of three budgets. They are to bracket the best one, which is deeper where a layer has fewer parameters."""
    return chain(*(isoflop(budgets=[c], depths=d) for c, d in zip((1e11, 4e11, 1.6e12), depths, strict=True)))


SHAPES = {
    "transformer": grid([1, 1.5, 2, 2.5, 3], [1.5, 2, 2.5, 3, 4], [2, 2.5, 3, 4, 5]),
    "encoder_decoder": grid([1, 1.5, 2, 2.5, 3], [1.5, 2, 2.5, 3, 4], [2, 2.5, 3, 4, 5]),
    "lstm": grid([1, 1.5, 2, 2.5, 3], [1.5, 2, 2.5, 3, 4], [2, 2.5, 3, 4, 5, 6]),
    "rnn": grid([1.5, 2, 2.5, 3, 4, 5], [2.5, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9]),
    "feedforward": grid([1, 1.5, 2, 2.5], [1, 1.5, 2, 2.5, 3, 4], [1.5, 2, 2.5, 3, 4, 5]),
}
MIXTURES = grid([1, 1.5, 2, 2.5], [1.5, 2, 2.5, 3], [2, 2.5, 3, 4])
# As many active parameters in the experts as in the dense MLP: 2 of 8 experts of half its width.
EXPERTS = {"model.experts.number": 8, "model.experts.per_token": 2, "model.experts.granularity": 2}

experiment = Experiment(
    model=Model(vocab_size=256, rope_theta=100.0),
    data=Data(source="stdlib", context=64, prefix=32),
    train=Train(schedule="cosine"),
    ladder=Ladder(aspect=16, num_heads=4),
    axes=chain(
        *(product(axis("model.family", [family]), shapes) for family, shapes in SHAPES.items()),
        product([EXPERTS], MIXTURES),
        product(axis("model.family", ["ngram"]), axis("train.tokens", [1_000_000, 10_000_000])),
    ),
)
