"""The commands of `clvr`, one file for each kind. A command is a dataclass of its options with a method `run`."""
