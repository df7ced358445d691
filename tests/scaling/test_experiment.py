"""Axes, trials and the ladder."""

import pytest

from llm_jax import ladder
from llm_jax.config import Config, Data, Model, Train
from llm_jax.ladder import Ladder
from llm_jax.parts import num_params
from llm_jax.settings import BadInput, override
from scaling import experiment
from scaling.experiment import Experiment, axis, chain, isoflop, product, zipped


def test_axes_combine():
    a, b = axis("model.d_model", [32, 64]), axis("train.seed", [0, 1, 2])
    assert len(product(a, b)) == 6
    assert product(a, b)[1] == {"model.d_model": 32, "train.seed": 1}
    assert zipped(a, axis("train.seed", [5, 6])) == (
        {"model.d_model": 32, "train.seed": 5},
        {"model.d_model": 64, "train.seed": 6},
    )
    assert chain(a, b) == a + b
    with pytest.raises(BadInput, match="2 and 3 points"):
        zipped(a, b)
    with pytest.raises(BadInput, match=r'"train\.seed" is there twice'):
        product(b, b)


def test_isoflop_trials_cost_the_same():
    """6 N D of each trial is its budget, to the rounding of D to whole steps."""
    found = experiment.trials(Experiment(ladder=Ladder(aspect=16), axes=isoflop([1e11, 1e12], [2, 3, 4])))
    assert len(found) == 6
    for one in found:
        assert one.counts["C_flops"] == pytest.approx(one.point["compute"], rel=0.01)
        assert one.config.resolved
        assert one.config.train.tokens % one.config.train.tokens_per_step == 0
    assert len({one.id for one in found}) == 6


def test_the_ladder_keeps_its_aspect():
    rungs = Ladder(aspect=32, head_dim=32)
    for depth in (2, 3, 5, 8):
        shape = rungs.shape(depth)
        assert shape["model.d_model"] == 32 * depth
        assert shape["model.num_layers"] == depth
        assert shape["model.d_model"] % shape["model.num_heads"] == 0
    sizes = [num_params(override(Config(), rungs.shape(depth / 2)).model) for depth in range(2, 20)]
    assert sizes == sorted(set(sizes)), "each half rung is larger than the one below"
    with pytest.raises(BadInput, match="depth"):
        rungs.shape(0)


def test_rules_follow_n_and_d():
    """The batch grows with D alone; the rate falls with N and D and grows with the batch; a number given is kept."""
    assert ladder.tokens_per_step(4e6, 128, 1) > ladder.tokens_per_step(1e6, 128, 1)
    assert ladder.tokens_per_step(1e3, 128, 1) == 256
    assert ladder.tokens_per_step(1e9, 128, 4) % 512 == 0
    assert ladder.peak_lr(1e6, 1e6, 512) < ladder.peak_lr(1e5, 1e6, 512)
    assert ladder.peak_lr(1e5, 1e6, 512) == pytest.approx(0.008)
    given = Config(train=Train(tokens=1_000_000, tokens_per_step=1024, peak_lr=1e-3, warmup_steps=7))
    resolved = ladder.resolve(given)
    assert (resolved.train.tokens_per_step, resolved.train.peak_lr, resolved.train.warmup_steps) == (1024, 1e-3, 7)
    assert abs(resolved.train.tokens - 1_000_000) <= 512
    chinchilla = ladder.resolve(Config())
    assert chinchilla.train.tokens == pytest.approx(20 * num_params(chinchilla.model), rel=0.01)


def test_trials_without_repetition_and_with_overrides():
    base = Experiment(model=Model(dropout=0.1), data=Data(context=64), axes=axis("model.num_layers", [1, 2, 2]))
    found = experiment.trials(base)
    assert [one.config.model.num_layers for one in found] == [1, 2]
    assert all(one.config.model.dropout == 0.1 and one.config.data.context == 64 for one in found)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("model.d_modl", "model.d_model"),
        ("dept", "depth"),
        ("train.learning_rate", ""),
        ("data.synthetic.key", "data.synthetic.keys"),
    ],
)
def test_an_axis_that_names_no_field(name, nearest):
    with pytest.raises(BadInput, match=f'axis "{name}" names no field.*{nearest}'):
        experiment.trials(Experiment(axes=axis(name, [1])))


def test_loading_files(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(
        '"""Что покупают N параметров?"""\nfrom scaling.experiment import Experiment\nexperiment = Experiment()\n'
    )
    found, docstring = experiment.load(good)
    assert found == Experiment()
    assert docstring == "Что покупают N параметров?"
    with pytest.raises(BadInput, match=r"did you mean .*good\.py"):
        experiment.load(tmp_path / "god.py")
    (tmp_path / "none.py").write_text("x = 1\n")
    with pytest.raises(BadInput, match='names no "experiment"'):
        experiment.load(tmp_path / "none.py")
    (tmp_path / "bad.py").write_text("from llm_jax.config import Model\nModel(d_model=30, num_heads=4)\n")
    with pytest.raises(BadInput, match=r"bad\.py: model\.num_heads=4 does not divide"):
        experiment.load(tmp_path / "bad.py")
