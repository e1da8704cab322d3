"""The files for clusters: their syntax, and that they call senet as it is."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from senet.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def test_slurm_script_parses() -> None:
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-n", str(DEPLOY / "slurm.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_slurm_script_requeues_a_failed_run(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: what srun is given, and what follows a failure."""
    for name, body in {
        "srun": 'printf "%s\\n" "$@" > "$SEEN"; exit 143',
        "scontrol": 'if [ "$1" = requeue ]; then echo "$@" >> "$SEEN"; else echo node1; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SEEN": str(tmp_path / "seen"),
        "OUT": str(tmp_path / "run"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    script = ["bash", str(DEPLOY / "slurm.sh"), "--model", "se_resnet50"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert "--rdzv-endpoint=node1:29500" in seen
    assert seen[-3:] == ["--model", "se_resnet50", "requeue 7"]
    known_flags([word for word in seen[seen.index("senet") + 1 :] if word.startswith("--")])
    done = subprocess.run(script, env=environment | {"SLURM_RESTART_COUNT": "20"}, check=False)
    assert "requeue 7" not in (tmp_path / "seen").read_text()


def known_flags(flags: list[str]) -> None:
    known = {name for argument in app["train"].assemble_argument_collection()
             for name in argument.names}  # fmt: skip
    for flag in flags:
        assert flag.split("=")[0] in known, flag


def containers(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, dict):
        return node.get("containers", []) + [c for v in node.values() for c in containers(v)]
    if isinstance(node, list):
        return [c for item in node for c in containers(item)]
    return []


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-jobset.yaml"])
def test_kubernetes_files(name: str) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / name).read_text()))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= d.keys() for d in documents)
    job = documents[-1]
    assert job["kind"] in ("Job", "JobSet")
    (container,) = containers(job)
    command = container["command"]
    assert command[0] == "torchrun"
    assert command[command.index("-m") :][:3] == ["-m", "senet", "train"]
    known_flags(command[command.index("train") + 1 :])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    volumes = re.findall(r"- name: (\w+).*\n\s+(?:persistentVolumeClaim|emptyDir)",
                         (DEPLOY / name).read_text())  # fmt: skip
    assert mounted == set(volumes)


def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling_model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scaling_model() -> None:
    """By hand: 1 GB over 2 GPUs at 1 GB/s sends 1 GB; half of a 1 s step hides 0.5 s of it."""
    step = model().step_seconds
    facts = {"parameters": 250e6, "step": 1.0, "bandwidth": 1e9, "latency": 0.0}
    assert step(1, overlap=0.5, **facts) == 1.0
    assert step(2, overlap=0.5, **facts) == pytest.approx(1.5)
    assert step(1024, overlap=0.0, **facts) == pytest.approx(1 + 2 * 1023 / 1024)
    assert step(2, overlap=1.0, **facts) == pytest.approx(1 + 25 * 2**20 / 1e9)  # the last bucket
