"""What the data sheets of accelerators say."""

PEAK_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L4": 121e12,
}
"""Dense bf16 matrix products a second, by a part of the device's name; the first that fits counts. NVIDIA's data
sheets, without sparsity."""
