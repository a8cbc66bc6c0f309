"""What users see: progress and errors on a terminal, tables, plots, and HTML pages from templates."""
