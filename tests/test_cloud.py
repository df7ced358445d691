"""The files of cloud/: each is read by the tool that it is for, as far as that goes without an account."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llm_jax.training.preemption import EXIT_STATUS
from scaling import parsing
from scaling.options import SweepOptions

CLOUD = Path(__file__).parents[1] / "cloud"


@pytest.mark.parametrize("name", ["sky-tpu.yaml", "sky-gpu.yaml"])
def test_skypilot_reads_its_files(name):
    """Its own parser, which refuses fields and values that it does not know; whether there are such chips it asks the cloud."""
    sky = pytest.importorskip("sky", reason="needs SkyPilot: make test-launchers")
    task = sky.Task.from_yaml(str(CLOUD / name))
    assert task.envs["EXPERIMENT"] == "experiments/quickstart.py"
    for resources in task.resources:
        assert resources.use_spot
        assert resources.job_recovery["recover_on_exit_codes"] == [EXIT_STATUS]
    if name == "sky-tpu.yaml":
        assert {str(one) for one in next(iter(task.resources)).accelerators} == {"tpu-v5litepod-8"}
    assert subprocess.run(["bash", "-n"], input=task.setup + task.run, text=True).returncode == 0


def test_ray_reads_its_file():
    """Its schema, the defaults that it fills in, and its rules for TPUs on Google Cloud: one host a node, the head none, chips as said."""
    pytest.importorskip("ray", reason="needs Ray: make test-launchers")
    import yaml
    from ray._private.accelerators import tpu
    from ray.autoscaler._private import util

    config = util.prepare_config(yaml.safe_load((CLOUD / "ray-tpu.yaml").read_text()))
    util.validate_config(config)
    node = config["available_node_types"]["tpu"]
    kind = node["node_config"]["acceleratorType"]
    assert tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_type(kind)
    assert node["resources"]["TPU"] == int(kind.split("-")[1]) / tpu.get_tpu_cores_per_chip(kind)
    assert node["resources"]["TPU"] <= tpu.get_num_tpu_visible_chips_per_host(kind)
    assert "machineType" in config["available_node_types"][config["head_node_type"]]["node_config"]


@pytest.mark.parametrize("status", [0, 2, EXIT_STATUS])
def test_slurm_puts_back_what_was_told_to_leave(tmp_path, status):
    """And nothing else: a sweep that is done or refused would go round for ever. Stand-ins say what they were asked."""
    for name, code in (("srun", status), ("scontrol", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "91"}
    command = ["bash", str(CLOUD / "slurm.sh"), "my exp.py", "run", "--train.seed", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == status
    said = ["srun llm-jax sweep my exp.py --run run --train.seed 1"]
    assert done.stdout.splitlines() == said + ["scontrol requeue 91"] * (status == EXIT_STATUS)


def test_every_sweep_that_is_told_of_parses():
    """The commands of the README and of the files, with their options as llm-jax takes them."""
    experiment = str(CLOUD.parent / "experiments" / "quickstart.py")
    lines = [line for path in CLOUD.iterdir() for line in re.split(r"[`\n]", path.read_text())]
    commands = [found[1] for line in lines if (found := re.search(r"llm-jax sweep (.*--run .*)", line))]
    assert len(commands) == 8
    for command in commands:
        words = [word for word in shlex.split(command) if word != "$@"]
        options = parsing.parse(SweepOptions, [experiment, *words[1:]], "sweep")
        assert words[0].lower().strip("$").removesuffix(".py") == "experiment"
        assert "run" in str(options.run).lower()
