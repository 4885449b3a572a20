"""The bzImage reader: the Linux/x86 setup header (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

from pyvmm.spec import linux_boot as lb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.image import ImageFile


class BzImage:
    """A validated bzImage with a 64-bit entry.

    :ivar header: bytes 0x1f1 to the header's end, for the zero page.
    :ivar offset: of the protected-mode code in the file; it goes to ``address`` (guest-physical).
    :ivar init_size: bytes from ``address`` that the kernel needs before it knows the memory map.
    :ivar cmdline_max: characters without the NUL. :ivar initrd_max: highest address the initrd may
        use.
    """

    __slots__ = ("address", "cmdline_max", "header", "init_size", "initrd_max", "length", "offset")

    def __init__(self, image: ImageFile) -> None:
        """Read and check the header; nothing is loaded. Raises ImageError naming the field at
        fault.
        """
        # A boot sector shorter than this has no setup header at all.
        head = image.read(0, lb.HDR_END_2_12, "the setup header")

        def field(offset: int, size: int) -> int:
            return int.from_bytes(head[offset : offset + size], "little")

        if field(lb.HDR_BOOT_FLAG, 2) != lb.BOOT_FLAG:
            raise image.bad(
                f"has boot_flag {field(lb.HDR_BOOT_FLAG, 2):#x}, a bzImage has {lb.BOOT_FLAG:#x}"
            )
        version = field(lb.HDR_VERSION, 2)
        if version < lb.VERSION_2_12:
            raise image.bad(
                f"speaks boot protocol {version >> 8}.{version & 255:02}, 2.12 is needed",
                "use Linux 3.8 or newer",
            )
        if not field(lb.HDR_LOADFLAGS, 1) & lb.LOADED_HIGH:
            raise image.bad("is a zImage (LOADED_HIGH is not set in loadflags)", "build a bzImage")
        if not field(lb.HDR_XLOADFLAGS, 2) & lb.XLF_KERNEL_64:
            raise image.bad(
                "has no 64-bit entry (XLF_KERNEL_64 is not set in xloadflags)",
                "use an x86-64 kernel",
            )
        end = lb.HDR_MAGIC + head[lb.HDR_JUMP + 1]
        if not lb.HDR_END_2_12 <= end <= lb.HDR_END_MAX:
            raise image.bad(
                f"setup header ends at {end:#x}, not in {lb.HDR_END_2_12:#x}..{lb.HDR_END_MAX:#x}"
            )
        self.header = image.read(lb.HDR_SETUP_SECTS, end - lb.HDR_SETUP_SECTS, "the setup header")
        self.offset = ((field(lb.HDR_SETUP_SECTS, 1) or 4) + 1) * lb.SECTOR
        self.length = image.size - self.offset
        # syssize counts 16-byte units, so the last one may be cut; what follows (a signature) is
        # harmless.
        syssize = field(lb.HDR_SYSSIZE, 4) * 16
        if self.length < max(syssize - 15, lb.ENTRY_64 + 1):
            raise image.truncated("the kernel code (setup_sects, syssize)", self.offset + syssize)
        self.address = field(lb.HDR_PREF_ADDRESS, 8)
        self.init_size = field(lb.HDR_INIT_SIZE, 4)
        alignment = field(lb.HDR_KERNEL_ALIGNMENT, 4)
        if not alignment or alignment & (alignment - 1) or self.address % alignment:
            raise image.bad(
                f"pref_address {self.address:#x} is not aligned to kernel_alignment {alignment:#x}"
            )
        if self.init_size < self.length:
            # The signature alone may make it so in a kernel that is not compressed.
            if self.init_size < syssize:
                raise image.bad(
                    f"init_size {self.init_size:#x} is less than its code, {syssize:#x} bytes"
                )
            self.length = syssize
        self.cmdline_max = field(lb.HDR_CMDLINE_SIZE, 4)
        self.initrd_max = field(lb.HDR_INITRD_ADDR_MAX, 4)
