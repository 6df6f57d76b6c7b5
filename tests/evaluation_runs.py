"""Evaluations by several processes, for tests that compare them with one."""

import multiprocessing
import os
import socket
from pathlib import Path

from hydrahead.evaluation.evaluator import Settings, evaluate
from hydrahead.evaluation.models import Model


def run(environment: dict, folders: list[str], settings: dict, texts: dict, output: Path) -> None:
    """What a child process does."""
    os.environ.update(environment)
    models = [Model(Path(folder).name, folder, Path(folder).name, dtype="float32") for folder in folders]
    evaluate(models, Settings(**settings), texts, output, {"text_name": "library"})


def finish_evaluation(folders: list[str], settings: dict, texts: dict, output: Path, processes: int) -> None:
    """Evaluate on several processes that know each other, to the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hydrahead.tests.evaluation_runs"])
    running = []
    for rank in range(processes):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(context.Process(target=run, args=(environment, folders, settings, texts, output)))
        running[-1].start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes
