"""DSWM: differences of parameter trees, scaled and added."""
