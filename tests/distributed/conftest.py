"""The job that the tests of this folder run in several processes, and one process to compare with."""

from __future__ import annotations

import pytest
from processes import Job


@pytest.fixture(scope="module")
def job(tiny_llama, tmp_path_factory):
    """A folder with data and configuration; see `processes.Job`."""
    return Job(tmp_path_factory.mktemp("job"), tiny_llama)
