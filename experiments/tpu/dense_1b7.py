"""1.7 billion parameters on 256 TPU v5e chips.

llm-jax aot experiments/tpu/dense_1b7.py --topology v5e:16x16
"""

from llm_jax.config import Data, Mesh, Model, Train
from scaling.experiment import Experiment

experiment = Experiment(
    model=Model(
        vocab_size=32_768,
        num_layers=24,
        d_model=2048,
        num_heads=16,
        d_ff=8192,
        mlp="swiglu",
        scan_layers=True,
        recompute="hidden",
        dtype="bfloat16",
    ),
    data=Data(source="tfds:c4/en", tokenizer="bpe", context=2048),
    train=Train(tokens_per_step=2**21),
    mesh=Mesh(fsdp=16),
)
