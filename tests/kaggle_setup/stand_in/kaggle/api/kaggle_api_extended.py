"""Stands for the official client's ``KaggleApi``, and for the server behind it: the folder ``$KAGGLE_STAND_IN``.

Signatures, answers, exceptions, prints and checks are those of ``kaggle`` 2.2.5 (``api/kaggle_api_extended.py``) and of
``kagglesdk`` 0.1.38; the server's own refusals are quoted from reports (session count: kaggle-cli #185; quota:
kaggle-benchmarks #76).

``plan.json`` in the folder makes it refuse, fail or finish cells; ``calls.jsonl`` is what it was asked.
"""

import enum
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import requests

HOME = Path(os.environ["KAGGLE_STAND_IN"])
SESSIONS = ["QUEUED", "RUNNING", "COMPLETE"]


class KernelWorkerStatus(enum.Enum):
    QUEUED = 0
    RUNNING = 1
    COMPLETE = 2
    ERROR = 3
    CANCEL_REQUESTED = 4
    CANCEL_ACKNOWLEDGED = 5
    NEW_SCRIPT = 6


class Answer:
    """An object of kagglesdk: attributes in snake_case, ``to_dict`` in the server's camelCase."""

    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self, ignore_defaults=True):
        values = {name: value.name if isinstance(value, enum.Enum) else value for name, value in self.fields.items()}
        return {name: value for name, value in values.items() if value or not ignore_defaults}


def saved(**fields):
    empty = {f"invalid{kind}Sources": [] for kind in ("Dataset", "Competition", "Kernel", "Model")}
    return Answer(**{"ref": "", "url": "", "versionNumber": None, "error": None, "invalidTags": [], **empty, "kernelId": 0,
                     **fields})


class KaggleApi:
    def authenticate(self):
        if os.environ.get("VERBOSE") or os.environ.get("VERBOSE_OUTPUT"):
            print(f"POST introspect\nAuthorization: Bearer {token()}")
        if not token():
            print("Authentication required to call the Kaggle API.\n\nFirst, you will need a Kaggle account.")
            sys.exit(1)

    def kernels_push(self, folder, timeout=None, acc=None, no_run=False):
        step = asked("kernels_push", folder=folder, timeout=timeout)
        meta = checked_metadata(Path(folder))
        owner, slug = meta["id"].split("/")
        if step == "maximum" or (meta["enable_gpu"] and gpu_sessions() >= 2):
            return saved(error="Maximum batch GPU session count of 2 reached.")
        if step == "leak":
            return saved(error=f"bad credentials {token()}")
        if step == "quota":
            return saved(error="You've exceeded the number of hours allowed to use GPU. Your quota will reset to 30 hours.")
        missing = [name for name in meta["dataset_sources"] if step == "without" or not known_dataset(name)]
        wrong = [name for name in meta["kernel_sources"] if not (HOME / "kernels" / name / "meta.json").is_file()]
        number = take(Path(folder), meta, timeout)
        if step == "die":  # the machine that pushes is switched off when the server has the kernel
            os.kill(os.getppid(), signal.SIGKILL)
            sys.exit(1)
        if step == "lost":  # the server has the kernel, and its answer gets lost
            raise requests.exceptions.ConnectionError("('Connection aborted.', RemoteDisconnected())")
        return saved(versionNumber=number, url=f"https://www.kaggle.com/code/{owner}/{slug}", invalidDatasetSources=missing,
                     invalidKernelSources=wrong)

    def kernels_status(self, kernel):
        asked("kernels_status", kernel=kernel)
        path = HOME / "kernels" / kernel / "meta.json"
        if not path.is_file():  # of a status 401 or 403
            raise ValueError(f"Cannot access kernel '{kernel}' (Permission 'kernels.get' was denied). The most likely cause "
                             "is a wrong kernel slug.")
        meta = json.loads(path.read_text())
        status = KernelWorkerStatus[session_of(meta)]
        meta["asked"] += 1
        path.write_text(json.dumps(meta))
        message = "Your notebook was stopped because it exceeded the max allowed execution duration."
        return Answer(status=status, failureMessage=message if status == KernelWorkerStatus.ERROR else None)

    def kernels_output(self, kernel, path, file_pattern=None, force=False, quiet=True, page_token=None, page_size=20):
        step = asked("kernels_output", kernel=kernel, path=path, file_pattern=file_pattern)
        home, target = HOME / "kernels" / kernel, Path(path)
        target.mkdir(parents=True, exist_ok=True)
        found = []
        for file in sorted((home / "output").rglob("*")):
            name = file.relative_to(home / "output").as_posix()
            if file.is_file() and re.search(file_pattern, name):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                found.append(str(shutil.copy(file, target / name)))
                if step == "half":
                    raise refused(403, "https://storage.googleapis.com/x?X-Goog-Signature=0a1b2c3d")
        shutil.copy(home / "log.txt", target / f"{kernel.split('/')[1]}.log")
        return found, ""

    def dataset_status(self, dataset, format=None):
        asked("dataset_status", dataset=dataset)
        if not dataset_meta(dataset).is_file():
            raise refused(404, "https://api.kaggle.com/v1/datasets.DatasetApiService/GetDatasetStatus")
        meta = json.loads(dataset_meta(dataset).read_text())
        meta["asked"] += 1
        dataset_meta(dataset).write_text(json.dumps(meta))
        now = "ready" if meta["asked"] > 1 else "blobs_received"
        return json.dumps({"status": now, "current_version_number": meta["version"]}) if format == "json" else now

    def dataset_create_new(self, folder, public=False, quiet=False, convert_to_csv=True, dir_mode="skip",
                           ignore_patterns=None):
        asked("dataset_create_new", folder=folder)
        meta = json.loads((Path(folder) / "dataset-metadata.json").read_text())
        slug = meta["id"].split("/")[1]
        for field, text in (("title", meta["title"]), ("slug", slug)):
            if not 6 <= len(text) <= 50:
                raise ValueError(f"The dataset {field} must be between 6 and 50 characters")
        if len(meta["licenses"]) != 1:
            raise ValueError("Please specify exactly one license")
        if dataset_meta(meta["id"]).is_file():
            return Answer(ref=None, url=None, status="error", invalidTags=[], error=f'The requested slug "{slug}" is already '
                          "in use by a dataset. Please choose another slug.")
        return uploaded(Path(folder), meta, quiet)

    def dataset_create_version(self, folder, version_notes, quiet=False, convert_to_csv=True, delete_old_versions=False,
                               dir_mode="skip", ignore_patterns=None):
        asked("dataset_create_version", folder=folder, version_notes=version_notes)
        return uploaded(Path(folder), json.loads((Path(folder) / "dataset-metadata.json").read_text()), quiet)


