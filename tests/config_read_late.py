"""Settings that a model imports as it runs."""

beta = 1.0
