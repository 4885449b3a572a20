/* SPDX-License-Identifier: MIT */
#include "filter.h"

/* A load of 1, 2 or 4 bytes, or of the length of an IP header. */
static bool check_load(const struct sock_filter *f)
{
	bool x = BPF_CLASS(f->code) == BPF_LDX;

	switch (f->code & ~(uint16_t)BPF_CLASS(f->code)) {
	case BPF_W | BPF_ABS:
	case BPF_H | BPF_ABS:
	case BPF_B | BPF_ABS:
	case BPF_W | BPF_IND:
	case BPF_H | BPF_IND:
	case BPF_B | BPF_IND:
		return !x;
	case BPF_B | BPF_MSH:
		return x;
	case BPF_W | BPF_IMM:
	case BPF_W | BPF_LEN:
		return true;
	case BPF_W | BPF_MEM:
		return f->k < BPF_MEMWORDS;
	}
	return false;
}

static bool check_alu(const struct sock_filter *f)
{
	switch (BPF_OP(f->code)) {
	case BPF_NEG:
		return BPF_SRC(f->code) == BPF_K;
	case BPF_DIV:
	case BPF_MOD:
		return BPF_SRC(f->code) == BPF_X || f->k;
	}
	return BPF_OP(f->code) <= BPF_XOR;
}

/* A jump of this instruction, with left instructions behind it. */
static bool check_jump(const struct sock_filter *f, uint32_t left)
{
	switch (BPF_OP(f->code)) {
	case BPF_JA:
		return f->code == (BPF_JMP | BPF_JA) && f->k < left;
	case BPF_JEQ:
	case BPF_JGT:
	case BPF_JGE:
	case BPF_JSET:
		return f->jt < left && f->jf < left;
	}
	return false;
}

static bool check_one(const struct sock_filter *f, uint32_t left)
{
	if (f->code & ~0xffu)
		return false;
	switch (BPF_CLASS(f->code)) {
	case BPF_LD:
	case BPF_LDX:
		return check_load(f);
	case BPF_ST:
	case BPF_STX:
		return f->code == BPF_CLASS(f->code) && f->k < BPF_MEMWORDS;
	case BPF_ALU:
		return check_alu(f);
	case BPF_JMP:
		return check_jump(f, left);
	case BPF_RET:
		return f->code == (BPF_RET | BPF_K) || f->code == (BPF_RET | BPF_A);
	}
	return f->code == (BPF_MISC | BPF_TAX) || f->code == (BPF_MISC | BPF_TXA);
}

/**
 * pv_filter_check() - Whether instructions may be given to pv_filter_run()
 * @code:	Instructions, struct sock_filter each; of anybody
 * @count:	How many
 */
bool pv_filter_check(const void *code, uint32_t count)
{
	const struct sock_filter *f = code;

	if (!count || count > PV_FILTER_MAX || BPF_CLASS(f[count - 1].code) != BPF_RET)
		return false;
	for (uint32_t i = 0; i < count; i++)
		if (!check_one(&f[i], count - 1 - i))
			return false;
	return true;
}

struct frame {
	const struct iovec *iov;
	size_t skip;
	size_t len;
};

/* Load size bytes, in the network's order. False if they are not all in the frame. */
static bool load(const struct frame *p, uint64_t at, uint32_t size, uint32_t *value)
{
	uint8_t byte[4];

	if (at > p->len || size > p->len - at)
		return false;
	pv_segments_load(p->iov, p->skip + at, byte, size);
	*value = 0;
	for (uint32_t i = 0; i < size; i++)
		*value = *value << 8 | byte[i];
	return true;
}

static uint32_t alu(uint32_t op, uint32_t a, uint32_t b)
{
	switch (op) {
	case BPF_ADD:
		return a + b;
	case BPF_SUB:
		return a - b;
	case BPF_MUL:
		return a * b;
	case BPF_DIV:
		return b ? a / b : 0;
	case BPF_MOD:
		return b ? a % b : 0;
	case BPF_OR:
		return a | b;
	case BPF_AND:
		return a & b;
	case BPF_XOR:
		return a ^ b;
	case BPF_LSH:
		return b < 32 ? a << b : 0;
	case BPF_RSH:
		return b < 32 ? a >> b : 0;
	}
	return -a; /* BPF_NEG */
}

