"""A comparison with another package is worth what it holds equal: the work, the turns, and who is told about what cannot be compared."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llm_jax import ladder
from llm_jax.config import Config, Data, Experts, Model, Train
from llm_jax.settings import BadInput, to_dict
from scaling import cli
from scaling.bench import peers, training

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAME = Model(num_layers=1, d_model=16, mlp="gelu", norm="layernorm", positions="learned", max_context=8, qk_norm=False)
SMALL = ladder.resolve(Config(SAME, Data(context=8), Train(tokens_per_step=16, steps_per_call=2)))

NANODO = """
import dataclasses
import jax.numpy as jnp
from flax import linen as nn

@dataclasses.dataclass
class DoConfig:
    D: int
    H: int
    L: int
    N: int
    V: int
    F: int
    dtype: jnp.dtype
    fsdp_enabled: bool

class TransformerDo(nn.Module):
    cfg: DoConfig

    @nn.compact
    def __call__(self, tokens):
        print("a peer may print what it likes")
        embed = nn.Embed(self.cfg.V, self.cfg.D)
        return embed.attend(embed(tokens))
"""
"""Has nanodo's interface, and for a model an embedding."""

NANOGPT = """
import torch

class GPTConfig:
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, dropout, bias):
        self.shape = vocab_size, n_embd

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a peer may print what it likes")
        self.embed = torch.nn.Embedding(*config.shape)

    def forward(self, tokens, targets):
        logits = self.embed(tokens) @ self.embed.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


@pytest.fixture
def nanodo(tmp_path: Path) -> Path:
    (tmp_path / "nanodo").mkdir()
    (tmp_path / "nanodo" / "model.py").write_text(NANODO)
    return tmp_path


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (replace(SAME, positions="rotary"), "it needs model.positions=learned"),
        (replace(SAME, norm="rmsnorm", mlp="relu2"), "it needs model.mlp=gelu, model.norm=layernorm"),
        (replace(SAME, qk_norm=True), "it needs model.qk_norm=false"),
        (replace(SAME, num_heads=2, num_kv_heads=1), "it needs model.num_kv_heads=2"),
        (replace(SAME, d_ff=24), "it needs model.d_ff=64"),
        (replace(SAME, head_dim=4), "it needs model.head_dim=none"),
        (replace(SAME, experts=Experts(4, 2)), "it needs model.experts.number=0"),
    ],
)
def test_what_a_peer_cannot_express_is_refused_by_name(model, named, nanodo):
    """Else the two would train different models, and the ratio would say nothing."""
    peers.check(SMALL, {"nanodo": nanodo})
    with pytest.raises(BadInput) as refused:
        peers.check(replace(SMALL, model=model), {"nanodo": nanodo})
    assert str(refused.value).endswith(named)


def test_peers_that_are_not_there_are_refused_in_one_line(capsys, nanodo, monkeypatch):
    assert cli.main(["bench", "train", "--peer", "nanodoo=x"]) == 2
    assert 'did you mean "nanodo"?' in capsys.readouterr().err
    assert cli.main(["bench", "train", "--peer", "nanodo"]) == 2
    assert "--peer nanodo=CHECKOUT" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"there is no model\.py in it"):
        peers.check(SMALL, {"nanogpt": nanodo})
    (nanodo / "model.py").write_text(NANOGPT)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs torch"):
        peers.check(SMALL, {"nanogpt": nanodo})


def test_a_peers_process_has_no_jax_before_it_asks_for_it():
    """JAX would take three quarters of the GPU's memory from torch."""
    code = "import sys, scaling.bench.peers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["llm_jax", "nanodo"])
