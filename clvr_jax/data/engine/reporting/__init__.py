"""What a run of the data engine reports: statistics, its page, the dataset card, and ShareGPT records."""
