# SPDX-License-Identifier: Apache-2.0
"""One process of the pool: joins the process group, then does jobs as they come."""

import datetime
import faulthandler
import gc
import os
import pickle
import sys
import traceback
import warnings
from multiprocessing.connection import Client
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def main():
    faulthandler.enable()
    address, key, store = os.environ.pop("POOL").split("|")
    rank = int(os.environ["RANK"])
    connection = Client(address, authkey=bytes.fromhex(key))
    connection.send(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=60),
    )
    import jobs

    while True:
        try:
            name, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        # Trainers collect garbage, which takes as long as there are objects; those of libraries
        # stay.
        gc.freeze()
        try:
            answer = True, getattr(jobs, name)(*args, **kwargs)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    os._exit(0)  # destroying the group would wait for the other process


if __name__ == "__main__":
    main()
