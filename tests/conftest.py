"""One test text, four devices: see `--device`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

DEVICES = {
    "cpu": "eager PyTorch",
    "ttsem": "the GPU path, each launch's Triton IR executed on the CPU",
    "interpreter": "Triton's interpreter (needs TRITON_INTERPRET=1)",
    "cuda": "a real GPU",
}
LAUNCHES = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=list(DEVICES), default="cpu", help="; ".join(f"{k}: {v}" for k, v in DEVICES.items())
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    config.stash[LAUNCHES] = []
    if device == "interpreter":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise pytest.UsageError("--device interpreter: Triton reads TRITON_INTERPRET=1 when it is imported; set it")
        import interpreter_shim

        interpreter_shim.install()
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    if device in ("ttsem", "interpreter"):
        kept = [item for item in items if item.get_closest_marker("kernel")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    for item in items:
        if item.get_closest_marker("gpu") and device != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a real GPU: run with --device cuda where there is one"))


@pytest.fixture(scope="session", autouse=True)
def _launches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Under ttsem, the session in which every launch is executed by the semantics."""
    torch.set_num_threads(1)
    if request.config.getoption("--device") != "ttsem":
        yield
        return
    from fusenc.kernels.common import device as gpu
    from ttsem.sanitize import session

    # The general configurations: their blocks are small, so that small tensors have several; others have tests.
    gpu.architecture = lambda index: ""
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(session(90, "<pytest>"))
        yield
        counts = [state.launches, state.races_unchecked]
    if hasattr(request.config, "workeroutput"):
        request.config.workeroutput["ttsem"] = counts
    else:
        request.config.stash[LAUNCHES].append(counts)


def pytest_testnodedown(node: object, error: object) -> None:
    counts = getattr(node, "workeroutput", {}).get("ttsem")
    if counts:
        node.config.stash[LAUNCHES].append(counts)  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    counts = config.stash[LAUNCHES]
    if counts:
        launches, unchecked = (sum(column) for column in zip(*counts, strict=True))
        terminalreporter.write_line(  # type: ignore[attr-defined]
            f"ttsem: {launches} launches executed and checked for overruns; {unchecked} of them too large for the "
            "race check"
        )


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors of a kernel test live; under ttsem "cuda" is a pretence."""
    torch.manual_seed(0)
    return "cuda" if request.config.getoption("--device") in ("ttsem", "cuda") else "cpu"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """What `fusenc.kernels.last_backend` has to say after a kernel ran."""
    return {"cpu": "eager", "interpreter": "interpreter"}.get(request.config.getoption("--device"), "triton")
