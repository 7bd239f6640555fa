"""The training loop's parts: steps, optimizers, checkpoints, logs."""
