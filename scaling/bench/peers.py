"""The training steps of other packages beside ours on the same work: google-deepmind/nanodo and karpathy/nanoGPT.

    llm-jax bench train --peer nanodo=CHECKOUT --peer nanogpt=CHECKOUT ...

A peer's model comes from the checkout that is named; its step is what its own training loop does with it. Each contender, ours too, is a
process of its own (`python -m scaling.bench.peers NAME [CHECKOUT]`), since JAX and torch both take hold of a GPU and neither belongs in the
other's process. They take turns: on a CPU call by call, as its speed wanders by more than what is measured; on a GPU, whose memory holds
one of them at a time, in two turns each. Medians are over all rounds.

A contender reads the config, a line of JSON, answers with what it is once it has compiled and warmed up, and then with one round for each
line that it is sent.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llm_jax.config import Config, Mesh
from llm_jax.settings import BadInput, did_you_mean, from_dict, to_dict
from scaling import ledger
from scaling.bench import training
from scaling.progress import progress

OURS = "llm_jax"
GPU_TURNS = 2

Contender = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What is known before a step is timed, and round_() -> at least "seconds" a step and "loss"; see training.timed."""


# ---- What a peer can express ----

NEEDS: dict[str, Any] = {
    "model.family": "transformer",
    "model.mlp": "gelu",
    "model.norm": "layernorm",
    "model.norm_position": "pre",
    "model.positions": "learned",
    "model.tie_embeddings": True,
    "model.qk_norm": False,
    "model.experts.number": 0,
    "model.logit_softcap": None,
    "model.window": None,
    "model.dropout": 0.0,
    "mesh": Mesh(),
    "train.compile": "jit",
    "data.prefix": 0,
    "data.document_mask": False,
    "train.z_loss": 0.0,
    "train.label_smoothing": 0.0,
    "train.grad_accumulation": 1,
    "train.freeze": (),
}
"""What both peers have and no setting of theirs changes. A dropout they could have is not timed."""
FILES = {"nanodo": "nanodo/model.py", "nanogpt": "model.py"}
"""Of a peer's checkout."""


def check(cfg: Config, checkouts: Mapping[str, Path]) -> None:
    """Refuses a config that the peers cannot express, naming the fields and what they must be; and a checkout that is none."""
    model = cfg.model
    needs = NEEDS | {
        "model.num_kv_heads": model.num_kv_heads if model.kv_heads == model.num_heads else model.num_heads,
        "model.head_dim": model.head_dim if model.head_width * model.num_heads == model.d_model else None,
        "model.d_ff": model.d_ff if model.ff_width == 4 * model.d_model else 4 * model.d_model,
    }
    wrong = [f"{name}={_said(value)}" for name, value in needs.items() if _value(cfg, name) != value]
    if wrong:
        raise BadInput(f"--peer {next(iter(checkouts))} has no such model; it needs {', '.join(wrong)}")
    for name, path in checkouts.items():
        if not (path / FILES[name]).is_file():
            raise BadInput(f"--peer {name}={path}: there is no {FILES[name]} in it; give a checkout of {name}")
        if name == "nanogpt" and importlib.util.find_spec("torch") is None:
            raise BadInput("--peer nanogpt needs torch in this environment: pip install torch")


def _value(cfg: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), cfg)


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def parse(words: Sequence[str]) -> dict[str, Path]:
    """{name: checkout} of --peer NAME=CHECKOUT."""
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if name not in FILES:
            raise BadInput(f'--peer "{name}" is no peer{did_you_mean(name, FILES)}')
        if not equals or not path:
            raise BadInput(f"--peer {name} needs its checkout: --peer {name}=CHECKOUT")
        found[name] = Path(path)
    return found


# ---- The contenders, each in a process of its own ----


def ours(cfg: Config, checkout: Path) -> Contender:
    """This package; `checkout` is not read."""
    facts, dispatch = training.start(cfg)
    return facts, functools.partial(training.timed, training.waited(dispatch))


