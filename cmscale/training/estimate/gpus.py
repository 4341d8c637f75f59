"""Lists GPUs: memory as PyTorch sees it, and the dense peak rates that their makers state."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU.

    Attributes:
        title: Its name in a table.
        gib: Memory that PyTorch reports, GiB.
        half: Dense TFLOP/s in bf16 or fp16 with fp32 accumulation.
        single: Dense TFLOP/s in fp32, with TF32 in convolutions where the card has it.
        has_bf16: Whether it computes in bf16.
    """

    title: str
    gib: float
    half: float
    single: float
    has_bf16: bool = True

    def peak(self, precision: str) -> float:
        """Dense TFLOP/s in a precision of the config."""
        return self.single if precision == "fp32" else self.half


GPUS = {
    "h200-141g": GPU("H200 141 GB", 139.8, 989, 495),
    "h100-80g": GPU("H100 SXM 80 GB", 79.1, 989, 495),
    "h100-pcie-80g": GPU("H100 PCIe 80 GB", 79.1, 756, 378),
    "a100-80g": GPU("A100 80 GB", 79.1, 312, 156),
    "a100-40g": GPU("A100 40 GB", 39.4, 312, 156),
    "l40s": GPU("L40S 48 GB", 44.4, 362, 183),
    "a6000-48g": GPU("RTX A6000 48 GB", 47.5, 155, 77),
    "rtx4090-24g": GPU("RTX 4090 24 GB", 23.5, 165, 83),
    "a10-24g": GPU("A10 24 GB", 22.0, 125, 62),
    "v100-32g": GPU("V100 32 GB", 31.7, 125, 15.7, has_bf16=False),
}
