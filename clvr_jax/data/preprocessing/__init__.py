"""Preprocessing of text, images and conversations for the models."""
