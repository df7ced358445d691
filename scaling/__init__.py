"""Sweeps, laws, forecasts and reports over llm_jax."""
