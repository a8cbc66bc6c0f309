"""Reports of runs, comparisons and scaling as tables, Markdown and plots."""
