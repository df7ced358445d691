"""47 billion parameters, 13 of them active: eight experts a layer, of the shape of Mixtral 8x7B (Jiang et al. 2024, Table 1), on 128 TPU
v5p chips, sold as v5p-256.

    llm-jax aot experiments/tpu/moe_8x7b.py --topology v5p:4x4x8
"""

from llm_jax.config import Data, Experts, Mesh, Model, Train
from scaling.experiment import Experiment

experiment = Experiment(
    model=Model(
        vocab_size=32_000,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14_336,
        mlp="swiglu",
        experts=Experts(number=8, per_token=2),
        rope_theta=1_000_000.0,
        tie_embeddings=False,
        qk_norm=False,
        scan_layers=True,
        recompute="block",
        dtype="bfloat16",
    ),
    data=Data(source="tfds:c4/en", tokenizer="bpe", context=8192),
    train=Train(tokens_per_step=2**21),
    mesh=Mesh(fsdp=32),
)
