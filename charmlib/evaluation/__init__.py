"""Honest scores: metrics, intervals, operating points, comparison with published figures. Files and arrays only."""
