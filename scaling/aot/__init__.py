"""Training steps ahead of their devices: reckoned, compiled for a TPU slice that is not there, read, and searched for the fastest."""
