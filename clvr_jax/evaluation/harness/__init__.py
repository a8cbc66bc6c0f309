"""The evaluation harness: generates, stores, resumes and scores the images of any benchmark.

`run.py` has the whole run, whose steps are modules of their own:

1. `benchmark.py`: a benchmark gives prompts (`Item`), the layout of its files and the weights of its tags.
2. `images.py`: `generate_images` asks a system for the images that are missing (`generation.py`) and stores them in a
   `run_directory.py`; `load_generated` and `load_external` return all images, complete and readable.
3. `scoring.py`: a `Scorer` gives each image a `Score`; `score_images` summarizes them (`summary.py`), adds the cost
   (`cost.py`) and writes results.json.
"""
