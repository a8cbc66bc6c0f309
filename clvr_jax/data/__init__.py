"""Data: text and pictures as the models take them, and training examples."""
