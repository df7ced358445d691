"""How fast this package is: `llm-jax bench`."""
