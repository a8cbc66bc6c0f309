"""Paired comparisons of results, test-time scaling, and the complexity probe."""
