"""Settings: what the docstrings of llm_jax/config.py promise."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest

from llm_jax.config import RULE, Config, Data, Model, Synthetic, Train
from llm_jax.settings import BadInput, did_you_mean, field_names, fingerprint, from_dict, given, override, to_dict

CONFIGS = {
    "default": Config(),
    "files, all optional set": Config(
        Model(
            vocab_size=512, d_model=96, num_heads=6, num_kv_heads=3, head_dim=8, d_ff=40, logit_softcap=30.0, window=64
        ),
        Data(source="files", files=("a/*.txt", "b/é*.jsonl.xz"), tokenizer="bpe", context=64, document_mask=True),
        Train(tokens=10**12, tokens_per_step=1024, peak_lr=3e-4, warmup_steps=0, grad_accumulation=4),
    ),
    "synthetic, half ruled": Config(
        Model(positions="learned", norm="layernorm", mlp="swiglu", dtype="bfloat16", tie_embeddings=False, dropout=0.1),
        Data(source="synthetic", synthetic=Synthetic(keys=7, exponent=1.5, noise=0.0, seed=3)),
        Train(schedule="wsd", tokens=12_345, final_lr=0.1),
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def leaves(tree: dict, prefix: str = "") -> dict:
    """Dotted name and value of every leaf of nested dicts."""
    found = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def python(code: str, hash_seed: str = "0") -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


@every_config
def test_json_round_trip_is_exact(config):
    """A trial is stored as JSON and rebuilt from it; a tuple that comes back as a list would be another config."""
    tree = to_dict(config)
    back = from_dict(Config, json.loads(json.dumps(tree)))
    assert back == config
    assert hash(back) == hash(config)
    assert to_dict(back) == tree
    assert type(back.data.files) is tuple


@every_config
def test_every_field_is_in_the_json_and_in_the_dotted_names(config):
    """A setting missing in either could not be recorded or could not be overridden."""
    assert sorted(leaves(to_dict(config))) == sorted(field_names(Config))
    assert {"data.synthetic.keys", "model.d_model", "train.peak_lr"} <= set(field_names(Config))


def test_from_dict_fills_in_defaults():
    """Records written before a field existed still load, with its default."""
    assert from_dict(Config, {"model": {"num_layers": 3}}) == Config(Model(num_layers=3))


def test_configs_are_frozen_and_hashable():
    """Configs are static arguments of jit and keys of caches."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.d_model = 3
    assert len({*CONFIGS.values(), *(from_dict(Config, to_dict(config)) for config in CONFIGS.values())}) == len(
        CONFIGS
    )


@every_config
def test_fingerprint_tells_every_field_apart(config):
    """Two trials of one fingerprint would overwrite each other in the ledger."""
    tree = given(config)
    prints = {"": fingerprint(config)}
    for name in field_names(type(config)):
        changed = json.loads(json.dumps(tree))
        *parents, leaf = name.split(".")
        node = changed
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = [node.get(leaf), "other"]
        prints[name] = fingerprint(changed)
    assert len(set(prints.values())) == len(prints)
    assert fingerprint(config) == fingerprint(tree)


@every_config
def test_what_is_given_makes_the_config_again(config):
    """A fingerprint is of all that tells a config from another: what was left out must be the defaults."""
    assert from_dict(type(config), given(config)) == config


def test_a_setting_that_is_new_renames_no_trial():
    """Results of runs from before a setting was there are still theirs: at its default it is not part of a name."""

    @dataclasses.dataclass(frozen=True)
    class Before:
        a: int = 1

    @dataclasses.dataclass(frozen=True)
    class After:
        a: int = 1
        new: Train = Train()

    assert fingerprint(Before(2)) == fingerprint(After(2)) != fingerprint(After(2, Train(clip_norm=2.0)))


def test_fingerprint_is_the_same_in_every_process():
    """A sweep is resumed by other workers: neither the hash seed nor the order of keys may rename its trials."""
    config = "Config(Model(d_model=64), Data(source='files', files=('é', 'b')))"
    code = f"from llm_jax.config import *; print(fingerprint({config}))"
    assert {python(code, hash_seed) for hash_seed in ("0", "1", "2")} == {fingerprint(eval(config))}
    assert fingerprint({"b": 1, "a": [2.5, None]}) == fingerprint({"a": [2.5, None], "b": 1})
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()[:12]


