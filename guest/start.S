/* SPDX-License-Identifier: MIT */
/*
 * Start-up of the bare-metal guests: the way from any entry to main() in long mode, with the first
 * 4 GiB mapped, a stack and an interrupt table. The trampoline in which application processors
 * start is here, too.
 *
 * With MULTIBOOT there is a multiboot 1 header, whose flags are MULTIBOOT. The image then begins
 * with a jump to its 32-bit entry, so that it can be used as a flat binary, too.
 */
#include "guest.h"

	/* Xen's note that makes an ELF a PVH kernel: name "Xen", type 18, the 32-bit entry. */
	.section .note.Xen, "a", @note
	.align	4
	.long	4, 4, 18
	.asciz	"Xen"
	.long	start32

/* --- the boot CPU ----------------------------------------------------------------------------- */

#ifdef MULTIBOOT
	.section .first, "ax"
	.code32
	jmp	start32
	.align	4
multiboot_header:
	.long	MULTIBOOT_MAGIC, MULTIBOOT, -(MULTIBOOT_MAGIC + MULTIBOOT)
	/*
	 * These are used with flag 16 only: header, start, end of the part in the file, end of
	 * .bss, entry.
	 */
	.long	multiboot_header, image_start, image_data_end, image_end, start32
#endif

	/*
	 * PVH and multiboot enter in flat 32-bit mode without paging. ebx points to struct
	 * hvm_start_info or, if eax is the multiboot magic, to multiboot_info.
	 */
	.text
	.code32
	.globl	start32
start32:
	cld
	movl	$BOOT_PVH, boot_way
	cmpl	$MULTIBOOT_BOOTLOADER_MAGIC, %eax
	jne	1f
	movl	$BOOT_MULTIBOOT, boot_way
1:	movl	%ebx, boot_pointer
	movl	$1f, %edi
	/* Enter long mode at edi. Application processors use this as well. */
enter_long:
	lgdt	gdt_pointer
	movl	%cr4, %eax
	orl	$0x20, %eax /* PAE */
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx /* EFER */
	rdmsr
	orl	$0x100, %eax /* LME */
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000001, %eax /* PG, PE */
	movl	%eax, %cr0
	ljmp	$GUEST_CS, $2f
	.code64
2:	movl	$GUEST_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%edi, %edi
	jmp	*%rdi

	/*
	 * The 64-bit boot protocol enters in long mode with the loader's page tables. rsi points to
	 * struct boot_params.
	 */
	.globl	start64
start64:
	cld
	movl	$BOOT_ZERO_PAGE, boot_way(%rip)
	movl	%esi, boot_pointer(%rip)
	lgdt	gdt_pointer(%rip)
	movl	$pml4, %eax
	movq	%rax, %cr3
	movl	$GUEST_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
1:	movl	$boot_stack_top, %esp
	xorl	%ebp, %ebp
	call	guest_main
3:	hlt
	jmp	3b

/* --- application processors ------------------------------------------------------------------- */

	/* A copy of this at AP_TRAMPOLINE runs in real mode with cs = AP_TRAMPOLINE >> 4. */
	.section .rodata
	.code16
	.globl	ap_trampoline, ap_trampoline_end
ap_trampoline:
	cli
	cld
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	AP_TRAMPOLINE + (ap_gdt_pointer - ap_trampoline)
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$GUEST_CS32, $ap_start32
	.align	4
ap_gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt
ap_trampoline_end:

	.text
	.code32
ap_start32:
	movl	$GUEST_DS, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$ap_start64, %edi
	jmp	enter_long
	.code64
ap_start64:
	movl	ap_stack(%rip), %esp
	xorl	%ebp, %ebp
	call	ap_entry
4:	hlt
	jmp	4b

/* --- interrupts ------------------------------------------------------------------------------- */

	/*
	 * There is one stub per vector, of 16 bytes. It pushes an error code if the CPU does not,
	 * and then the vector.
	 */
	.align	16
	.globl	trap_stubs
trap_stubs:
	.set	vector, 0
	.rept	256
	.align	16
	.if	!(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
	pushq	$0
	.endif
	pushq	$vector
	jmp	trap_common
	.set	vector, vector + 1
	.endr

trap_common:
	pushq	%rax
	pushq	%rcx
	pushq	%rdx
	pushq	%rsi
	pushq	%rdi
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	movq	%rsp, %rdi
	cld
	call	trap
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rdi
	popq	%rsi
	popq	%rdx
	popq	%rcx
	popq	%rax
	addq	$16, %rsp
	iretq

/* --- tables ----------------------------------------------------------------------------------- */

	.data
	.align	16
gdt:
	.quad	0
	.quad	0x00cf9b000000ffff /* GUEST_CS32 */
	.quad	0x00af9b000000ffff /* GUEST_CS */
	.quad	0x00cf93000000ffff /* GUEST_DS */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt

	.globl	boot_way, boot_pointer
boot_way:
	.long	0
boot_pointer:
	.long	0

	/*
	 * The tables are static because filling them in would take long on hosts that emulate ring
	 * 0. Memory from 3 GiB up is not cached.
	 */
	.align	4096
pml4:
	.quad	pdpt + 3
	.fill	511, 8, 0
pdpt:
	.quad	directories + 3, directories + 0x1003, directories + 0x2003, directories + 0x3003
	.fill	508, 8, 0
directories:
	.set	page, 0
	.rept	2048
	.quad	page * 0x200000 + 0x83 + (page >= 1536) * -0x18
	.set	page, page + 1
	.endr

	.bss
	.align	16
boot_stack:
	.skip	16384
boot_stack_top:

	.section .note.GNU-stack, "", @progbits