static bool jumps(uint32_t op, uint32_t a, uint32_t b)
{
	switch (op) {
	case BPF_JEQ:
		return a == b;
	case BPF_JGT:
		return a > b;
	case BPF_JGE:
		return a >= b;
	}
	return a & b; /* BPF_JSET */
}

/**
 * pv_filter_run() - How many bytes of a frame a filter wants
 * @code:	Instructions that pv_filter_check() has accepted
 * @iov:	Segments in which the frame lies, of @skip + @len bytes at least
 * @skip:	Bytes before the frame
 * @len:	Bytes of the frame
 *
 * Division by zero, and a load beyond the frame's end, mean 0, as in the kernel.
 *
 * Return: the most bytes to keep; 0: the frame is not wanted
 */
uint32_t pv_filter_run(const struct sock_filter *code, const struct iovec *iov, size_t skip,
		       size_t len)
{
	const struct frame frame = {.iov = iov, .skip = skip, .len = len};
	uint32_t a = 0, x = 0, mem[BPF_MEMWORDS] = {0}, value = 0;

	for (const struct sock_filter *f = code;; f++) {
		uint32_t size = BPF_SIZE(f->code) == BPF_W ? 4 : BPF_SIZE(f->code) == BPF_H ? 2 : 1;
		uint32_t b = BPF_SRC(f->code) == BPF_X ? x : f->k;

		switch (BPF_CLASS(f->code)) {
		case BPF_LD:
		case BPF_LDX:
			value = f->k; /* BPF_IMM */
			if (BPF_MODE(f->code) == BPF_LEN)
				value = (uint32_t)len;
			else if (BPF_MODE(f->code) == BPF_MEM)
				value = mem[f->k];
			else if ((BPF_MODE(f->code) == BPF_ABS &&
				  !load(&frame, f->k, size, &value)) ||
				 (BPF_MODE(f->code) == BPF_IND &&
				  !load(&frame, (uint64_t)x + f->k, size, &value)) ||
				 (BPF_MODE(f->code) == BPF_MSH && !load(&frame, f->k, 1, &value)))
				return 0;
			if (BPF_MODE(f->code) == BPF_MSH)
				value = (value & 0xf) << 2;
			*(BPF_CLASS(f->code) == BPF_LD ? &a : &x) = value;
			break;
		case BPF_ST:
			mem[f->k] = a;
			break;
		case BPF_STX:
			mem[f->k] = x;
			break;
		case BPF_ALU:
			if (!b && (BPF_OP(f->code) == BPF_DIV || BPF_OP(f->code) == BPF_MOD))
				return 0;
			a = alu(BPF_OP(f->code), a, b);
			break;
		case BPF_JMP:
			if (BPF_OP(f->code) == BPF_JA)
				f += f->k;
			else
				f += jumps(BPF_OP(f->code), a, b) ? f->jt : f->jf;
			break;
		case BPF_RET:
			return BPF_RVAL(f->code) == BPF_A ? a : f->k;
		default:
			if (BPF_MISCOP(f->code) == BPF_TAX)
				x = a;
			else
				a = x;
		}
	}
}

/**
 * pv_filter_match() - Run a filter over a frame in one piece
 * @code:	Instructions that pv_filter_check() has accepted
 * @count:	How many
 * @frame:	The frame
 * @len:	Its bytes
 *
 * Return: as pv_filter_run(); 0 also for instructions that are not accepted
 */
uint32_t pv_filter_match(const void *code, uint32_t count, const uint8_t *frame, size_t len)
{
	const struct iovec iov = {.iov_base = (void *)(uintptr_t)frame, .iov_len = len};

	return pv_filter_check(code, count) ? pv_filter_run(code, &iov, 0, len) : 0;
}
