"""Stands for the official ``kaggle`` command, and for the server behind it: the folder ``$KAGGLE_STAND_IN``.

Arguments, texts, exit statuses and checks are those of ``kaggle`` 2.2.5 (``cli.py``, ``api/kaggle_api_extended.py``); the
server's own refusals are quoted from reports (session count: kaggle-cli #185; quota: kaggle-benchmarks #76).

``plan.json`` in the folder makes it refuse, fail or finish cells; ``calls.jsonl`` is what it was asked.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

HOME = Path(os.environ["KAGGLE_STAND_IN"])
SESSIONS = ["QUEUED", "RUNNING", "COMPLETE"]
NOT_FOUND = ("404 Client Error: Not Found for url: https://api.kaggle.com/v1/datasets.DatasetApiService/GetDatasetStatus\n\n"
             "The resource was not found. Check the spelling of the reference you passed.")


def main():
    args = parse()
    if args.version:
        print("Kaggle CLI " + plan().get("version", "2.2.5"))
        return 0
    with open(HOME / "calls.jsonl", "a") as log:
        log.write(json.dumps(sys.argv[1:]) + "\n")
    if not authenticated():
        print("Authentication required to call the Kaggle API.\n\nFirst, you will need a Kaggle account.")
        return 1
    if step := next_of(f"{args.group} {args.command}"):
        if step == "hang":
            print(os.environ["KAGGLE_API_TOKEN"], flush=True)
            time.sleep(60)
        if step == "crash":
            print("ConnectionError: ('Connection aborted.', RemoteDisconnected())", file=sys.stderr)
            return 1
        if step.startswith("leak"):
            token = os.environ.get("KAGGLE_API_TOKEN") or os.environ.get("KAGGLE_KEY") or kaggle_json()["key"]
            print(f"Kernel push error: bad credentials {token}")
            print(f"{{'Authorization': 'Bearer {token}'}}", file=sys.stderr)
            return 0
    try:
        return {"kernels push": push, "kernels status": status, "kernels output": output, "datasets create": create,
                "datasets version": version, "datasets status": dataset_status}[f"{args.group} {args.command}"](args, step)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


def parse():
    parser = argparse.ArgumentParser(prog="kaggle")
    parser.add_argument("-v", "--version", action="store_true")
    groups = parser.add_subparsers(dest="group")
    kernels = groups.add_parser("kernels").add_subparsers(dest="command", required=True)
    one = kernels.add_parser("push")
    one.add_argument("-p", "--path")
    one.add_argument("-t", "--timeout", type=int)
    kernels.add_parser("status").add_argument("kernel")
    one = kernels.add_parser("output")
    one.add_argument("kernel")
    one.add_argument("-p", "--path")
    one.add_argument("-q", "--quiet", action="store_true")
    one.add_argument("--file-pattern")
    datasets = groups.add_parser("datasets").add_subparsers(dest="command", required=True)
    for name in ("create", "version"):
        one = datasets.add_parser(name)
        one.add_argument("-p", "--path")
        one.add_argument("-r", "--dir-mode", choices=["skip", "zip", "tar"], default="skip")
    one.add_argument("-m", "--message", required=True)
    one = datasets.add_parser("status")
    one.add_argument("dataset")
    one.add_argument("--format")
    return parser.parse_args()


def authenticated():
    return bool(os.environ.get("KAGGLE_API_TOKEN") or os.environ.get("KAGGLE_KEY") or kaggle_json().get("key"))


def kaggle_json():
    path = Path(os.environ.get("KAGGLE_CONFIG_DIR", Path.home() / ".kaggle")) / "kaggle.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def plan():
    path = HOME / "plan.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def next_of(command):
    """Takes the next planned step of a command."""
    content = plan()
    steps = content.get("steps", {}).get(command, [])
    step = steps.pop(0) if steps else ""
    (HOME / "plan.json").write_text(json.dumps(content))
    return step


def slugify(title):
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def push(args, step):
    meta = checked_metadata(Path(args.path))
    owner, slug = meta["id"].split("/")
    if step == "maximum" or (meta["enable_gpu"] and gpu_sessions() >= 2):
        print("Kernel push error: Maximum batch GPU session count of 2 reached.")
        return 0
    if step == "quota":
        print("Kernel push error: You've exceeded the number of hours allowed to use GPU. Your quota will reset to 30 hours.")
        return 0
    missing = [name for name in meta["dataset_sources"] if not known_dataset(name)]
    wrong = [name for name in meta["kernel_sources"] if not (HOME / "kernels" / name / "meta.json").is_file()]
    number = take(Path(args.path), meta, args.timeout)
    if step == "die":  # the machine that pushes is switched off when the server has the kernel
        os.kill(os.getppid(), signal.SIGKILL)
        return 1
    for kind, names in (("dataset", missing), ("kernel", wrong)):
        if names:
            print(f"The following are not valid {kind} sources and could not be added to the kernel: {names}")
    print(f"Kernel version {number} successfully pushed.  Please check progress at https://www.kaggle.com/code/{owner}/{slug}")
    return 0


def checked_metadata(folder):
    if not (folder / "kernel-metadata.json").is_file():
        raise ValueError(f"Metadata file not found: {folder / 'kernel-metadata.json'}")
    meta = json.loads((folder / "kernel-metadata.json").read_text())
    if len(meta["title"]) < 5:
        raise ValueError("Title must be at least five characters")
    if not (folder / meta["code_file"]).is_file():
        raise ValueError(f"Source file not found: {folder / meta['code_file']}")
    if slugify(meta["title"]) != meta["id"].split("/")[1].lower():
        print("Your kernel title does not resolve to the specified id. This may result in surprising behavior. We suggest "
              "making your title something that resolves to the specified id.")
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
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.kaggle.session import image_python, run_session

    attached = {f"datasets/{name}": dataset_meta(name).parent / "files" for name in meta["dataset_sources"]}
    attached |= {f"datasets/{name}": Path(folder) for name, folder in how["datasets"].items()}
    attached |= {f"notebooks/{name}": HOME / "kernels" / name / "output" for name in meta["kernel_sources"]}
    old = any(part in meta["id"] for part in how["old_form"])
    done = run_session(home / "notebook.ipynb", home / "tree", attached, image_python(home / "venv"), old_form=old)
    (home / "log.txt").write_text(done.stdout + done.stderr)
    shutil.copytree(home / "tree" / "working", home / "output", dirs_exist_ok=True)
    meta["session"] = ["RUNNING", "ERROR" if done.returncode else "COMPLETE"]


def status(args, step):
    path = HOME / "kernels" / args.kernel / "meta.json"
    if not path.is_file():
        raise ValueError(f"Cannot access kernel '{args.kernel}' (Permission 'kernels.get' was denied). The most likely cause "
                         "is a wrong kernel slug.")
    meta = json.loads(path.read_text())
    print(f'{args.kernel} has status "KernelWorkerStatus.{session_of(meta)}"')
    if session_of(meta) == "ERROR":
        print('Failure message: "Your notebook was stopped because it exceeded the max allowed execution duration."')
    meta["asked"] += 1
    path.write_text(json.dumps(meta))
    return 0


def output(args, step):
    home = HOME / "kernels" / args.kernel
    target = Path(args.path)
    for path in sorted((home / "output").rglob("*")):
        name = path.relative_to(home / "output").as_posix()
        if path.is_file() and re.search(args.file_pattern, name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)
            if step == "half":
                print("HTTPError: 403 Client Error: Forbidden for url: "
                      "https://storage.googleapis.com/x?X-Goog-Signature=0a1b2c3d", file=sys.stderr)
                return 1
    shutil.copy(home / "log.txt", target / f"{args.kernel.split('/')[1]}.log")
    return 0


def dataset_meta(name):
    return HOME / "datasets" / name / "meta.json"


def create(args, step):
    meta = json.loads((Path(args.path) / "dataset-metadata.json").read_text())
    for field in ("title", "slug"):
        text = meta["title"] if field == "title" else meta["id"].split("/")[1]
        if not 6 <= len(text) <= 50:
            raise ValueError(f"The dataset {field} must be between 6 and 50 characters")
    if len(meta["licenses"]) != 1:
        raise ValueError("Please specify exactly one license")
    slug = meta["id"].split("/")[1]
    if dataset_meta(meta["id"]).is_file():
        print(f'Dataset creation error: The requested slug "{slug}" is already in use by a dataset. Please choose another '
              "slug.")
        return 0
    upload(Path(args.path), meta)
    print(f"Your private Dataset is being created. Please check progress at https://www.kaggle.com/datasets/{meta['id']}")
    return 0


def version(args, step):
    meta = json.loads((Path(args.path) / "dataset-metadata.json").read_text())
    upload(Path(args.path), meta)
    print(f"Dataset version is being created. Please check progress at https://www.kaggle.com/datasets/{meta['id']}")
    return 0


def upload(folder, meta):
    home = HOME / "datasets" / meta["id"]
    before = json.loads((home / "meta.json").read_text())["version"] if (home / "meta.json").is_file() else 0
    shutil.rmtree(home / "files", ignore_errors=True)
    shutil.copytree(folder, home / "files", ignore=shutil.ignore_patterns("dataset-metadata.json"))
    (home / "meta.json").write_text(json.dumps({"version": before + 1, "asked": 0}))


def dataset_status(args, step):
    if not dataset_meta(args.dataset).is_file():
        raise ValueError(NOT_FOUND)
    meta = json.loads(dataset_meta(args.dataset).read_text())
    meta["asked"] += 1
    dataset_meta(args.dataset).write_text(json.dumps(meta))
    now = "ready" if meta["asked"] > 1 else "blobs_received"
    print(json.dumps({"status": now, "current_version_number": meta["version"]}), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
