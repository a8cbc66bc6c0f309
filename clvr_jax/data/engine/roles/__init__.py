"""The roles of the data engine: their protocols, vision-language models with prompts, and exact programs."""