def test_equal_configs_have_equal_fingerprints():
    """1 and 1.0 are one setting: written either way it must resume the same trial."""
    whole, fraction = Config(train=Train(clip_norm=1, peak_lr=1)), Config(train=Train(clip_norm=1.0, peak_lr=1.0))
    assert whole == fraction
    assert fingerprint(whole) == fingerprint(fraction)
    assert Data(source="files", files=["a"]) == Data(source="files", files=("a",))


def test_override_replaces_by_dotted_name_and_leaves_the_rest():
    """The command line and the axes of a sweep reach every field, nested ones too, and the original stays as it was."""
    base = CONFIGS["synthetic, half ruled"]
    before = leaves(to_dict(base))
    values = {"data.synthetic.keys": 99, "model.num_layers": 9, "train.peak_lr": 0.01}
    assert leaves(to_dict(override(base, values))) == before | values
    assert leaves(to_dict(base)) == before
    assert override(base, {}) == base


def test_override_changes_all_at_once():
    """Settings that depend on each other pass through no state that is refused in between."""
    changed = override(Config(), {"model.d_model": 96, "model.num_heads": 3})
    assert (changed.model.d_model, changed.model.num_heads, changed.model.head_width) == (96, 3, 32)
    with pytest.raises(BadInput, match=r"model\.num_heads=3 does not divide"):
        override(Config(), {"model.num_heads": 3})
    files = override(Config(), {"data.source": "files", "data.files": ("a", "b")})
    assert files.data.files == ("a", "b")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.d_modl", "model.d_model"),
        ("d_model", "model.d_model"),
        ("data.synthetic.kyes", "data.synthetic.keys"),
        ("train.peek_lr", "train.peak_lr"),
        ("train.learning_rate", "train.peak_lr"),
        ("model", None),
        ("data.synthetic", None),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(wrong, right):
    """A setting that is silently not applied spoils a sweep; the answer must be one line that says what to type."""
    with pytest.raises(BadInput) as error:
        override(Config(), {wrong: 1})
    message = str(error.value)
    assert message.startswith(f'"{wrong}" names no field of Config; ')
    assert "\n" not in message
    if right is None:
        assert message.count('"') == 4  # a section is no field, and some field is offered
    else:
        assert message.endswith(f'did you mean "{right}"?')


def test_from_dict_names_the_field_and_where_it_is():
    """A config file edited by hand, or written by a later version, says which of its lines is not understood."""
    with pytest.raises(BadInput, match=r'^"model\.d_modl" names no field of Model; did you mean "model\.d_model"\?$'):
        from_dict(Config, {"model": {"d_modl": 3}})
    with pytest.raises(BadInput, match=r'^"data\.synthetic\.key" names no field of Synthetic; did you mean'):
        from_dict(Config, {"data": {"synthetic": {"key": 3}}})
    with pytest.raises(BadInput, match=r'^"modle" names no field of Config; did you mean "model"\?$'):
        from_dict(Config, {"modle": {}})


def test_did_you_mean_lists_all_when_none_is_near():
    """Nothing close is better answered with what there is than with a guess."""
    assert did_you_mean("cosin", ["linear", "cosine"]) == '; did you mean "cosine"?'
    assert did_you_mean("xyz", ["linear", "cosine"]) == "; valid: cosine, linear"


