"""How a QEMU guest comes to be behind a virtual IOMMU."""

from __future__ import annotations

from typing import Any, Final

# Without the split the emulated interrupt controller does not know of remapped interrupts.
MACHINE: Final[dict[str, Any]] = {
    "machine": "q35,kernel-irqchip=split",
    "more": ["-device", "intel-iommu,intremap=on,device-iotlb=on"],
}
BEHIND: Final[dict[str, str | int]] = {"iommu_platform": "on", "ats": "on", "disable-legacy": "on"}
# On a busy machine an emulated timer may miss the moment in which Linux tries it; with remapped interrupts that is
# fatal.
_WORDS = "intel_iommu=on no_timer_check"
STRICT: Final = f"{_WORDS} iommu.strict=1"  # each unmapping is an INVALIDATE, and is waited for
LAZY: Final = f"{_WORDS} iommu.strict=0"  # they are gathered, and flushed together