def token():
    path = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle")) / "kaggle.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    return os.environ.get("KAGGLE_API_TOKEN") or os.environ.get("KAGGLE_KEY") or kept.get("key")


def refused(number, url, text="{}"):
    """What requests makes of a refusal of the server."""
    response = requests.Response()
    response.status_code, response.url, response._content = number, url, text.encode()
    reason = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests", 502: "Bad Gateway"}[number]
    kind = "Client" if number < 500 else "Server"
    return requests.exceptions.HTTPError(f"{number} {kind} Error: {reason} for url: {url}", response=response)


def plan():
    path = HOME / "plan.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def asked(method, **arguments):
    """Write a call down and take the next planned step of its method; the steps of any method are taken here."""
    with open(HOME / "calls.jsonl", "a") as log:
        log.write(json.dumps([method, arguments]) + "\n")
    content = plan()
    steps = content.get("steps", {}).get(method, [])
    step = steps.pop(0) if steps else ""
    (HOME / "plan.json").write_text(json.dumps(content))
    if step == "hang":
        print(token(), flush=True)
        time.sleep(60)
    if step == "ask":
        input(f"Really, {token()}? ")
    if step == "crash":
        raise requests.exceptions.ConnectionError("('Connection aborted.', RemoteDisconnected())")
    if step == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if step.isdigit():
        raise refused(int(step), "https://api.kaggle.com/v1/x")
    if step == "in body":  # a refusal whose number is in its body alone
        error = refused(401, "https://api.kaggle.com/v1/x", '{"code": 401, "message": "Unauthorized"}')
        error.response.status_code = 200
        raise error
    if step == "leak":
        print(f"{{'Authorization': 'Bearer {token()}'}}", file=sys.stderr)
        print(f"bad credentials {token()}")
        if method != "kernels_push":
            raise ValueError(f"bad credentials {token()}")
    return step


