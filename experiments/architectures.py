"""Which architecture buys the most at equal FLOPs? Transformers with and without encoder or experts, LSTMs, RNNs, and what was before.

    llm-jax sweep experiments/architectures.py
    llm-jax fit runs/architectures --by family
    llm-jax report runs/architectures

The counterpart of Kaplan et al. 2020, figure 7, with the law of each family and its intervals. An encoder needs tokens to read before
its decoder predicts any: all families read the first half of a row and are scored on the second, the same targets after the same
context; C = 6 N D counts the tokens of both halves. 94 trials, 6.6e13 FLOPs.

Measured 2026-11-22 on 16 CPU cores (--workers 12, 8 minutes), Python 3.12's library, one seed. Least loss in nats a byte at each budget
of C = 6 N D, N active, each between worse ones on both sides; exponents of Chinchilla's law with 95 % intervals of the profile:

    C                1e11    4e11    1.6e12   alpha               beta
    experts          1.833   1.545   1.338    0.50 [0.38, 0.66]   0.34 [0.29, 0.43]
    Transformer      1.884   1.608   1.393    0.58 [0.45, 0.81]   0.36 [0.28, 0.48]
    RNN              1.846   1.656   1.482    0.47 [0.43, 0.59]   0.28 [0.21, 0.43]
    encoder-decoder  1.927   1.683   1.492    0.54 [0.36, 0.68]   0.21 [0.19, 0.36]
    LSTM             1.982   1.727   1.509    0.23 [0.15, 0.31]   0.37 [0.25, 0.45]
    feed-forward     1.886   1.713   1.583    1.06 [0.72, 1.29]   0.38 [0.28, 0.56]

5-grams counted on 1 M and 10 M bytes: 1.366 and 1.288. The decoder-only Transformer is ahead of the
encoder-decoder at each budget on running text; experiments/transliterate.py is a task where they are even.
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
