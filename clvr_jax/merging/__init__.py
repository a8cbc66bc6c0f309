"""Delta-space weight merging (DSWM): scaled sums of the deltas of parameter trees."""
