"""On two processes the network that a function uses is one network."""

from support import run_script


def test_a_functions_network_is_synchronised(tmp_path):
    found = run_script("ddp_networks_fit.py", tmp_path)
    assert found["world_size"] == 2
    assert {"_networks.NET.0.weight", "_pyro_param_store.loc"} <= set(found["names"])
    first, second = found["start"]
    assert not any(a == b for a, b in zip(first, second, strict=True))
    # Each rank has rows and noise of its own: equal ends mean that the gradients were averaged.
    ends = found["end"]
    assert ends[0] == ends[1]
    assert not any(a == b for a, b in zip(ends[0], first, strict=True))
