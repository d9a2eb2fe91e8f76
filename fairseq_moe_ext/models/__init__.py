"""The registered model, its decoder and the paper's architectures."""
