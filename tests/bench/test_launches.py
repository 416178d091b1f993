"""How many kernels a layer launches."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not recorded")
def test_a_layer_launches_seven_kernels_forward():
    from fusenc.bench.launches import layers

    counts = layers(0.0)
    ours = counts["fusenc"]
    assert ours.forward == {
        "addmm": 2, "attention_forward_kernel": 1, "add_norm_forward_kernel": 2, "linear_act_kernel": 2,
    }  # fmt: skip
    assert ours.backward.total() < counts["torch.nn, flash attention"].backward.total()
    assert ours.forward.total() < counts["torch.nn, flash attention"].forward.total()
    assert counts["torch.nn, plain attention"].forward["bmm"] == 2
    # With dropout a layer draws four keys more and launches nothing else.
    assert layers(0.1)["fusenc"].forward - ours.forward == {"randint": 4}
