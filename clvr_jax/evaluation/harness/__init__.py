"""The evaluation harness: benchmarks give prompts and scorers; the harness generates, stores, resumes and scores."""