def test_a_contender_answers_with_its_facts_and_then_a_round_a_line(name, nanodo, mixed_dtypes, monkeypatch):
    monkeypatch.setattr(training, "_product_seconds", lambda: (0.01, 0.01))
    monkeypatch.setattr(sys, "path", [*sys.path])
    answers = io.StringIO()
    peers.serve(name, nanodo, io.StringIO(json.dumps(to_dict(SMALL)) + "\n\n\n"), answers)
    facts, *rounds = map(json.loads, answers.getvalue().splitlines())
    assert len(rounds) == 2
    assert facts["platform"] == "cpu"
    assert facts["compile_seconds"] > 0
    if name == "nanodo":
        assert facts["n_params"] == 256 * 16
    assert all(one["seconds"] > 0 for one in rounds)
    assert rounds[1]["loss"] < rounds[0]["loss"], "it trains on the same batches again"


@pytest.mark.parametrize(
    ("platform", "starts", "turns"),
    [("cpu", ["llm_jax", "nanodo"], [1] * 8), ("gpu", ["llm_jax", "nanodo"] * 2, [2] * 4)],
)
def test_contenders_take_turns(platform, starts, turns, monkeypatch):
    """On a CPU call by call, both alive, since its speed wanders; on a GPU one at a time has its memory."""
    events: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def process(name, cfg, checkout):
        events.append(("start", name))
        facts = {"device": "some", "platform": platform, "devices": 1, "framework": "x", "n_params": 1}
        unsaid = [facts | {"memory_bytes": 1, "compile_seconds": 1.0}]

        def ask():
            if unsaid:
                return unsaid.pop()
            events.append(("round", name))
            return {"seconds": 0.1 if name == "llm_jax" else 0.2, "loss": 1.0}

        yield ask
        events.append(("end", name))

    monkeypatch.setattr(peers, "process", process)
    monkeypatch.setattr(peers, "check", lambda cfg, checkouts: None)
    monkeypatch.setattr(training, "ROUNDS", 4)
    found = peers.bench(SMALL, {"nanodo": Path()})
    assert [name for what, name in events if what == "start"] == starts
    rounds = [name for what, name in events if what == "round"]
    expected = [name for turn, length in enumerate(turns) for name in [["llm_jax", "nanodo"][turn % 2]] * length]
    assert rounds == expected
    alive: set[str] = set()
    for what, name in events:
        alive = alive | {name} if what == "start" else alive - {name} if what == "end" else alive
        assert platform == "cpu" or len(alive) <= 1
    assert not alive
    assert found["peers"]["nanodo"]["ratio"] == pytest.approx(2.0)
    assert found["peers"]["nanodo"]["tokens_per_second"] == pytest.approx(16 / 0.2)
    assert "2.00" in peers.describe(found)


def test_a_peer_that_does_not_start_is_told_with_its_last_line(nanodo):
    (nanodo / "nanodo" / "model.py").write_text("raise RuntimeError('no such kernel')")
    with (
        pytest.raises(BadInput, match="--peer nanodo: RuntimeError: no such kernel"),
        peers.process("nanodo", SMALL, nanodo) as ask,
    ):
        ask()


@pytest.mark.slow
def test_processes_end_to_end(nanodo, capsys, monkeypatch):
    """What a peer prints stays out of the one JSON object."""
    shape = "--model.num-layers 1 --model.d-model 16 --model.mlp gelu --model.norm layernorm --model.positions learned"
    work = (
        "--model.max-context 8 --model.no-qk-norm --data.context 8 --train.tokens-per-step 16 --train.steps-per-call 2"
    )
    monkeypatch.setattr(training, "ROUNDS", 2)
    words = ["bench", "train", *shape.split(), *work.split(), "--peer", f"nanodo={nanodo}", "--json"]
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    peer = found["peers"]["nanodo"]
    assert peer["ratio"] == pytest.approx(found["tokens_per_second"] / peer["tokens_per_second"])


@pytest.mark.slow
def test_nanogpt_where_there_is_torch(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "model.py").write_text(NANOGPT)
    with peers.process("nanogpt", SMALL, tmp_path) as ask:
        facts, first, second = ask(), ask(), ask()
    assert facts["n_params"] == 256 * 16
    assert facts["framework"].startswith("torch")
    assert second["loss"] < first["loss"]