REFUSED = [
    ({"model.num_heads": 3}, "model.num_heads=3 does not divide model.d_model=128; nearest that does: 2"),
    ({"model.num_heads": 31}, "model.num_heads=31 does not divide model.d_model=128; nearest that does: 32"),
    (
        {"model.num_heads": 8, "model.num_kv_heads": 3},
        "model.num_kv_heads=3 does not divide model.num_heads=8; nearest that does: 2",
    ),
    (
        {"model.num_heads": 8, "model.num_kv_heads": 16},
        "model.num_kv_heads=16 does not divide model.num_heads=8; nearest that does: 8",
    ),
    ({"model.d_model": 0}, "model.d_model must be positive, got 0"),
    ({"model.num_layers": -1}, "model.num_layers must be positive, got -1"),
    ({"model.num_kv_heads": 0}, "model.num_kv_heads must be positive, got 0"),
    ({"model.window": 0}, "model.window must be positive, got 0"),
    ({"model.head_dim": 5}, "rotary positions need an even head_dim, got 5; try 6"),
    (
        {"model.d_model": 33, "model.head_dim": 4, "model.positions": "sinusoidal"},
        "sinusoidal positions need an even model.d_model, got 33; try 34",
    ),
    ({"model.mlp": "swigul"}, 'model.mlp cannot be "swigul"; did you mean "swiglu"?'),
    ({"model.dtype": "float16"}, 'model.dtype cannot be "float16"; did you mean "bfloat16"?'),
    ({"model.num_layers": 2.5}, 'model.num_layers cannot be "2.5"; must be int'),
    ({"model.num_layers": "4"}, 'model.num_layers cannot be "4"; must be int'),
    ({"model.qk_norm": 1}, 'model.qk_norm cannot be "1"; must be bool'),
    ({"model.logit_softcap": -1.0}, "model.logit_softcap must be positive, got -1.0"),
    ({"model.max_context": 0}, "model.max_context must be positive, got 0"),
    ({"model.experts.number": -1}, "model.experts.number must not be negative, got -1"),
    (
        {"model.experts.number": 4, "model.experts.per_token": 5},
        "model.experts.per_token=5 exceeds model.experts.number=4",
    ),
    (
        {"model.experts.number": 4, "model.experts.per_token": 1},
        "model.experts.normalize=true makes the one weight of per_token=1 a constant; set it to false",
    ),
    (
        {"model.experts.number": 4, "model.experts.routing": "expert"},
        "model.experts.routing=expert fills every expert alike: it needs balance=none and no capacity_factor",
    ),
    (
        {"model.experts.number": 4, "model.experts.granularity": 3},
        "model.experts.granularity=3 does not divide the width 512 of the MLP; nearest below: 2",
    ),
    ({"model.experts.number": 4, "model.family": "lstm"}, "model.experts needs model.family=transformer, got lstm"),
    ({"model.experts.gate": "softmx"}, 'model.experts.gate cannot be "softmx"; did you mean "softmax"?'),
    ({"model.experts.capacity_factor": 0.0}, "model.experts.capacity_factor must be positive, got 0.0"),
    ({"data.source": "tfds:"}, 'data.source "tfds:" is no source; did you mean "tfds:NAME"?'),
    ({"data.source": "files", "data.files": "a.txt"}, "data.files must be a list of strings, got 'a.txt'"),
    ({"train.peak_lr": "ruel"}, 'train.peak_lr cannot be "ruel"; must be float or rule'),
    ({"train.tokens": 1e9}, 'train.tokens cannot be "1000000000.0"; must be int or rule'),
    ({"train.beta2": 1.0}, "train.beta2 must lie in [0, 1), got 1.0"),
    ({"train.weight_decay": -0.1}, "train.weight_decay must not be negative, got -0.1"),
    ({"model.dropout": 1.0}, "model.dropout must lie in [0, 1), got 1.0"),
    ({"model.vocab_size": 100}, "the tokenizer bytes needs model.vocab_size >= 256, got 100"),
    (
        {"model.positions": "learned", "model.max_context": 64},
        "data.context=128 exceeds the learned positions; model.max_context=64",
    ),
    ({"data.source": "stdlb"}, 'data.source "stdlb" is no source; did you mean "stdlib"?'),
    ({"data.source": "tfds"}, 'data.source "tfds" is no source; did you mean "tfds:NAME"?'),
    ({"data.source": "stdlib:x"}, 'data.source "stdlib:x" is no source; did you mean "stdlib"?'),
    ({"data.source": "files"}, "data.source=files needs data.files, for instance 'corpus/*.jsonl.xz'"),
    ({"data.files": ("a",)}, "data.files is only read by data.source=files, pairs and media, not by stdlib"),
    ({"data.context": 1}, "data.context must be at least 2, got 1"),
    ({"data.val_fraction": 0.0}, "data.val_fraction must lie in (0, 1), got 0.0"),
    ({"data.eval_tokens": 100}, "data.eval_tokens=100 is less than one row; at least data.context=128"),
    ({"data.synthetic.noise": 1.0}, "data.synthetic.noise must lie in [0, 1), got 1.0"),
    ({"data.synthetic.exponent": 0.0}, "data.synthetic.exponent must be positive, got 0.0"),
    ({"data.synthetic.documents": 1}, "data.synthetic.documents must be at least 2, got 1"),
    ({"train.tokens": 0}, "train.tokens must be positive, got 0"),
    ({"train.peak_lr": float("nan")}, "train.peak_lr must be positive, got nan"),
    ({"train.warmup_steps": -1}, "train.warmup_steps must not be negative, got -1"),
    ({"train.decay_fraction": 0.0}, "train.decay_fraction must lie in (0, 1], got 0.0"),
    ({"train.final_lr": 1.5}, "train.final_lr is a share of the peak in [0, 1], got 1.5"),
    (
        {"train.tokens_per_step": 1000},
        "train.tokens_per_step=1000 is no multiple of data.context x train.grad_accumulation = 128; nearest: 1024",
    ),
    (
        {"train.tokens_per_step": 100, "train.grad_accumulation": 3},
        "train.tokens_per_step=100 is no multiple of data.context x train.grad_accumulation = 384; nearest: 384",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), REFUSED, ids=[",".join(map(str, values.items())) for values, _ in REFUSED]
)
def test_what_cannot_work_is_refused_in_one_line(values, message):
    """Found before anything is compiled, with the setting's name and what would have been accepted."""
    with pytest.raises(BadInput) as error:
        override(Config(), values)
    assert str(error.value) == message


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_nearest_valid_value_is_valid(positions):
    """A suggestion that is refused in turn is worse than none."""
    valid = {"learned": [1, 2, 3, 4, 6, 9, 12, 18, 36], "rotary": [1, 2, 3, 6, 9, 18]}[positions]
    for num_heads in (n for n in range(1, 40) if 36 % n):
        with pytest.raises(BadInput) as error:
            Model(d_model=36, num_heads=num_heads, positions=positions)
        nearest = int(str(error.value).rsplit(" ", 1)[1])
        assert abs(nearest - num_heads) == min(abs(n - num_heads) for n in valid)
        Model(d_model=36, num_heads=nearest, positions=positions)