def nanodo(cfg: Config, checkout: Path) -> Contender:
    """nanodo's TransformerDo and step (its train.py): one jitted, donated step a dispatch, whose metrics are fetched after the next is
    dispatched. Its training loop itself needs TensorFlow; this is that loop's step, without its metrics of parameters and gradients.
    """
    import flax
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    sys.path.insert(0, str(checkout))
    from nanodo.model import DoConfig, TransformerDo

    model, train = cfg.model, cfg.train
    shape = {"D": model.d_model, "H": model.num_heads, "L": model.max_context, "N": model.num_layers}
    shape |= {"V": model.vocab_size, "F": model.ff_width}
    module = TransformerDo(DoConfig(**shape, dtype=jnp.dtype(model.dtype), fsdp_enabled=False))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, cfg.data.context), jnp.int32))["params"]
    optimizer = optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(train.peak_lr, train.beta1, train.beta2, train.epsilon, weight_decay=train.weight_decay),
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens_BxT):
        def loss(params):
            logits_BxTxV = module.apply({"params": params}, tokens_BxT[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV, tokens_BxT[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    state = (params, jax.jit(optimizer.init)(params))
    rng = np.random.default_rng(0)
    rows = (cfg.rows_per_step, cfg.data.context + 1)
    batches = [
        jax.device_put(rng.integers(0, model.vocab_size, rows).astype(np.int32)) for _ in range(train.steps_per_call)
    ]
    began = time.perf_counter()
    compiled = step.lower(*state, batches[0]).compile()
    compile_seconds = time.perf_counter() - began

    def round_() -> dict[str, Any]:
        nonlocal state
        losses: list[Any] = []
        began = time.perf_counter()
        for tokens_BxT in batches:
            *state, loss = compiled(*state, tokens_BxT)
            losses.append(loss)
            if len(losses) > 1:
                jax.device_get(losses[-2])
        value = float(losses[-1])
        return {"seconds": (time.perf_counter() - began) / len(batches), "loss": value}

    facts = {
        "device": training.device_name(),
        "platform": jax.default_backend(),
        "framework": f"jax {jax.__version__}, flax {flax.__version__}",
        "n_params": sum(x.size for x in jax.tree.leaves(params)),
        "memory_bytes": training.needed_bytes(compiled),
        "compile_seconds": compile_seconds,
    }
    return facts, round_


def nanogpt(cfg: Config, checkout: Path) -> Contender:
    """nanoGPT's GPT and step (its train.py and bench.py): torch.compile, autocast, clipping, fused AdamW; TF32 where products are float32.

    Its GELU is the exact one, ours and nanodo's the tanh form. The loss is fetched once a round: train.py does so every ten steps.
    """
    import torch

    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    model, train = cfg.model, cfg.train
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shape = {"n_layer": model.num_layers, "n_head": model.num_heads, "n_embd": model.d_model}
    shape |= {"block_size": model.max_context, "vocab_size": model.vocab_size}
    gpt = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(device)
    optimizer = gpt.configure_optimizers(train.weight_decay, train.peak_lr, (train.beta1, train.beta2), device)
    compiled = torch.compile(gpt)
    cast = torch.amp.autocast(device, torch.bfloat16) if model.dtype == "bfloat16" else contextlib.nullcontext()
    rows = (train.steps_per_call, cfg.rows_per_step, cfg.data.context + 1)
    tokens_CxBxT = torch.randint(model.vocab_size, rows, device=device)
    batches = [(tokens_BxT[:, :-1].contiguous(), tokens_BxT[:, 1:].contiguous()) for tokens_BxT in tokens_CxBxT]

    def step(inputs_BxT: Any, targets_BxT: Any) -> Any:
        with cast:
            _, loss = compiled(inputs_BxT, targets_BxT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def round_() -> dict[str, Any]:
        began = time.perf_counter()
        for inputs_BxT, targets_BxT in batches:
            loss = step(inputs_BxT, targets_BxT)
        value = loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / len(batches)
        held = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {"seconds": seconds, "loss": value, "allocated_bytes": held}

    began = time.perf_counter()
    step(*batches[0]).item()
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else ledger.processor(),
        "platform": "gpu" if device == "cuda" else "cpu",
        "framework": f"torch {torch.__version__}",
        "n_params": sum(x.numel() for x in gpt.parameters()),
        "memory_bytes": None,
        "compile_seconds": time.perf_counter() - began,
    }
    return facts, round_


CONTENDERS: dict[str, Callable[[Config, Path], Contender]] = {OURS: ours, "nanodo": nanodo, "nanogpt": nanogpt}


def serve(name: str, checkout: Path, lines: IO[str], answers: IO[str]) -> None:
    """A contender's process, from the config to the end of the lines."""

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    facts, round_ = CONTENDERS[name](from_dict(Config, json.loads(lines.readline())), checkout)
    for _ in range(training.WARM_UP):
        round_()
    answer(facts)
    for _ in lines:
        answer(round_())


# ---- All of them, turn about ----


@contextlib.contextmanager
def process(name: str, cfg: Config, checkout: Path) -> Iterator[Callable[[], dict[str, Any]]]:
    """ask() of a contender that is started here: the first answer is its facts, the others are rounds. BadInput, with the last line
    of what it wrote to stderr, where it ends unasked."""
    command = [sys.executable, "-m", "scaling.bench.peers", name, str(checkout)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdin is not None and child.stdout is not None
        sent, answers = child.stdin, child.stdout
        asked = [json.dumps(to_dict(cfg))]

        def ask() -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                print(asked.pop() if asked else "", file=sent, flush=True)
            if line := answers.readline():
                return json.loads(line)
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit status {child.wait()}"]
            raise BadInput(f"--peer {name}: {said[-1]}" if name != OURS else f"bench train: {said[-1]}")

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                sent.close()
            try:
                child.wait(
                    timeout=30
                )  # the end of the lines is the end of it; the GPU's memory is free when it is gone
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            answers.close()


def bench(cfg: Config, checkouts: Mapping[str, Path]) -> dict[str, Any]:
    """`llm-jax bench train --peer`: what training.record has of ours, and under "peers" of each other one its framework, n_params,
    seconds_per_step with fastest and slowest, tokens_per_second, compile_seconds, memory, and ratio, ours over its tokens a second.

    `cfg` is resolved. BadInput for what a peer cannot express, and for one that does not start.
    """
    training.check(cfg)
    check(cfg, checkouts)
    facts, rounds = _take_turns(cfg, {OURS: Path(), **checkouts})
    found = training.record(cfg, facts[OURS], rounds[OURS])
    peers = {name: _facts_of_peer(cfg, facts[name], rounds[name]) for name in checkouts}
    for peer in peers.values():
        peer["ratio"] = found["tokens_per_second"] / peer["tokens_per_second"]
    return found | {"peers": peers}


def _take_turns(cfg: Config, contenders: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Facts and rounds by contender."""
    facts: dict[str, Any] = {}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    turns = training.ROUNDS
    with contextlib.ExitStack() as stack, progress("bench", turns * len(contenders), " rounds") as update:
        alive: dict[str, Callable[[], dict[str, Any]]] = {}
        while len(rounds[list(contenders)[-1]]) < training.ROUNDS:
            for name, checkout in contenders.items():
                update(sum(map(len, rounds.values())), name)
                with contextlib.ExitStack() as turn:
                    ask = alive.get(name) or turn.enter_context(process(name, cfg, checkout))
                    if name not in alive:
                        new = ask()
                        facts.setdefault(name, new)
                        if new["platform"] == "cpu":
                            alive[name] = ask
                            stack.push(turn.pop_all())
                        else:
                            turns = GPU_TURNS
                    rounds[name] += [ask() for _ in range(training.ROUNDS // turns)]
    return facts, rounds


def _facts_of_peer(cfg: Config, facts: dict[str, Any], rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [one["seconds"] for one in rounds]
    step = statistics.median(seconds)
    return {
        "framework": facts["framework"],
        "n_params": facts["n_params"],
        "seconds_per_step": step,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tokens_per_second": cfg.rows_per_step * cfg.data.context / step,
        "compile_seconds": facts["compile_seconds"],
        "memory_bytes": facts["memory_bytes"],
        "allocated_bytes": rounds[-1].get("allocated_bytes"),
        "loss": rounds[-1]["loss"],
    }


def describe(found: dict[str, Any]) -> str:
    """The table for people: ours in full, then a line a peer."""
    lines = [training.describe(found), "", f"{'':16} {'tokens a second':>15} {'ms a step':>10} {'ours, times':>11}"]
    for name, one in {OURS: found, **found["peers"]}.items():
        ratio = f"{one['ratio']:.2f}" if "ratio" in one else ""
        lines.append(
            f"{name:16} {one['tokens_per_second']:>15,.0f} {1e3 * one['seconds_per_step']:>10.3f} {ratio:>11}  "
            f"N {one['n_params']:,}, {one['framework']}, compiled in {one['compile_seconds']:.1f} s"
        )
    return "\n".join(lines)


def main(name: str, checkout: str) -> None:
    """A contender's process. What anything in it prints goes to stderr: stdout is for the answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(name, Path(checkout), sys.stdin, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
