"""Commands on recipes and their runs: train, plan, synth, launch and curves."""
