"""70 billion parameters, of the shape of Llama 3 70B (Grattafiori et al. 2024, Table 3), on 256 TPU v5p chips, sold as v5p-512.

llm-jax aot experiments/tpu/dense_70b.py --topology v5p:4x8x8
"""

from llm_jax.config import Data, Mesh, Model, Train
from scaling.experiment import Experiment

experiment = Experiment(
    model=Model(
        vocab_size=128_256,
        num_layers=80,
        d_model=8192,
        num_heads=64,
        num_kv_heads=8,
        d_ff=28_672,
        mlp="swiglu",
        rope_theta=500_000.0,
        tie_embeddings=False,
        qk_norm=False,
        scan_layers=True,
        recompute="block",
        dtype="bfloat16",
    ),
    data=Data(source="tfds:c4/en", tokenizer="bpe", context=8192),
    train=Train(tokens_per_step=2**22),
    mesh=Mesh(fsdp=64),
)
