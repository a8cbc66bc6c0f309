"""Trajectories: steps, edits and outcome of a loop, the files that store them, and the page that shows them."""
