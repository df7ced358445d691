"""A mixture is compared with a dense model that does the same products; else the ratio measures the models and not the routing."""

from dataclasses import replace

import pytest

from llm_jax import ladder, parts
from llm_jax.config import Config, Data, Experts, Model, Train
from llm_jax.settings import BadInput
from scaling import cli
from scaling.bench import mixture, training

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Config(
    Model(num_layers=1, d_model=16, num_heads=1, experts=Experts(4, 2, granularity=2)),
    Data(context=16),
    Train(tokens_per_step=64, steps_per_call=2),
)


@pytest.mark.parametrize(
    "experts", [Experts(8, 2, granularity=2), Experts(4, 1, normalize=False), Experts(8, 2, shared=1)]
)
@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_the_dense_twin_has_the_active_parameters_but_for_the_routers(experts, mlp):
    model = Model(num_layers=3, d_model=48, num_heads=2, mlp=mlp, experts=experts)
    routers = model.num_layers * model.d_model * experts.number
    assert parts.num_params_active(model, 128) == parts.num_params(mixture.dense_twin(model)) + routers


def test_figures_of_a_mixture_follow_from_each_other(mixed_dtypes, monkeypatch):
    monkeypatch.setattr(training, "ROUNDS", 2)
    monkeypatch.setattr(training, "_product_seconds", lambda: (0.01, 0.01))
    found = mixture.bench_moe(ladder.resolve(TINY))
    sparse, dense = found["mixture"], found["dense"]
    assert found["ratio"] == pytest.approx(sparse["tokens_per_second"] / dense["tokens_per_second"])
    assert found["cpu_ratio"] == pytest.approx(dense["cpu_seconds_per_step"] / sparse["cpu_seconds_per_step"])
    assert sparse["n_params"] > sparse["n_active"] > dense["n_params"] == dense["n_active"]
    assert 1 <= found["busiest"] <= 2, "2: every token is at that one of 4 experts, and at another"
    assert f"{found['ratio']:.3f}" in mixture.describe(found)


def test_a_dense_model_is_no_mixture():
    with pytest.raises(BadInput, match=r"give model\.experts\.number"):
        mixture.bench_moe(ladder.resolve(replace(TINY, model=Model())))


def test_without_settings_the_shape_is_the_devices_own(monkeypatch, capsys):
    """And with any setting that of all verbs, so that no setting that happens to be a default is overruled."""
    asked = []
    monkeypatch.setattr(mixture, "bench_moe", lambda cfg: asked.append(cfg.model) or {})
    assert cli.main(["bench", "moe", "--json"]) == 0
    assert cli.main(["bench", "moe", "--data.context", "64", "--json"]) == 0
    assert cli.main(["bench", "moe", "--model.experts.number", "4", "--json"]) == 0
    bare, given, own = asked
    assert bare == replace(mixture.TINY.model, experts=mixture.EXPERTS)
    assert given == replace(Model(), experts=mixture.EXPERTS)
    assert own.experts == Experts(4)
