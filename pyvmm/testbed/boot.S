# SPDX-License-Identifier: MIT
# The boot sectors of L1's disk under Bochs, whose BIOS loads the first one.
#
# They load the rest of themselves, then the pieces of the disk that `pieces` names, each to its
# place in memory. They ask the BIOS for the memory map and enter the kernel by its PVH note
# (Documentation/arch/x86/boot.rst; xen/interface/hvm/start_info.h). disk.py fills in the tables
# from 0x800 on, at the offsets that it names.
	.code16
	.globl	_start
	.set	SECTORS, 16		# of this loader
	.set	BOUNCE, 0x10000		# where the BIOS puts what it reads, as it reaches 1 MiB only
	.set	AT_ONCE, 120		# sectors per read: they fit below the stack of the BIOS
	.set	MEMMAP, 0x6000		# the memory map: 24 bytes per entry

_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	ljmp	$0, $1f
1:	movb	%dl, drive
	movw	$rest, %si
	movb	$0x42, %ah		# extended read
	int	$0x13
	jnc	stage2

fail:	movw	$message, %si
1:	lodsb
	testb	%al, %al
	jz	2f
	movw	$0x3e8, %dx		# the third serial port, which is L1's console
	outb	%al, %dx
	jmp	1b
2:	hlt
	jmp	2b
message: .asciz	"L1: the BIOS cannot read the disk\n"

drive:	.byte	0
	.balign	4
rest:	.byte	16, 0			# disk address packet
	.word	SECTORS - 1, 0x7e00, 0
	.long	1, 0
gdt:	.quad	0, 0x00cf9b000000ffff, 0x00cf93000000ffff	# none, code, data: flat, 32 bits
gdtr:	.word	23
	.long	gdt
	.org	510
	.word	0xaa55

stage2:
	inb	$0x92, %al		# open the A20 gate; bit 0 would reset
	orb	$2, %al
	andb	$0xfe, %al
	outb	%al, $0x92
	# Give FS a limit of 4 GiB by a visit to protected mode. It stays in real mode.
	lgdtl	gdtr
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	jmp	1f
1:	movw	$16, %bx
	movw	%bx, %fs
	andb	$0xfe, %al
	movl	%eax, %cr0
	jmp	1f
1:	xorw	%bx, %bx
	movw	%bx, %fs

	movw	$pieces, %di
load:	movl	4(%di), %eax		# sectors left
	testl	%eax, %eax
	jz	loaded
	cmpl	$AT_ONCE, %eax
	jbe	1f
	movl	$AT_ONCE, %eax
1:	movw	%ax, count
	movl	(%di), %ebx
	movl	%ebx, sector
	addl	%eax, (%di)
	subl	%eax, 4(%di)
	pushl	%eax
	movb	drive, %dl
	movw	$packet, %si
	movb	$0x42, %ah
	pushw	%di
	sti				# the BIOS waits for the disk's interrupt
	int	$0x13
	cli
	popw	%di
	jc	fail
	popl	%ecx
	shll	$7, %ecx		# 128 long words per sector
	movl	$BOUNCE, %esi
	movl	8(%di), %edx
1:	movl	%fs:(%esi), %eax
	movl	%eax, %fs:(%edx)
	addl	$4, %esi
	addl	$4, %edx
	decl	%ecx
	jnz	1b
	movl	%edx, 8(%di)
	cmpl	$0, 4(%di)
	jnz	load
	addw	$12, %di
	jmp	load

loaded:	xorl	%ebx, %ebx
	movw	$MEMMAP, %di
1:	movl	$0, 20(%di)
	movl	$0xe820, %eax
	movl	$0x534d4150, %edx	# SMAP
	movl	$20, %ecx
	int	$0x15
	jc	2f
	incl	entries
	addw	$24, %di
	testl	%ebx, %ebx
	jnz	1b
2:	cli
	lgdtl	gdtr
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$8, $1f
	.code32
1:	movl	$16, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%eax, %fs
	movl	%eax, %gs
	movl	$start_info, %ebx
	movl	entry, %eax
	jmp	*%eax

	.balign	8
packet:	.byte	16, 0
count:	.word	0, 0, BOUNCE >> 4
sector:	.long	0, 0
	.balign	8
start_info:
	.long	0x336ec578, 1, 0, 1	# magic, version, flags, modules
	.long	module, 0, cmdline, 0, 0, 0, MEMMAP, 0
entries: .long	0, 0

	.org	0x800
module:	.quad	0, 0, 0, 0		# the initramfs: address, bytes
entry:	.long	0
	.org	0x840
pieces:	.fill	12 * 16, 1, 0		# first sector, sectors, address; 0 sectors end the list
	.org	0x900
cmdline: .fill	0x700, 1, 0
	.org	SECTORS * 512
