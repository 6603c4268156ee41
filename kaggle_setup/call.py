"""One call of the official client's Python interface; :mod:`kaggle_setup.client` starts it as a process of its own.

The client logs in when it is imported, prints, exits, and sets no time limit for its requests. None of that reaches the
process that pushes: the answer is one line of JSON.
"""

import contextlib
import io
import json
import re
import sys

OLDEST = "2.2.5"


def call(method: str, arguments: dict) -> dict:
    """Log in and call a method of ``KaggleApi``.

    Returns ``answer``, the fields of Kaggle's object by their JSON names; or ``error``, all the client's words, with
    ``status``, the HTTP number of Kaggle's refusal or 0 without one.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import kaggle
            from kaggle.api.kaggle_api_extended import KaggleApi
        if [int(n) for n in re.findall(r"\d+", kaggle.__version__)] < [int(n) for n in OLDEST.split(".")]:
            raise ImportError(f"kaggle {kaggle.__version__} is older than {OLDEST}")
        with contextlib.redirect_stdout(printed):
            api = KaggleApi()
            api.authenticate()
            answer = getattr(api, method)(**arguments)
    except SystemExit:  # its way of saying that it has no valid token
        return {"error": printed.getvalue(), "status": 401}
    except Exception as error:
        return {"error": f"{printed.getvalue()} {type(error).__name__}: {error}", "status": _status(error)}
    return {"answer": answer.to_dict(ignore_defaults=False) if hasattr(answer, "to_dict") else answer}


def _status(error: Exception) -> int:
    response = getattr(error, "response", None)
    if response is None:
        return 0
    coded = re.search(r'"code":\s*(\d+)', response.text) if response.status_code < 400 else None
    return int(coded[1]) if coded else response.status_code


if __name__ == "__main__":
    print(json.dumps(call(sys.argv[1], json.loads(sys.argv[2]))))
