"""Pushing grids to Kaggle with its official client, and fetching them back. Knows notebooks and files, never torch."""
