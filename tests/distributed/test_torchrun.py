"""Two nodes: torchrun is started twice, as on two machines, and they find each other through a port."""

from __future__ import annotations

import pytest
import torch
from processes import END_S, end, free_port

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.slow
def test_two_nodes_train_one_adapter_and_it_is_that_of_one_process(job):
    options = ["--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--data.batch_size", "2"]
    fit = ["fit", "-c", "job.yaml", *options, "--trainer.devices", "1", "--name", "nodes"]
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "0")
    meet = ("--rdzv_backend", "c10d", "--rdzv_id", "job", "--rdzv_endpoint", f"127.0.0.1:{free_port()}")
    nodes = [
        job.start([fit], f"node-{node}", launcher=(*launcher, *meet, "--local_addr", "127.0.0.1")) for node in (0, 1)
    ]
    try:
        codes = [node.wait(END_S) for node in nodes]
    finally:
        for node in nodes:
            end(node)
    printed = [(job.folder / f"node-{node}.log").read_text() for node in (0, 1)]
    assert codes == [0, 0], printed
    job.run([job.command("fit", 1, "--name", "alone")], "alone")
    first, second = (torch.load(job.folder / "runs" / "nodes" / f"weights-{rank}.pt") for rank in (0, 1))
    alone = torch.load(job.folder / "runs" / "alone" / "weights-0.pt")
    assert first.keys() == second.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert float((value - alone[name]).abs().max()) <= 1e-6, name
