# SPDX-License-Identifier: Apache-2.0
"""Two processes that wait for work and do it together, so that many checks share one start.

Processes find each other through a file, so that no port has to be free. Whatever hangs is killed:
a job that is not done by its deadline, or whose other process failed, ends both processes, and the
next job starts new ones.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Listener
from pathlib import Path

HERE = Path(__file__).parent
WORLD = 2
START_SECONDS = 180
JOB_SECONDS = 90
# After one process failed, how long the other may still take: it is most likely waiting for the
# first.
GRACE_SECONDS = 3


class JobError(Exception):
    """A job raised in a process, whose traceback this carries, or was not done in time."""


class Pool:
    """The processes, started on the first job."""

    def __init__(self):
        self.processes = []
        self.connections = []
        self.folder = None

    def start(self):
        self.folder = tempfile.TemporaryDirectory(prefix="peft-pool-")
        key = os.urandom(16)
        with Listener(authkey=key) as listener:
            listener._listener._socket.settimeout(START_SECONDS)
            log = Path(self.folder.name) / "log"
            for rank in range(WORLD):
                environment = {
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(WORLD),
                    "LOCAL_WORLD_SIZE": str(WORLD),
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "POOL": f"{listener.address}|{key.hex()}|{self.folder.name}/store",
                }
                with open(f"{log}{rank}", "wb") as output:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, HERE / "worker.py"],
                            env=environment,
                            stdout=output,
                            stderr=output,
                        )
                    )
            try:
                connections = [listener.accept() for _ in range(WORLD)]
            except TimeoutError:
                raise JobError(f"The processes did not start:\n{self.log()}") from None
        ranked = {connection.recv(): connection for connection in connections}
        self.connections = [ranked[rank] for rank in range(WORLD)]

    def run(self, job, *args, seconds=JOB_SECONDS, **kwargs):
        """What `jobs.<job>(*args, **kwargs)` returns in each process, in the order of their ranks."""
        if not self.processes:
            try:
                self.start()
            except BaseException:
                self.stop()
                raise
        try:
            message = pickle.dumps((job, args, kwargs))
            for connection in self.connections:
                connection.send_bytes(message)
            return self._results(job, time.monotonic() + seconds)
        except JobError:
            self.stop()
            raise
        except (OSError, EOFError):
            log, codes = self.log(), [process.poll() for process in self.processes]
            self.stop()
            raise JobError(f"A process ended during {job}:\n{log}\nExit codes: {codes}") from None

    def _results(self, job, deadline):
        results, failures = {}, {}
        while len(results) + len(failures) < WORLD:
            for rank, connection in enumerate(self.connections):
                if rank not in results and rank not in failures and connection.poll(0.02):
                    done, value = pickle.loads(connection.recv_bytes())
                    (results if done else failures)[rank] = value
                    if not done:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() > deadline:
                break
        if failures:
            raise JobError(
                "\n".join(f"--- process {rank} ---\n{text}" for rank, text in failures.items())
            )
        if len(results) < WORLD:
            raise JobError(
                f"{job} was not done in time by all processes, only by "
                f"{sorted(results)}:\n{self.log()}"
            )
        return [results[rank] for rank in range(WORLD)]

    def log(self):
        """The end of what the processes printed."""
        texts = [
            path.read_text(errors="replace")[-3000:]
            for path in sorted(Path(self.folder.name).glob("log*"))
        ]
        return "\n---\n".join(texts)

    def stop(self):
        """End the processes, at once."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.connections, self.folder = [], [], None
