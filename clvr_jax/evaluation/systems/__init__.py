"""Systems under test: our models in their modes, models behind endpoints, and external images."""
