"""One device thread for the works of many jobs: queue, batches, limits and metrics; knows neither models nor HTTP."""
