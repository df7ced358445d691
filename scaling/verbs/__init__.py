"""One thin function a verb of llm-jax. Numerics are imported inside of them, so that --help answers at once."""