@pytest.mark.parametrize("source", ["stdlib", "synthetic", "tfds:gsm8k", "tfds:wikipedia/20230601.en:1.0.0"])
def test_sources_are_accepted(source):
    """TFDS names carry slashes, and colons before a version."""
    assert Data(source=source).source == source


def test_widths_left_open_follow_the_others():
    """The docstrings of Model say what None stands for; the cost model and the network must read the same numbers."""
    model = Model(d_model=96, num_heads=4)
    assert (model.head_width, model.kv_heads, model.ff_width) == (24, 4, 4 * 96)
    swiglu = Model(d_model=100, num_heads=2, mlp="swiglu").ff_width
    assert swiglu % 8 == 0
    assert 8 * 100 / 3 <= swiglu < 8 * 100 / 3 + 8
    assert Model(d_model=96, mlp="swiglu").ff_width == 256  # 8/3 of the width is a multiple of 8 already
    explicit = Model(d_model=96, num_heads=4, num_kv_heads=1, head_dim=10, d_ff=7, mlp="swiglu")
    assert (explicit.head_width, explicit.kv_heads, explicit.ff_width) == (10, 1, 7)


def test_resolved_and_steps():
    """Steps are D over the batch; a run whose length is still a rule cannot be counted."""
    open_ended = Config()
    assert not open_ended.resolved
    settled = {"tokens": 10_000, "tokens_per_step": 1024, "peak_lr": 1e-3, "warmup_steps": 5}
    config = Config(train=Train(**settled))
    assert config.resolved
    assert (config.rows_per_step, config.num_steps) == (8, 10)
    assert Config(train=Train(**settled | {"tokens": 1})).num_steps == 1
    for name in settled:
        assert not Config(train=Train(**settled | {name: RULE})).resolved


def test_importing_config_imports_nothing_heavy():
    """`llm-jax --help` must answer in under half a second; jax alone takes longer than that to import."""
    heavy = {"jax", "flax", "optax", "numpy", "scipy", "grain", "orbax", "tensorflow_datasets", "matplotlib"}
    loaded = python("import sys, llm_jax.config; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "llm_jax" in loaded
    assert not heavy & set(loaded)
