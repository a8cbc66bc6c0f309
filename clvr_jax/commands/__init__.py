"""What `clvr` can do: a file for each kind of command. A command is a dataclass of its options with a `run`."""
