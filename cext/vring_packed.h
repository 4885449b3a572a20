/* SPDX-License-Identifier: MIT */
/*
 * What the calls of vring.h do with a packed ring, for vring.c and the in-flight notes alone.
 * Whoever moves packets sees one kind of ring.
 */
#ifndef PV_VRING_PACKED_H
#define PV_VRING_PACKED_H

#include "vring.h"

/* Of a packed ring's position as it is seen from outside. */
#define PV_PACKED_INDEX 0x7fffu
#define PV_PACKED_WRAP	0x8000u

enum pv_fault pv_packed_init(struct pv_vring *vr, uint32_t base);
bool pv_packed_available(const struct pv_vring *vr);
bool pv_packed_take(struct pv_vring *vr, uint16_t slots);
void pv_packed_unpop(struct pv_vring *vr, uint32_t slots);
void pv_packed_push(struct pv_vring *vr, uint16_t id, uint16_t slots, uint32_t len);
void pv_packed_publish(struct pv_vring *vr);
bool pv_packed_flush(struct pv_vring *vr);
void pv_packed_mark_used(struct pv_vring *vr, uint32_t slots);
void pv_packed_notify(struct pv_vring *vr, bool on);
bool pv_packed_inside(const struct pv_vring *vr, uint16_t from, uint16_t *at);
uint16_t pv_packed_outside(const struct pv_vring *vr, uint16_t at);
uint16_t pv_packed_advance(const struct pv_vring *vr, uint16_t at, uint32_t slots);

#endif
