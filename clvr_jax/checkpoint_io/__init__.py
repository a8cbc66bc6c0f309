"""Checkpoint files as a stream: safetensors, Orbax trees, direct I/O, and directories whose writing can be resumed."""
