"""Judges: vision-language models that score images by their answers to questions."""
