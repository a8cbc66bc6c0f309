"""Small worlds whose pictures a program can draw, read and check."""
