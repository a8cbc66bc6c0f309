"""Prompts of the shapes world in English: two grammars, and the wide phrasings of training prompts."""
