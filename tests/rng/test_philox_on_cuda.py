"""Philox on CUDA draws what it draws on a CPU."""

import numpy as np
import pytest
import torch

from cmscale.rng import PhiloxKeys, philox

CPU = torch.device("cpu")
KEY = 0x7EDCBA9876543210


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_draws_what_a_cpu_draws() -> None:
    cuda, positions = torch.device("cuda"), torch.tensor([0, 3, 2**40, 2**62 + 7])
    assert philox._kernels_work(cuda)
    for key, purpose in ((5, 0), (2**63 - 1, 1), (KEY, 2000)):
        for shape in ((1,), (3, 7, 5), (3, 256, 256)):
            expected = philox.kept(key, positions, purpose, shape, rate=0.3)
            assert torch.equal(philox.kept(key, positions.to(cuda), purpose, shape, rate=0.3).cpu(), expected)
            normal = philox.normal(key, positions, purpose, shape)
            found = philox.normal(key, positions.to(cuda), purpose, shape).cpu()
            np.testing.assert_array_max_ulp(found.numpy(), normal.numpy(), maxulp=1)
            assert (found != normal).double().mean() < 1e-5
        assert torch.equal(
            philox.uniform(key, positions.to(cuda), purpose).cpu(), philox.uniform(key, positions, purpose)
        )
    words = philox.words_by_torch(KEY, positions, 0, range(300))
    assert torch.equal(philox.words_by_torch(KEY, positions.to(cuda), 0, range(300)).cpu(), words)
    keys = PhiloxKeys(KEY, (1, 2), cuda)
    assert torch.equal(keys.kept((9,), 0.5, layer=1).cpu(), PhiloxKeys(KEY, (1, 2), CPU).kept((9,), 0.5, layer=1))
