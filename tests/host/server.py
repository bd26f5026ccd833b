"""A real ComfyUI server on CPU, for tests.

$COMFYUI_PATH (default ~/comfy/ComfyUI) is ComfyUI's folder, $COMFYUI_PYTHON (default
~/comfy/venv/bin/python) the Python of an environment with its requirements. Without them
HOST_FOUND is false and every test in this folder is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH") or "~/comfy/ComfyUI").expanduser()
PYTHON = Path(os.environ.get("COMFYUI_PYTHON") or "~/comfy/venv/bin/python").expanduser()
HOST_FOUND = (COMFYUI / "main.py").is_file() and PYTHON.is_file()
HOW_TO = (
    "ComfyUI not found, so every test in tests/host was SKIPPED: set COMFYUI_PATH to its folder "
    "and COMFYUI_PYTHON to a Python with its requirements "
    "(defaults: ~/comfy/ComfyUI and ~/comfy/venv/bin/python)"
)
MODEL_FOLDERS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "unet", "vae")
FLAGS = "--cpu --disable-api-nodes --disable-auto-launch --database-url sqlite:///:memory:"
START_TIMEOUT = 300.0
ANSI_COLOUR = re.compile(r"\x1b\[\d+m")


class Host:
    """A running ComfyUI server and the few calls that tests make to it."""

    def __init__(self, base_dir: Path, *packs: Path, flags: str = "") -> None:
        """Lay out a fresh base directory, with other node packs if asked; start() starts the server.

        flags: more of the command line's, beside `FLAGS`.
        """
        self.base_dir, self.flags = base_dir, [*FLAGS.split(), *flags.split()]
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file = base_dir / "server.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for folder in MODEL_FOLDERS:
            (base_dir / "models" / folder).mkdir(parents=True)
        (base_dir / "custom_nodes").mkdir()
        (base_dir / "custom_nodes" / "test_nodes").symlink_to(HERE / "test_nodes", True)
        if (REPO / "__init__.py").is_file():
            (base_dir / "custom_nodes" / "turbo-distill").symlink_to(REPO, True)
        for pack in packs:
            (base_dir / "custom_nodes" / pack.name).symlink_to(pack, True)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [PYTHON, HERE / "launch.py", *self.flags, "--listen", "127.0.0.1"]
        command += ["--port", str(self.port), "--base-directory", self.base_dir]
        settings = {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | settings,
                cwd=self.base_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        end = time.monotonic() + START_TIMEOUT
        while not self.answers():
            self.check_alive()
            assert time.monotonic() < end, f"no answer in {START_TIMEOUT} s\n{self.log()}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server: ask, then kill."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answers(self) -> bool:
        """Whether the server takes requests yet."""
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def check_alive(self) -> None:
        """Fail, with the end of its log, if the server has died."""
        alive = self.process is not None and self.process.poll() is None
        assert alive, f"the server has ended\n{self.log()[-4000:]}"

    def log(self) -> str:
        """What the server has printed so far, without colours."""
        return ANSI_COLOUR.sub("", self.log_file.read_text("utf-8", "replace"))

    def get(self, path: str) -> Any:
        """Answer to a GET: decoded JSON, or bytes when it is something else."""
        return self._request(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any = None) -> Any:
        """Answer to a POST of JSON, decoded as in get."""
        data = json.dumps({} if body is None else body).encode()
        headers = {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, data, headers))

    def _request(self, request: urllib.request.Request) -> Any:
        """Send a request; an HTTP error becomes an AssertionError with the server's text."""
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                data = answer.read()
                is_json = answer.headers.get_content_type() == "application/json"
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            where = f"{request.get_method()} {request.selector}"
            raise AssertionError(f"{where} -> HTTP {error.code}: {text}") from None
        return json.loads(data) if is_json else data

    def object_info(self) -> dict[str, Any]:
        """Every node class the server knows, with its inputs and outputs."""
        return self.get("/object_info")

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow in API format and return its id without waiting for it."""
        answer = self.post("/prompt", {"prompt": prompt})
        errors = answer["node_errors"]
        assert not errors, f"invalid nodes: {json.dumps(errors, indent=1)}"
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 60.0) -> dict[str, Any]:
        """History entry of a queued workflow once it has ended, well or not."""
        end = time.monotonic() + timeout
        while True:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            self.check_alive()
            if time.monotonic() > end:
                self.post("/interrupt")
                raise AssertionError(f"not done in {timeout} s\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def run(self, prompt: dict[str, Any], timeout: float = 60.0) -> dict[str, Any]:
        """Run a workflow in API format to its end; fail with the node's error text."""
        entry = self.wait(self.queue(prompt), timeout)
        assert entry["status"]["status_str"] == "success", failure_text(entry)
        return entry

    def forget(self) -> None:
        """Make the server drop its cache of results and its models.

        It does so after the prompt that it works on, so one without any use is run first: a prompt that is queued at
        once may come before.
        """
        self.post("/free", {"unload_models": True, "free_memory": True})
        image = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
        self.run({"1": image, "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}})

    def add_model(self, folder: str, source_path: str | Path, name: str | None = None) -> str:
        """Copy a file into models/<folder> and return the name a loader node knows it by."""
        name = name or Path(source_path).name
        target = self.base_dir / "models" / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_path, target)
        return name


def run_probe(script: str, *arguments: Any) -> str:
    """What a probe_*.py of this folder prints; it runs in the host's Python, without a server."""
    environment = os.environ | {"COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, HERE / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def failure_text(entry: dict[str, Any]) -> str:
    """The error or interruption recorded in a history entry, readable in a test report."""
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            node = f"node {data['node_id']} ({data['node_type']})"
            error = f"{data['exception_type']}: {data['exception_message']}"
            return f"{node}: {error}\n{''.join(data['traceback'])}"
        if event == "execution_interrupted":
            return f"interrupted in node {data['node_id']} ({data['node_type']})"
    return json.dumps(entry["status"])


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
