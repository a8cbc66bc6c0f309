"""The paper's tables in miniature, measured in the shapes world; `configs/paper.py` runs them.

What is compared are folders (`models`) in modes (`rows`); what was drawn once for the same inputs is not drawn again
(`stages`); tables, plots and the page are functions of results.
"""
