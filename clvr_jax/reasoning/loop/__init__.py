"""The loop itself: its state for each prompt, works, events and budget; loops that are edited or saved on the way."""