def slugify(title):
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def checked_metadata(folder):
    if not (folder / "kernel-metadata.json").is_file():
        raise ValueError(f"Metadata file not found: {folder / 'kernel-metadata.json'}")
    meta = json.loads((folder / "kernel-metadata.json").read_text())
    if len(meta["title"]) < 5:
        raise ValueError("Title must be at least five characters")
    if not (folder / meta["code_file"]).is_file():
        raise ValueError(f"Source file not found: {folder / meta['code_file']}")
    if slugify(meta["title"]) != meta["id"].split("/")[1].lower():
        raise AssertionError("the kernel lies under the slug of its title, not under its id")
    if meta["language"] not in ("python", "r", "rmarkdown"):
        raise ValueError("A valid language must be specified in the metadata.")
    if meta["kernel_type"] not in ("script", "notebook"):
        raise ValueError("A valid kernel type must be specified in the metadata.")
    for name in meta["dataset_sources"]:
        if "/" not in name:
            raise ValueError("Dataset must be specified in the form of '{username}/{dataset-slug}'")
    for name in [meta["id"], *meta["kernel_sources"]]:
        if name.count("/") != 1 or len(name.split("/")[1]) < 5:
            raise ValueError("Kernel slug must be at least five characters")
    if meta["docker_image_pinning_type"] not in ("original", "latest"):
        raise ValueError("If specified, the docker_image_pinning_type must be one of ['original', 'latest']")
    for name in ("is_private", "enable_gpu", "enable_tpu", "enable_internet"):
        if not isinstance(meta[name], bool):
            raise ValueError("Invalid boolean value: " + meta[name])
    return meta


def known_dataset(name):
    return name in plan().get("datasets", []) or dataset_meta(name).is_file()


def gpu_sessions():
    metas = [json.loads(path.read_text()) for path in (HOME / "kernels").glob("*/*/meta.json")]
    return sum(meta["enable_gpu"] and session_of(meta) in ("QUEUED", "RUNNING") for meta in metas)


def session_of(meta):
    return meta["session"][min(meta["asked"], len(meta["session"]) - 1)]


def take(folder, meta, timeout):
    home = HOME / "kernels" / meta["id"]
    before = json.loads((home / "meta.json").read_text())["version"] if (home / "meta.json").is_file() else 0
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / meta["code_file"], home / "notebook.ipynb")
    content = plan()
    key = meta["id"].rpartition("-s")[2]
    kept = {**meta, "version": before + 1, "asked": 0, "timeout": timeout,
            "session": content.get("sessions", {}).get(key, SESSIONS)}
    if content.get("run"):
        run(home, kept, content["run"])
    else:
        finish(home, meta, content, content.get("done", {}).get(key, []))
    (home / "meta.json").write_text(json.dumps(kept))
    return before + 1


def finish(home, meta, content, cells):
    """What a session leaves: the cells of the sessions that it goes on from, and the planned ones."""
    grid = home / "output" / "runs" / content.get("name", "grid")
    for earlier in meta["kernel_sources"]:
        if (HOME / "kernels" / earlier / "output").is_dir():
            shutil.copytree(HOME / "kernels" / earlier / "output", home / "output", dirs_exist_ok=True)
    for cell in cells:
        name, _, how = cell.partition(":")
        (grid / name).mkdir(parents=True, exist_ok=True)
        (grid / name / ("error.txt" if how else "metrics.json")).write_text(how or '{"format": 1}')
    (home / "log.txt").write_text(json.dumps([{"stream_name": "stdout", "time": 1.0, "data": content.get("log", "fine\n")}]))


def run(home, meta, how):
    """Really runs the notebook, as a session would."""
    sys.path.insert(0, str(Path(__file__).parents[5]))
    from tests.kaggle_setup.session import image_python, run_session

    attached = {f"datasets/{name}": dataset_meta(name).parent / "files" for name in meta["dataset_sources"]}
    attached |= {f"datasets/{name}": Path(folder) for name, folder in how["datasets"].items()}
    attached |= {f"notebooks/{name}": HOME / "kernels" / name / "output" for name in meta["kernel_sources"]}
    old = any(part in meta["id"] for part in how["old_form"])
    done = run_session(home / "notebook.ipynb", home / "tree", attached, image_python(home / "venv"), old_form=old)
    (home / "log.txt").write_text(done.stdout + done.stderr)
    shutil.copytree(home / "tree" / "working", home / "output", dirs_exist_ok=True)
    meta["session"] = ["RUNNING", "ERROR" if done.returncode else "COMPLETE"]


def dataset_meta(name):
    return HOME / "datasets" / name / "meta.json"


def uploaded(folder, meta, quiet):
    if not quiet:
        print("Starting upload for file ...")
    home = HOME / "datasets" / meta["id"]
    before = json.loads((home / "meta.json").read_text())["version"] if (home / "meta.json").is_file() else 0
    shutil.rmtree(home / "files", ignore_errors=True)
    shutil.copytree(folder, home / "files", ignore=shutil.ignore_patterns("dataset-metadata.json"))
    (home / "meta.json").write_text(json.dumps({"version": before + 1, "asked": 0}))
    url = f"https://www.kaggle.com/datasets/{meta['id']}"
    return Answer(ref=None, url=url, status="ok", error=None, invalidTags=[])
