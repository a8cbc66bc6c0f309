"""The README and the pages of docs/: their links, commands and programs."""
