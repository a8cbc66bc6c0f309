"""Files: paths and names, atomic writes, locks, and readers that check JSON, images and recipes from outside."""
