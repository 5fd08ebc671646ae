"""Jobs of several processes on this machine, as on several hosts."""

import os
import socket
import subprocess
import sys


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
