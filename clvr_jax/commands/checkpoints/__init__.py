"""Commands on checkpoints: convert and merge."""
