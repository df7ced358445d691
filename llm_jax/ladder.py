"""One dial: `depth` sets width and heads; N and D set horizon, batch, learning rate and warm-up."""
