"""Random and malformed settings for every trainer node, through a real ComfyUI server on the CPU.

    python tests/attack/settings.py --count 1000 --seed 0 --out DIR [--trainer LADD]

Half of the cases are plausible (any choice of the widgets, one or two steps on eight latents of the mini model), half
have one to three values that nobody should send: wrong types, links to nowhere, NaN, huge numbers, text that is no
Unicode. Each must end as a success, with a sentence of ours, or refused by the host's own validation; the server must
go on serving, and nothing may be written outside its output folder. The exit status is 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent / "host"), str(HERE.parents[1])]

from graphs import OWN, mini_dataset, node  # noqa: E402
from outcomes import Outcomes, listing  # noqa: E402
from server import REPO, Host  # noqa: E402

TRAINERS = ("LADD", "ADD", "Diffusion2GAN", "DMD2")
CHECK_EVERY = 25  # cases between two looks at whether the server still works
CASE_SECONDS = 300
NOT_OUTPUT = ("output", "temp", "user", "input", "__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache")
SMALL = {  # widgets whose plausible values are kept cheap
    "steps": [1, 1, 1, 2],
    "batch_size": [1, 2, 2, 2, 3, 4],
    "accumulation": [1, 1, 1, 2],
    "discriminator_updates": [1, 1, 1, 2],
    "target_steps": [1, 1, 2, 4],
    "vision_size": [0, 32, 48, 64, 7, 16],
    "rank": [0, 1, 2, 4, 64],
    "critic_rank": [1, 2, 4],
    "fake_score_rank": [0, 1, 4],
    "fake_score_updates": [1, 1, 2],
    "preview_every": [0, 50],
    "checkpoint_every": [1, 250],
    "lora_targets": ["", "", "attn", "to_q, to_k", "nothing_like_it"],
    "student_lr": [0.0, 1e-5, 1e-3, 1.0],
    "discriminator_lr": [0.0, 1e-4, 1e-2, 1.0],
}
SURROGATE, DEEP = "\ud800", [[[[[[[[["deep"]]]]]]]]]
HOSTILE: list[Any] = [
    *(float("nan"), float("inf"), float("-inf"), -1, 0, -0.0, 0.5, 1e308, 2**63, 2**64, 2**70, -(2**70), 10**400),
    *("", " ", "abc", "1", "NaN", "None", "1e999", "x" * 10000, "名" * 100, "e\u0301te\u0301", "\0", "a\nb", "%s%n{0}"),
    *(SURROGATE, f"run{SURROGATE}", "../../escape", "/tmp/escape", "con", "a/b", "a\\b", ".", "..", "-rf", "<b>x</b>"),
    *(None, True, False, [], {}, [1], [1, 2, 3], {"a": 1}, DEEP, ["nowhere", 0], ["train", 0]),
    *(
        ["mini", 0],
        ["mini", 1],
        ["mini", 99],
        ["mini", -1],
        ["mini", "0"],
        ["classes", 0],
        ["dataset", 0],
        [None, None],
    ),
]


def inputs_of(host: Host, name: str) -> dict[str, list]:
    """Name -> [type, options] of every input of the node, as the server tells them."""
    described = host.get(f"/object_info/TurboDistill{name}")[f"TurboDistill{name}"]["input"]
    return {**described["required"], **described.get("optional", {})}


def plausible(draw: random.Random, name: str, described: list) -> Any:
    """A value that a person could choose."""
    kind, options = described[0], described[1] if len(described) > 1 else {}
    choices = options.get("options") if kind == "COMBO" else kind if isinstance(kind, list) else None
    if name in SMALL:
        return draw.choice(SMALL[name])
    if choices:
        return draw.choice(choices)
    if kind == "BOOLEAN":
        return draw.random() < 0.5
    if kind == "INT":
        return draw.choice(
            [options["default"], options["min"], draw.randint(options["min"], min(options["max"], 2**31))]
        )
    if kind == "FLOAT":
        return draw.choice(
            [options["default"], options["min"], draw.uniform(options["min"], min(options["max"], 10.0))]
        )
    return None


def graph(draw: random.Random, trainer: str, inputs: dict[str, dict[str, list]], number: int) -> tuple[str, dict]:
    """(kind, workflow) of one case. inputs: of the trainer ("train") and of Training Settings ("settings")."""
    usual: dict[str, Any] = dict(model=["teacher", 0], dataset=["dataset", 0], target_steps=1, steps=1)
    usual |= dict(batch_size=2, rank=2, gradient_checkpointing=False, run_name=f"case {number}", **OWN[trainer])
    if draw.random() < 0.7:
        usual["settings"] = ["settings", 0]
    settings: dict[str, dict[str, Any]] = {"train": usual, "settings": {"preflight": False}}  # it costs the most
    for at, most in (("train", 6), ("settings", 2)):
        names = [n for n, (kind, *_) in inputs[at].items() if isinstance(kind, list) or kind in WIDGETS]
        names = [n for n in names if n not in ("run_name", "betas")]
        for name in draw.sample(names, draw.randint(0, most)):
            settings[at][name] = plausible(draw, name, inputs[at][name])
    kind = "plausible"
    if draw.random() < 0.5:
        kind = "malformed"
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            at = draw.choice(["train", "train", "train", "settings"])
            settings[at][draw.choice(list(inputs[at]))] = draw.choice(HOSTILE)
        if draw.random() < 0.1:
            usual.pop(draw.choice(list(usual)))
    nodes = {
        "settings": node("TurboDistillTrainingSettings", **settings["settings"]),
        "train": node(f"TurboDistill{trainer}Trainer", **usual),
        "out": node("PreviewAny", source=["train", 4]),
    }
    return kind, dataset() | nodes


WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def dataset() -> dict:
    """Eight latents of the mini model, with pairs; the server makes them once."""
    return mini_dataset("attack", count=8, steps=2, batch_size=8)


def queue(host: Host, workflow: dict) -> tuple[int, Any]:
    """HTTP status and answer; the JSON may hold NaN, numbers beyond 64 bits and half surrogates."""
    data = json.dumps({"prompt": workflow}).encode()
    request = urllib.request.Request(host.url + "/prompt", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def outcome_of(host: Host, workflow: dict) -> tuple[str, str]:
    """What became of a workflow, and what was said."""
    status, answer = queue(host, workflow)
    if status != 200:
        return ("refused by the host" if status == 400 else "server error"), str(answer)
    end = time.monotonic() + CASE_SECONDS
    while time.monotonic() < end:
        entry = host.get(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
        if entry is not None:
            result, said = judge(entry)
            refused = answer.get("node_errors")  # of outputs that were left out; the others ran
            return ("refused by the host", str(refused)) if refused and result == "success" else (result, said)
        host.check_alive()
        time.sleep(0.02)
    host.post("/interrupt")
    return "no answer", f"nothing in {CASE_SECONDS} s"


def judge(entry: dict) -> tuple[str, str]:
    """A history entry: a success, a sentence of ours, or the traceback of somebody else."""
    if entry["status"]["status_str"] == "success":
        return "success", ""
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            kind, text, trace = data["exception_type"], data["exception_message"], data["traceback"]
            ours = kind in ("ValueError", "FloatingPointError") and "turbo-distill" in trace[-1].split(", line")[0]
            whole = f"{data['node_type']}: {kind}: {text}\n{''.join(trace)}"
            return ("our sentence" if ours else f"raw {kind.rpartition('.')[2]}"), whole
    return "no answer", json.dumps(entry["status"])


def works(host: Host, number: int) -> bool:
    """Whether the server still trains."""
    settings = dict(
        model=["teacher", 0], dataset=["dataset", 0], run_name=f"works {number}", steps=1, batch_size=2, rank=2
    )
    trainer = node("TurboDistillLADDTrainer", **settings, target_steps=1, gradient_checkpointing=False)
    return (
        outcome_of(host, dataset() | {"train": trainer, "out": node("PreviewAny", source=["train", 4])})[0] == "success"
    )


def tidy(host: Host) -> None:
    """Remove what the cases left, so that thousands of them fit on a disk."""
    for folder in ("turbo_distill/runs", "loras"):
        shutil.rmtree(host.base_dir / "output" / folder, ignore_errors=True)
    for path in (host.base_dir / "temp").glob("*"):
        path.unlink()


def attack(host: Host, trainers: tuple[str, ...], count: int, seed: int, out: Path | None = None) -> Outcomes:
    """``count`` cases for each trainer."""
    outcomes, before = Outcomes("settings"), listing(host.base_dir, REPO, without=NOT_OUTPUT)
    assert works(host, -1), host.log()[-3000:]
    for trainer in trainers:
        draw, started = random.Random(f"{seed} {trainer}"), time.monotonic()
        inputs = {"train": inputs_of(host, f"{trainer}Trainer"), "settings": inputs_of(host, "TrainingSettings")}
        for number in range(count):
            kind, workflow = graph(draw, trainer, inputs, number)
            result, said = outcome_of(host, workflow)
            case = [workflow["train"]["inputs"], workflow["settings"]["inputs"]]
            outcomes.add(f"{trainer}, {kind}", result, case, said)
            if number % CHECK_EVERY == CHECK_EVERY - 1 or number == count - 1:
                outcomes.add("server", "success" if works(host, number) else "no longer works", [trainer, number])
                tidy(host)
                print(f"{trainer} {number + 1}: {outcomes.bad} bad, {time.monotonic() - started:.0f} s", flush=True)
                if out:
                    outcomes.save(out, seed=seed, count=count)
    after = listing(host.base_dir, REPO, without=NOT_OUTPUT)
    for path in sorted(after.keys() - before.keys() - {str(host.log_file)}):
        outcomes.add("files", "written outside output", path)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="cases for each trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for outcomes.json and table.md")
    parser.add_argument("--trainer", choices=TRAINERS, action="append")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="attack-"))
    host = Host(base)
    try:
        host.start()
        outcomes = attack(host, tuple(args.trainer or TRAINERS), args.count, args.seed, args.out)
    finally:
        host.stop()
        shutil.copyfile(host.log_file, args.out / "server.log") if args.out.is_dir() else None
        shutil.rmtree(base, ignore_errors=True)
    outcomes.save(args.out, seed=args.seed, count=args.count)
    print(outcomes.markdown())
    return 1 if outcomes.bad else 0


if __name__ == "__main__":
    sys.exit(main())
