"""Models, data and training of llm_jax; scaling laws over them live in the package `scaling`."""

__version__ = "0.1.0"
