"""Who looks and who draws: two protocols, over endpoints and over our own pipelines."""
