"""Runs a grid on Kaggle from a checkout: ``python -m kaggle_setup push|wheel|status|fetch``."""
