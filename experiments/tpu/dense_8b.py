"""8 billion parameters, of the shape of Llama 3 8B (Grattafiori et al. 2024, Table 3), on 256 TPU v5e chips.

llm-jax aot experiments/tpu/dense_8b.py --topology v5e:16x16
"""

from llm_jax.config import Data, Mesh, Model, Train
from scaling.experiment import Experiment

experiment = Experiment(
    model=Model(
        vocab_size=128_256,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14_336,
        mlp="swiglu",
        rope_theta=500_000.0,
        tie_embeddings=False,
        qk_norm=False,
        scan_layers=True,
        recompute="block",
        dtype="bfloat16",
    ),
    data=Data(source="tfds:c4/en", tokenizer="bpe", context=8192),
    train=Train(tokens_per_step=2**22, grad_accumulation=2),
    mesh=Mesh(fsdp=32),
)
