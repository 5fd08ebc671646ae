"""Processes of their own: with one device, for a TPU, or several as on several hosts."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run_on_one_device(*arguments):
    """Runs `python *arguments` with one CPU device, and returns what it has printed."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "").strip()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_for_gpu(*arguments):
    """As `run_for_tpu`, for GPUs."""
    pytest.importorskip(
        "jax_cuda12_plugin", reason="no compiler for GPUs: pip install 'jax[cuda12]'"
    )
    return run_on_one_device(*arguments)


def run_for_tpu(*arguments):
    """Runs `python *arguments`, which compiles for devices of `benchmarks.compiled.topology`.

    Several workers of pytest-xdist may do so at once: the topology sets what libtpu needs for that.
    Not in the worker itself, where libtpu would stay loaded, and devices are eight.
    """
    pytest.importorskip("libtpu", reason="no compiler for TPUs: pip install -e '.[tpu-compiler]'")
    return run_on_one_device(*arguments)


def run_job(script, *arguments, processes=2, devices=2, timeout=60):
    """Runs the script in each process as `script coordinator processes index *arguments`.

    Returns what each has printed. Should one fail or hang, all are ended, and the test fails with
    what they had to say.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    jobs = [
        subprocess.Popen(
            [sys.executable, script, coordinator, str(processes), str(index), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    try:
        printed = [job.communicate(timeout=timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (_, errors) in zip(jobs, printed, strict=True):
        assert job.returncode == 0, errors
    return [output for output, _ in printed]
