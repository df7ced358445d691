"""Training steps compiled for H100s that are not there: XLA's compiler for GPUs needs none, only JAX's plugin with it (130 MB).

make test-gpu-programs
"""

import re
from dataclasses import replace

import pytest
from jax.experimental import topologies

from llm_jax import ladder
from llm_jax.config import Config, Data, Experts, Mesh, Model, Train
from llm_jax.training import mesh as meshes
from llm_jax.training import programs

pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax-cuda13-plugin; make test-gpu-programs installs it")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the chip."""
LAYERS, ROWS, CONTEXT = 3, 8, 1024
MODEL = Model(num_layers=LAYERS, d_model=768, num_heads=12, vocab_size=50304, qk_norm=False, dtype="bfloat16")
EXPERTS = replace(MODEL, experts=Experts(8, 2, capacity_factor=1.25))


@pytest.fixture(autouse=True)
def cudnn(monkeypatch):
    """JAX asks the machine for its cuDNN and its GPU while attention is traced."""
    from jax._src.cudnn import fused_attention_stablehlo as attention

    monkeypatch.setattr(attention, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(attention, "is_cuda_compute_capability_equal", lambda *_: False)


def compiled(model: Model, mesh: Mesh, count: int) -> str:
    """The scheduled program of a training call."""
    train = Train(tokens_per_step=ROWS * CONTEXT, steps_per_call=4)
    config = ladder.resolve(Config(model, Data(context=CONTEXT, tokenizer="bpe"), train, mesh))
    chips = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology=f"1x1x{count}").devices
    lowered = programs.lower(config, meshes.make(config, chips))
    return lowered.compile({"xla_gpu_autotune_level": "0"}).as_text()  # kernels are chosen by trying them on the chip


@pytest.mark.parametrize(
    ("model", "mesh", "count", "exchanges"),
    [
        (MODEL, Mesh(data=2), 2, {"all-reduce", "collective-permute"}),
        (MODEL, Mesh(data=4), 4, {"all-reduce"}),
        (MODEL, Mesh(data=1, fsdp=2), 2, {"all-gather", "reduce-scatter", "all-reduce"}),
        (MODEL, Mesh(data=1, tensor=2), 2, {"all-reduce"}),
        (MODEL, Mesh(data=2, fsdp=2, tensor=2), 8, {"all-gather", "reduce-scatter", "all-reduce"}),
        (MODEL, Mesh(data=1, sequence=2), 2, {"all-to-all", "all-reduce"}),
        (EXPERTS, Mesh(data=1, expert=2), 2, {"all-to-all", "all-reduce"}),
    ],
    ids=["data", "data 4", "fsdp", "tensor", "data, fsdp, tensor", "sequence", "expert"],
)
def test_every_mesh_compiles_with_cudnns_attention(model, mesh, count, exchanges):
    """Its custom partitioner refuses some shardings; and what devices exchange is what the axis stands for. The loss has its kernel but
    where the vocabulary or the positions of a row are spread."""
    program = compiled(model, mesh, count)
    assert len(re.findall(r'custom_call_target="__cudnn\$fmha', program)) == 2 * LAYERS
    assert ("__gpu$xla.gpu.triton" in program) == (mesh.tensor == mesh.sequence == 1)
    kinds = r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    assert exchanges <= set(re.findall(kinds, program))


def test_gradients_leave_while_products_remain():
    """Two replicas: most swaps start before the last product of the backward pass, and all end behind it."""
    body = max(re.split(r"\n\n", compiled(MODEL, Mesh(data=2), 2)), key=lambda text: text.count("collective-permute"))
    lines = body.splitlines()
    products = [i for i, line in enumerate(lines) if "__cublas" in line or "%gemm" in line.split("=")[0]]
    starts = [i for i, line in enumerate(lines) if "collective-permute-start(" in line]
    ends = [i for i, line in enumerate(lines) if "collective-permute-done(" in line]
    assert products and len(starts) == len(ends) > 2
    assert sum(start < products[-1] for start in starts) > len(starts) / 2
    assert min(ends) > products[-1]
