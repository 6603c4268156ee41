"""Stands for the official ``kaggle`` package, which logs in when it is imported and says so when it cannot."""

import contextlib

from kaggle.api.kaggle_api_extended import KaggleApi, plan

__version__ = plan().get("version", "2.2.5")

api = KaggleApi()
with contextlib.suppress(Exception, SystemExit):
    api.authenticate()
