"""`clvr eval ...`: benchmarks, comparisons, scaling, and the verifier and planning benchmarks."""
