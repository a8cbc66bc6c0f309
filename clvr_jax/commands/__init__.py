"""The commands of `clvr`, by what they work on. A command is a dataclass of its options with a method `run`."""
