"""The bzImage reader: the Linux/x86 setup header (Documentation/arch/x86/boot.rst)."""

from __future__ import annotations

from pyvmm.spec import linux_boot as lb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.image import ImageFile


class BzImage:
    """A validated bzImage with a 64-bit entry.

    :ivar header: the file's bytes from 0x1f1 to the end of the setup header, for the zero page.
    :ivar offset: the position in the file of the protected-mode code.
    :ivar length: the number of bytes of protected-mode code to load.
    :ivar address: the guest-physical address at which the code is loaded.
    :ivar init_size: the kernel uses so many bytes from ``address`` on before it reads the memory
        map.
    :ivar cmdline_max: the longest command line in characters, without the NUL.
    :ivar initrd_max: the highest address that the initrd may occupy.
    """

    __slots__ = ("address", "cmdline_max", "header", "init_size", "initrd_max", "length", "offset")

    def __init__(self, image: ImageFile) -> None:
        """Read and check the header; load nothing.

        :raises ImageError: it names the header field at fault.
        """
        # A file that ends earlier has no complete setup header.
        head = image.read(0, lb.HDR_END_2_12, "the setup header")

        def field(offset: int, size: int) -> int:
            return int.from_bytes(head[offset : offset + size], "little")

        if field(lb.HDR_BOOT_FLAG, 2) != lb.BOOT_FLAG:
            raise image.bad(
                f"has boot_flag {field(lb.HDR_BOOT_FLAG, 2):#x}, but a bzImage has"
                f" {lb.BOOT_FLAG:#x}"
            )
        version = field(lb.HDR_VERSION, 2)
        if version < lb.VERSION_2_12:
            raise image.bad(
                f"speaks boot protocol {version >> 8}.{version & 255:02}, but pyvmm needs 2.12",
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
                f"has a setup header that ends at {end:#x}, not in"
                f" {lb.HDR_END_2_12:#x}..{lb.HDR_END_MAX:#x}"
            )
        self.header = image.read(lb.HDR_SETUP_SECTS, end - lb.HDR_SETUP_SECTS, "the setup header")
        self.offset = ((field(lb.HDR_SETUP_SECTS, 1) or 4) + 1) * lb.SECTOR
        self.length = image.size - self.offset
        # syssize counts units of 16 bytes, so the file may lack up to 15 bytes of the last unit. A
        # signature may follow the code; it is harmless.
        syssize = field(lb.HDR_SYSSIZE, 4) * 16
        if self.length < max(syssize - 15, lb.ENTRY_64 + 1):
            raise image.truncated("the kernel code (setup_sects, syssize)", self.offset + syssize)
        self.address = field(lb.HDR_PREF_ADDRESS, 8)
        self.init_size = field(lb.HDR_INIT_SIZE, 4)
        alignment = field(lb.HDR_KERNEL_ALIGNMENT, 4)
        if not alignment or alignment & (alignment - 1) or self.address % alignment:
            raise image.bad(
                f"has pref_address {self.address:#x}, which is not aligned to kernel_alignment"
                f" {alignment:#x}"
            )
        if self.init_size < self.length:
            # If the kernel is not compressed, the signature alone may exceed init_size: load the
            # code without the signature then.
            if self.init_size < syssize:
                raise image.bad(
                    f"has init_size {self.init_size:#x}, which is less than its {syssize:#x} bytes"
                    " of code"
                )
            self.length = syssize
        self.cmdline_max = field(lb.HDR_CMDLINE_SIZE, 4)
        self.initrd_max = field(lb.HDR_INITRD_ADDR_MAX, 4)
