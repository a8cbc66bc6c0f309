"""Public benchmarks: official prompts, layouts and scores, with judges and detectors that anybody can run."""
