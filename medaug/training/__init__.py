"""Training: ignite engines as MONAI builds them, keyed draws, checkpoints without pickled objects."""
