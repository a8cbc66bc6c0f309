"""Verification of images, plans and replies against the requirements of a prompt."""
