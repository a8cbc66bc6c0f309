"""Data: preprocessing of text and images, and training examples."""
